"""Fits that are kept on disk, die, and go on to the same bits."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import Trouble, interrupt, noisy, prompts, same_maps, short_fit, snapshot

import lineas
from lineas import AffineMap, SteeringMaps, fit_end_to_end
from lineas.fitting import checkpoint
from lineas.maps import files

HELD_OUT = (prompts(6, 3), prompts(6, 4))
KINDS = {
    "auto": {"lr": "auto", "l1": 0.05},
    "sgd": {"lr": 0.02, "group": 0.01},
    "adam": {"lr": 0.02, "optimizer": "adam", "l1": 0.01},
    "mini-batches": {"lr": "auto", "mini_batch": 3},
}


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


@pytest.fixture
def fit(llama):
    return lambda *sets, model=llama, **settings: short_fit(model, *sets, **{"steps": 6, "patience": None, **settings})


def same_fit(a, b):
    same_maps(a.maps, b.maps)
    for name, values in a.history.items():
        np.testing.assert_array_equal(values, b.history[name])
    assert (a.best_step, a.stopped, a.held_out_loss) == (b.best_step, b.stopped, b.held_out_loss)
    assert (a.passes, a.held_out_passes) == (b.passes, b.held_out_passes)


@pytest.mark.parametrize("held_out", [None, HELD_OUT], ids=["plain", "held-out"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", [0, 1, 4])
def test_an_interrupted_fit_goes_on_to_the_same_bits(fit, tmp_path, kind, held_out, done):
    path = tmp_path / "fit.safetensors"
    settings = {**KINDS[kind], "held_out": held_out}
    whole = fit(**settings, forward=noisy)

    class Cut:
        """Interrupts the fit in the step after `done`."""

        def __init__(self):
            self.reached = 0

        def __call__(self, model, batch):
            self.reached += 1
            if len(kept()) > done:
                raise KeyboardInterrupt
            return noisy(model, batch)

    def kept():
        return checkpoint.load(path)[1]["records"] + [None] if path.exists() else []

    cut = fit(**settings, forward=Cut(), checkpoint=path)
    assert cut.stopped == "interrupted" and len(cut.history["loss"]) == done
    same_fit(fit(**settings, forward=noisy, checkpoint=path), whole)
    same_fit(fit(**settings, forward=noisy, checkpoint=str(path)), whole)  # a fit that has ended is there at once
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
import models_zoo as zoo
from fits import prompts, short_fit
calls = 0
def forward(model, batch):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return model(**batch)
short_fit(zoo.llama(), lr="auto", l1=0.02, steps=6, forward=forward, checkpoint={path!r})
"""


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path):
    path = str(tmp_path / "fit.safetensors")
    script = textwrap.dedent(KILLED).format(at=5, path=path)  # calls: targets, start, then one a step
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=300)
    assert done.returncode == -signal.SIGKILL
    settings = {"lr": "auto", "l1": 0.02, "steps": 6, "forward": lambda model, batch: model(**batch)}
    assert len(checkpoint.load(path)[1]["records"]) == 2
    same_fit(short_fit(zoo.llama(), **settings, checkpoint=path), short_fit(zoo.llama(), **settings))


def test_a_fit_goes_on_for_more_steps_where_rates_do_not_depend_on_their_number(fit, tmp_path):
    path = tmp_path / "fit.safetensors"
    settings = {"lr": "auto", "l1": 0.05}
    fit(**settings, steps=3, checkpoint=path)
    same_fit(fit(**settings, steps=6, checkpoint=path), fit(**settings, steps=6))


def test_a_file_that_is_there_goes_on(fit, tmp_path):
    path = tmp_path / "fit.safetensors"
    fit(lr="auto", steps=2, checkpoint=path)
    before = checkpoint.load(path)[1]
    same_fit(fit(lr="auto", steps=2, checkpoint=path), fit(lr="auto", steps=2))  # nothing is left to do
    assert checkpoint.load(path)[1] == before


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_the_same_fit_leaves_the_same_bytes(fit, tmp_path):
    kept = [tmp_path / f"{k}.safetensors" for k in range(4)]
    for path in kept:
        fit(steps=2, checkpoint=path, held_out=HELD_OUT)
    assert len({path.read_bytes() for path in kept}) == 1


def test_a_full_disk_leaves_the_last_checkpoint(fit, llama, tmp_path, monkeypatch):
    path, before = tmp_path / "fit.safetensors", snapshot(llama)
    plain = {"lr": "auto", "forward": lambda model, batch: model(**batch)}
    real, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    text = r"cannot write the checkpoint \(No space left on device; the last checkpoint is untouched\).*fit.safetensors"
    with pytest.raises(OSError, match=text):
        fit(**plain, checkpoint=path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path] and len(checkpoint.load(path)[1]["records"]) == 2
    same_fit(fit(**plain, checkpoint=path), fit(**plain))
    assert snapshot(llama) == before


