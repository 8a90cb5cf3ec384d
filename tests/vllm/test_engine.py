"""Real engines of vLLM against transformers with the hooks of lineas, and what engines and requests are refused."""

import functools
import logging
from importlib.metadata import entry_points
from types import SimpleNamespace

import numpy as np
import pytest
import vllm_engines
from vllm_engines import generate, mixed_requests, start, tiny_llama, tiny_maps, with_hooks

import lineas
from lineas.export.vllm import plugin
from lineas.export.vllm.requests import read
from lineas.export.vllm.steering import Steering

exceptions = pytest.importorskip("vllm.exceptions", reason="make vllm has an environment with vLLM")


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def maps():
    return tiny_maps()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def files(maps, tmp_path_factory):
    return vllm_engines.save(maps, tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def engine(folder, files):
    return start(folder, files)


@pytest.fixture(scope="module")
def mixed(model, maps):
    """Requests, and the tokens and log-probabilities that hooks give."""
    return [(request, with_hooks(model, maps, *request)) for request in mixed_requests()]


def runner_of(engine):
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def check(given, expected):
    tokens, logprobs, _ = given
    assert tokens == expected[0]
    assert np.abs(np.subtract(logprobs, expected[1])).max() < 1e-4


def test_the_plugin_is_found_by_its_entry_point(engine):
    (found,) = (one for one in entry_points(group="vllm.general_plugins") if one.name == "lineas")
    assert found.load() is plugin.register
    assert isinstance(runner_of(engine).execute_model, functools.partial)


def test_a_mixed_batch_gives_what_hooks_give(engine, mixed):
    given = generate(engine, [request for request, _ in mixed])
    assert len({tuple(tokens) for tokens, _, _ in given}) > 32  # the requests do differ
    for one, (_, expected) in zip(given, mixed, strict=True):
        check(one, expected)


def test_each_request_alone_gives_the_same(engine, mixed):
    for request, expected in mixed:
        check(generate(engine, [request])[0], expected)


def test_maps_change_what_is_said(engine, mixed):
    steered = [request for request, _ in mixed if request[1] is not None]
    plain = generate(engine, [(ids, None) for ids, _ in steered])
    differ = [a[0] != b[0] for a, b in zip(generate(engine, steered), plain, strict=True)]
    assert np.mean(differ) > 0.8


def test_prefixes_are_shared_only_with_the_same_maps_and_strengths(engine, model, maps):
    ids = np.random.default_rng(5).integers(3, 128, 150).tolist()
    off, zero = None, {"lineas": {"maps": "norms", "strength": 0.0}}
    on, half = {"lineas": {"maps": "norms"}}, {"lineas_maps": "norms", "lineas_strength": 0.5}
    seen = set()
    for extra_args in (zero, on, off, half, on, zero, half):
        given = generate(engine, [(ids, extra_args)])[0]
        check(given, with_hooks(model, maps, ids, extra_args))
        key = str(read(extra_args, maps))
        assert given[2] == (128 if key in seen else 0)
        seen.add(key)


def test_chunks_preemptions_and_no_prefix_cache_change_nothing(folder, files, mixed, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, original = [], Scheduler._preempt_request

    def preempt(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return original(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    # Fewer tokens in a step than the longest prompts have, and fewer blocks than the requests need.
    small = start(
        folder,
        files,
        max_num_batched_tokens=48,
        max_num_seqs=16,
        num_gpu_blocks_override=17,
        enable_prefix_caching=False,
    )
    given = generate(small, [request for request, _ in mixed])
    for one, (_, expected) in zip(given, mixed, strict=True):
        check(one, expected)
    assert preempted


@pytest.mark.parametrize(
    ("extra_args", "message"),
    [
        ({"lineas": {"maps": "rude"}}, "no maps are called 'rude'; there are"),
        ({"lineas": {"maps": "norms", "strength": float("nan")}}, "strength of 'norms' must be finite, got nan"),
        ({"lineas": {"maps": {"norms": "much"}}}, "strength of 'norms' must be a real number, got str"),
        ({"lineas": [1]}, "lineas must be a mapping"),
    ],
)
def test_a_bad_request_is_refused_and_the_engine_goes_on(engine, mixed, extra_args, message):
    with pytest.raises(exceptions.VLLMValidationError, match=message):
        generate(engine, [mixed[0][0], ([3, 4, 5], extra_args)])
    few = mixed[:4]
    for given, (_, expected) in zip(generate(engine, [request for request, _ in few]), few, strict=True):
        check(given, expected)


def test_a_strength_that_overflows_harms_no_other_request(engine, mixed):
    few = mixed[:4]
    for _ in range(2):  # the second time in blocks of the cache that the first one has used
        given = generate(
            engine, [([3, 4, 5] * 30, {"lineas": {"maps": "norms", "strength": 1e300}}), *[r for r, _ in few]]
        )
        for one, (_, expected) in zip(given[1:], few, strict=True):
            check(one, expected)


def test_a_request_that_came_by_another_way_is_left_unsteered(maps, caplog):
    params = SimpleNamespace(extra_args={"lineas": {"maps": "rude"}})
    logger = plugin._logger()
    logger.addHandler(caplog.handler)  # vLLM's loggers hand nothing on
    try:
        assert plugin._strengths(SimpleNamespace(req_id="1", sampling_params=params), maps) == {}
    finally:
        logger.removeHandler(caplog.handler)
    assert "request 1 is left unsteered: lineas: no maps are called 'rude'" in caplog.text


def test_the_server_carries_flat_arguments():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    arguments = [
        {"lineas_maps": "norms", "lineas_strength": 0.5},
        {"lineas_maps": ["norms", "linear"], "lineas_strength": [0.5, 2]},
        {"lineas": '{"maps": {"norms": 0.5, "linear": 2}}'},
    ]
    for extra_args in arguments:
        chat = ChatCompletionRequest(messages=[{"role": "user", "content": "x"}], vllm_xargs=extra_args)
        text = CompletionRequest(prompt="x", vllm_xargs=extra_args)
        for request in (chat, text):
            carried = request.to_sampling_params(5, {}).extra_args
            assert read(carried, ("norms", "linear")) == read(extra_args, ("norms", "linear"))


def test_without_maps_nothing_is_replaced_in_the_worker(folder, mixed):
    plain = start(folder, {})
    assert not isinstance(runner_of(plain).execute_model, functools.partial)
    check(generate(plain, [mixed[0][0]])[0], mixed[0][1])
    with pytest.raises(exceptions.VLLMValidationError, match="this engine was started without maps"):
        generate(plain, [([3], {"lineas": {"maps": "norms"}})])


def one_map(name, d=vllm_engines.WIDTH):
    return lineas.SteeringMaps({name: lineas.AffineMap(np.full(d, 2.0), np.zeros(d))})


@pytest.mark.parametrize(
    ("name", "width", "parts", "message"),
    [
        ("model.layers.0.self_attn.q_proj", 64, 1, "q_proj as a part of qkv_proj"),
        ("model.layers.0.mlp.up_proj", 96, 1, "up_proj as a part of gate_up_proj"),
        ("model.layers.7.input_layernorm", 64, 1, "has no such module; similar names: .*input_layernorm"),
        ("model.layers.1.input_layernorm", 63, 1, "input_layernorm' gives 64 neurons, its map is for 63"),
        ("model.layers.1.mlp", 63, 1, "mlp' gives 64 neurons, its map is for 63"),
        ("model.embed_tokens", 64, 1, "embeddings and heads are not steered"),
        ("lm_head", 128, 1, "embeddings and heads are not steered"),
        ("model.layers.0.mlp.act_fn", 96, 1, "maps must be on norms, linear layers"),
        ("model.layers.0.mlp.gate_up_proj", 192, 2, "tensor_parallel_size=2 each process has a part"),
        ("model.layers.0.mlp", 64, 2, "with tensor_parallel_size=2 maps must be on norms"),
    ],
)
def test_maps_that_do_not_fit_are_refused_before_any_hook_is_put_on(engine, name, width, parts, message):
    from lineas.export.vllm.modules import put_on

    steering = Steering({"good": one_map("model.norm"), "bad": one_map(name, width)}, logging.getLogger("test"))
    with pytest.raises(ValueError, match=f"maps 'bad'.*{message}"):
        put_on(runner_of(engine).get_model(), steering, vllm_engines.WIDTH, parts)
    assert not steering.hooks


def test_an_engine_with_maps_that_do_not_fit_does_not_start(folder, tmp_path):
    files = vllm_engines.save({"bad": one_map("model.norm", 32)}, tmp_path)
    with pytest.raises(ValueError, match=r"maps 'bad' do not fit the model: module 'model\.norm' gives 64 neurons"):
        start(folder, files)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"enforce_eager": False}, "start vLLM with enforce_eager=True"), ({"enable_lora": True}, "LoRA adapters")],
)
def test_an_engine_that_would_not_apply_maps_does_not_start(folder, files, settings, message):
    with pytest.raises(ValueError, match=message):
        start(folder, files, **settings)


