"""Activations by module, with what they were collected from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray


class Activations(dict[str, NDArray]):
    """Pooled activations by module name, in execution order, as `lineas.collect` returns them: a dict with metadata.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        [n, d] by module name.
    metadata : dict
        What they were collected from: "model", "layers", "pooling" and "tokens", as far as known. `lineas.fit` hands it
        on to the maps, so that these act on the tokens that they were fitted for.
    """

    def __init__(self, arrays: Mapping[str, NDArray], metadata: Mapping[str, Any]) -> None:
        super().__init__(arrays)
        self.metadata = dict(metadata)
