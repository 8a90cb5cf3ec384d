"""SGD and Adam steps with the prox of the sparse group lasso, in place on the maps of 57 modules x 2048 neurons.

`_core.step`, one thread. The floor is NumPy's in-place scaling of slopes and shifts; the step also reads the
gradients, checks that they are finite, and returns penalty and support, which the rivals leave out. "One module at a
time" is the published way: torch's optimiser, then the prox of every module in turn.

    python benchmarks/step.py [--budget 1.5]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from _machine import Case, Floor, main, scaled_error
from torch import Tensor

from lineas import _core
from lineas.arrays import reference

MODULES, NEURONS = 57, 2048
OFFSETS = np.arange(MODULES + 1, dtype=np.int64) * NEURONS
LR, L1, GROUP = 1e-3, 1e-2, 1e-2
ADAM = (2, 0.9, 0.999, 1e-8)


def parameters() -> list[np.ndarray]:
    """Slopes, shifts and their gradients, flat."""
    rng = np.random.default_rng(0)
    w, b, gw, gb = rng.normal(0, 0.1, (4, MODULES * NEURONS)).astype(np.float32)
    return [1 + w, b, gw, gb]


def moments() -> list[np.ndarray]:
    """Adam's four moments, flat."""
    return [np.full(MODULES * NEURONS, value, np.float32) for value in (0.01, 0.01, 0.01, 0.01)]


def prox_numpy(x: np.ndarray) -> np.ndarray:
    """Prox of the groups in the rows of x."""
    x = np.sign(x) * np.maximum(np.abs(x) - np.float32(LR * L1), 0)
    norm = np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(x.dtype).tiny)
    x *= np.maximum(1 - np.float32(LR * GROUP * NEURONS**0.5) / norm, 0)
    return x


def numpy_step(w: np.ndarray, b: np.ndarray, gw: np.ndarray, gb: np.ndarray) -> None:
    w -= np.float32(LR) * gw
    b -= np.float32(LR) * gb
    w[...] = 1 + prox_numpy(w - 1)
    b[...] = prox_numpy(b)


def prox_torch(x: Tensor) -> Tensor:
    x = torch.nn.functional.softshrink(x, LR * L1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=torch.finfo(x.dtype).tiny)
    return x.mul_((1 - LR * GROUP * NEURONS**0.5 / norm).clamp_(min=0))


def torch_step(pairs: list[tuple[Tensor, Tensor]], update: Callable[[], object]) -> None:
    """`update` takes the gradient step; then the prox of every pair of slopes and shifts, [d] or [modules, d]."""
    update()
    with torch.no_grad():
        for w, b in pairs:
            torch.add(prox_torch(w - 1), 1, out=w)
            b.copy_(prox_torch(b))


def leaves(modules: bool, adam: bool) -> tuple[list[tuple[Tensor, Tensor]], Callable[[], object]]:
    """Parameters with their gradients set, one pair a module or one of all, and torch's step on them."""
    shape = (MODULES, NEURONS)
    w, b, gw, gb = (torch.from_numpy(x.reshape(shape)) for x in parameters())
    parts = [[x.clone() for x in (w, b, gw, gb)]]
    if modules:
        parts = [[x[k].clone() for x in (w, b, gw, gb)] for k in range(MODULES)]
    for pw, pb, pgw, pgb in parts:
        pw.requires_grad_().grad, pb.requires_grad_().grad = pgw, pgb
    pairs = [(part[0], part[1]) for part in parts]
    flat = [x for pair in pairs for x in pair]
    optimizer = torch.optim.Adam(flat, lr=LR) if adam else torch.optim.SGD(flat, lr=LR)
    return pairs, optimizer.step


def measured_error(adam: bool) -> float:
    """Of slopes - 1 and shifts after one step, from the same step in float64."""
    got, state = parameters(), moments()
    want, exact = [x.astype(np.float64) for x in got], [x.astype(np.float64) for x in state]
    penalties = (LR, L1, GROUP, L1, GROUP)
    _core.step(*got, OFFSETS, *penalties, (*state, *ADAM) if adam else None, 1)
    reference.step(*want, OFFSETS, *penalties, (*exact, *ADAM) if adam else None)
    return max(scaled_error(got[0] - np.float32(1), want[0] - 1), scaled_error(got[1], want[1]))


def cases() -> Iterator[Case]:
    for adam in (False, True):
        ours, state = parameters(), moments()
        scaled = parameters()[:2]
        factor = np.float32(1 - 2**-23)
        mine = (*state, *ADAM) if adam else None
        rivals = {}
        for name, modules in (("torch batched", False), ("torch, one module at a time", True)):
            pairs, update = leaves(modules, adam)
            rivals[name] = lambda pairs=pairs, update=update: torch_step(pairs, update)
        if not adam:
            batched = [x.reshape(MODULES, NEURONS) for x in parameters()]
            rivals["numpy batched"] = lambda arrays=batched: numpy_step(*arrays)
        yield Case(
            f"{'Adam' if adam else 'SGD'} + prox step, in place",
            f"{MODULES} x {NEURONS}",
            lambda ours=ours, mine=mine: _core.step(*ours, OFFSETS, LR, L1, GROUP, L1, GROUP, mine, 1),
            floors={
                "scaling in place": Floor(
                    lambda arrays=scaled, factor=factor: [np.multiply(x, factor, out=x) for x in arrays],
                    2 * sum(x.nbytes for x in scaled),
                )
            },
            rivals=rivals,
            errors={"parameters": measured_error(adam)},
            goals={} if adam else {"scaling in place": 3.0, "torch batched": 8.5},
        )


if __name__ == "__main__":
    main(__doc__, cases)
