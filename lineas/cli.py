"""The command line ``lineas``: fit maps, evaluate and calibrate them, generate with them, run the demo.

Exit codes: 0 done, 2 wrong usage or bad input (one line on stderr says what), 130 ended by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lineas
from lineas import cli_fold, cli_torchrun
from lineas._checks import as_int, as_not_negative, as_share
from lineas._process import own_process
from lineas.fitting import settings
from lineas.hooks.settings import RunSettings
from lineas.maps.metadata import CALIBRATED, as_strength
from lineas.serving.command import add_serve_options, serve

if TYPE_CHECKING:
    from .fitting.result import FitResult

INTERRUPTED = 130
_MODEL: dict[str, Any] = {"metavar": "MODEL", "help": "folder or hub id of a transformers model"}
_MAPS: dict[str, Any] = {"metavar": "FILE", "help": "maps that `lineas fit` wrote: file, folder or hub id"}


def _rate(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, got {text!r}") from None


def _strength(text: str) -> float | str:
    try:
        return text if text == CALIBRATED else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or {CALIBRATED}, got {text!r}") from None


def _tokens(text: str) -> str | slice:
    if ":" not in text:
        return text
    try:
        return slice(*(int(part) if part else None for part in text.split(":")))
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected a word or start:stop:step, got {text!r}") from None


# Options of `fit` that set what the library calls so; the last ones are for end-to-end fits only.
_FOR_ALL: dict[str, dict[str, Any]] = {
    "layers": {"nargs": "+", "metavar": "GLOB", "help": "modules that get a map (default: as `lineas sites` suggests)"},
    "pooling": {"help": "mean, min, max, last or all, over the tokens"},
    "tokens": {
        "type": _tokens,
        "help": "tokens that the maps are for, here and when they generate: all, last (whose output a token is "
        "predicted from), prompt, generated (answers of conversations), or a slice of positions such as -3:",
    },
    "max_length": {"type": int, "help": "cut prompts to N tokens"},
    "batch_size": {"type": int, "help": "prompts in a forward pass (default: 32)"},
}
_END_TO_END: dict[str, dict[str, Any]] = {
    "loss_layers": {"nargs": "+", "metavar": "GLOB", "help": "modules at which the distance is taken"},
    "steps": {"type": int, "help": "steps"},
    "lr": {"type": _rate, "metavar": "RATE", "help": "learning rate; auto finds it from the loss"},
    "l1": {"type": float, "help": "lasso penalty"},
    "group": {"type": float, "help": "group lasso penalty of each module"},
    "init": {"help": "closed-form maps to start from: mean, gaussian, linear, iti-c, linear-incremental or best"},
    "scaling": {"help": "standardized, layer-mean, paper or reference"},
    "slopes": {"nargs": "*", "metavar": "GLOB", "help": "modules with slopes (default: all); none: shifts alone"},
    "shifts": {"nargs": "*", "metavar": "GLOB", "help": "modules with shifts (default: all); none: slopes alone"},
    "keep": {
        "type": Path,
        "metavar": "FILE",
        "help": "prompts on which the model is to stay as it is (default: the target, with --keep-weight or --max-kl)",
    },
    "keep_weight": {"type": float, "help": "weight of the divergence on them"},
    "keep_loss": {"help": "kl or activations"},
    "max_kl": {"type": float, "help": "budget of that divergence in nats, which finds the weight"},
    "optimizer": {"help": "sgd or adam"},
    "mini_batch": {"type": int, "help": "source prompts in a step (default: all)"},
    "patience": {"type": int, "help": "kept steps without a lower held-out loss that end the fit"},
    "strengths": {"type": float, "nargs": "+", "help": "strengths that held-out prompts choose of (default: 1)"},
    "checkpoint": {
        "type": Path,
        "help": "keep the fit in a file, written after every step; go on with it where it is there",
    },
    "seed": {"type": int, "help": "seed of the fit"},
    "held_out_fraction": {
        "type": float,
        "help": "keep this share of both files, from their ends, out of the fit and choose the best maps by it",
    },
}
# What checks the settings of a method, before the model is loaded.
_SETTINGS: dict[str, Any] = {"end-to-end": settings.FitSettings, "incremental": settings.IncrementalSettings}
_METAVARS: dict[Any, str] = {int: "N", float: "X", Path: "FILE"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments without the program's name. Default: those of the process.

    Returns
    -------
    int
        0 done, 2 bad input, 130 interrupted. Wrong usage raises SystemExit(2), SIGTERM SystemExit(143).
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse before Python 3.12.7 fills a "*" positional together with the one before it, that is, with nothing: the
    # prompts that stand behind an option are left over.
    if rest and ("prompt" not in args or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.prompt = [*args.prompt, *rest]
    try:
        with own_process(), cli_torchrun.joined(args):
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("lineas: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
        print(f"lineas: error: {_with_options(' '.join(str(error).split()), args)}", file=sys.stderr)
        return 2


def _with_options(message: str, args: argparse.Namespace) -> str:
    """A message of the library with an option in place of the argument that it begins with."""
    flags = {name: _flag(name) for name in vars(args) if name not in ("run", "model", "maps", "prompt", "prompts")}
    flags |= {"held_out": "--held-out-fraction", "judges": "--judge"}
    return re.sub(r"^\w+", lambda found: flags.get(found[0], found[0]), message)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lineas", description="Steer generative models with sparse affine maps.")
    parser.add_argument("--version", action="version", version=f"lineas {lineas.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        """A command that `run` carries out and describes."""
        made = commands.add_parser(name, help=help, description=run.__doc__)
        # As from Python 3.14 on: what begins like a number, such as -3: and -1e-3, is the value of an option.
        made._negative_number_matcher = re.compile(r"-\.?\d")
        made.set_defaults(run=run)
        return made

    fit = command("fit", _fit, "fit maps between two sets of prompts")
    _add_model(fit)
    fit.add_argument("--source", required=True, type=Path, metavar="FILE", help="prompts to move")
    fit.add_argument("--target", required=True, type=Path, metavar="FILE", help="prompts to move them to")
    fit.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="safetensors file to write")
    fit.add_argument(
        "--method",
        choices=("end-to-end", "incremental", "linear", "gaussian", "mean"),
        default="end-to-end",
        help="end-to-end: all maps together, by gradient steps; incremental: linear maps, each fitted with the "
        "earlier ones on; the others: each module by itself (default: %(default)s)",
    )
    _add_settings(fit, _FOR_ALL)
    _add_settings(fit.add_argument_group("end-to-end fits only"), _END_TO_END)

    generate = command("generate", _generate, "continue prompts with maps on")
    _add_model(generate)
    generate.add_argument("prompt", nargs="*", help="prompts to continue")
    generate.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="file of prompts, as for `lineas fit`; of conversations the next answer is printed, or the last anew",
    )
    generate.add_argument("--maps", required=True, **_MAPS)
    generate.add_argument(
        "--strength",
        type=_strength,
        action="append",
        metavar="X",
        help="0 is off, 1 the maps (default: 1), calibrated what `lineas calibrate` found; given several times, every "
        "prompt is continued at each",
    )
    generate.add_argument("--max-new-tokens", type=int, default=40, metavar="N", help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0 is greedy; default: 1")
    generate.add_argument("--top-p", type=float, default=0.9, metavar="X", help="default: %(default)s")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="the same for every prompt; default: 0")

    evaluate = command("evaluate", _evaluate, "measure what maps do and what they cost, by strength")
    _add_model(evaluate)
    evaluate.add_argument("--maps", required=True, nargs="+", **_MAPS)
    evaluate.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to continue, as for `lineas fit`")
    evaluate.add_argument("--neutral", type=Path, metavar="FILE", help="texts that maps should leave alone")
    evaluate.add_argument(
        "--judge",
        action="append",
        default=[],
        metavar="NAME",
        help="vader, or the folder or hub id of a text classifier; several times for several judges",
    )
    evaluate.add_argument(
        "--strengths", type=float, nargs="+", default=[0.5, 1.0, 2.0], metavar="X", help="default: 0.5 1 2"
    )
    evaluate.add_argument("--instruction", metavar="TEXT", help="a text before every prompt, to compare with")
    evaluate.add_argument(
        "--controls",
        nargs="+",
        default=[],
        metavar="NAME",
        help="random, mean, iti_c, aura, gaussian, linear, incremental",
    )
    evaluate.add_argument("--source", type=Path, metavar="FILE", help="prompts that controls are fitted to")
    evaluate.add_argument("--target", type=Path, metavar="FILE", help="prompts that controls are fitted to")
    _add_generation(evaluate)
    evaluate.add_argument("--checkpoint", type=Path, metavar="FILE", help="keep what is known; go on where it is there")
    evaluate.add_argument("--max-kl", type=float, metavar="X", help="name the best point within this KL divergence")
    evaluate.add_argument("--minimize", action="store_true", help="the smallest score is the best")
    evaluate.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the evaluation, for lineas.load")
    evaluate.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page")

    calibrate = command("calibrate", _calibrate, "find the strength for a budget or an effect")
    _add_model(calibrate)
    calibrate.add_argument("--maps", required=True, **_MAPS)
    calibrate.add_argument("--neutral", type=Path, metavar="FILE", help="texts that maps should leave alone")
    for name, what in (
        ("max_kl", "mean KL divergence of the next token, in nats"),
        ("max_loss_rise", "rise of the loss, in nats a token"),
        ("max_perplexity_ratio", "ratio of the perplexities, such as 1.1"),
        ("effect", "mean score that the judge is to give the continuations of --prompts"),
    ):
        calibrate.add_argument(_flag(name), type=float, metavar="X", help=what)
    calibrate.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to continue, for --effect")
    calibrate.add_argument("--judge", metavar="NAME", help="vader, or a text classifier, for --effect")
    calibrate.add_argument("--confidence", type=float, default=0.95, metavar="X", help="default: %(default)s")
    _add_generation(calibrate)
    calibrate.add_argument(
        "-o",
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="safetensors file to write: the maps, with the strength",
    )

    command("sites", _sites, "list the modules of a model that can carry maps").add_argument("model", **_MODEL)

    fold = command("fold", _fold, "write a model with maps in its weights")
    _add_model(fold, "folder or hub id of a transformers model, or a GGUF file of llama.cpp")
    cli_fold.add_fold_options(fold, maps=_MAPS, strength=_strength)

    server = command("serve", _serve, "serve a model with maps over HTTP, as OpenAI's API does")
    _add_model(server)
    add_serve_options(server, maps=_MAPS, strength=_strength)

    command("info", _info, "describe a file of maps").add_argument("maps", **_MAPS)

    demo = command("demo", _demo, "steer a small model and show the effect and its cost")
    demo.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--steps", type=int, default=12, metavar="N", help="steps of the fit (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    demo.add_argument("--quick", action="store_true", help="fewer sentences and samples: only shows that it works")
    return parser


def _add_settings(command: Any, options: dict[str, dict[str, Any]]) -> None:
    """Options for settings of a fit; what is not given is left to their class, whose default the help shows."""
    for name, option in options.items():
        default = getattr(settings.FitSettings, name, None)
        shown = "" if default is None or "default" in option["help"] else f" (default: {default})"
        named = {"metavar": _METAVARS.get(option.get("type"))} | option
        command.add_argument(_flag(name), **named | {"help": option["help"] + shown})


def _add_generation(command: argparse.ArgumentParser) -> None:
    command.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of a prompt; default: 1")
    command.add_argument("--max-new-tokens", type=int, default=20, metavar="N", help="default: %(default)s")
    command.add_argument("--max-length", type=int, metavar="N", help="cut prompts and texts to N tokens")
    command.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_model(command: argparse.ArgumentParser, help: str = _MODEL["help"]) -> None:
    command.add_argument("model", metavar="MODEL", help=help)
    command.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16", "auto"),
        default="float32",
        help="of the weights (default: %(default)s; auto: as they were saved)",
    )
    command.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    command.add_argument("--quiet", action="store_true", help="no progress bars")


def _fit(args: argparse.Namespace) -> int:
    """Fit maps that move a model from --source to --target: two text files of prompts, one a line, or JSON lines
    (.jsonl) of texts or of conversations, which are lists of messages or objects with one under "messages".
    """
    given = {name: getattr(args, name) for name in (*_FOR_ALL, *_END_TO_END) if getattr(args, name) is not None}
    only = [name for name in given if name in _END_TO_END]
    if only and args.method != "end-to-end":
        raise ValueError(f"{_flag(only[0])} is for --method end-to-end only, got --method {args.method}")
    for name in ("layers", "loss_layers"):  # a list may match what one glob must not
        if len(given.get(name, ())) == 1:
            given[name] = given[name][0]
    for name in ("slopes", "shifts"):
        if given.get(name) == []:
            given[name] = False
    fraction = given.pop("held_out_fraction", None)
    if fraction is None and given.get("strengths", [1]) != [1]:
        raise ValueError("--strengths: there are no prompts to choose among them by without --held-out-fraction")
    (source, held_source), (target, held_target) = (_read_sets(path, fraction) for path in (args.source, args.target))
    if fraction is not None:
        given["held_out"] = (held_source, held_target)
    if "keep" in given:
        given["keep"] = _read_sets(args.keep, None)[0]
    named = ("source", "target", "keep", "checkpoint", "output")
    _check_outputs(args, *named)
    for name in named[:-1]:
        path = getattr(args, name)
        if path is not None and path.resolve() == args.output.resolve():
            raise ValueError(f"--output: {path} is the file of {_flag(name)}, which the maps would replace")
    _SETTINGS.get(args.method, RunSettings)(**given)

    tokenizer, model = _load(args, "AutoTokenizer"), _load_model(args)
    given |= {"tokenizer": tokenizer, "progress": not args.quiet}
    code = 0
    if args.method == "end-to-end":
        result = lineas.fit_end_to_end(model, source, target, process_group=args.process_group, **given)
        maps, code = result.maps, INTERRUPTED if result.stopped == "interrupted" else 0
        _report(result)
    elif args.method == "incremental":
        maps = lineas.fit_incremental(model, source, target, **given)
    else:
        before, after = (lineas.collect(model, prompts, **given) for prompts in (source, target))
        maps = lineas.fit(before, after, method=args.method)
    if args.writes:
        maps.save(args.output)
    print(f"{maps!r}\nwritten to {args.output}")
    return code


def _report(result: FitResult) -> None:
    """Print what a fit reached."""
    loss, held_out = result.history["loss"], result.history["held_out_loss"]
    if loss.size:
        print(f"loss: {loss[0]:.4g} before the first step, {loss[-1]:.4g} before the last")
    if held_out.size:
        strength = f" (at strength {result.best_strength:g} of the fit)" if result.best_strength != 1 else ""
        kept = f"{result.held_out_loss:.4g} for the maps kept{strength}"
        print(f"held-out loss: {held_out[0]:.4g} before the first step, {kept}")
    if result.stopped != "finished":
        print(f"lineas: {result.stopped}; maps of step {result.best_step} kept", file=sys.stderr)


def _generate(args: argparse.Namespace) -> None:
    """Continue prompts with maps on, to stdout."""
    prompts = args.prompt + ([] if args.prompts is None else _read_prompts(args.prompts))
    if not prompts:
        raise ValueError("expected a prompt or --prompts FILE with at least one, got none")
    as_int(args.max_new_tokens, "max_new_tokens", low=1)
    random = {"temperature": as_not_negative(args.temperature, "temperature"), "top_p": as_share(args.top_p, "top_p")}
    how = {"do_sample": True, **random} if args.temperature else {"do_sample": False}
    maps = _load_maps(args.maps)
    strengths = [as_strength(strength, maps.metadata) for strength in args.strength or [1.0]]
    tokenizer = _load(args, "AutoTokenizer")
    from .inputs.prompts import read

    rows = read([_asked(prompt) for prompt in prompts], "prompts", tokenizer=tokenizer)
    model = _load_model(args)
    import torch

    with maps.attach(model) as handle, torch.inference_mode():
        for k, prompt in enumerate(prompts):
            # Prompt by prompt: no padding, so any tokenizer will do, and a text does not depend on its neighbours.
            batch = {name: x.to(model.device) for name, x in rows.take([k])[0].kwargs.items()}
            start = batch["input_ids"].shape[1] if isinstance(prompt[-1], dict) else 0  # of chats the answer alone
            for strength in strengths:
                handle.strength = strength
                torch.manual_seed(args.seed)
                tokens = model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=args.max_new_tokens,
                    pad_token_id=tokenizer.pad_token_id,
                    **how,
                )
                text = tokenizer.decode(tokens[0, start:], skip_special_tokens=True)
                print(text if len(strengths) == 1 else f"[{strength:g}] {text}", flush=True)


def _evaluate(args: argparse.Namespace) -> int:
    """Measure the effect of maps, the price on neutral texts and the quality of the continuations, by strength."""
    _check_outputs(args, "output", "report", "checkpoint")
    methods = dict(zip(_labels(args.maps), map(_load_maps, args.maps), strict=True))
    files = ("prompts", "neutral", "source", "target")
    data: dict[str, Any] = {name: _read_prompts(getattr(args, name)) for name in files}
    if data["prompts"] is not None:
        data["prompts"] = [_asked(prompt) for prompt in data["prompts"]]
    tokenizer, model = _load(args, "AutoTokenizer"), _load_model(args)
    found = lineas.evaluate(
        model,
        methods,
        tokenizer=tokenizer,
        **data,
        judges=args.judge or None,
        strengths=args.strengths,
        instruction=args.instruction,
        controls=args.controls,
        checkpoint=args.checkpoint,
        progress=not args.quiet,
        **_generation(args),
    )
    print(found.table())
    if args.output is not None:
        found.save(args.output)
        print(f"written to {args.output}")
    if args.max_kl is not None or (found.scores and args.minimize):
        for judge in found.scores:
            best = found.best(judge, max_kl=args.max_kl, minimize=args.minimize)
            print(f"best by {judge}: {best['method']} at strength {best['strength']:g}, {best[judge]:.3f}")
    if args.report is not None:
        found.report(args.report)
        print(f"report in {args.report}")
    return INTERRUPTED if found.stopped == "interrupted" else 0


def _calibrate(args: argparse.Namespace) -> None:
    """Find the largest strength that neutral texts allow, or the smallest with an effect, and note it in the maps."""
    _check_outputs(args, "output")
    maps = _load_maps(args.maps)
    data: dict[str, Any] = {name: _read_prompts(getattr(args, name)) for name in ("neutral", "prompts")}
    tokenizer, model = _load(args, "AutoTokenizer"), _load_model(args)
    budgets = ("max_kl", "max_loss_rise", "max_perplexity_ratio", "effect", "judge", "confidence")
    asked: dict[str, Any] = {name: getattr(args, name) for name in budgets}
    found = maps.calibrate(
        model,
        tokenizer=tokenizer,
        **data,
        **asked,
        progress=not args.quiet,
        **_generation(args),
    )
    found.maps.save(args.output)
    print(f"{found!r}\nwritten to {args.output}")


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    names = ("samples", "max_new_tokens", "max_length", "batch_size", "seed")
    return {name: getattr(args, name) for name in names}


def _check_outputs(args: argparse.Namespace, *names: str) -> None:
    """ValueError, before anything is computed, where a file could not be written."""
    for name in names:
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ValueError(f"{_flag(name)}: expected a file in an existing folder, got {path}")


def _labels(names: Sequence[str]) -> list[str]:
    """What to call maps: the ends of their names, or the whole names where those are not different."""
    ends = [Path(name).name.removesuffix(".safetensors") for name in names]
    return ends if len(set(ends)) == len(ends) else list(names)


def _asked(prompt: Any) -> Any:
    """A prompt without the answer that a conversation ends with."""
    if isinstance(prompt, str) or len(prompt) < 2 or not isinstance(prompt[-1], dict):
        return prompt
    return prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt


def _sites(args: argparse.Namespace) -> None:
    """List the modules that can carry maps, by glob, the suggested ones marked. Reads no weights of the model."""
    torch, transformers = _libraries()
    config = _load(args, "AutoConfig")
    with torch.device("meta"):
        print(lineas.sites(transformers.AutoModelForCausalLM.from_config(config)))


def _fold(args: argparse.Namespace) -> None:
    """Put maps into the weights of a model, exactly or not at all: a folder or a GGUF file that needs no lineas."""
    cli_fold.check_output(args.output, args.model)
    if cli_fold.is_gguf(args.model):
        cli_fold.fold_gguf(args, _load_maps(args.maps))
    else:
        load_model, load_tokenizer = partial(_load_model, args), partial(_load, args, "AutoTokenizer")
        cli_fold.fold(args, _load_maps(args.maps), load_tokenizer=load_tokenizer, load_model=load_model)


def _serve(args: argparse.Namespace) -> None:
    """Serve completions and chats as OpenAI's API does, with maps at the strengths of each request, and a page to try
    them. Ctrl-C ends it.
    """
    load_model, load_tokenizer = partial(_load_model, args), partial(_load, args, "AutoTokenizer")
    serve(args, load_maps=_load_maps, load_tokenizer=load_tokenizer, load_model=load_model)


def _info(args: argparse.Namespace) -> None:
    """Describe a file of maps."""
    maps = _load_maps(args.maps)
    print(repr(maps))
    for key, value in maps.metadata.items():
        value = ", ".join(f"{name}={one}" for name, one in value.items()) if key == "settings" else value
        if key != "history":  # long; the file keeps it
            print(f"{key}: {value}")
    print(f"\n{maps.summary()}")


def _demo(args: argparse.Namespace) -> int:
    """Steer a small language model from negative to positive; shows samples, scores and what the effect costs."""
    as_int(args.steps, "steps", low=1)
    as_int(args.seed, "seed", low=0)
    from .demo.run import run

    return run(args.output, steps=args.steps, seed=args.seed, quick=args.quick)


def _load_maps(name: str) -> lineas.SteeringMaps:
    """Maps out of a file, a folder or the hub."""
    found = lineas.load(name)
    if isinstance(found, lineas.SparsePath):
        raise ValueError(f"{name} is a sparse path: save the maps of one of its points, as path.at(...).save(...) does")
    maps = getattr(found, "maps", found)  # those of the result of a fit
    if not isinstance(maps, lineas.SteeringMaps):
        raise ValueError(f"{name} holds a {type(found).__name__}, not steering maps")
    return maps


def _read_prompts(path: Path | None) -> Any:
    """The prompts of a file, None for no file; ImportError that says what to install where torch is missing."""
    if path is None:
        return None
    _libraries()
    from .inputs.files import read_prompts

    return read_prompts(path)


def _read_sets(path: Path, fraction: float | None) -> tuple[list[Any], list[Any]]:
    """The prompts of a file, and the last `fraction` of them apart."""
    prompts = _read_prompts(path)
    if len(prompts) < 2:
        raise ValueError(f"{path}: expected at least 2 prompts, got {len(prompts)}")
    if fraction is None:
        return prompts, []
    if not 0 < fraction < 1:
        raise ValueError(f"--held-out-fraction: expected 0 < x < 1, got {fraction:g}")
    kept = len(prompts) - round(fraction * len(prompts))
    if min(kept, len(prompts) - kept) < 2:
        seen = f"{kept} fitted and {len(prompts) - kept} held out of {path}"
        raise ValueError(f"--held-out-fraction: expected at least 2 prompts on each side, got {seen}")
    return prompts[:kept], prompts[kept:]


def _libraries() -> tuple[Any, Any]:
    """torch and transformers."""
    try:
        import torch
        import transformers
    except ImportError as error:
        install = f'pip install "lineas[torch]" ({error})'
        raise ImportError(f"this command needs torch and transformers: {install}") from error
    return torch, transformers


def _load(args: argparse.Namespace, what: str, **options: Any) -> Any:
    """What a class of transformers loads of MODEL, which the error names where it cannot."""
    transformers = _libraries()[1]
    if vars(args).get("quiet"):
        transformers.utils.logging.disable_progress_bar()
    try:
        return getattr(transformers, what).from_pretrained(args.model, **options)
    except (OSError, ValueError) as error:
        here = "" if Path(args.model).is_dir() else ", which is no folder here"
        raise ValueError(f"cannot load {args.model!r}{here}: {error}") from error


def _load_model(args: argparse.Namespace) -> Any:
    torch = _libraries()[0]
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises an AssertionError
        raise ValueError(f"--device: expected a device of this machine, got {args.device!r} ({error})") from None
    dtype = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    return _load(args, "AutoModelForCausalLM", dtype=dtype).to(args.device).eval()


if __name__ == "__main__":
    sys.exit(main())
