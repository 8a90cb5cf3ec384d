"""Folded GGUF files: which bytes change, what is refused and why, and that nothing is left behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import gguf
import gguf_cases
import gguf_files
import numpy as np
import pytest
from gguf_cases import CASES, IN, MIDDLE

import lineas
from lineas import AffineMap, SteeringMaps
from lineas.export import gguf as export
from lineas.export.gguf import folding


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny Llama with quantised matrices, by its path, and the model."""
    folder = tmp_path_factory.mktemp("gguf")
    model = gguf_files.model("llama")
    return gguf_files.convert(model, folder / "model.gguf", quantize=("Q4_1", "Q8_0", "F16")), model


@pytest.fixture
def path(made):
    return made[0]


def one_map(name="model.layers.0.post_attention_layernorm", d=32, weight=1.5, bias=0.5):
    return SteeringMaps({name: AffineMap(np.full(d, weight), np.full(d, bias))})


def raw(path):
    """The bytes of the tensors by name."""
    return {t.name: (t.tensor_type, np.asarray(t.data).tobytes()) for t in gguf.GGUFReader(path).tensors}


def refusal(maps, path, **settings):
    """The message of the ValueError of a fold, which must leave nothing."""
    folder = path.parent
    before = sorted(folder.iterdir())
    with pytest.raises(ValueError) as error:
        maps.fold_gguf(path, folder / "refused.gguf", **settings)
    assert sorted(folder.iterdir()) == before
    return str(error.value)


def test_only_gains_change_and_only_biases_are_new(made, tmp_path):
    path, model = made
    maps = gguf_cases.maps_of(model, (IN, MIDDLE))
    strength = 0.7
    target = tmp_path / "steered.gguf"
    assert maps.fold_gguf(path, target, strength) == target
    before, after = raw(path), raw(target)
    assert list(after)[: len(before)] == list(before)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"blk.{k}.{norm}_norm.weight" for k in (0, 1) for norm in ("attn", "ffn")}
    readers = {"attn": ("attn_q", "attn_k", "attn_v"), "ffn": ("ffn_gate", "ffn_up")}
    new = {f"blk.{k}.{reader}.bias" for k in (0, 1) for norm in readers for reader in readers[norm]}
    assert set(after) - set(before) == new
    assert all(after[name][0] == gguf.GGMLQuantizationType.F32 for name in changed | new)
    old, found = gguf_files.read(path), gguf_files.read(target)
    for name, affine in maps.items():
        norm = export.tensor_name(name, "llama")
        weight, bias = 1 + strength * (affine.weight - 1), strength * affine.bias
        expected = (old[f"{norm}.weight"].astype(np.float64) * weight).astype(np.float32)
        assert np.array_equal(found[f"{norm}.weight"], expected)
        for reader in readers[norm.split(".")[2].removesuffix("_norm")]:
            matrix = old[f"{norm.rpartition('.')[0]}.{reader}.weight"].astype(np.float64)
            np.testing.assert_allclose(found[f"{norm.rpartition('.')[0]}.{reader}.bias"], matrix @ bias, rtol=1e-6)


def test_the_metadata_stay_and_say_what_was_done(path, tmp_path):
    maps = one_map()
    target = maps.fold_gguf(path, tmp_path / "steered.gguf", 0.25)
    before, after = (
        {name: (field.types, field.contents()) for name, field in gguf.GGUFReader(one).fields.items() if "." in name}
        for one in (path, target)
    )
    own = {name: value for name, (_, value) in after.items() if name.startswith("lineas.")}
    assert [name for name in after if not name.startswith(("lineas.", "GGUF."))] == [
        name for name in before if not name.startswith("GGUF.")
    ]
    assert all(after[name] == before[name] for name in before if not name.startswith("GGUF."))
    assert own == {
        "lineas.folded.version": lineas.__version__,
        "lineas.folded.strength": 0.25,
        "lineas.folded.maps": export.digest(maps),
        "lineas.folded.modules": ["model.layers.0.post_attention_layernorm"],
    }


def test_the_digest_is_that_of_equal_maps():
    maps = one_map()
    single = SteeringMaps(
        {name: AffineMap(one.weight.astype(np.float32), one.bias.astype(np.float32)) for name, one in maps.items()},
        {"method": "other"},
    )
    assert export.digest(maps) == export.digest(single) and len(export.digest(maps)) == 64
    others = [one_map(bias=0.25), one_map(weight=2.0), one_map("model.layers.1.post_attention_layernorm")]
    assert len({export.digest(one) for one in [maps, *others]}) == 4
    zero, negative = one_map(bias=0.0), one_map(bias=-0.0)
    assert zero == negative and export.digest(zero) == export.digest(negative)


