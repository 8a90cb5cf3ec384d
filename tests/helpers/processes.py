"""Start the processes of a test on several, with a time limit, and read what they found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

WORKER = Path(__file__).with_name("distributed_worker.py")
LIMIT = 480


def start(folder, size=2):
    """Processes that run distributed_worker.py."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, [WORKER.parent, *sys.path])),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(size), folder],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=open(folder / f"{rank}.log", "w"),
        )
        for rank in range(size)
    ]


def finish(processes, folder):
    """What each process said, once all have ended; those that have not within the limit are killed."""
    try:
        for process in processes:
            process.wait(timeout=LIMIT)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(len(processes))]
    said = [folder / f"{rank}.json" for rank in range(len(processes))]
    return [json.loads(one.read_text()) if one.exists() else {} for one in said], logs


def arrays(folder, rank, name):
    with np.load(folder / f"{rank}-{name}.npz") as found:
        return dict(found)


def same_bits(folder, name):
    """What the processes found of a fit, which must be the same to the bit."""
    first, second = (arrays(folder, rank, name) for rank in (0, 1))
    assert first.keys() == second.keys()
    for key, values in first.items():
        assert values.tobytes() == second[key].tobytes(), (name, key)
    return first


def close(found, expected, dtype):
    """Whether arrays are those of a fit on one process, to rounding."""
    eps = {"torch.float64": 1e-13, "torch.float32": 1e-5}[str(dtype)]
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=20 * eps, atol=eps, err_msg=key)