def test_an_engine_without_a_file_of_its_maps_does_not_start(folder, tmp_path):
    with pytest.raises(OSError, match="maps 'lost'"):
        start(folder, {"lost": str(tmp_path / "lost.safetensors")})


@pytest.mark.parametrize(
    ("version", "fits"), [("0.32.0", True), ("0.32.1+cpu", True), ("0.31.9", False), ("1.0", False)]
)
def test_other_versions_of_vllm_are_refused_where_there_are_maps(monkeypatch, caplog, version, fits):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    monkeypatch.setenv("LINEAS_VLLM_MAPS", "a=b")
    if fits:
        plugin.register()
        return
    with pytest.raises(RuntimeError, match=f"needs vllm>=0.32,<0.33, found {version}"):
        plugin.register()
    monkeypatch.delenv("LINEAS_VLLM_MAPS")
    plugin.register()


def test_a_missing_part_of_vllm_is_named(monkeypatch):
    monkeypatch.setitem(plugin.REPLACED, ("vllm.v1.engine.input_processor", "InputProcessor"), ("process_outputs",))
    monkeypatch.setenv("LINEAS_VLLM_MAPS", "a=b")
    with pytest.raises(RuntimeError, match=r"finds no vllm\.v1\..*\.InputProcessor\.process_outputs"):
        plugin.register()