def test_a_strength_of_zero_and_identities_change_no_tensor(path, tmp_path):
    nothing = {"model.layers.0.input_layernorm": AffineMap.identity(32), "elsewhere": AffineMap.identity(7)}
    identity = SteeringMaps(nothing)
    for maps, strength in ((one_map(), 0), (identity, 1.0)):
        assert raw(maps.fold_gguf(path, tmp_path / "same.gguf", strength)) == raw(path)


def test_a_calibrated_strength(path, tmp_path):
    maps = SteeringMaps(dict(one_map()), {"calibration": {"strength": 0.5}})
    calibrated = raw(maps.fold_gguf(path, tmp_path / "a.gguf", "calibrated"))
    assert calibrated == raw(maps.fold_gguf(path, tmp_path / "b.gguf", 0.5))
    assert "for maps that were calibrated" in refusal(one_map(), path, strength="calibrated")


def test_biases_that_are_there_are_added_to(tmp_path):
    model = gguf_files.model("qwen2")
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    maps = gguf_cases.maps_of(model, (IN,))
    old, found = gguf_files.read(path), gguf_files.read(maps.fold_gguf(path, tmp_path / "steered.gguf"))
    bias = maps["model.layers.1.input_layernorm"].bias
    for name in ("blk.1.attn_q", "blk.1.attn_v"):
        expected = old[f"{name}.bias"] + old[f"{name}.weight"].astype(np.float64) @ bias
        np.testing.assert_allclose(found[f"{name}.bias"], expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == old.keys()


def test_the_gain_of_gemma_in_a_file_is_one_plus_its_weight(tmp_path):
    model = gguf_files.model("gemma3_text")
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    maps = gguf_cases.maps_of(model, slopes=(gguf_cases.PRE,))
    name = "model.layers.0.pre_feedforward_layernorm"
    gain = 1 + model.get_submodule(name).weight.detach().double().numpy()
    found = gguf_files.read(maps.fold_gguf(path, tmp_path / "steered.gguf"))
    np.testing.assert_allclose(found["blk.0.ffn_norm.weight"], gain * maps[name].weight, rtol=1e-6)


def test_norms_in_other_floating_types_become_float32(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    half = np.linspace(0.5, 1.5, 32).astype(np.float16)
    writer.add_tensor("blk.0.ffn_norm.weight", half)
    writer.add_tensor("other", np.ones(7, np.float32))
    gguf_files.finish(writer)
    found = gguf.GGUFReader(one_map(bias=0.0).fold_gguf(path, tmp_path / "steered.gguf")).tensors
    assert found[0].tensor_type == gguf.GGMLQuantizationType.F32
    assert np.array_equal(found[0].data, (half.astype(np.float64) * 1.5).astype(np.float32))
    assert np.array_equal(found[1].data, np.ones(7))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_what_has_no_place_is_refused_by_name(case, tmp_path):
    model = gguf_files.model(case.kind)
    path = gguf_files.convert(model, tmp_path / "model.gguf")
    if case.slopes:
        maps = gguf_cases.maps_of(model, shifts=case.slopes)  # shifts where only slopes have a place
        message = refusal(maps, path)
        assert f"{len(maps)} of {len(maps)} maps cannot be folded, and nothing was written" in message
        assert all(f"\n  {name}: its shift is not 0, " in message for name in maps)
        assert ("lineas.export.gguf.control_vector writes one" in message) == ("post_feedforward" in message)
    if case.shifts:
        maps = gguf_cases.maps_of(model, slopes=case.shifts)
        message = refusal(maps, path)
        assert all(f"\n  {name}: its slopes are not 1, and would scale the rows of 'blk." in message for name in maps)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (one_map("model.layers.0.nothing"), "it is not known where 'model.layers.0.nothing' is in a file of llama"),
        (one_map("model.layers.0.input_layernorn"), "did you mean"),
        (one_map("model.layers.1"), "only where these are: model.norm, model.layers.*.input_layernorm, "),
        (one_map("transformer.h.0.ln_1"), "it is not known where 'transformer.h.0.ln_1' is"),
        (one_map("model.layers.2.input_layernorm"), "the file has 2 blocks, the last of which is 1"),
        (one_map(d=31), "the map is for 31 neurons, 'blk.0.ffn_norm.weight' has the shape [32]"),
        (
            one_map("model.norm"),
            "'output_norm' has no bias, and llama.cpp takes no bias of 'output'",
        ),
        (
            one_map() + one_map("model.language_model.layers.0.post_attention_layernorm"),
            "the map of 'model.layers.0.post_attention_layernorm' is for the same tensor 'blk.0.ffn_norm'",
        ),
        (one_map(weight=1e39), "'blk.0.ffn_norm.weight' would not be finite in float32"),
        (one_map(weight=1.0, bias=1e300), "'blk.0.ffn_gate.bias' would not be finite in float32"),
    ],
)
def test_maps_that_do_not_fit_are_refused(path, maps, message):
    found = refusal(maps, path)
    assert (message if message != "did you mean" else "input_layernorm") in found


