"""The loss of an end-to-end fit: prompts through the model with maps on, pooled, and compared with their targets."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import double
from ..hooks import gating, outputs
from ..hooks.affine import affine, working_dtype
from ..hooks.capture import Capture, warn_of_repeated
from ..hooks.tokens import BatchTokens
from ..inputs.batches import Batch
from ..inputs.frozen import RandomState
from ..inputs.prompts import Sampler
from ..maps.affine import AffineMap
from ..maps.gates import AnyGate
from ..maps.steering import SteeringMaps
from .autograd import sort_columns, wasserstein
from .distributed import ALONE, IdleTurn, NonFinite, Processes
from .settings import ObjectiveSettings
from .sharded import check_plain

Leaves = Mapping[str, tuple[Tensor, Tensor]]
"""Slopes and shifts of every map, as leaves of the graph."""

# Gradients that go through a float16 model are scaled by a power of two so that the largest of those that enter it is
# about 2 ** 6: a factor of 2 ** 9 below the overflow, and entries down to 2 ** -20 times that one keep all their bits.
# Where that overflows, smaller ones are tried.
HALF_EXPONENTS = (6, 2, -2, -6)


class Task(NamedTuple):
    """Prompts, and what their activations are compared with."""

    argument: str
    """What error messages call the prompts."""
    batches: Sequence[Batch]
    targets: Sequence[Tensor]
    """Target activations [m, d_k] of every loss module, each column ascending."""
    sampler: Sampler | None = None
    """Where the prompts of a step come from, if they are not the same in each."""

    def at(self, step: int) -> Task:
        """The task of a step, counted from 0."""
        return self if self.sampler is None else self._replace(batches=self.sampler.draw(step))

    @property
    def passes(self) -> int:
        """What a gradient costs: one for each forward pass of the prompts, in part or whole, and two backward."""
        return 3 if len(self.batches) == 1 else 4


class _Run(NamedTuple):
    """A forward pass on the way to a gradient, with the random state that it started from."""

    batch: Batch
    random: RandomState
    pooled: list[Tensor]


class Standards(NamedTuple):
    """What the mapped activations are standardized by, each [D].

    The mean of the target's tokens; the standard deviation of its pooled activations, in which the loss counts; and
    that of the tokens, which a few tokens with massive activations (Sun, Chen, Kolter and Liu 2024, arXiv 2402.17762)
    make much larger than the other.
    """

    center: Tensor
    spread: Tensor
    scale: Tensor


class Objective:
    """The sum over modules of the squared Wasserstein distances between mapped source and target activations.

    Of several tasks it is the mean: all count alike. What the first run of a target tells is learnt there: the order of
    the modules, their widths, the working dtype and the device.

    Parameters
    ----------
    model : nn.Module
        The model, while it is `frozen`.
    map_names, loss_names : list of str
        Modules that carry maps and modules where the loss is taken; in execution order once a target has run.
    settings : ObjectiveSettings
        How the model is called, which tokens are mapped and pooled and how, and how the modules' terms are added: by
        their mean, of activations divided by the standard deviations of the targets or as they are; their sum (LinEAS,
        arXiv 2503.10679, eq. 4); or as in the published code, where the term of a module is multiplied by min(n, m) / d
        and the mean taken.
    processes : Processes, optional
        Those that run this objective together, each with its own part of all prompts. Default: this one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        map_names: Sequence[str],
        loss_names: Sequence[str],
        settings: ObjectiveSettings,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.map_names, self.loss_names = model, list(map_names), list(loss_names)
        self.settings, self.processes = settings, processes
        self.widths: dict[str, int] = {}
        self.dtype = torch.float64
        self.device = torch.device("cpu")
        self.seen: set[torch.dtype] = set()
        self.gates: Mapping[str, AnyGate] = {}
        self._sites: dict[str, AnyGate] = {}
        self._ordered = False
        self._moments: list[dict[str, tuple[Tensor, Tensor, Tensor]]] = []
        self._sums: dict[str, Tensor] | None = None
        self.precisions: list[Tensor] | None = None

    def put_gates(self, gates: Any) -> None:
        """Let gates act from now on, as `SteeringMaps.gated` takes them; after the first target has run."""
        identities = {name: AffineMap.identity(width) for name, width in self.widths.items()}
        self.gates = SteeringMaps(identities, gates=gates).gates
        self._sites = {gate.site or name: gate for name, gate in self.gates.items()}

    @property
    def steered(self) -> list[str]:
        """The modules that maps are on or gates read."""
        return list(dict.fromkeys([*self.map_names, *self._sites]))

    @property
    def tolerance(self) -> float:
        """Up to which share activations are taken for the same: half of the digits of their dtype."""
        return math.sqrt(max(torch.finfo(dtype).eps for dtype in self.seen))

    # --- activations --------------------------------------------------------------------------------------------------

    def target(self, batches: Sequence[Batch], argument: str, *, fitted: bool = False) -> list[Tensor]:
        """Pooled activations [m, d_k] of a target at the loss modules, without maps, each column sorted.

        Those of targets that are `fitted` tell how activations are standardized.
        """
        fitted = fitted and self.settings.scaling == "standardized"
        self._sums = {} if fitted else None
        with torch.no_grad(), self.processes.together():  # no decorator, which warnings would take for the caller
            parts = [self._pooled(Capture(), batch, None) for batch in batches]
            own = [torch.cat([part[name] for part in parts]) for name in parts[0]]
            self.processes.check_whole(own, list(parts[0]), self.tolerance)
            samples = dict(zip(parts[0], self.processes.rows(own, argument), strict=True))
        self.widths = {name: self.widths[name] for name in self.map_names}
        compared = [samples[name] for name in self.loss_names]
        _check_count(compared, argument)
        ordered = sort_columns(compared, [f"{argument}: {name}" for name in self.loss_names])
        if self._sums is not None:
            sums, _ = self.processes.added(list(self._sums.values()))
            moments = self._moments_of(samples, dict(zip(self._sums, sums, strict=True)))
            self.processes.same_tensors(*(tensor for found in moments.values() for tensor in found))
            self._moments.append(moments)
            self.precisions = [1 / self._variance(name) for name in self.loss_names]
            self._sums = None
        return ordered

    def _moments_of(
        self, samples: Mapping[str, Tensor], sums: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Variances [d] of pooled activations, and means and variances of those of tokens where there are sums."""
        found = {}
        for name, sample in samples.items():
            variance = sample.var(dim=0, correction=0)
            count, total, squares = sums.get(name, variance.new_ones(3, len(variance)))
            mean = total / count
            rest = (squares / count - mean.square()).clamp(min=0)
            found[name] = variance, mean.to(self.device, self.dtype), rest.to(self.device, self.dtype)
        return found

    def _variance(self, name: str) -> Tensor:
        """Variance [d] of the targets at a module, by which it is standardized: never so small that noise is blown up.

        The mean over the targets, and a hundredth of the median over the neurons.
        """
        variance = torch.stack([found[name][0] for found in self._moments]).mean(dim=0)
        typical = variance.median()
        typical = torch.where(typical > 0, typical, variance.mean())
        return torch.where(typical > 0, variance + typical / 100, 1.0)

    def standards(self) -> Standards | None:
        """What the parameters of maps are standardized by, the mean over the targets; None in the other scalings."""
        if not self._moments:
            return None
        variance = torch.cat([self._variance(name) for name in self.map_names])
        center, tokens = (
            torch.cat([torch.stack([found[name][k] for found in self._moments]).mean(dim=0) for name in self.map_names])
            for k in (1, 2)
        )
        return Standards(center, variance.sqrt(), (tokens + variance).sqrt())

    def _activations(self, batches: Sequence[Batch], maps: Leaves) -> list[Tensor]:
        """Pooled activations [n, d_k] of the loss modules, all batches one after the other, without a graph."""
        with torch.no_grad():
            own = _join([self._at_losses(Capture(), batch, maps) for batch in batches])
            return self.processes.rows(own, "the prompts")

    def _at_losses(self, capture: Capture, batch: Batch, maps: Leaves) -> list[Tensor]:
        """Pooled activations [n, d_k] of the loss modules for one batch, with maps on."""
        pooled = self._pooled(capture, batch, maps)
        return [pooled[name] for name in self.loss_names]

    def _pooled(self, capture: Capture, batch: Batch, maps: Leaves | None) -> dict[str, Tensor]:
        """Pooled activations [n, d] for one batch: of the loss modules with maps on, without any of the mapped too."""
        names = list(dict.fromkeys([*(self.map_names if maps is None else self.steered), *self.loss_names]))
        mapped, wanted = frozenset(self.map_names), frozenset(self.loss_names)
        if maps is None and self.settings.scaling == "standardized":
            wanted |= mapped
        choice = BatchTokens(self.model, batch, self.settings)
        pooled: dict[str, Tensor] = {}
        steer = self.steerer(choice, maps)
        differentiated = torch.is_grad_enabled()
        sharding = self.processes.sharding

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            if differentiated and not torch.is_grad_enabled():
                raise ValueError(
                    f"forward: module {name!r} ran without gradients, under a torch.no_grad() of its caller such as "
                    "that of a diffusers pipeline; give a forward that runs it with them, like "
                    "type(pipe).__call__.__wrapped__"
                )
            check_plain(name, tensor)
            self.seen.add(tensor.dtype)
            replaced = None
            if name in mapped:
                axis = outputs.channel_axis(module, tensor, name)
                if maps is None:
                    self._learn(name, tensor, tensor.shape[axis])
                    if self._sums is not None:
                        rows = choice.rows(name, module, tensor, axis)
                        self._add(name, rows[:0] if isinstance(batch, IdleTurn) else rows)
            replaced = steer(name, module, tensor)
            if name in wanted and name not in pooled:  # a module called twice counts with its first call
                if sharding is not None:
                    sharding.before_backward(module, tensor if replaced is None else replaced)
                pooled[name] = choice.pool(name, module, tensor, replaced)
            return replaced

        last = self.loss_names[-1] if self._ordered else None  # the first run goes on until every module was called
        leave = sharding is None or sharding.leaves
        order = capture.run(self.model, batch, names, on_output, last=last, forward=self.settings.forward, leave=leave)
        if not self._ordered:
            warn_of_repeated(capture.repeated)
            self._sort(order)
        if isinstance(batch, IdleTurn):  # with its graph: a backward pass of it gives zeros
            pooled = {name: one[:0] for name, one in pooled.items()}
        return {name: one.to(self.device, self.dtype) for name, one in pooled.items()}

    def _add(self, name: str, rows: Tensor) -> None:
        """Add the activations [N, d] of the tokens of a batch to their number, sum and sum of squares."""
        assert self._sums is not None
        wide = double(rows)
        total = torch.stack([wide.new_full(wide.shape[1:], len(wide)), wide.sum(dim=0), wide.square().sum(dim=0)])
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def _learn(self, name: str, tensor: Tensor, width: int) -> None:
        """Note the width of a module, the working dtype and the device."""
        if not self.widths:
            self.device = tensor.device
        if self.widths.setdefault(name, width) != width:
            raise ValueError(f"module {name!r} has {width} neurons in one call and {self.widths[name]} in another")
        if working_dtype(tensor.dtype) == torch.float32:
            self.dtype = torch.float32

    def _sort(self, order: list[str]) -> None:
        """Bring the modules into the order of their first calls."""
        last = max(map(order.index, self.loss_names))
        late = [name for name in self.map_names if order.index(name) > last]
        if late:
            raise ValueError(
                f"layers: module {late[0]!r} runs after {order[last]!r}, the last of loss_layers: no gradient reaches "
                "it"
            )
        self.map_names.sort(key=order.index)
        self.loss_names.sort(key=order.index)
        self._ordered = True

    def steerer(self, choice: BatchTokens, maps: Leaves | None) -> Callable[[str, nn.Module, Tensor], Tensor | None]:
        """What maps and gates make of the output of a module in one forward pass; None where they leave it alone.

        To be called at every output of the modules that maps are on and gates read.
        """
        values: dict[str, Tensor] = {}

        def steer(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            if maps is None or not (name in maps or name in self._sites):
                return None
            axis = outputs.channel_axis(module, tensor, name)
            if name in self._sites:
                values[name] = gating.values(self._sites[name], tensor, choice.real(name, tensor), axis)
            if name not in maps:
                return None
            mapped = affine(tensor, *maps[name], 1.0, axis)
            gate = self.gates.get(name)
            if gate is not None:
                site = gate.site or name
                if site not in values:
                    raise ValueError(f"gates: module {site!r} had not run before {name!r}, whose gate reads it")
                mapped = gating.gated(tensor, mapped, values[site].to(tensor.device, tensor.dtype))
            return choice.only(name, module, tensor, mapped)

        return steer

    # --- the loss -----------------------------------------------------------------------------------------------------

    def loss(self, tasks: Sequence[Task], maps: Leaves) -> tuple[float, Tensor]:
        """The loss with the maps on, and its terms [T, L]: those of every loss module in each task.

        The loss of a task is the mean of its terms, or their sum in the scaling "paper". NonFinite if an activation or
        a term is not finite.
        """
        with self.processes.together():
            compared = [self._compare(task, self._activations(task.batches, maps)) for task in tasks]
            totals, terms = zip(*compared, strict=True)
            found = torch.cat([torch.stack(totals), *terms])
            self.processes.same_tensors(found)
        return found[: len(tasks)].mean().item(), found[len(tasks) :].reshape(len(tasks), -1)

    def _compare(self, task: Task, us: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of pooled activations, differentiable in them, and its terms."""
        _check_count(us, task.argument)
        try:
            values = wasserstein(us, task.targets, self.loss_names)
        except ValueError as error:
            if all(u.isfinite().all() for u in us):
                raise
            raise NonFinite(f"{task.argument}: {error}") from None
        reference = self.settings.scaling == "reference"
        scales = [min(len(u), len(v)) / u.shape[1] if reference else 1.0 for u, v in zip(us, task.targets, strict=True)]
        if self.precisions is not None:
            values = tuple(w2 * precision for w2, precision in zip(values, self.precisions, strict=True))
        terms = torch.stack([w2.sum() * scale for w2, scale in zip(values, scales, strict=True)])
        if not terms.isfinite().all():
            name = self.loss_names[int((~terms.isfinite()).nonzero()[0])]
            raise NonFinite(f"{task.argument}: {name}: the loss overflows {self.dtype}")
        return (terms.sum() if self.settings.scaling == "paper" else terms.mean()), terms.detach()

    # --- its gradient -------------------------------------------------------------------------------------------------

    def gradient(self, tasks: Sequence[Task], maps: Leaves) -> tuple[float, Tensor, Tensor, Tensor]:
        """The loss, its terms [T, L] as of `loss`, and its gradients [D] in the slopes and in the shifts of all maps.

        One task after the other, so that the graph of only one is alive at a time. NonFinite, which names the module,
        if the loss or a gradient is not finite; ValueError if a map has no influence on the loss, or the model does not
        give the same activations twice.
        """
        with self.processes.together():
            totals, terms, *grads = zip(*(self._gradient(task, maps) for task in tasks), strict=True)
        grad_weight, grad_bias = (torch.stack(parts).mean(dim=0) for parts in grads)
        return sum(totals) / len(totals), torch.stack(terms), grad_weight, grad_bias

    def _gradient(self, task: Task, maps: Leaves) -> tuple[float, Tensor, Tensor, Tensor]:
        """`gradient` of one task, with terms [L].

        Several batches go through the model twice, all but the last, so that only the graph of one is alive at a time,
        however many there are: first without graphs, for the pooled activations of all, the loss and its gradient in
        them; then each by itself, to take its part of that gradient back to the maps (the cached gradients of Gao,
        Zhang, Han and Callan 2021, arXiv 2101.06983). Up to the order of sums it is the gradient of one large batch.
        """
        runs: list[_Run] = []
        with Capture() as capture:  # checkpointed layers run again on the way back and need their maps
            for k, batch in enumerate(task.batches, start=1):
                random = RandomState(self.model)
                with torch.set_grad_enabled(k == len(task.batches)):
                    runs.append(_Run(batch, random, self._at_losses(capture, batch, maps)))
            after = RandomState(self.model)
            own = [u.detach() for u in _join([run.pooled for run in runs])]
            us = [u.requires_grad_() for u in self.processes.rows(own, task.argument)]
            total, terms = self._compare(task, us)
            cached = torch.autograd.grad(total, us)
            sizes = zip(*([len(u) for u in run.pooled] for run in runs), strict=True)
            mine = self.processes.own_rows(cached, own)
            shares = (grad.split(list(rows)) for grad, rows in zip(mine, sizes, strict=True))
            pulls = list(zip(*shares, strict=True))
            for exponent in self._exponents(cached):
                parts = self._pull_back(capture, task.argument, maps, runs, pulls, 2.0**exponent)
                sums, (total, terms) = self.processes.added(list(parts.values()), [total.detach(), terms])
                found = dict(zip(parts, sums, strict=True))
                if torch.cat(list(found.values())).isfinite().all():
                    break
                runs[-1] = runs[-1]._replace(pooled=[u.detach() for u in runs[-1].pooled])  # its graph is used up
            else:
                # The last module in execution order: backwards, the first in which something went wrong.
                bad = [name for (name, _), grad in found.items() if not grad.isfinite().all()]
                name = max(bad, key=self.map_names.index)
                raise NonFinite(f"{task.argument}: {name}: the gradient is not finite")
            after.restore()
        weights, biases = [found[name, 0] for name in maps], [found[name, 1] for name in maps]
        return total.item(), terms, torch.cat(weights), torch.cat(biases)

    def _exponents(self, cached: Sequence[Tensor]) -> Sequence[int]:
        """Powers of two to scale the gradients with on their way through the model, to be tried in this order."""
        if torch.float16 not in self.seen:
            return (0,)
        largest = max(grad.abs().max().item() for grad in cached)
        # Powers that float32 has, and not only its subnormal ones.
        return [min(max(exponent - math.frexp(largest)[1], -120), 120) for exponent in HALF_EXPONENTS]

    def _pull_back(
        self, capture: Capture, argument: str, maps: Leaves, runs: list[_Run], pulls: Sequence[Any], scale: float
    ) -> dict[tuple[str, int], Tensor]:
        """Gradients of slopes (name, 0) and shifts (name, 1) from those of the pooled activations, run by run.

        The last run comes first, since it may have a graph. The others are made once more, from the same random
        numbers.
        """
        keys = [(name, k) for name in maps for k in (0, 1)]
        leaves = [maps[name][k] for name, k in keys]
        sums: dict[tuple[str, int], Tensor] = {}
        for run, pull in zip(reversed(runs), reversed(pulls), strict=True):
            pooled = run.pooled
            if not any(u.requires_grad for u in pooled):
                run.random.restore()
                pooled = self._at_losses(capture, run.batch, maps)
                self._check_repeated(argument, run.pooled, pooled)
            reached = [k for k, u in enumerate(pooled) if u.requires_grad]
            if not reached:
                continue
            found = differentiate([pooled[k] for k in reached], leaves, [pull[k] * scale for k in reached])
            for key, grad in zip(keys, found, strict=True):
                if grad is not None:
                    sums[key] = sums[key] + grad if key in sums else grad
        for name, k in keys:
            if (name, k) not in sums:
                raise ValueError(f"layers: no gradient reaches module {name!r}: no loss module depends on its output")
        return {key: sums[key] / scale for key in keys}

    def _check_repeated(self, argument: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        """Raise ValueError where a second run gives other activations, by more than half of the digits of their dtype.

        Then the gradients would be those of another loss.
        """
        with torch.no_grad():
            same = torch.stack(
                [(a - b).abs().max() <= self.tolerance * b.abs().max() for a, b in zip(before, after, strict=True)]
                if len(before[0])
                else [torch.ones((), dtype=torch.bool)]
            )
        if not same.all():
            name = self.loss_names[int((~same).nonzero()[0])]
            raise ValueError(
                f"{argument}: module {name!r} gave other activations when its batch was run a second time, so several "
                "batches cannot form one step; random numbers must come from torch's global generators"
            )


def differentiate(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], pulls: Sequence[Tensor], *, retain: bool = False
) -> tuple[Tensor | None, ...]:
    """Gradients of `outputs`, multiplied by `pulls`, in the leaves; None where an output does not depend on one.

    ValueError where an operation has no gradient, as in some quantised layers: torch would pass over it with a warning.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*an autograd kernel was not registered")
        try:
            return torch.autograd.grad(outputs, leaves, pulls, allow_unused=True, retain_graph=retain)
        except UserWarning as warning:
            operation = str(warning).partition(": an autograd")[0]
            raise ValueError(
                f"model: {operation} has no gradient, so maps cannot be fitted through it: fit them on the model as it "
                "was before quantisation"
            ) from None


def _join(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def _check_count(samples: Sequence[Tensor], argument: str) -> None:
    """Raise ValueError where there are fewer than two samples: one has no distribution to move."""
    if len(samples[0]) < 2:
        raise ValueError(f"{argument} must give at least 2 samples after pooling, got {len(samples[0])}")
