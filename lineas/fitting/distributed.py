"""Fits on several processes: prompts are dealt out, activations gathered, gradients added up, decisions shared.

Everything that a fit decides by is the same on every process to the bit: numbers are gathered and added in the order of
the processes, or are those of the first one. What goes wrong on one process is told to all others in the next exchange,
so that none waits for one that has left.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from ..inputs.batches import Batch
from ..inputs.prompts import BATCH_SIZE, Prompts
from ..inputs.tokenize import TokenRows
from .sharded import Sharding

# Bytes of the first part of every message, which most notes fit in.
_BLOCK = 4096
# Signals of Ctrl-C that wait for the next exchange; torchrun hands on each that it gets, so that there are two.
_PATIENCE = 2
_KNOWN = "_lineas_known_to_all"

T = TypeVar("T")


class NonFinite(ValueError):
    """A loss or a gradient is not finite; the message names the module."""


class ProcessError(RuntimeError):
    """Another process of a fit has failed, has ended, or is at another place."""


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IdleTurn(Batch):
    """A batch that a process without prompts of its own runs; nothing of it counts.

    It tells that process what the others know of the modules, and keeps it in step where models are divided.
    """


class Shared(Prompts):
    """The part of a set of prompts that is dealt to one of several processes; `counts` are those of the whole set.

    Rows of tokens are dealt out in equal parts, as are batches that the user made where a `batch_size` divides them
    anyway; without one these are dealt out whole. A process that gets none has an `IdleTurn`.

    Parameters
    ----------
    whole : Prompts
        The set, the same on all processes.
    rank, size : int
        Number of the process, and how many there are.
    even : bool
        Whether all processes are to have the same number of batches.
    """

    def __init__(self, whole: Prompts, rank: int, size: int, *, even: bool) -> None:
        super().__init__(whole.made, whole.argument)
        self.rank, self.size, self.even = rank, size, even

    def parts(self, batch_size: int | None = None) -> list[Batch]:
        """This process's prompts in batches of at most `batch_size`."""
        if isinstance(self.made, TokenRows) or batch_size is not None:
            return self.take(range(sum(self.counts())), batch_size)
        dealt = [len(self._mine(self.made, rank)) for rank in range(self.size)]
        return self._filled(self._mine(self.made, self.rank), dealt)

    def take(self, rows: Sequence[int] | NDArray, batch_size: int | None = None) -> list[Batch]:
        """This process's part of the prompts `rows`."""
        found = super().take(self._mine(rows, self.rank), batch_size)
        return self._filled(found, [self._batches(self._mine(rows, rank), batch_size) for rank in range(self.size)])

    def _mine(self, entries: Any, rank: int) -> Any:
        return entries[len(entries) * rank // self.size : len(entries) * (rank + 1) // self.size]

    def _batches(self, rows: Sequence[int] | NDArray, batch_size: int | None) -> int:
        """How many batches so many rows are."""
        if isinstance(self.made, TokenRows):
            return -(-len(rows) // (batch_size or BATCH_SIZE))
        home = np.searchsorted(np.cumsum(self.counts()), np.asarray(rows, np.int64), side="right")
        sizes = np.unique(home, return_counts=True)[1]
        return int(sum(-(-size // batch_size) if batch_size else 1 for size in sizes))

    def _filled(self, found: Sequence[Batch], dealt: Sequence[int]) -> list[Batch]:
        """The batches, after as many idle turns as it takes: the last batch is the one that a gradient runs once."""
        idle = (max(dealt) if self.even else 1) - len(found)
        if idle <= 0:
            return list(found)
        some = self.made.batch([0]) if isinstance(self.made, TokenRows) else self.made[0]
        return [IdleTurn(**{field.name: getattr(some, field.name) for field in fields(some)})] * idle + list(found)


# --- one process ------------------------------------------------------------------------------------------------------


class Processes:
    """One process by itself: what is shared among all is what it has."""

    rank = 0
    size = 1
    sharding: Sharding | None = None

    def share(self, prompts: Prompts) -> Prompts:
        """The part of the prompts that this process runs."""
        return prompts

    def seed(self, seed: int) -> int:
        """A seed of this process, of whose prompts the random numbers are not those of others."""
        return seed

    def session(self) -> AbstractContextManager[Any]:
        """What surrounds a fit: an error in one process ends it in all."""
        return nullcontext()

    def together(self) -> AbstractContextManager[Any]:
        """What surrounds computations after which all go on, or none: an error in one process is one in all."""
        return nullcontext()

    def compare(self, facts: Mapping[str, Any]) -> None:
        """ValueError, which names it, where a fact is another on another process."""

    def rows(self, samples: Sequence[Tensor], argument: str) -> list[Tensor]:
        """The rows [n, d] of all processes, one process after the other, of every module."""
        return list(samples)

    def own_rows(self, gathered: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """What belongs to the rows of this process, `own`, of tensors for the rows that were gathered last."""
        return list(gathered)

    def check_whole(self, samples: Sequence[Tensor], names: Sequence[str], tolerance: float) -> None:
        """ValueError, which names the module, where processes that run the same prompts give different activations."""

    def added(self, tensors: Sequence[Tensor], same: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
        """The sums over all processes of `tensors`, and `same` as the first process has it."""
        return list(tensors), list(same)

    def numbers(self, found: list[Any]) -> list[Any]:
        """The entries of the lists of all processes, one process after the other."""
        return found

    def same(self, value: T) -> T:
        """What the first process has: numbers, text, None, and lists and dicts of them."""
        return value

    def same_tensors(self, *tensors: Tensor) -> None:
        """Copy what the first process has into the tensors."""

    def each(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of all processes: those of process k > 0 by their name and " of process k"."""
        return dict(tensors)

    def mine(self, name: str) -> str:
        """What `each` calls a tensor of this process."""
        return name

    def read(self, load: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> tuple[dict[str, Tensor], Any]:
        """Tensors and state that the first process loads."""
        return load()


ALONE = Processes()


# --- several ----------------------------------------------------------------------------------------------------------


class _Message(NamedTuple):
    """What a process has sent."""

    note: Any
    tensors: list[Tensor]


class Group(Processes):
    """The processes of a group of torch.distributed, which run the same fit.

    Parameters
    ----------
    group : ProcessGroup
        Their group.
    sharding : Sharding
        How the model is divided among them.
    """

    def __init__(self, group: Any, sharding: Sharding) -> None:
        self.group = group
        self.sharding: Sharding = sharding
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group: this process is not in it")
        kinds = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
        self._kinds = kinds if "cpu" in kinds else kinds[:1]
        self._over = False
        self._starts: list[int] = []
        self._interrupts, self._interrupted = 0, False

    @property
    def divides(self) -> bool:
        """Whether prompts are dealt out; a model of which every process computes a part takes all of them on each."""
        return self.sharding.kind != "tensor"

    def share(self, prompts: Prompts) -> Prompts:
        return Shared(prompts, self.rank, self.size, even=self.sharding.in_step) if self.divides else prompts

    def seed(self, seed: int) -> int:
        if self.rank == 0 or not self.divides:
            return seed
        return int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0])

    # --- what goes wrong ---

    @contextmanager
    def session(self) -> Iterator[None]:
        with self._patient():
            try:
                yield
                self._exchange("the end of the fit")
            except BaseException as error:
                self._tell(error)
                raise

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    @contextmanager
    def _patient(self) -> Iterator[None]:
        """Let Ctrl-C wait for the next exchange, where all processes stop at the same place."""
        main = threading.current_thread() is threading.main_thread()
        if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._interrupts += 1
            if self._interrupts > _PATIENCE:
                signal.default_int_handler(number, frame)

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _tell(self, error: BaseException) -> None:
        """Tell the others of an error that they do not know; raise what all raise then."""
        if self._over or getattr(error, _KNOWN, False):
            return
        if self.sharding.in_step and not isinstance(error, NonFinite):
            # The others may be within the model, waiting for this process there: its end tells them.
            self._over = True
            return
        try:
            self._exchange("an error", error=error)
        except ProcessError as other:
            if not isinstance(error, NonFinite | KeyboardInterrupt):  # they would go on
                raise error from other
            raise

    def _raise(self, notes: Sequence[Any], own: BaseException | None) -> NoReturn:
        """Raise what the worst of the errors asks for: what ends the fit, before Ctrl-C, before what is not finite."""
        failed = [(rank, note["error"]) for rank, note in enumerate(notes) if note["error"] is not None]
        order = ("NonFinite", "KeyboardInterrupt")
        rank, (kind, text) = min(failed, key=lambda one: order.index(one[1][0]) if one[1][0] in order else -1)
        if kind == "NonFinite":
            error: BaseException = NonFinite(text)
        elif kind == "KeyboardInterrupt":
            self._interrupted = True
            error = KeyboardInterrupt()
        else:
            self._over = True
            if own is not None and type(own).__name__ not in order:
                raise own
            error = ProcessError(f"process {rank} of the fit has stopped: {kind}: {text}")
        setattr(error, _KNOWN, True)
        raise error from own

    def _lost(self, error: BaseException) -> ProcessError:
        self._over = True
        found = ProcessError(
            "another process of the fit has ended or does not answer, and so this one stops: a checkpoint holds the "
            f"last whole step ({' '.join(str(error).split())})"
        )
        setattr(found, _KNOWN, True)
        return found

    # --- exchanges ---

    def _device(self, kind: str) -> torch.device:
        chosen = kind if kind in self._kinds else self._kinds[0]
        if chosen == "cpu":
            return torch.device("cpu")
        return torch.device(chosen, torch.get_device_module(chosen).current_device())

    def _all(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            dist.all_gather(found, tensor, group=self.group)
        except RuntimeError as error:  # as all that torch.distributed raises is
            raise self._lost(error) from error
        return found

    def _exchange(
        self, what: str, note: Any = None, tensors: Sequence[Tensor] = (), error: BaseException | None = None
    ) -> list[_Message]:
        """Give a note, which JSON can hold, and tensors to all processes, and get theirs.

        What any of them has met with, or a Ctrl-C that waited, is raised in all. ProcessError where one is at another
        place, or has ended.
        """
        if self._over:
            raise ProcessError("the processes of the fit have parted")
        if error is None and self._interrupts and not self._interrupted:
            error = KeyboardInterrupt()
        try:
            return self._exchanged(what, note, tensors, error)
        except BaseException as found:
            # Between its parts nothing may come in: from here on the others would take one thing for another.
            self._over |= not getattr(found, _KNOWN, False)
            raise

    def _exchanged(
        self, what: str, note: Any, tensors: Sequence[Tensor], error: BaseException | None
    ) -> list[_Message]:
        told = None if error is None else [_kind(error), str(error)]
        laid = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        own = json.dumps({"what": what, "note": note, "laid": laid, "error": told}).encode()
        notes = [json.loads(text) for text in self._texts(own)]
        if any(note["error"] is not None for note in notes):
            self._raise(notes, error)
        self._check_places(notes)
        data = self._data(tensors, notes)
        return [_Message(one["note"], _unpacked(part, one["laid"])) for one, part in zip(notes, data, strict=True)]

    def _texts(self, own: bytes) -> list[bytes]:
        """The texts of all processes: in one block where they fit."""
        device = self._device("cpu")
        head = len(own).to_bytes(8, "little")

        def packed(text: bytes, size: int) -> Tensor:
            return torch.frombuffer(bytearray(text.ljust(size)), dtype=torch.uint8).to(device)

        blocks = [bytes(block.cpu().numpy()) for block in self._all(packed(head + own[: _BLOCK - 8], _BLOCK))]
        sizes = [int.from_bytes(block[:8], "little") for block in blocks]
        longest = max(sizes)
        if longest > _BLOCK - 8:
            texts = [bytes(block.cpu().numpy()) for block in self._all(packed(own, longest))]
        else:
            texts = [block[8:] for block in blocks]
        return [text[:size] for text, size in zip(texts, sizes, strict=True)]

    def _check_places(self, notes: Sequence[Any]) -> None:
        for rank, note in enumerate(notes):
            if note["what"] != notes[0]["what"]:
                self._over = True
                raise ProcessError(
                    f"the processes of the fit are at different places: process 0 at {notes[0]['what']}, process "
                    f"{rank} at {note['what']}; every process must make the same calls"
                )

    def _data(self, tensors: Sequence[Tensor], notes: Sequence[Any]) -> list[Tensor]:
        """The tensors of all processes, as bytes."""
        sizes = [sum(_bytes(dtype, shape) for dtype, shape in note["laid"]) for note in notes]
        if not max(sizes):
            return [torch.empty(0, dtype=torch.uint8)] * self.size
        device = self._device(tensors[0].device.type if tensors else "cpu")
        flat = [tensor.detach().to(device).contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
        own = torch.cat([*flat, torch.empty(max(sizes) - sizes[self.rank], dtype=torch.uint8, device=device)])
        return self._all(own)

    # --- what fits share ---

    def compare(self, facts: Mapping[str, Any]) -> None:
        plain = json.loads(json.dumps(facts, default=repr))
        found = [message.note for message in self._exchange("the start of the fit", plain)]
        for rank, other in enumerate(found):
            for key in {**found[0], **other}:
                if other.get(key) != found[0].get(key):
                    detail = "" if "digest" in key else f": {found[0].get(key)!r} and {other.get(key)!r}"
                    raise ValueError(
                        f"process_group: every process must be given the same arguments: processes 0 and {rank} "
                        f"differ in the {key}{detail}"
                    )

    def rows(self, samples: Sequence[Tensor], argument: str) -> list[Tensor]:
        messages = self._exchange(f"the activations of {argument}", tensors=samples)
        if not self.divides:
            messages = messages[:1]
        before = messages[: self.rank] if self.divides else []
        self._starts = [sum(len(message.tensors[k]) for message in before) for k in range(len(samples))]
        parts = zip(*(message.tensors for message in messages), strict=True)
        return [torch.cat(part).to(own.device) for part, own in zip(parts, samples, strict=True)]

    def own_rows(self, gathered: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        return [rows[start : start + len(one)] for rows, one, start in zip(gathered, own, self._starts, strict=True)]

    def check_whole(self, samples: Sequence[Tensor], names: Sequence[str], tolerance: float) -> None:
        if self.divides:
            return
        first, *others = (message.tensors for message in self._exchange("the parts of the model", tensors=samples))
        for rank, other in enumerate(others, start=1):
            for name, a, b in zip(names, first, other, strict=True):
                if a.shape != b.shape or not bool(((a - b).abs() <= tolerance * a.abs().max()).all()):
                    raise ValueError(
                        f"module {name!r} has other activations in process {rank} than in process 0: its output is "
                        "divided among them (tensor parallelism); choose modules whose output is whole on each, such "
                        "as norms and layers"
                    )

    def added(self, tensors: Sequence[Tensor], same: Sequence[Tensor] = ()) -> tuple[list[Tensor], list[Tensor]]:
        messages = [message.tensors for message in self._exchange("the gradients", tensors=[*tensors, *same])]
        own, count = [*tensors, *same], len(tensors)
        first = [found.to(tensor.device) for found, tensor in zip(messages[0], own, strict=True)]
        sums = first[:count]
        for message in messages[1:] if self.divides else []:
            sums = [one + other.to(one.device) for one, other in zip(sums, message[:count], strict=True)]
        return sums, first[count:]

    def numbers(self, found: list[Any]) -> list[Any]:
        messages = self._exchange("the divergence", found)
        return [entry for message in (messages if self.divides else messages[:1]) for entry in message.note]

    def same(self, value: T) -> T:
        return self._exchange("a decision", value if self.rank == 0 else None)[0].note

    def same_tensors(self, *tensors: Tensor) -> None:
        found = self._exchange("the maps", tensors=tensors if self.rank == 0 else ())[0].tensors
        for tensor, first in zip(tensors, found, strict=True):
            tensor.copy_(first)

    def each(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        messages = self._exchange("the checkpoint", list(tensors), list(tensors.values()))
        return {
            _of_process(name, rank): tensor
            for rank, message in enumerate(messages)
            for name, tensor in zip(message.note, message.tensors, strict=True)
        }

    def mine(self, name: str) -> str:
        return _of_process(name, self.rank)

    def read(self, load: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]]) -> tuple[dict[str, Tensor], Any]:
        tensors, state = load() if self.rank == 0 else ({}, None)
        found = self._exchange("reading the checkpoint", [list(tensors), state], list(tensors.values()))[0]
        names, state = found.note
        return dict(zip(names, (tensor.cpu() for tensor in found.tensors), strict=True)), state


def _of_process(name: str, rank: int) -> str:
    return f"{name} of process {rank}" if rank else name


def _kind(error: BaseException) -> str:
    return next(
        (one.__name__ for one in (NonFinite, KeyboardInterrupt) if isinstance(error, one)), type(error).__name__
    )


def _bytes(dtype: str, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * getattr(torch, dtype).itemsize


def _unpacked(data: Tensor, laid: Sequence[Any]) -> list[Tensor]:
    """Tensors out of bytes; each a copy, since a part may begin anywhere."""
    found, start = [], 0
    for dtype, shape in laid:
        stop = start + _bytes(dtype, shape)
        found.append(data[start:stop].clone().view(getattr(torch, dtype)).reshape(shape))
        start = stop
    return found


def processes_of(model: nn.Module, process_group: Any) -> tuple[Processes, nn.Module]:
    """The processes of a fit, and the model as it is to be called there.

    Parameters
    ----------
    model : nn.Module
        What the user handed over. Of one that DistributedDataParallel wraps the model inside is called, since forward
        passes of the wrapper wait for those of the other processes.
    process_group : None, "world" or ProcessGroup
        The group, as users give it; None for this process alone.

    Raises
    ------
    ValueError
        If torch.distributed is not initialised, this process is not in the group, or the model is divided among
        processes in a way that does not fit.
    """
    if process_group is None:
        Sharding.check_alone(model)
        return ALONE, model
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"process_group={process_group!r}: torch.distributed is not initialised; call "
            "torch.distributed.init_process_group() in a script that torchrun starts"
        )
    group = dist.group.WORLD if process_group == "world" else process_group
    inner = model
    while isinstance(inner, nn.parallel.DistributedDataParallel):
        inner = inner.module
    return Group(group, Sharding(inner, dist.get_world_size(group))), inner