def test_some_maps_that_fit_do_not_hide_those_that_do_not(path):
    maps = one_map() + one_map("model.norm")
    message = refusal(maps, path)
    assert "1 of 2 maps cannot be folded" in message and "post_attention" not in message
    assert "maps.select([...]) picks others" in message


def test_gates_and_selections_of_tokens_are_refused(path):
    name = "model.layers.0.post_attention_layernorm"
    gated = one_map().gated({name: lineas.Gate(np.ones(32), 0.0)})
    assert "a fold: these maps have gates" in refusal(gated, path)
    for tokens, shown in (("last", "tokens='last'"), ({"slice": [1, None, None]}, "tokens=slice(1, None, None)")):
        some = SteeringMaps(dict(one_map()), {"tokens": tokens})
        assert f"fitted for {shown}, and a fold acts on all tokens alike" in refusal(some, path)
    named = SteeringMaps(dict(one_map()), {"tokens": {"callable": "chosen"}})
    message = "a fold acts on all tokens alike: these maps were fitted for the tokens that chosen selects"
    assert message in refusal(named, path)
    assert "fitted for tokens='last'" in refusal(0.5 * SteeringMaps(dict(one_map()), {"tokens": "last"}), path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"split.count": 3}, "is one of 3 shards, and each has a part of the tensors: join them with llama-gguf-split"),
        ({"general.type": "adapter"}, "holds no model: its general.type is 'adapter'"),
    ],
)
def test_files_that_are_no_whole_model_are_refused(tmp_path, metadata, message):
    path = gguf_files.convert(gguf_files.model("llama"), tmp_path / "model.gguf", metadata=metadata)
    assert message in refusal(one_map(), path)


def test_other_architectures_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("x", np.ones(3, np.float32))
    gguf_files.finish(writer)
    message = refusal(one_map(), path)
    assert "the architecture 'mamba' is not known: maps can go into files of gemma, gemma2, " in message


def test_headers_without_what_a_model_has_are_refused(tmp_path):
    def written(name, change):
        path = tmp_path / name
        writer = gguf.GGUFWriter(path, "llama")
        change(writer)
        writer.add_tensor("blk.0.ffn_norm.weight", np.ones(32, np.float32))
        gguf_files.finish(writer)
        return path

    assert "llama.block_count must be a whole number, got None" in refusal(one_map(), written("a.gguf", lambda w: None))
    path = written("b.gguf", lambda w: w.add_string("llama.block_count", "2"))
    assert "llama.block_count must be a whole number, got '2'" in refusal(one_map(), path)
    path = written("c.gguf", lambda w: w.add_block_count(1))
    assert "the file has no tensor 'blk.0.ffn_gate.weight', which should read its output" in refusal(one_map(), path)
    data = path.read_bytes().replace(b"general.architecture", b"general.architectura")
    (tmp_path / "d.gguf").write_bytes(data)
    assert "general.architecture must be a text, got None" in refusal(one_map(), tmp_path / "d.gguf")


