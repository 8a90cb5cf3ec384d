"""What steering is to leave alone: how far maps move a model on prompts that are to stay as they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks import outputs
from ..hooks.capture import Capture
from ..hooks.tokens import BatchTokens
from ..inputs.batches import Batch
from ..inputs.call import unwrap, vocabulary_size
from ..inputs.frozen import RandomState
from ..inputs.prompts import BATCH_SIZE, Prompts, Sampler
from ..inputs.tokenize import TokenRows
from .distributed import IdleTurn
from .objective import HALF_EXPONENTS, Leaves, NonFinite, Objective, differentiate

LOGITS = 1 << 25
"""Logits of a forward pass: several arrays of this size, in float32, are in memory at a time."""
REMEMBERED = 1 << 27
"""Numbers of the unsteered model that are kept in memory; what goes beyond is computed anew at every step."""

# What share of the loss at the start the first automatic weight lets a divergence of the budget cost.
_FIRST_SHARE = 0.03
# An automatic weight changes by at most so much from step to step, and falls to no less than this share of the first.
_FASTEST, _LEAST = 2.0, 0.01


class Preservation:
    """A divergence between the steered and the unsteered model on prompts that are to stay as they are.

    With ``keep_loss="kl"`` it is the Kullback-Leibler divergence KL(unsteered || steered) of the next token in nats,
    the mean over tokens, and the whole model runs. With "activations" it is the mean over tokens of the squared change
    of the activations at the loss modules, scaled and added up over neurons and modules as the loss is; the model is
    left after the last of them.

    Parameters
    ----------
    objective : Objective
        Which modules are mapped and where the loss is taken; after it has seen a target.
    prompts : Prompts
        The prompts to preserve.
    rows : sequence of int, optional
        Which of them. Default: all.
    mini_batch : int, optional
        How many of them each step draws, where there are more.
    """

    def __init__(
        self, objective: Objective, prompts: Prompts, rows: Sequence[int] | None = None, mini_batch: int | None = None
    ) -> None:
        self.objective, self.argument = objective, prompts.argument
        settings: Any = objective.settings
        self.settings, self.kind = settings, settings.keep_loss
        whole = rows is None
        total = sum(prompts.counts()) if mini_batch is not None or not whole else 0
        rows = range(total) if rows is None else rows
        self._sampler = None
        if mini_batch is not None and mini_batch < len(rows):
            self._sampler = Sampler(prompts, mini_batch, batch_size=self._size(prompts), seed=settings.seed)
        if self._sampler is not None:
            self.batches = self._sampler.draw(0)
        elif whole:
            self.batches = prompts.parts(self._size(prompts))
        else:
            self.batches = prompts.take(rows, self._size(prompts))
        self._random = RandomState(objective.model)
        self._remembered: dict[int, Any] = {}
        self._room = 0 if self._sampler is not None else REMEMBERED

    def _size(self, prompts: Prompts) -> int | None:
        """How many prompts run together: as many as the fit's, or fewer where their logits need more memory."""
        size = self.settings.batch_size
        if self.kind != "kl" or not isinstance(prompts.made, TokenRows):
            return size
        longest = max(map(len, prompts.made.columns["input_ids"]))
        fitting = max(1, LOGITS // (longest * vocabulary_size(self.objective.model)))
        return min(fitting, size or BATCH_SIZE)

    def at(self, step: int) -> None:
        """Draw the prompts of a step, counted from 0."""
        if self._sampler is not None:
            self.batches = self._sampler.draw(step)

    @property
    def passes(self) -> int:
        """What a gradient costs: forward passes, of which a backward one counts two."""
        return 3 if len(self._remembered) == len(self.batches) else 4

    def measure(self, maps: Leaves) -> float:
        """The divergence under the maps; NonFinite if it is not finite."""
        with self.objective.processes.together():
            with torch.no_grad(), self._same_random_numbers():
                found = [self._divergence(Capture(), k, batch, maps) for k, batch in enumerate(self.batches)]
            return self._mean([(total.item(), count) for total, count in found])[0]

    def gradient(self, maps: Leaves) -> tuple[float, Tensor, Tensor]:
        """The divergence and its gradients [D] in slopes and shifts of all maps; the graph of one batch at a time."""
        with self.objective.processes.together():
            return self._gradient(maps)

    def _gradient(self, maps: Leaves) -> tuple[float, Tensor, Tensor]:
        leaves = [leaf for pair in maps.values() for leaf in pair]
        sums = [torch.zeros_like(leaf) for leaf in leaves]
        found = []
        with self._same_random_numbers():
            for k, batch in enumerate(self.batches):
                with Capture() as capture:  # checkpointed layers run again on the way back and need their maps
                    total, count = self._divergence(capture, k, batch, maps)
                    found.append((total.item(), count))
                    if total.requires_grad:
                        self._add(sums, total, leaves)
        mean, count = self._mean(found)
        sums, _ = self.objective.processes.added(sums)
        if not all(bool(part.isfinite().all()) for part in sums):
            bad = next(
                name for name, k in zip(maps, range(0, len(sums), 2), strict=True) if not _finite(sums[k : k + 2])
            )
            raise NonFinite(f"{self.argument}: {bad}: the gradient is not finite")
        return mean, torch.cat(sums[::2]) / count, torch.cat(sums[1::2]) / count

    def _add(self, sums: list[Tensor], total: Tensor, leaves: Sequence[Tensor]) -> None:
        """Add the gradients of a sum over tokens; through a float16 model they are scaled, as those of the loss are."""
        exponents = HALF_EXPONENTS if torch.float16 in self.objective.seen else (0,)
        for exponent in exponents:
            scale = 2.0**exponent
            grads = differentiate([total], leaves, [torch.full_like(total, scale)], retain=exponent != exponents[-1])
            parts = [None if grad is None else grad / scale for grad in grads]
            if _finite([part for part in parts if part is not None]) or exponent == exponents[-1]:
                for one, part in zip(sums, parts, strict=True):
                    if part is not None:
                        one += part
                return

    def _mean(self, found: Sequence[tuple[float, float]]) -> tuple[float, float]:
        """The mean over the tokens of all processes, and their number, from the sums and numbers of the batches."""
        totals, counts = zip(*self.objective.processes.numbers(list(found)), strict=True)
        count = math.fsum(counts)
        value = math.fsum(totals) / count
        if not math.isfinite(value):
            raise NonFinite(f"{self.argument}: the divergence from the unsteered model is {value}")
        return value, count

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """Let a model that draws random numbers draw the same ones each time, and the fit go on with its own."""
        now = RandomState(self.objective.model)
        self._random.restore()
        try:
            yield
        finally:
            now.restore()

    def _divergence(self, capture: Capture, k: int, batch: Batch, maps: Leaves) -> tuple[Tensor, float]:
        """The sum over the tokens of batch `k`, and their number."""
        random = RandomState(self.objective.model)
        before = self._remembered.get(k)
        if before is None:
            with torch.no_grad():
                before = self._outputs(Capture(), batch, None)
            numbers = sum(tensor.numel() for tensor in before)
            if numbers <= self._room:
                self._room -= numbers
                self._remembered[k] = before
            random.restore()
        now = self._outputs(capture, batch, maps)
        if self.kind == "kl":
            # Of differences of logarithms: cross-entropies less entropies would lose the digits of small ones.
            return torch.linalg.vecdot(before[0].exp(), before[0] - now[0]).sum(), float(len(now[0]))
        precisions = self.objective.precisions or [one.new_ones(()) for one in now]
        terms = [((b - a).square() * p).sum() / max(len(a), 1) for a, b, p in zip(before, now, precisions, strict=True)]
        terms = [term * scale for term, scale in zip(terms, self._scales(now), strict=True)]
        rows = float(len(now[0]))  # so that batches count by their tokens
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() * rows, rows

    def _scales(self, tensors: Sequence[Tensor]) -> list[float]:
        """What the terms of the modules are multiplied with, which is what the loss does with them."""
        if self.settings.scaling == "paper":
            return [1.0] * len(tensors)
        each = [1 / tensor.shape[1] if self.settings.scaling == "reference" else 1.0 for tensor in tensors]
        return [one / len(tensors) for one in each]

    def _outputs(self, capture: Capture, batch: Batch, maps: Leaves | None) -> list[Tensor]:
        """Log-probabilities [tokens, V] of the next token, or activations [tokens, d] of the loss modules."""
        objective = self.objective
        choice = BatchTokens(objective.model, batch, self.settings)
        found: dict[str, Tensor] = {}
        steer = objective.steerer(choice, maps)
        wanted = frozenset(() if self.kind == "kl" else objective.loss_names)
        sharding = objective.processes.sharding

        def on_output(name: str, module: nn.Module, tensor: Tensor) -> Tensor | None:
            replaced = steer(name, module, tensor)
            if name in wanted and name not in found:
                axis = outputs.channel_axis(module, tensor, name)
                shown = tensor if replaced is None else replaced
                if sharding is not None:
                    sharding.before_backward(module, shown)
                found[name] = choice.rows(name, module, shown, axis)
            return replaced

        names = list(dict.fromkeys([*objective.steered, *wanted]))
        last = objective.loss_names[-1]
        leave = self.kind == "activations" and (sharding is None or sharding.leaves)
        capture.run(objective.model, batch, names, on_output, last, self.settings.forward, leave=leave)
        if self.kind == "activations":
            values = [found[name].to(objective.device, objective.dtype) for name in objective.loss_names]
        else:
            values = [self._log_probabilities(capture.output, choice)]
        return [one[:0] for one in values] if isinstance(batch, IdleTurn) else values

    def _log_probabilities(self, output: Any, choice: BatchTokens) -> Tensor:
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ValueError(
                f"{self.argument}: keep_loss='kl' needs a model that gives logits [batch, tokens, vocabulary], "
                f"{type(unwrap(self.objective.model)).__name__} gives {type(output).__name__}; keep_loss='activations' "
                "needs none"
            )
        mask = choice.named.mask
        if mask is not None and mask.shape != logits.shape[:2]:
            raise ValueError(
                f"{self.argument}: the logits have the shape {list(logits.shape)}, the attention mask "
                f"{list(mask.shape)}; keep_loss='activations' needs no logits"
            )
        rows = logits.flatten(0, 1) if mask is None else logits[mask.to(logits.device) != 0]
        found = rows.to(self.objective.dtype).log_softmax(dim=-1)
        # Processes in step with each other go on together: the mean over all tells as well.
        sharding = self.objective.processes.sharding
        if (sharding is None or not sharding.in_step) and not found.isfinite().all():
            raise NonFinite(f"{self.argument}: the logits are not finite")
        return found


class KeepWeight:
    """The weight of a preservation in a fit: a number, or one that follows a budget.

    One that follows a budget grows where the divergence is above it and falls where it is below, by at most a factor of
    two a step, as the multiplier of a constraint does.

    Attributes
    ----------
    value : float
        The weight.
    budget : float or None
        The largest divergence, or None for a weight that was given.
    """

    def __init__(self, value: float, budget: float | None = None) -> None:
        self.value, self.budget, self.first = value, budget, value

    def start(self, loss: float) -> None:
        """Take the first weight from the loss of maps that change nothing, unless one is there."""
        if self.budget is not None and self.value == 0:
            self.value = self.first = _FIRST_SHARE * loss / self.budget if loss > 0 else 1.0

    def follow(self, measured: float) -> None:
        """Follow what was measured after a step."""
        if self.budget is not None:
            self.value *= min(max(measured / self.budget, 1 / _FASTEST), _FASTEST)
            self.value = max(self.value, _LEAST * self.first)


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
