"""The plugin: what vLLM calls, and all that reaches into vLLM.

vLLM calls `register` in each of its processes. What is replaced there, and why:

============================================= ======================================================================
``InputProcessor.__init__``                   reads the maps before the engine starts, and refuses what cannot work
``InputProcessor.process_inputs``             checks what a request asks for; salts its blocks of the prefix cache
``WorkerWrapperBase.init_device``             puts the next ones on the model runner of a worker, where there are maps
``load_model`` of the runner                  puts the hooks on the model
``execute_model`` of the runner               notes new and finished requests; ends the batch
``_prepare_inputs``, ``prepare_inputs``       of vLLM's two runners: begins the batch, in the order of its rows
============================================= ======================================================================
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

from . import catalogue, requests
from .catalogue import Catalogue
from .steering import Steering

SUPPORTED = (0, 32), (0, 33)
"""The first version of vLLM whose insides these are, and the first one that was not looked at: as in pyproject.toml."""

# Modules, classes and methods that are replaced.
REPLACED = {
    ("vllm.v1.engine.input_processor", "InputProcessor"): ("__init__", "process_inputs"),
    ("vllm.v1.worker.worker_base", "WorkerWrapperBase"): ("init_device",),
}
_MARK = "_lineas_replaced"
_ATTRIBUTE = "_lineas_catalogue"


def register() -> None:
    """Make vLLM apply maps; the entry point ``vllm.general_plugins``. Called again, it does nothing.

    Raises
    ------
    RuntimeError
        If maps are named in the environment and this is a version of vLLM with other insides. Without maps that is a
        warning: lineas may be installed for other reasons.
    """
    try:
        _check_version()
        classes = {target: _class_with(*target, methods) for target, methods in REPLACED.items()}
    except RuntimeError as error:
        if catalogue.paths(None):
            raise
        _logger().warning("%s; requests with maps are not steered", error)
        return
    for (_, name), found in classes.items():
        if not hasattr(found, _MARK):
            setattr(found, _MARK, True)
            _REPLACEMENTS[name](found)


def _logger() -> logging.Logger:
    # A child of vLLM's logger, which has the handlers.
    return logging.getLogger("vllm.plugins.lineas")


def _check_version() -> None:
    import vllm

    first, last = (".".join(map(str, version)) for version in SUPPORTED)
    try:
        version = tuple(int(part) for part in vllm.__version__.split("+")[0].split(".")[:2])
    except ValueError:
        version = ()
    if not SUPPORTED[0] <= version < SUPPORTED[1]:
        raise RuntimeError(f"the vLLM plugin of lineas needs vllm>={first},<{last}, found {vllm.__version__}")


def _class_with(module: str, name: str, methods: tuple[str, ...]) -> Any:
    """A class of vLLM; RuntimeError where it, or one of the methods, is not there."""
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"the vLLM plugin of lineas finds no {module}.{name}: {error}") from error
    _check_has(found, f"{module}.{name}", methods)
    return found


def _check_has(owner: Any, label: str, methods: tuple[str, ...]) -> None:
    for method in methods:
        if not callable(getattr(owner, method, None)):
            raise RuntimeError(f"the vLLM plugin of lineas finds no {label}.{method}: this vLLM has other insides")


# ---- in the process that takes requests ------------------------------------------------------------------------------


def _replace_input_processor(cls: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    init, process = cls.__init__, cls.process_inputs

    @functools.wraps(init)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        setattr(self, _ATTRIBUTE, _catalogue_for(vllm_config))
        init(self, vllm_config, *args, **kwargs)

    @functools.wraps(process)
    def process_inputs(self: Any, request_id: Any, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        maps, extra_args = getattr(self, _ATTRIBUTE), getattr(params, "extra_args", None)
        try:
            strengths = requests.read(extra_args, maps)
        except (TypeError, ValueError) as error:
            # Of the kind that vLLM answers with an error for this request alone.
            raise VLLMValidationError(str(error), parameter="extra_args") from error
        request = process(self, request_id, prompt, params, *args, **kwargs)
        if extra_args is not None and request.sampling_params is not None:
            request.sampling_params.extra_args = requests.plain(extra_args, strengths) or None
        if strengths:
            request.cache_salt = maps.salt(strengths, request.cache_salt)
        return request

    cls.__init__, cls.process_inputs = __init__, process_inputs


def _catalogue_for(vllm_config: Any) -> Catalogue:
    """The maps that an engine is started with; ValueError where it would not apply them as it should."""
    maps = Catalogue(catalogue.paths(vllm_config.additional_config))
    if maps:
        _check_engine(vllm_config)
    return maps


def _check_engine(config: Any) -> None:
    parallel = config.parallel_config
    for wrong, why in (
        (
            not config.model_config.enforce_eager,
            "compiled graphs would not call the hooks that apply maps: start vLLM with enforce_eager=True "
            "(--enforce-eager)",
        ),
        (config.model_config.runner_type != "generate", "maps act in models that generate"),
        (config.model_config.is_encoder_decoder, "models with an encoder are not supported"),
        (config.speculative_config is not None, "speculative decoding is not supported"),
        (config.lora_config is not None, "LoRA adapters are not supported beside maps"),
        (config.cache_config.kv_sharing_fast_prefill, "kv_sharing_fast_prefill skips tokens in some layers"),
        (parallel.use_ubatching, "batches that are split (enable_dbo) are not supported"),
        (
            max(parallel.prefill_context_parallel_size, parallel.decode_context_parallel_size) > 1,
            "context parallelism is not supported",
        ),
    ):
        if wrong:
            raise ValueError(f"lineas: {why}")


# ---- in the processes that run the model -----------------------------------------------------------------------------


def _replace_worker_wrapper(cls: Any) -> None:
    init_device = cls.init_device

    @functools.wraps(init_device)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = init_device(self, *args, **kwargs)
        maps = _catalogue_for(self.vllm_config)
        if maps:
            _steer(self.worker.model_runner, maps, self.vllm_config)
        return result

    cls.init_device = wrapped


def _steer(runner: Any, maps: Catalogue, config: Any) -> None:
    """Let a model runner apply maps."""
    from .modules import put_on  # imports models of vLLM

    prepare = "prepare_inputs" if hasattr(runner, "prepare_inputs") else "_prepare_inputs"
    kind = type(runner)
    _check_has(runner, f"{kind.__module__}.{kind.__name__}", ("load_model", "get_model", "execute_model", prepare))
    steering = Steering(maps, _logger())

    def load_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        width, parts = config.model_config.get_hidden_size(), config.parallel_config.tensor_parallel_size
        put_on(runner.get_model(), steering, width, parts)
        _logger().info("lineas: maps %s on %d modules", ", ".join(map(repr, maps)), len(steering.hooks))
        return result

    def execute_model(original: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        for request in scheduled.finished_req_ids:
            steering.remove(request)
        for new in scheduled.scheduled_new_reqs:
            steering.add(new.req_id, _strengths(new, maps))
        try:
            return original(scheduled, *args, **kwargs)
        finally:
            steering.end()

    def prepare_of_first_runner(original: Callable[..., Any], scheduled: Any, counts: Any, *args: Any) -> Any:
        result = original(scheduled, counts, *args)
        steering.begin(runner.input_batch.req_ids[: len(counts)], counts, runner.device)
        return result

    def prepare_of_second_runner(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = original(*args, **kwargs)
        steering.begin(batch.req_ids, batch.num_scheduled_tokens, runner.device)
        return batch

    first = prepare == "_prepare_inputs"
    for name, replacement in (
        ("load_model", load_model),
        ("execute_model", execute_model),
        (prepare, prepare_of_first_runner if first else prepare_of_second_runner),
    ):
        setattr(runner, name, functools.partial(replacement, getattr(runner, name)))


def _strengths(new: Any, maps: Catalogue) -> requests.Strengths:
    """What a request asks for that `process_inputs` has let pass; one that came by another way may ask for anything."""
    try:
        return requests.read(getattr(new.sampling_params, "extra_args", None), maps)
    except (TypeError, ValueError) as error:
        _logger().error("request %s is left unsteered: %s", new.req_id, error)
        return {}


_REPLACEMENTS: dict[str, Callable[[Any], None]] = {
    "InputProcessor": _replace_input_processor,
    "WorkerWrapperBase": _replace_worker_wrapper,
}