def test_matrices_that_are_scaled_or_do_not_fit_are_refused(path, tmp_path):
    from lineas.export.gguf.container import GGUFFile, write_copy

    def with_tensors(name, tensors):
        with GGUFFile(path) as file:
            write_copy(file, str(tmp_path / name), {key: np.float32(x) for key, x in tensors.items()}, {})
        return tmp_path / name

    scaled = with_tensors("scaled.gguf", {"blk.0.ffn_up.scale": np.ones(1)})
    assert "the output of 'blk.0.ffn_up.weight' is multiplied by 'blk.0.ffn_up.scale'" in refusal(one_map(), scaled)
    narrow = with_tensors("narrow.gguf", {"blk.0.ffn_up.weight": np.ones((64, 31))})
    assert "'blk.0.ffn_up.weight' has the shape [64, 31]: it does not read 32 neurons" in refusal(one_map(), narrow)
    short = with_tensors("short.gguf", {"blk.0.ffn_up.bias": np.ones(3)})
    assert "'blk.0.ffn_up.bias' has the shape [3], not [64]" in refusal(one_map(), short)
    endless = with_tensors("endless.gguf", {"blk.0.ffn_norm.weight": np.full(32, np.inf)})
    assert "'blk.0.ffn_norm.weight' is not finite" in refusal(one_map(), endless)


def test_a_folded_file_is_not_folded_again(path, tmp_path):
    folded = one_map().fold_gguf(path, tmp_path / "once.gguf", 0.5)
    message = refusal(one_map(), folded)
    assert f"has maps folded in (strength 0.5, maps {export.digest(one_map())[:12]})" in message
    assert "Fold second @ first" in message


def test_a_composition_is_what_one_fold_after_another_would_have_been(path, tmp_path):
    """Slopes of the second map act on the shifts of the first: what a second fold could not do."""
    first, second = one_map(weight=0.5, bias=1.0), one_map(weight=3.0, bias=-0.25)
    found = gguf_files.read((second @ first).fold_gguf(path, tmp_path / "both.gguf"))
    old = gguf_files.read(path)
    np.testing.assert_allclose(found["blk.0.ffn_norm.weight"], 1.5 * old["blk.0.ffn_norm.weight"], rtol=1e-6)
    shift = old["blk.0.ffn_up.weight"].astype(np.float64) @ np.full(32, 3.0 * 1.0 - 0.25)
    np.testing.assert_allclose(found["blk.0.ffn_up.bias"], shift, rtol=1e-5)


def test_the_input_is_never_written_to(path, tmp_path):
    before = path.read_bytes()
    (tmp_path / "link.gguf").symlink_to(path)
    for same in (path, tmp_path / "link.gguf"):
        with pytest.raises(ValueError, match="itself, which is never written to"):
            one_map().fold_gguf(path, same)
        with pytest.raises(ValueError, match="itself, which is never written to"):
            one_map().fold_gguf(same, path)
    assert path.read_bytes() == before


