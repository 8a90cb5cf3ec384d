"""The command line on two processes that torchrun starts."""

import os
import signal
import subprocess
import sys

import models_zoo as zoo
import numpy as np
import pytest

import lineas
from lineas import cli

LIMIT = 240
MODULE = "model.layers.*.post_attention_layernorm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    zoo.llama().save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    for name, seed in (("source", 1), ("target", 2)):
        (folder / f"{name}.txt").write_text("\n".join(zoo.texts(7, seed=seed)))
    return folder


def arguments(folder, output, *others):
    sets = [f"--{name}={folder / f'{name}.txt'}" for name in ("source", "target")]
    return ["fit", str(folder / "model"), *sets, "--layers", MODULE, "--steps", "2", "-o", str(output), *others]


def torchrun(folder, *command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lineas"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # A group of its own, so that what hangs can be ended with all that it has started.
    running = subprocess.Popen(
        [*launch, *command],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = running.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        raise
    return running.returncode, output, errors


@pytest.mark.slow
def test_one_process_writes_and_prints_the_maps_of_both(folder, capsys):
    code, output, errors = torchrun(folder, *arguments(folder, folder / "both.safetensors"))
    assert code == 0, errors
    assert output.count("written to ") == output.count("loss: ") == 1
    assert cli.main([*arguments(folder, folder / "one.safetensors"), "--quiet"]) == 0
    both, one = (lineas.load(folder / f"{name}.safetensors") for name in ("both", "one"))
    assert both.metadata["settings"] == one.metadata["settings"]
    for name in one:
        np.testing.assert_allclose(both[name].weight, one[name].weight, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(both[name].bias, one[name].bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "command", [["info", "maps.safetensors"], ["fit", "m", "--source=a", "--target=b", "-o=c", "--method=linear"]]
)
def test_other_commands_are_refused(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.main(command) == 2
    text = "torchrun has started 2 processes, and only `lineas fit` of end-to-end maps runs on several"
    assert text in capsys.readouterr().err
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # what schedulers set alone is no torchrun
    cli.main(command)
    assert "torchrun" not in capsys.readouterr().err


def test_python_runs_the_package():
    done = subprocess.run([sys.executable, "-m", "lineas", "--version"], capture_output=True, text=True, timeout=LIMIT)
    assert done.stdout == f"lineas {lineas.__version__}\n"