def test_a_file_too_large_for_the_process_is_an_error_too(fit, tmp_path):
    """The operating system's own refusal, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write the checkpoint \(File too large; there is no checkpoint yet"):
            fit(lr="auto", checkpoint=tmp_path / "fit.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_to_is_known_before_anything_is_computed(fit, llama, tmp_path):
    before, seen = snapshot(llama), []

    def forward(model, batch):
        seen.append(1)
        return model(**batch)

    with pytest.raises(OSError, match=r"cannot write the checkpoint \(No such file or directory; there is no"):
        fit(lr="auto", forward=forward, checkpoint=tmp_path / "none" / "fit.safetensors")
    assert len(seen) == 1  # the targets
    assert snapshot(llama) == before


@pytest.fixture
def kept(fit, tmp_path):
    """A checkpoint of a short fit."""
    path = tmp_path / "fit.safetensors"
    fit(lr="auto", steps=2, checkpoint=path)
    return path


def test_damaged_checkpoints(fit, kept):
    data = kept.read_bytes()
    for part in (b"", data[:7], data[: len(data) // 2], data[:-1], b"\xff" * 100):
        kept.write_bytes(part)
        with pytest.raises(ValueError, match=r"^checkpoint: .*fit\.safetensors is not a sound safetensors file"):
            fit(lr="auto", checkpoint=kept)
        assert kept.read_bytes() == part
    for place in (-1, -1000, 300):
        flipped = bytearray(data)
        flipped[place] ^= 1
        kept.write_bytes(flipped)
        with pytest.raises(ValueError, match="checkpoint: "):
            fit(lr="auto", checkpoint=kept)


def test_what_is_no_checkpoint(fit, kept, tmp_path, monkeypatch):
    maps = tmp_path / "maps.safetensors"
    SteeringMaps({"a": AffineMap.identity(3)}).save(maps)
    with pytest.raises(ValueError, match=r"maps\.safetensors holds steering maps, not the checkpoint of a fit"):
        fit(lr="auto", checkpoint=maps)
    with pytest.raises(ValueError, match=r"holds the checkpoint of a fit: pass it as checkpoint= to go on"):
        lineas.load(kept)
    tensors, state = checkpoint.load(kept)
    newer = files.FORMATS[checkpoint.FORMAT]._replace(version=4)
    with monkeypatch.context() as later:
        later.setitem(files.FORMATS, checkpoint.FORMAT, newer)
        checkpoint.save(kept, tensors, state)
    with pytest.raises(ValueError, match="has version 4 of the format; this lineas reads versions 3 to 3"):
        fit(lr="auto", checkpoint=kept)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"lr": 0.1}, "another fit, of which the lr differs: it was 'auto', and is 0.1"),
        ({"l1": 0.1}, "another fit, of which the l1 differs: it was 0.0, and is 0.1"),
        ({"scaling": "paper"}, "the scaling differs: it was 'layer-mean', and is 'paper'"),
        ({"layers": "model.layers.0.*norm"}, "the modules differs"),
        ({"source": prompts(6, 7)}, "another fit, of which the digest of the prompts differs; give"),
        ({"held_out": HELD_OUT}, "the digest of the prompts differs; give"),
        (
            {"model": zoo.llama(seed=5).double()},
            "another fit, of which the digest of the model's weights differs; give",
        ),
        ({"model": zoo.llama()}, "the dtype differs: it was 'torch.float64', and is 'torch.float32'"),
    ],
)
def test_the_checkpoint_of_another_fit(fit, kept, settings, text):
    before = kept.read_bytes()
    with pytest.raises(ValueError, match=text):
        fit(**{"lr": "auto", "checkpoint": kept, **settings})
    assert kept.read_bytes() == before


def test_a_fit_from_other_maps_is_another(fit, kept, llama):
    maps = fit(lr="auto", steps=1).maps
    with pytest.raises(ValueError, match=r"the digest of init differs; give"):
        fit(lr="auto", checkpoint=kept, init=maps)


def test_what_acts_on_the_model_beside_its_weights_makes_it_another_fit(fit, kept, llama):
    before, text = kept.read_bytes(), r"the activations of target at module 'model\.layers\.0\.post_.*maps, adapters"
    maps = SteeringMaps({"model.layers.0.mlp": AffineMap(np.full(zoo.WIDTH, 1.01), np.zeros(zoo.WIDTH))})
    with maps.attach(llama), pytest.raises(ValueError, match=text.replace("0", "1", 1)):
        fit(lr="auto", checkpoint=kept)
    for other in ({"forward": noisy}, {"tokens": lambda tokens: tokens.positions >= 1}):
        with pytest.raises(ValueError, match=text if "forward" in other else "the tokens differs"):
            fit(lr="auto", checkpoint=kept, **other)
    assert kept.read_bytes() == before
    same_fit(fit(lr="auto", checkpoint=kept), fit(lr="auto"))


def test_another_selection_of_the_same_name_is_another_fit(fit, tmp_path):
    path = tmp_path / "fit.safetensors"
    fit(lr="auto", steps=1, tokens=lambda tokens: tokens.positions >= 0, checkpoint=path)
    with pytest.raises(ValueError, match=r"the activations of target at module 'model\.layers\.0\."):
        fit(lr="auto", steps=1, tokens=lambda tokens: tokens.positions >= 1, checkpoint=path)


def test_an_adapter_that_was_switched_off_makes_it_another_fit(fit, tmp_path):
    peft = pytest.importorskip("peft")
    path = tmp_path / "fit.safetensors"
    config = peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(zoo.llama().double(), config)
    fit(lr="auto", steps=1, model=model, checkpoint=path)
    with model.disable_adapter(), pytest.raises(ValueError, match=r"the activations of target at module"):
        fit(lr="auto", steps=1, model=model, checkpoint=path)


def test_held_out_targets_count_too(fit, tmp_path):
    path = tmp_path / "fit.safetensors"
    plain = {"lr": "auto", "steps": 1, "held_out": HELD_OUT, "checkpoint": path}
    calls = []

    def forward(model, batch):
        """Others in the second call alone, which is that of the held-out target."""
        calls.append(1)
        return noisy(model, batch) if len(calls) == 2 else model(**batch)

    fit(**plain, forward=lambda model, batch: model(**batch))
    with pytest.raises(ValueError, match=r"the activations of held_out target at module"):
        fit(**plain, forward=forward)


def test_other_sums_of_the_same_go_on(tmp_path):
    path, model, calls = tmp_path / "fit.safetensors", zoo.llama(), []
    plain = {"lr": "auto", "l1": 0.01}

    def rounded(model, batch):
        """A forward whose activations differ as those of another number of threads do."""
        calls.append(1)
        hook = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * (1 + 1e-6))
        with hook:
            return model(**batch)

    short_fit(model, **plain, steps=2, checkpoint=path)
    found = short_fit(model, **plain, steps=4, checkpoint=path, forward=rounded)
    assert calls and len(found.history["loss"]) == 4


def test_fewer_steps_than_were_taken_are_refused(fit, kept):
    before = kept.read_bytes()
    with pytest.raises(ValueError, match=r"^steps must be at least the 2 that the fit in .* has taken, got 1; give"):
        fit(lr="auto", steps=1, checkpoint=kept)
    assert kept.read_bytes() == before


def test_wrong_types(llama):
    with pytest.raises(TypeError, match="checkpoint must be a path, got int"):
        fit_end_to_end(llama, prompts(6, 1), prompts(6, 2), layers=zoo.NORMS["llama"], checkpoint=3)


def test_an_interrupt_leaves_a_checkpoint_that_goes_on(fit, tmp_path):
    path = tmp_path / "fit.safetensors"
    plain = {"lr": "auto", "forward": lambda model, batch: model(**batch)}
    fit(**{**plain, "forward": Trouble(2 + 3, interrupt)}, checkpoint=path)
    same_fit(fit(**plain, checkpoint=path), fit(**plain))


def test_the_digest_of_weights_tells_models_apart():
    digests = {checkpoint.digest_of_weights(zoo.llama(seed=seed).to(dtype)) for seed in (0, 5) for dtype in
               (torch.float64, torch.float32, torch.bfloat16)}  # fmt: skip
    assert len(digests) == 6
    model = zoo.llama()
    before = checkpoint.digest_of_weights(model)
    assert checkpoint.digest_of_weights(zoo.llama()) == before
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[3, 7] += 1e-3
        assert checkpoint.digest_of_weights(model) != before
        weight[3, 7] = zoo.llama().model.layers[1].mlp.up_proj.weight[3, 7]
    assert checkpoint.digest_of_weights(model) == before
    assert checkpoint.digest_of_weights(model.to("meta")) != before  # weights that are not in memory count by shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_the_digest_of_weights_tells_where_every_number_is(dtype):
    model = torch.nn.Module()
    model.register_buffer("values", (1 + torch.arange(1000) % 100).to(dtype))
    before = checkpoint.digest_of_weights(model)
    # Powers of two differ in a few of the first bits of floating-point numbers alone.
    for a, b in ((0, 1), (1, 3), (3, 63), (40, 90)):
        model.values[[a, b]] = model.values[[b, a]]
        assert checkpoint.digest_of_weights(model) != before
        model.values[[a, b]] = model.values[[b, a]]
    assert checkpoint.digest_of_weights(model) == before