def test_what_was_there_stays_until_the_new_file_is_whole(path, tmp_path):
    target = tmp_path / "steered.gguf"
    target.write_bytes(b"old")
    with pytest.raises(ValueError, match="the file has 2 blocks"):
        one_map("model.layers.2.input_layernorm").fold_gguf(path, target)
    assert target.read_bytes() == b"old"
    one_map().fold_gguf(path, target)
    assert target.read_bytes()[:4] == b"GGUF" and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_fold_that_stops_half_way_leaves_nothing(path, tmp_path, monkeypatch, error):
    from lineas.export.gguf.container import GGUFFile

    def stops(self, tensor):
        yield b"half"
        raise error

    monkeypatch.setattr(GGUFFile, "chunks", stops)
    with pytest.raises(type(error)):
        one_map().fold_gguf(path, tmp_path / "steered.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_input_that_shrinks_while_it_is_copied_is_an_error(path, tmp_path, monkeypatch):
    copy = tmp_path / "model.gguf"
    copy.write_bytes(path.read_bytes())
    values = folding._values

    def shrinks(*args):
        found = values(*args)
        os.truncate(copy, copy.stat().st_size // 2)
        return found

    monkeypatch.setattr(folding, "_values", shrinks)
    with pytest.raises(ValueError, match="it ends in tensor"):
        one_map().fold_gguf(copy, tmp_path / "steered.gguf")
    assert list(tmp_path.iterdir()) == [copy]


def test_wrong_types_are_type_errors(path, tmp_path):
    target = tmp_path / "steered.gguf"
    with pytest.raises(TypeError, match="maps must be SteeringMaps, got dict"):
        export.fold(dict(one_map()), path, target)
    with pytest.raises(TypeError, match="strength must be a real number, got NoneType"):
        one_map().fold_gguf(path, target, None)
    with pytest.raises(ValueError, match="strength must be finite, got nan"):
        one_map().fold_gguf(path, target, float("nan"))
    with pytest.raises(TypeError, match="progress must be True or False, got 1"):
        one_map().fold_gguf(path, target, progress=1)
    with pytest.raises(FileNotFoundError):
        one_map().fold_gguf(tmp_path / "none.gguf", target)
    assert list(tmp_path.iterdir()) == []


# ---- the command line, and a process of its own ----------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    one_map().save(tmp_path / "maps.safetensors")
    return tmp_path / "maps.safetensors"


def test_the_command_is_the_librarys(path, saved, tmp_path, capsys):
    from lineas import cli

    target = tmp_path / "steered.gguf"
    arguments = ["fold", str(path), "--maps", str(saved), "--strength", "0.5", "--quiet", "-o"]
    assert cli.main([*arguments, str(target)]) == 0
    assert capsys.readouterr().out == f"GGUF file with 1 maps at strength 0.5\nwritten to {target}\n"
    assert target.read_bytes() == one_map().fold_gguf(path, tmp_path / "expected.gguf", 0.5).read_bytes()
    bare = tmp_path / "without-suffix"
    bare.write_bytes(path.read_bytes())
    assert cli.main(["fold", str(bare), *arguments[2:], str(tmp_path / "again.gguf")]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == target.read_bytes()


def test_the_command_refuses_in_one_line(path, saved, tmp_path, capsys):
    from lineas import cli

    def fails(message, model, *options, output="steered.gguf"):
        code = cli.main(["fold", str(model), "--maps", str(saved), *options, "-o", str(tmp_path / output)])
        error = capsys.readouterr().err
        assert code == 2 and error.count("\n") == 1 and error.startswith("lineas: error: ") and message in error

    fails(f"--output: of the GGUF file {path} a GGUF file is made, which must end in .gguf", path, output="new")
    fails("--output: ", path, output="maps.safetensors")
    (tmp_path / "there.gguf").touch()
    fails("there.gguf exists", path, output="there.gguf")
    (tmp_path / "there.gguf").unlink()
    fails("does not exist", path, output="no/steered.gguf")
    fails("--convert is for models of transformers, got the GGUF file", path, "--convert")
    fails("--dtype is for models of transformers, got the GGUF file", path, "--dtype", "bfloat16")
    fails("--device is for models of transformers, got the GGUF file", path, "--device", "meta")
    fails("No such file or directory", tmp_path / "none.gguf")
    (tmp_path / "damaged.gguf").write_bytes(path.read_bytes()[:500])
    fails("damaged.gguf is not a sound GGUF file: the number of tensors is 21, more than", tmp_path / "damaged.gguf")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["damaged.gguf", "maps.safetensors"]


def test_a_fold_needs_no_torch(path, saved, tmp_path):
    code = f"""
import sys
sys.modules["torch"] = None
import lineas
lineas.load({str(saved)!r}).fold_gguf({str(path)!r}, {str(tmp_path / "steered.gguf")!r})
print([name for name in ("transformers", "scipy", "matplotlib") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    assert (tmp_path / "steered.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("number", "code", "message"),
    [(signal.SIGINT, 130, "lineas: interrupted"), (signal.SIGTERM, 143, "lineas: terminated")],
)
def test_a_signal_in_the_command_leaves_nothing(path, saved, tmp_path, number, code, message):
    """A real signal, while the copy waits between two tensors."""
    program = f"""
        import signal, sys, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it for what they run in the background
        from lineas import cli
        from lineas.export.gguf.container import GGUFFile
        chunks = GGUFFile.chunks
        def slow(self, tensor):
            yield from chunks(self, tensor)
            print("copied", flush=True)
            time.sleep(60)
        GGUFFile.chunks = slow
        sys.exit(cli.main(["fold", {str(path)!r}, "--maps", {str(saved)!r}, "-o", {str(tmp_path / "steered.gguf")!r}]))
    """
    run = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert run.stdout.readline() == "copied\n"
        time.sleep(0.1)
        assert any(one.name.startswith(".steered.gguf.") for one in tmp_path.iterdir())
        run.send_signal(number)
        _, error = run.communicate(timeout=30)
    finally:
        run.kill()
    assert run.returncode == code and error.splitlines()[-1] == message and "Traceback" not in error
    assert [one.name for one in tmp_path.iterdir()] == ["maps.safetensors"]
