"""The model of a server: jobs wait for a thread of their own, and those that have one take turns, token by token.

A job is what one request asks for. Its strengths hold in its thread alone (`lineas.Handle.at`), so jobs at different
strengths go on side by side, while the model runs one pass at a time. Each comes to the same as it does alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import torch

from ..hooks.attach import Handle
from ..maps.steering import SteeringMaps
from .errors import ApiError, failure, logger
from .generation import NotFinite, Piece, Sampling, generate
from .text import Codec

WAITING = 100
"""Jobs that may wait; others are refused."""
Event = Piece | ApiError | None
"""What a job tells: a piece of text, the error that it ended with, or None at its end."""


class Turns:
    """A lock that goes round: who hands it on waits behind everybody who waits already."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken = False
        self._gates: deque[threading.Event] = deque()

    def take(self) -> None:
        """Wait for the turn."""
        with self._lock:
            if not self._taken:
                self._taken = True
                return
            gate = threading.Event()
            self._gates.append(gate)
        gate.wait()

    def give(self) -> None:
        """Let the next one have it."""
        with self._lock:
            if self._gates:
                self._gates.popleft().set()  # still taken: nobody gets between
            else:
                self._taken = False

    def hand_on(self) -> None:
        """Let everybody who waits have a turn first."""
        self.give()
        self.take()

    def __enter__(self) -> Turns:
        self.take()
        return self

    def __exit__(self, *exception: object) -> None:
        self.give()


class Job:
    """What a request asks for.

    Parameters
    ----------
    prompts : sequence of sequence of int
        Tokens of each prompt.
    sampling : Sampling
        How texts are made.
    strengths : mapping from str to float
        By name of the maps; those that are not named are off.
    choices : int
        Texts of each prompt, whose indices follow each other, prompt by prompt.
    continues : bool
        As `generation.generate`.
    emit : callable
        Gets every `Event`, in a thread of the engine.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        strengths: Mapping[str, float],
        *,
        choices: int = 1,
        continues: bool = False,
        emit: Callable[[Event], None],
    ) -> None:
        self.prompts, self.sampling, self.strengths = prompts, sampling, dict(strengths)
        self.choices, self.continues, self.emit = choices, continues, emit
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End it before its next token."""
        self._cancelled.set()


class Engine:
    """A model with maps on it, all of them off but for jobs that ask for them.

    Parameters
    ----------
    model, tokenizer
        Of transformers.
    maps : mapping from str to SteeringMaps
        By name. They act one after the other, in this order.
    concurrency : int, default 4
        Jobs that take turns; others wait for one of them to end.

    Raises
    ------
    ValueError
        If maps do not fit the model; the message names them, and none are left on it.
    """

    def __init__(self, model: Any, tokenizer: Any, maps: Mapping[str, SteeringMaps], *, concurrency: int = 4) -> None:
        self.model = model
        self.codec = Codec(tokenizer, model.get_input_embeddings().weight.shape[0])
        self._turns, self._lock = Turns(), threading.Lock()
        self._jobs: set[Job] = set()
        self._closed = False
        self._most = concurrency + WAITING
        self.handles: dict[str, Handle] = {}
        try:
            for name, one in maps.items():
                try:
                    self.handles[name] = one.attach(model, strength=0.0)
                    self._try(self.handles[name])
                except (ValueError, RuntimeError) as error:
                    raise ValueError(f"the maps {name!r} do not fit the model: {error}") from error
        except BaseException:
            self._detach()
            raise
        # Threads stay: torch keeps a pool of its own for each thread that it has worked in.
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="lineas-serving")

    @property
    def context_length(self) -> int | None:
        """Tokens of a prompt and its continuation together at most; None where the model does not say."""
        config = self.model.config
        found = getattr(config.get_text_config(), "max_position_embeddings", None)
        return found if isinstance(found, int) and found > 0 else None

    @property
    def jobs(self) -> int:
        """How many run or wait."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Let a job wait for its thread; ApiError where too many do."""
        with self._lock:
            if self._closed:
                raise _closing()
            if len(self._jobs) >= self._most:
                raise ApiError(429, f"{len(self._jobs)} requests are waiting already: try again later", code="busy")
            self._jobs.add(job)
            self._pool.submit(self._run, job)

    def stop(self) -> None:
        """End all jobs, and take no others. Does not wait for them."""
        with self._lock:
            self._closed = True
            jobs = list(self._jobs)
        for job in jobs:
            job.cancel()

    def close(self) -> None:
        """`stop`, wait for the jobs to end, and take the maps off the model."""
        self.stop()
        self._pool.shutdown(wait=True)
        self._detach()

    def _try(self, handle: Handle) -> None:
        """Let maps act once on a prompt and on a generated token: not every module tells its width before it is called.

        ValueError where one does not fit.
        """
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.model.get_input_embeddings().weight.device)
        with torch.inference_mode(), handle.at(1.0):
            self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=2,
                max_new_tokens=2,
                pad_token_id=0,
                disable_compile=True,
            )

    def _detach(self) -> None:
        for handle in self.handles.values():
            handle.remove()

    def _run(self, job: Job) -> None:
        """Everything of a job, in a thread of the pool."""
        end: Event = None
        try:
            if not job.cancelled:
                self._generate(job)
        except NotFinite:
            steered = any(job.strengths.values())
            message = f"the model's logits are not finite{f' at the strengths {job.strengths}' if steered else ''}"
            end = ApiError(400, message, param="lineas.strength" if steered else None)
        except Exception as error:
            logger.exception("a generation failed")
            end = failure(error)
        finally:
            with self._lock:
                self._jobs.discard(job)
        job.emit(_closing() if self._closed and job.cancelled else end)

    def _generate(self, job: Job) -> None:
        def go_on() -> bool:
            if not job.cancelled:
                self._turns.hand_on()
            return not job.cancelled

        with self._turns, ExitStack() as strengths, torch.inference_mode():
            for name, handle in self.handles.items():
                strengths.enter_context(handle.at(job.strengths.get(name, 0.0)))
            for k, prompt in enumerate(job.prompts):
                if k and not go_on():
                    break
                generate(
                    self.model,
                    self.codec,
                    prompt,
                    job.sampling,
                    first=k * job.choices,
                    choices=job.choices,
                    continues=job.continues,
                    emit=job.emit,
                    go_on=go_on,
                )


def _closing() -> ApiError:
    return ApiError(503, "the server is shutting down")
