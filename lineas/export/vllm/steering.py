"""Maps on the tokens of a batch: which request wants what, and one hook a module that does it.

vLLM runs the tokens of all requests as rows [tokens, channels]. A batch is told by `Steering.begin`, from then on until
`Steering.end` the hooks change the rows of the requests that want it. Each change is `lineas.hooks.affine.apply` of the
parameters that a hook of `maps.attach` has at that strength, row by row, so that the result is that of the hooks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...hooks.affine import apply, parameters, working_dtype
from ...maps.affine import AffineMap
from ...maps.steering import SteeringMaps
from .requests import Strengths

# Rows that are mapped at once: what a change needs beside the activations stays small.
CHUNK = 2048
_FIRST_SLOTS = 16

Pair = tuple[str, float]
"""Maps by name, at a strength."""


class Step(NamedTuple):
    """One map for each of some rows; the maps of a request act in as many steps."""

    names: frozenset[str]
    rows: Tensor | None  # of the batch, int64; None: all
    slots: Tensor | int  # of the parameters of each of these rows, or of all


class Batch(NamedTuple):
    """What is to be done to the rows of a batch: all steps, and the rows that have any."""

    n_tokens: int
    steps: tuple[Step, ...]
    names: frozenset[str]
    rows: Tensor | None


class Slots:
    """Places of the parameters of maps at strengths, the same for all modules; place 0 changes nothing."""

    def __init__(self) -> None:
        self.size = _FIRST_SLOTS
        self.version = 0  # of `places`
        self.places: dict[Pair, int] = {}

    def take(self, pairs: Sequence[Pair]) -> None:
        """Give every pair of a batch a place: that of a pair which the batch lacks, where all are taken."""
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self.places]
        if not new:
            return
        taken = set(self.places.values())
        free = [place for place in range(1, self.size) if place not in taken]
        wanted = set(pairs)
        for pair in list(self.places):
            if len(free) >= len(new):
                break
            if pair not in wanted:
                free.append(self.places.pop(pair))
        while len(free) < len(new):
            free.extend(range(self.size, 2 * self.size))
            self.size *= 2
        for pair in new:
            self.places[pair] = free.pop(0)
        self.version += 1

    def __getitem__(self, pair: Pair) -> int:
        return self.places[pair]


class ModuleHook:
    """A forward hook that maps rows of a module's output.

    Parameters
    ----------
    name : str
        The module, for messages.
    maps : Mapping[str, AffineMap]
        Its map in each of the maps that have one, all of one width.
    stream : bool
        Whether the module gives the residual stream as two terms whose sum it is, as vLLM's decoder layers do.
    """

    def __init__(self, steering: Steering, name: str, maps: Mapping[str, AffineMap], stream: bool) -> None:
        self.steering, self.name, self.maps, self.stream = steering, name, dict(maps), stream
        self.d = next(iter(self.maps.values())).d
        self.names = frozenset(self.maps)
        self._weights: Tensor | None = None
        self._biases: Tensor | None = None
        self._filled: dict[int, Pair] = {}
        self._version = 0

    def __call__(self, module: nn.Module, args: object, output: object) -> object:
        batch = self.steering.batch
        if batch is None or batch.names.isdisjoint(self.names):
            return None
        self.steering.acted.add(self.name)
        if isinstance(output, Tensor):
            return self._mapped(batch, output)
        if not isinstance(output, tuple) or not output or not isinstance(output[0], Tensor):
            self._refuse(f"it gives a {type(output).__name__}")
            return None
        if self.stream and len(output) == 2 and isinstance(output[1], Tensor) and output[1].shape == output[0].shape:
            return self._mapped_sum(batch, *output)
        if self.stream and len(output) > 1:
            self._refuse(f"it gives {len(output)} values, which are not known to be terms of a sum")
            return None
        # A norm that adds the residual gives (output, residual), a linear layer (output, bias): the first is the one.
        mapped = self._mapped(batch, output[0])
        return None if mapped is None else (mapped, *output[1:])

    def _refuse(self, why: str) -> None:
        """Leave an output as it is and say so: an error here would end the engine, with the requests of others."""
        self.steering.report(f"module {self.name!r} is left unsteered: {why}")

    def _fits(self, batch: Batch, z: Tensor) -> bool:
        """Whether an output has a row of the right width for each token; reports where it has not."""
        fits = z.is_floating_point() and z.shape[-1] == self.d and z.numel() >= batch.n_tokens * self.d
        if not fits:
            shape = f"{list(z.shape)}, {z.dtype}"
            self._refuse(f"its maps are for {batch.n_tokens} tokens of {self.d} neurons, its output is {shape}")
        return fits

    def _mapped(self, batch: Batch, z: Tensor) -> Tensor | None:
        """`z` with the steps of a batch on its rows; the others keep their bits."""
        if not self._fits(batch, z):
            return None
        rows = z.reshape(-1, self.d).clone()
        self._map(batch, rows)
        return rows.view(z.shape)

    def _mapped_sum(self, batch: Batch, branch: Tensor, stream: Tensor) -> tuple[Tensor, Tensor] | None:
        """Two terms whose sum is mapped: for mapped rows the whole of it in the first, and nothing in the second."""
        if not self._fits(batch, branch):
            return None
        which = slice(batch.n_tokens) if batch.rows is None else batch.rows
        first, second = branch.reshape(-1, self.d).clone(), stream.reshape(-1, self.d).clone()
        first[which] += second[which]
        second[which] = 0
        self._map(batch, first)
        return first.view(branch.shape), second.view(stream.shape)

    def _map(self, batch: Batch, z: Tensor) -> None:
        """Do the steps of a batch on rows [tokens, d], in place."""
        weights, biases = self._tables(z)
        for step in batch.steps:
            if step.names.isdisjoint(self.names):
                continue
            n_rows = batch.n_tokens if step.rows is None else len(step.rows)
            for start in range(0, n_rows, CHUNK):
                end = min(start + CHUNK, n_rows)
                rows = slice(start, end) if step.rows is None else step.rows[start:end]
                slots = step.slots if isinstance(step.slots, int) else step.slots[start:end]
                z[rows] = apply(z[rows], weights[slots], biases[slots], -1)

    def _tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes and shifts [slots, d] for activations like `like`, with those of all pairs that have a place."""
        dtype, slots = working_dtype(like.dtype), self.steering.slots
        size = slots.size
        weights, biases = self._weights, self._biases
        if weights is None or biases is None or weights.dtype != dtype or weights.device != like.device:
            weights = torch.ones(size, self.d, dtype=dtype, device=like.device)
            biases = torch.zeros_like(weights)
            self._filled = {}
        elif len(weights) < size:
            more = size - len(weights), self.d
            weights = torch.cat([weights, weights.new_ones(more)])
            biases = torch.cat([biases, biases.new_zeros(more)])
        elif self._version == slots.version:
            return weights, biases
        self._weights, self._biases, self._version = weights, biases, slots.version
        for pair, place in slots.places.items():
            if self._filled.get(place) != pair:
                self._filled[place] = pair
                if pair[0] in self.maps:
                    weight, bias = parameters(self.maps[pair[0]], pair[1], like.device, dtype)
                    weights[place], biases[place] = weight, bias
                else:
                    weights[place], biases[place] = 1, 0
        return weights, biases


