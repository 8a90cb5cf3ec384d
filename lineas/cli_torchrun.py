"""The command line on several processes that torchrun has started: which commands, and what each process does."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta

# A process that is gone is noticed at once; one that hangs, after so long.
TIMEOUT = timedelta(minutes=30)


def count() -> int:
    """How many processes torchrun has started; 1 where it has not started this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Join the processes that torchrun has started, if it has; `args` get ``process_group`` and ``writes``.

    ``process_group`` is what fits take, and ``writes`` whether this process is the one that writes files and prints. On
    CUDA every process has a device of its own. ValueError for a command that runs on one process only.
    """
    args.process_group, args.writes = None, True
    if count() == 1:
        yield
        return
    if getattr(args, "method", None) != "end-to-end":
        raise ValueError(
            f"torchrun has started {count()} processes, and only `lineas fit` of end-to-end maps runs on several"
        )
    import torch
    from torch import distributed

    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    args.process_group, args.writes = "world", distributed.get_rank() == 0
    args.quiet = args.quiet or not args.writes
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(sys.stdout if args.writes else nowhere):
            yield
    finally:
        distributed.destroy_process_group()
