"""The check of accelerators runs, as far as it can without one."""

import re

import pytest
from scripts import load_script


@pytest.fixture
def check(monkeypatch):
    return load_script(monkeypatch, "cuda_check")


def test_the_cpu_does_what_the_cpu_does(check, capsys):
    check.main(["--device", "cpu", "--tiny", "--rounds", "2"])
    out = capsys.readouterr().out
    assert "losses of a fit: at most 0.0e+00 from those on the CPU" in out
    assert float(re.search(r"ratio +([\d.]+)", out)[1]) > 0


def test_differences_are_seen(check, monkeypatch):
    fit = check.fit
    monkeypatch.setattr(
        check, "fit", lambda device, layers, steps: fit("cpu", check.ONE if device != "cpu" else layers, steps)
    )
    assert check.difference("other") > 1e-3


def test_a_missing_device_is_said(check, capsys):
    if check.torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="2"):
        check.main([])
    assert "this torch sees no CUDA device" in capsys.readouterr().err