class Steering:
    """What the requests of an engine want, and the batch that runs.

    Parameters
    ----------
    catalogue : Mapping[str, SteeringMaps]
        Maps by name.
    logger : logging.Logger
        Where problems go that must not end the engine.
    """

    def __init__(self, catalogue: Mapping[str, SteeringMaps], logger: logging.Logger) -> None:
        self.catalogue, self.logger = catalogue, logger
        self.slots = Slots()
        self.batch: Batch | None = None
        self.acted: set[str] = set()
        self.hooks: dict[str, ModuleHook] = {}
        self._wanted: dict[str, tuple[Pair, ...]] = {}
        self._reported: set[str] = set()

    def add(self, request: str, strengths: Strengths) -> None:
        """Note what a request wants; none but those of `strengths`, where there were others."""
        self._wanted.pop(request, None)
        if strengths:
            self._wanted[request] = tuple(strengths.items())

    def remove(self, request: str) -> None:
        """Forget a request."""
        self._wanted.pop(request, None)

    def begin(self, requests: Sequence[str], n_tokens: Sequence[int], device: torch.device) -> None:
        """Tell the hooks of a batch: requests in the order of their rows, and how many rows each of them has."""
        wanted = [self._wanted.get(request, ()) for request in requests]
        if not any(wanted):
            self.batch = None
            return
        counts = np.asarray(n_tokens, dtype=np.int64)
        every = dict.fromkeys(pair for pairs in wanted for pair in pairs)
        self.slots.take(list(every))
        steps = []
        for depth in range(max(map(len, wanted))):
            here = [pairs[depth] if depth < len(pairs) else None for pairs in wanted]
            slots = np.repeat([0 if pair is None else self.slots[pair] for pair in here], counts)
            rows = np.flatnonzero(slots)
            slots = slots[rows]
            names = frozenset(pair[0] for pair in here if pair is not None)
            single = int(slots[0]) if len(slots) and (slots == slots[0]).all() else None
            steps.append(
                Step(
                    names,
                    None if len(rows) == counts.sum() else torch.from_numpy(rows).to(device),
                    single if single is not None else torch.from_numpy(slots).to(device),
                )
            )
        names = frozenset(pair[0] for pair in every)
        self.batch = Batch(int(counts.sum()), tuple(steps), names, steps[0].rows)

    def end(self) -> None:
        """Tell the hooks that the batch is over; say once which of its modules did not run."""
        batch, self.batch = self.batch, None
        if batch is None:
            return
        for name, hook in self.hooks.items():
            if name not in self.acted and not batch.names.isdisjoint(hook.names):
                self.report(f"module {name!r} is left unsteered: vLLM does not call it")

    def report(self, problem: str) -> None:
        """Log a problem once."""
        if problem not in self._reported:
            self._reported.add(problem)
            self.logger.error("lineas: %s", problem)
