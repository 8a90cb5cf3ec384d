"""What a sequence of fits returns, and its maps on a model with a strength for each concept. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from .._checks import as_finite
from .._names import hint
from ..maps.metadata import Selection, describe
from ..maps.records import Record
from ..maps.steering import SteeringMaps
from .result import FitResult

if TYPE_CHECKING:
    from ..hooks.attach import Handle
    from ..hooks.strength import Strength


@dataclass(frozen=True, eq=False, repr=False)
class SequenceResult(Record):
    """What `lineas.fit_sequence` found: maps for several concepts, each fitted while the earlier ones are on.

    Attributes
    ----------
    results : dict of str to FitResult
        The fit of every concept, in order. The maps of each are its own, without those of the others; its losses are
        those with the earlier concepts' maps on as well, at strength 1.
    on_top_of : SteeringMaps or None
        The maps that were on during all fits, if there were any. They come before all others, at strength 1.
    stopped : str
        "finished", or "interrupted" where Ctrl-C ended the fit of the last concept in `results`, or came before that of
        the next one began.
    """

    FORMAT = "lineas sequence of fits"

    results: dict[str, FitResult]
    on_top_of: SteeringMaps | None = None
    stopped: str = "finished"

    def __post_init__(self) -> None:
        if not self.results:
            raise ValueError("results must hold at least one concept")

    @property
    def maps(self) -> SteeringMaps:
        """The maps of all concepts composed, in order: one set of maps that does at strength 1 what all do together.

        Their metadata name the concepts as "tasks", and have the metadata of each among "parts". At another strength
        they are not what the concepts are at that strength, one after the other: see `composed`. ValueError where maps
        have gates: those can only be attached.
        """
        return self.composed()

    def composed(self, strengths: Mapping[str, float] | None = None) -> SteeringMaps:
        """Return one set of maps that does at strength 1 what the concepts do, each at a strength of its own.

        To save, fold or export them as one.

        Parameters
        ----------
        strengths : dict of str to float, optional
            By concept. Those that are left out have strength 1.

        Raises
        ------
        TypeError
            If `strengths` is not a mapping, or one of them is no number.
        ValueError
            If there is no such concept, a strength is not finite, or maps have gates.
        """
        given = self._given(strengths)
        found = {name: as_finite(strength, f"strengths[{name!r}]") for name, strength in given.items()}
        parts = [
            result.maps if found.get(name, 1.0) == 1 else result.maps.scaled(found[name])
            for name, result in self.results.items()
        ]
        if self.on_top_of is not None:
            parts.insert(0, self.on_top_of)
        maps = reduce(lambda first, second: second @ first, parts)
        facts = {"tasks": list(self.results), "parts": [part.metadata for part in parts]}
        return SteeringMaps(maps, describe("sequence", **facts), maps.gates)

    def attach(
        self, model: Any, strengths: Mapping[str, Strength] | None = None, *, tokens: Selection | None = None
    ) -> SequenceHandle:
        """Put the maps of all concepts into a model, in order, with a live strength for each.

        Parameters
        ----------
        model : torch.nn.Module
            The model that they were fitted to.
        strengths : dict of str to (float, array or callable), optional
            By concept, as in `SteeringMaps.attach`. Those that are left out have strength 1.
        tokens : "all", "last", "prompt", "generated", slice or callable, optional
            As in `SteeringMaps.attach`, for all concepts. Default: the tokens that they were fitted for.

        Returns
        -------
        lineas.SequenceHandle
            Usable as a with-block; ``handle["mood"].strength = 0.5`` changes that of one concept.

        Raises
        ------
        TypeError, ValueError
            As `SteeringMaps.attach`, or if there is no such concept; nothing is attached then.
        """
        given = self._given(strengths)
        handles: dict[str, Handle] = {}
        before = None if self.on_top_of is None else self.on_top_of.attach(model, tokens=tokens)
        try:
            for name, result in self.results.items():
                handles[name] = result.maps.attach(model, given.get(name, 1.0), tokens=tokens)
        except BaseException:
            SequenceHandle(handles, before).remove()
            raise
        return SequenceHandle(handles, before)

    def _given(self, strengths: Mapping[str, Any] | None) -> dict[str, Any]:
        return {} if strengths is None else _by_concept(strengths, list(self.results))

    def __repr__(self) -> str:
        fits = ", ".join(f"{name!r}: {result!r}" for name, result in self.results.items())
        return f"SequenceResult({{{fits}}}, stopped={self.stopped!r})"


class SequenceHandle:
    """The maps of several concepts on a model, as `SequenceResult.attach` returns them.

    The `lineas.Handle` of each concept is ``handle["name"]``: its ``strength`` is live, and it has ``at()`` and
    ``tokens``. A with-block takes all of them off at its end.

    Attributes
    ----------
    strengths : dict of str to (float, array or callable)
        A copy of the strengths by concept. Setting it, to a dict of any of the concepts, changes those: all, or none
        where one is wrong.
    attached : bool
        Whether all concepts are still on.
    """

    def __init__(self, handles: Mapping[str, Handle], before: Handle | None = None) -> None:
        self._handles, self._before = dict(handles), before

    def __getitem__(self, name: str) -> Handle:
        if name not in self._handles:
            raise KeyError(f"no concept {name!r}{hint(str(name), list(self._handles), 'this sequence')}")
        return self._handles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def strengths(self) -> dict[str, Any]:
        return {name: handle.strength for name, handle in self._handles.items()}

    @strengths.setter
    def strengths(self, strengths: Mapping[str, Strength]) -> None:
        given, before = _by_concept(strengths, list(self._handles)), self.strengths
        try:
            for name, strength in given.items():
                self._handles[name].strength = strength
        except BaseException:
            for name in given:
                self._handles[name].strength = before[name]
            raise

    @property
    def attached(self) -> bool:
        return all(handle.attached for handle in self._all())

    def remove(self) -> None:
        """Take the maps of all concepts off the model. Does nothing where they are off already."""
        for handle in self._all():
            handle.remove()

    def _all(self) -> list[Handle]:
        return [*self._handles.values(), *([] if self._before is None else [self._before])]

    def __enter__(self) -> SequenceHandle:
        for handle in self._all():
            handle.__enter__()  # an error where it was removed
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = f"strengths={self.strengths}" if self.attached else "removed"
        return f"SequenceHandle({', '.join(map(repr, self._handles))}; {state})"


def _by_concept(strengths: Any, names: list[str]) -> dict[str, Any]:
    """`strengths` by concept; TypeError where they are no mapping, ValueError where one is for none of `names`."""
    if not isinstance(strengths, Mapping):
        raise TypeError(f"strengths must map concepts to strengths, got {type(strengths).__name__}")
    for name in strengths:
        if name not in names:
            raise ValueError(f"strengths has {name!r}, which is none of the concepts {names}")
    return dict(strengths)
