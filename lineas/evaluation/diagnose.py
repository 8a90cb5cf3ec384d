"""Diagnose fitted maps from activations, before anything is generated: what will probably not work, and why."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from .._checks import as_finite, as_int
from ..arrays.wasserstein import wasserstein
from ..fitting.result import FitResult
from ..hooks.attach import attached
from ..hooks.collect import collect_batches, read_prompts
from ..hooks.modules import check_runs, find, resolve
from ..hooks.settings import RunSettings
from ..hooks.tokens import check_fit_tokens
from ..inputs.frozen import frozen
from ..inputs.prompts import Prompts
from ..maps.affine import AffineMap
from ..maps.gates import AnyGate
from ..maps.metadata import Layers, Selection, fitted_tokens, spell_tokens
from ..maps.steering import SteeringMaps
from . import sample_statistics as statistics
from .diagnosis import Check, Diagnosis

LEAST_PROMPTS = 2 * statistics.FOLDS  # on each side: two for each fold, five in a half
LEAST_TOKENS = 32
HALVES, SHUFFLES = 100, 199
BOOTSTRAPS, SUPPORT_SHUFFLES = 20, 19  # one-sided tests at 5 %
DENSE = 0.9  # the share of the neurons from which on supports have nothing to choose: at random, 0.82 alike
KL_SHOWS, KL_BREAKS = 0.1, 0.7  # nats a token; e^0.1 is a perplexity a tenth higher, e^0.7 one twice as high

W2, SEPARABILITY, STABILITY = "share of the gap closed", "separability", "stability of the support"
DAMAGE, CHANGE = "damage", "change"
# At which numbers the divergence of the next token on neutral text reaches these two, as docs/diagnostics.md measures
# it: within a factor of two for the change. The damage tells nothing of it there, and gets no verdict.
THRESHOLDS = {CHANGE: (0.034, 0.27)}


def diagnose(
    maps: SteeringMaps | FitResult,
    model: nn.Module,
    source: Any,
    target: Any,
    *,
    neutral: Any = None,
    strength: float = 1.0,
    layers: Layers | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
    pooling: str | None = None,
    tokens: Selection | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Diagnosis:
    """Look at the maps before anything is generated: what will probably not work with them, and why.

    Four questions, each answered by numbers, a verdict in words and a reason:

    - Do the maps bring source activations to those of the target? The share of the gap in squared W2 distance that they
      close, between no maps and two halves of the target, all with as many prompts.
    - Is the concept there? How well a linear probe tells source from target activations.
    - Are these the neurons? How much alike supports of sparse maps are that are refitted to bootstraps of the prompts.
    - What does text that the maps are not meant for pay? How much its activations are changed against how they vary.

    docs/diagnostics.md shows how well these numbers rank maps by what they do to generated text, and what they cost.

    Parameters
    ----------
    model : torch.nn.Module
        The loaded model, without these maps on it. Other maps that are on it stay on throughout.
    source, target : list of texts, conversations or token ids, batch or list of batches
        Prompts that the maps were not fitted to, at least 10 of each; as `lineas.collect` takes them. With those that
        were fitted, the numbers say little.
    neutral : list of texts, conversations or token ids, batch or list of batches, optional
        Text that the maps are not meant for, at least 32 tokens of it. Without any, damage is left out.
    strength : float, default 1.0
        The strength at which the maps are looked at.
    layers : str, list[str] or re.Pattern, optional
        Modules at which source and target are compared. Default: those where the fit took its loss, as far as the
        metadata of the maps say; otherwise those of the maps.
    tokenizer, max_length, batch_size, forward, progress
        As for `lineas.collect`.
    pooling : {"mean", "min", "max", "last"}, optional
        Over the tokens of a prompt. Default: that of the fit, "mean" where the metadata do not say. "all" is refused:
        tokens of one prompt are alike, and no statistics of independent rows would hold for them.
    tokens : "all", "last", "prompt", "generated", slice or callable, optional
        The tokens that maps act on, and over which activations are pooled. Default: those that the maps were fitted
        for; "all" where the metadata do not say.
    seed : int, default 0
        Of everything that is drawn.

    Returns
    -------
    lineas.evaluation.diagnosis.Diagnosis
        ``print`` shows it; ``checks``, ``modules`` and ``to_dict()`` hold it.

    Raises
    ------
    ImportError
        If scikit-learn and SciPy are not installed: ``pip install "lineas[sklearn]"``.
    TypeError
        If an argument is of a wrong type.
    ValueError
        If the model lacks a module of the maps or has it with another width, these maps are on the model already, a set
        has too few prompts, an activation is not finite (set, module and row are named), or a setting is out of range;
        and as `lineas.collect`.
    """
    if find_spec("sklearn") is None or find_spec("scipy") is None:
        raise ImportError('diagnose needs scikit-learn and SciPy: pip install "lineas[sklearn]"')
    result = maps if isinstance(maps, FitResult) else None
    if isinstance(maps, FitResult):
        maps = maps.maps
    if not isinstance(maps, SteeringMaps):
        raise TypeError(f"maps must be SteeringMaps or a FitResult, got {type(maps).__name__}")
    check_runs(model)
    strength, seed = as_finite(strength, "strength"), as_int(seed, "seed", low=0)
    pooling = _fitted_pooling(maps.metadata) if pooling is None else pooling
    if pooling == "all":
        raise ValueError(
            "pooling must be 'mean', 'min', 'max' or 'last', got 'all': tokens of one prompt are no independent rows; "
            "pass pooling='mean' for maps that were fitted to single tokens"
        )
    settings = RunSettings(
        tokenizer=tokenizer,
        max_length=max_length,
        batch_size=batch_size,
        forward=forward,
        pooling=pooling,
        tokens=fitted_tokens(maps.metadata) if tokens is None else tokens,
        progress=progress,
    )
    check_fit_tokens(settings.tokens, model)
    if any(handle.maps == maps for handle in attached(model)):
        raise ValueError("these maps are on the model already, which is to be compared without them: handle.remove()")
    with maps.attach(model, 0.0, tokens=settings.tokens):
        pass  # an error where the model has no such modules
    # What a gate makes of rows without their texts, and without other modules, cannot be told.
    alone = [name for name in maps if name not in maps.gates or _by_itself(maps.gates[name])]
    own = {find(model, name)[0]: affine for name, affine in maps.items()}
    each = {find(model, name)[0]: _one(maps, name) for name in alone}
    compared = _compared(maps, model, layers)
    seconds: dict[str, float] = {}
    with _timed("collect", seconds):
        samples = _Samples(model, maps, list(dict.fromkeys([*own, *compared])), strength, settings)
        prompts = {"source": source, "target": target}
        plain = {name: samples.of(data, name) for name, data in prompts.items()}
        steered = samples.of(source, "source", on=True)
        aside: dict[bool, dict[str, NDArray]] = {}
        if neutral is not None:
            aside = {on: samples.of(neutral, "neutral", on=on, pooling="all") for on in (False, True)}
    names = list(plain["source"])
    details: dict[str, NDArray] = {"module": np.array(names)}
    compared = [name for name in names if name in compared]
    order = [name for name in names if name in own]
    own = {name: own[name] for name in order}
    checks = []
    with _timed(W2, seconds):
        checks.append(_distance(plain, steered, compared, _closing(result, strength), seed, details))
    with _timed(SEPARABILITY, seconds):
        checks.append(_separability(plain, seed, details))
    with _timed(STABILITY, seconds):
        checks.append(_stability(plain, own, seed, details))
    with _timed(DAMAGE, seconds):
        checks += _damage(aside, each, strength, details)
    facts = {
        "strength": strength,
        "pooling": pooling,
        "tokens": spell_tokens(settings.tokens),
        "seed": seed,
        **{name: len(sample[names[0]]) for name, sample in plain.items()},
        "neutral": len(aside[False][names[0]]) if aside else 0,
    }
    return Diagnosis(tuple(checks), details, facts, seconds)


# --- activations ------------------------------------------------------------------------------------------------------


def _compared(maps: SteeringMaps, model: nn.Module, layers: Layers | None) -> list[str]:
    """The modules at which source and target are compared."""
    if layers is not None:
        return resolve(model, layers)
    metadata = maps.metadata
    loss_layers = metadata.get("loss_layers")
    if loss_layers is None or loss_layers == metadata.get("layers"):
        return [find(model, name)[0] for name in maps]
    try:
        return resolve(model, loss_layers)
    except ValueError as error:  # such as a regular expression, which metadata spell like a glob
        raise ValueError(f"the loss_layers of the maps' metadata are not found, pass layers=: {error}") from None


def _fitted_pooling(metadata: Mapping[str, Any]) -> str:
    """The pooling that maps with this metadata were fitted with, "mean" where it says nothing of it."""
    parts = metadata.get("parts")
    if "pooling" not in metadata and isinstance(parts, list) and parts and all(isinstance(p, dict) for p in parts):
        found = list(dict.fromkeys(map(_fitted_pooling, parts)))
        if len(found) > 1:
            raise ValueError(
                f"these maps are composed of some that were fitted with different poolings, {', '.join(found)}: pass "
                "pooling="
            )
        return found[0]
    return metadata.get("pooling") or "mean"


class _Samples:
    """Activations of some modules of a model, checked."""

    def __init__(self, model: nn.Module, maps: SteeringMaps, names: list[str], strength: float, run: RunSettings):
        self.model, self.maps, self.names, self.strength, self.run = model, maps, names, strength, run
        self.read: dict[str, Prompts] = {}

    def of(self, data: Any, argument: str, *, on: bool = False, pooling: str | None = None) -> dict[str, NDArray]:
        """Activations [n, d] by module in execution order, with the maps `on` or off."""
        if argument not in self.read:
            self.read[argument] = read_prompts(data, argument, self.run)
        run = self.run if pooling is None else replace(self.run, pooling=pooling)
        batches = self.read[argument].parts(run.batch_size)
        shown = tqdm(batches, f"{argument}, maps {'on' if on else 'off'}", disable=not run.progress)
        steered = self.maps.attach(self.model, self.strength, tokens=run.tokens) if on else nullcontext()
        with steered, frozen(self.model, gradients=False):
            found = collect_batches(self.model, shown, self.names, run)
        label = f"{argument}, with the maps on" if on else argument
        for name, values in found.items():
            finite = np.isfinite(values).all(axis=1)
            if not finite.all():
                raise ValueError(f"{label}: {name}: an activation of row {int(np.argmin(finite))} is not finite")
        rows = len(next(iter(found.values())))
        if pooling is None and rows < LEAST_PROMPTS:
            raise ValueError(f"{argument} must have at least {LEAST_PROMPTS} prompts, got {rows}")
        if pooling is not None and rows < LEAST_TOKENS:
            raise ValueError(f"{argument} must have at least {LEAST_TOKENS} tokens, got {rows}")
        return found


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


# --- verdicts ---------------------------------------------------------------------------------------------------------


def _placed(values: NDArray, at: list[str], details: dict[str, NDArray]) -> NDArray:
    """`values` of the modules `at`, with NaN for all others."""
    found = np.full(len(details["module"]), np.nan)
    found[[list(details["module"]).index(name) for name in at]] = values
    return found


def _distance(
    plain: dict[str, dict[str, NDArray]],
    steered: dict[str, NDArray],
    compared: list[str],
    closing: float | None,
    seed: int,
    details: dict[str, NDArray],
) -> Check:
    source, target, on = ({name: one[name] for name in compared} for one in (*plain.values(), steered))
    sets = statistics.compared(source, on, target)
    halves = statistics.half_distances(sets, draws=HALVES, seed=seed)
    for name, values in halves._asdict().items():
        details[name] = _placed(values.mean(axis=0), compared, details)
    unsteered, with_maps, floor = (values.mean() for values in halves)
    chance = statistics.chance_of_distance(sets, shuffles=SHUFFLES, seed=seed)
    found = statistics.closed(sets, halves)
    share = float(found.share) if np.isfinite(found.share) else None
    span = found.share_interval if np.isfinite(found.share_interval).all() else None
    why = (
        f"between halves of the sets the distance is {unsteered:.3g} without maps, {with_maps:.3g} with them, and "
        f"{floor:.3g} within the target"
    )
    if chance > 0.05:
        what = (
            f"prompts dealt out at random are as far apart in {chance:.0%} of the cases: so few cannot show what the "
            "maps do; take more, or sets that differ more"
        )
        return Check(W2, share, "sets not told apart", f"{why}; {what}.", span)
    held_out = 1 - _raw(on, target) / _raw(source, target)
    overfit = closing is not None and held_out < closing / 2
    if closing is not None:
        why += (
            f"; the fit took {closing:.0%} off the loss of its own prompts, and takes {held_out:.0%} off that of these"
        )
    remedy = ": fewer steps, more prompts, held_out= or l1= may help" if overfit else ""
    if found.distance_interval[1] <= 0:
        verdict = "overfit" if overfit else "does not transfer"
        what = f"the maps bring other prompts no nearer to the target{remedy}"
    elif found.distance_interval[0] <= 0:
        verdict = "overfit" if overfit else "not shown to transfer"
        what = f"so few prompts do not show that the maps bring others nearer to the target{remedy}"
    elif share is None or span is None:
        verdict = "nearer, by an unknown share"
        what = "the maps bring other prompts nearer to the target, but so few do not tell how wide the gap is"
    elif share < 0.5:
        verdict, what = "overfit" if overfit else "partly", f"the maps close less than half of the gap{remedy}"
    else:
        verdict, what = "good", "the maps close most of the gap"
    return Check(W2, share, verdict, f"{why}; {what}.", span)


def _closing(result: FitResult | None, strength: float) -> float | None:
    """The share of its loss that a fit took off, where it tells."""
    if result is None or result.loss is None or strength != 1 or not len(result.history["loss"]):
        return None
    return 1 - result.loss / float(result.history["loss"][0])


def _raw(source: Mapping[str, NDArray], target: Mapping[str, NDArray]) -> float:
    """The distance as a fit has it: summed over neurons."""
    return float(np.mean([wasserstein(source[name], target[name]).sum(dtype=np.float64) for name in source]))


def _separability(plain: dict[str, dict[str, NDArray]], seed: int, details: dict[str, NDArray]) -> Check:
    source, target = plain.values()
    names = list(source)
    n, m = len(source[names[0]]), len(target[names[0]])
    aucs = np.array([statistics.cross_validated_auc(source[name], target[name], seed=seed) for name in names])
    spans = np.array([statistics.auc_interval(auc, n, m) for auc in aucs])
    details |= {"auc": aucs, "auc_low": spans[:, 0], "auc_high": spans[:, 1]}
    median, best = float(np.median(aucs)), int(np.argmax(aucs))
    span = statistics.auc_interval(median, n, m)
    # The best of many is high by chance as well: its interval holds for all modules at once.
    of_best = statistics.auc_interval(float(aucs[best]), n, m, level=1 - 0.05 / len(names))
    why = (
        f"a linear probe tells target from source prompts with an AUC of {median:.2f} at the median module, and of "
        f"{aucs[best]:.2f} [{of_best[0]:.2f}, {of_best[1]:.2f}] at the best of {len(names)}, {names[best]}"
    )
    if span[0] > 0.5:
        return Check(SEPARABILITY, median, "linearly visible", f"{why}.", span)
    if of_best[0] > 0.5:
        verdict, what = "visible at some modules", "where it is not, maps have nothing to act on: layers= can say where"
    else:
        verdict, what = (
            "not shown to be visible",
            f"0.5 is chance, and {n} + {m} prompts do not tell these from it; what a probe does not find, maps of "
            "single neurons move by chance",
        )
    return Check(SEPARABILITY, median, verdict, f"{why}; {what}.", span)


def _stability(
    plain: dict[str, dict[str, NDArray]],
    own: dict[str, AffineMap],
    seed: int,
    details: dict[str, NDArray],
) -> Check:
    fitted = {name: (one.weight != 1) | (one.bias != 0) for name, one in own.items()}
    counts = np.array([one.sum() for one in fitted.values()])
    total, d = int(counts.sum()), sum(one.size for one in fitted.values())
    details["support"] = _placed(counts, list(own), details)
    if total == 0:
        return Check(STABILITY, None, "not applicable", "the maps change no neuron.")
    if total > DENSE * d:
        why = f"the maps change {total / d:.0%} of the neurons: there is no choice of neurons to be stable or not."
        return Check(STABILITY, None, "not applicable", why)
    source, target = ({name: one[name] for name in own} for one in plain.values())
    found = statistics.support_stability(
        source, target, fitted, bootstraps=BOOTSTRAPS, shuffles=SUPPORT_SHUFFLES, seed=seed
    )
    details["jaccard"] = _placed(found.by_module, list(own), details)
    why = (
        f"of the neurons that two refits to resampled prompts change, {found.between:.0%} are in both (Jaccard), "
        f"against {found.shuffled.mean():.0%} where prompts were dealt out at random between source and target, and "
        f"{found.chance:.0%} for random neurons; with the maps' own {total} of {d} it is {found.to_fitted:.0%} against "
        f"{found.shuffled_to_fitted.mean():.0%}"
    )
    if found.between <= found.shuffled.max():
        verdict = "no better than chance"
        what = "which neurons the maps change says nothing of the concept; take more prompts, or a larger support"
    elif found.to_fitted <= found.shuffled_to_fitted.max():
        verdict, what = "other neurons", "the prompts have neurons of their own, but not those that the maps change"
    elif found.between < 0.5:
        verdict = "partly stable"
        what = "other prompts would have chosen many other neurons: do not read much into single ones"
    else:
        verdict, what = "stable", "other prompts would have chosen mostly the same neurons"
    return Check(STABILITY, found.between, verdict, f"{why}; {what}.")


def _by_itself(gate: AnyGate) -> bool:
    """Whether a gate needs one row of its own module alone."""
    return gate.site is None and gate.context == "token"


def _one(maps: SteeringMaps, name: str) -> Callable[[NDArray, float], NDArray]:
    """The map of one module with its gate, as a function of rows and a strength."""
    if name not in maps.gates:
        return maps[name].transform
    one = SteeringMaps({name: maps[name]}, gates={name: maps.gates[name]})
    return lambda z, strength: one.transform({name: z}, strength)[name]


def _damage(
    neutral: dict[bool, dict[str, NDArray]],
    each: dict[str, Callable[[NDArray, float], NDArray]],
    strength: float,
    details: dict[str, NDArray],
) -> list[Check]:
    if not neutral:
        why = "there are no neutral texts: pass neutral=, texts that the maps are not meant for."
        return [Check(name, None, "left out", why) for name in _DAMAGES]
    before, after = neutral[False], neutral[True]
    together = {name: statistics.damage(z, after[name] - z) for name, z in before.items()}
    alone = {
        name: statistics.damage(before[name], transform(before[name], strength) - before[name])
        for name, transform in each.items()
    }
    for prefix, found in (("", together), ("own_", alone)):
        for kind in _DAMAGES:
            values = np.array([getattr(one, kind) for one in found.values()])
            details[prefix + kind] = _placed(values, list(found), details)
    return [_scaled(kind, details, texts) for kind, texts in _DAMAGES.items()]


_DAMAGES = {
    DAMAGE: "the mean shift of neutral activations, weighed by their variance in its direction (delta' Sigma delta),",
    CHANGE: "the mean squared change of neutral activations, over their own variance,",
}


def _scaled(kind: str, details: dict[str, NDArray], texts: str) -> Check:
    """A number of the damage with its verdict."""
    values = details[kind]
    value, worst = float(np.mean(values)), int(np.argmax(values))
    why = (
        f"{texts} is {value:.3g}, the mean over modules, and at most {values[worst]:.3g}, at {details['module'][worst]}"
    )
    if kind not in THRESHOLDS:
        what = (
            "it did not tell what the next token pays where that was measured (docs/diagnostics.md): go by the change"
        )
        return Check(kind, value, "no verdict", f"{why}; {what}, or by calibrate.")
    show, breaks = THRESHOLDS[kind]
    measured = "where it was measured (docs/diagnostics.md), the next token of such text moved by"
    if value < show:
        verdict, what = "mild", f"{measured} less than {KL_SHOWS:g} nats below {show:g}"
    elif value < breaks:
        verdict, what = (
            "will show",
            f"{measured} {KL_SHOWS:g} nats and more from {show:g} on; a lower strength, fewer neurons or fewer modules "
            "cost less",
        )
    else:
        verdict, what = (
            "will break",
            f"{measured} {KL_BREAKS:g} nats and more from {breaks:g} on, as much as doubles perplexity; take a lower "
            "strength",
        )
    return Check(kind, value, verdict, f"{why}; {what}.")
