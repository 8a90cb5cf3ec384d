"""Sparse maps of image models as LoRA files: what diffusers makes of the files is what the hooks do."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import lineas
from lineas.maps.digest import digest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from slider_cases import GLOBS, READ_WITHOUT_BIAS, build, hooked, pipeline, prefix, run, sparse_maps

# PEFT says at each Linear without a bias that a bias of its LoRA cannot be merged.
# RuntimeWarnings of PEFT say that a rank, an alpha or a module of the file is not one of the model.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*", "ignore:Already found a `peft_config`"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),
]
UNET_NORM = "mid_block.attentions.0.transformer_blocks.0.norm1"
UNET_LINEAR = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
FLUX_NORM = "transformer_blocks.0.norm1"


def load(kind, path):
    """The model with the file on it, loaded by itself."""
    model = build(kind)
    # Else it does not look at the metadata, as pipelines do.
    model.load_lora_adapter(str(path), prefix=prefix(kind), adapter_name="slider", use_safetensors=True)
    return model


def read(path):
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def one(name, d, weight=1.0, bias=0.0):
    """A map that changes the first neuron of d."""
    weights, biases = np.ones(d), np.zeros(d)
    weights[0], biases[0] = weight, bias
    return lineas.SteeringMaps({name: lineas.AffineMap(weights, biases)})


def apart(a, b):
    return float((a - b).abs().max())


# --- what is exact ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", GLOBS)
def test_diffusers_does_from_the_file_what_the_hooks_do_at_every_scale(kind, tmp_path):
    model = build(kind)
    maps, plain = sparse_maps(model, GLOBS[kind]), run(model)
    path = tmp_path / "slider.safetensors"
    assert maps.to_diffusers_lora(model, str(path)) == path
    assert torch.equal(run(model), plain) and not any(m._forward_hooks for m in model.modules())
    loaded = load(kind, path)
    assert apart(hooked(model, maps), plain) > 0.05
    for scale in (1.0, 0.5, -1.0):
        loaded.set_adapters("slider", scale)
        assert apart(run(loaded), hooked(model, maps, scale)) < 1e-13, scale
    loaded.set_adapters("slider", 0.0)
    assert torch.equal(run(loaded), plain)
    loaded.unload_lora()
    assert torch.equal(run(loaded), plain)


@pytest.mark.parametrize("kind", ["UNet", "Flux", "SD3"])
def test_every_kind_of_module_by_itself(kind, tmp_path):
    model = build(kind)
    plain = run(model)
    for glob in GLOBS[kind]:
        name, affine = next(iter(sparse_maps(model, glob, seed=1).items()))
        maps = lineas.SteeringMaps({name: affine})
        maps.to_diffusers_lora(model, tmp_path / "slider.safetensors")
        expected = hooked(model, maps)
        assert apart(expected, plain) > 1e-5, name
        assert apart(run(load(kind, tmp_path / "slider.safetensors")), expected) < 1e-13, name


@pytest.mark.parametrize("kind", GLOBS)
def test_pipelines_load_the_file(kind, tmp_path):
    model = build(kind)
    maps = sparse_maps(model, GLOBS[kind])
    maps.to_diffusers_lora(model, tmp_path / "slider.safetensors")
    pipe = pipeline(kind)
    inner = getattr(pipe, prefix(kind))
    pipe.load_lora_weights(str(tmp_path / "slider.safetensors"), adapter_name="slider")
    for scale in (0.5, 1.0):
        pipe.set_adapters(["slider"], [scale])
        assert apart(run(inner), hooked(model, maps, scale)) < 1e-13
    pipe.unload_lora_weights()
    assert torch.equal(run(inner), run(model))


def test_float32_models_and_the_strength_that_a_scale_of_1_is(tmp_path):
    model = build("UNet").float()
    maps = sparse_maps(build("UNet"), GLOBS["UNet"])
    maps.to_diffusers_lora(model, tmp_path / "slider.safetensors", strength=0.7)
    tensors, _ = read(tmp_path / "slider.safetensors")
    assert {one.dtype for one in tensors.values()} == {torch.float32}
    loaded = build("UNet").float()
    loaded.load_lora_adapter(str(tmp_path / "slider.safetensors"), prefix="unet", adapter_name="slider")
    loaded.set_adapters("slider", 0.5)
    assert apart(run(loaded.double()), hooked(model.double(), maps, 0.35)) < 1e-5


def test_a_dense_map_gets_the_rank_of_the_matrix_and_no_more(tmp_path):
    model = build("UNet")
    names = ["conv_in", "conv_out", UNET_NORM.replace("norm1", "ff.net.0.proj"), UNET_NORM.replace("norm1", "norm3")]
    rng = np.random.default_rng(0)
    widths = {"conv_in": 8, "conv_out": 3, names[2]: 128, names[3]: 16}
    for name, d in widths.items():
        maps = lineas.SteeringMaps({name: lineas.AffineMap(rng.uniform(0.5, 1.5, d), rng.normal(size=d))})
        maps.to_diffusers_lora(model, tmp_path / "slider.safetensors")
        for key, tensor in read(tmp_path / "slider.safetensors")[0].items():
            if key.endswith("lora_A.weight"):
                target = model.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight")).weight
                assert len(tensor) <= min(len(target), target[0].numel())
        assert apart(run(load("UNet", tmp_path / "slider.safetensors")), hooked(model, maps)) < 1e-13, name


def test_readers_can_be_said_and_may_be_convolutions(tmp_path):
    class Own(nn.Module):
        """Diffusers' loader on a model of one's own: a norm that a convolution of 3 by 3 reads."""

        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 5, 3, padding=1)

        def forward(self, x):
            return self.conv(self.norm(x))

        def load_lora_adapter(self): ...

    torch.manual_seed(0)
    model = Own().double()
    path, x = tmp_path / "slider.safetensors", torch.randn(2, 4, 6, 6, dtype=torch.float64)
    with pytest.raises(
        ValueError, match=r"which Linears or convolutions alone read the output of 'norm' in Own \(readers="
    ):
        one("norm", 4, 2.0).to_diffusers_lora(model, path)
    maps = one("norm", 4, 2.0)
    maps.to_diffusers_lora(model, path, readers={"norm": ["conv"]})
    tensors, _ = read(path)
    a, b = tensors["transformer.conv.lora_A.weight"], tensors["transformer.conv.lora_B.weight"]
    assert a.shape == (5, 4, 3, 3) and b.shape == (5, 5, 1, 1)  # not the 9 places of the window
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.conv.weight += torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
        with maps.attach(model):
            assert apart(changed(x), model(x)) < 1e-13
    with pytest.raises(ValueError, match=r"its shift is not 0, and 'conv' sees zeros without it at the edges"):
        one("norm", 4, 2.0, 1.0).to_diffusers_lora(model, path, readers={"norm": ["conv"]})
    model.conv = nn.Conv2d(4, 5, 3, padding=1, groups=1, dilation=2).double()
    with pytest.raises(ValueError, match=r"'conv' has groups=1, dilation=\(2, 2\)"):
        maps.to_diffusers_lora(model, path, readers={"norm": ["conv"]})


def test_a_norm_whose_reader_is_mapped_goes_into_its_modulation(tmp_path):
    model = build("Flux")
    both = lineas.SteeringMaps({**one(FLUX_NORM, 16, 1.5, 0.5), **one("transformer_blocks.0.attn.to_q", 16, 0.5, 0.1)})
    both.to_diffusers_lora(model, tmp_path / "slider.safetensors")
    tensors, _ = read(tmp_path / "slider.safetensors")
    assert {name.partition(".lora")[0] for name in tensors} == {
        "transformer.transformer_blocks.0.norm1.linear",
        "transformer.transformer_blocks.0.attn.to_q",
    }
    loaded = load("Flux", tmp_path / "slider.safetensors")
    for scale in (1.0, 0.5):
        loaded.set_adapters("slider", scale)
        assert apart(run(loaded), hooked(model, both, scale)) < 1e-13


def test_changes_of_other_rows_of_a_linear_add_up(tmp_path):
    model = build("Flux")
    linear, norm = one("transformer_blocks.0.norm1.linear", 96, 2.0), one("transformer_blocks.0.norm2", 16, 2.0, 0.5)
    maps = lineas.SteeringMaps({**linear, **norm})
    maps.to_diffusers_lora(model, tmp_path / "slider.safetensors")
    assert apart(run(load("Flux", tmp_path / "slider.safetensors")), hooked(model, maps)) < 1e-13


@pytest.mark.parametrize("dual", [False, True])
def test_fold_knows_the_norms_of_stable_diffusion_3(dual):
    kind = "SD3.5" if dual else "SD3"
    model = build(kind)
    maps = sparse_maps(model, GLOBS[kind])
    assert apart(run(maps.fold(model)), hooked(model, maps)) < 1e-13


# --- the file ---------------------------------------------------------------------------------------------------------


def test_ranks_are_the_numbers_of_neurons_and_biases_are_there_where_needed(tmp_path):
    model = build("UNet")
    maps = sparse_maps(model, READ_WITHOUT_BIAS, shift=False)
    maps.to_diffusers_lora(model, tmp_path / "slider.safetensors", bias=False)
    tensors, metadata = read(tmp_path / "slider.safetensors")
    assert not any("bias" in name for name in tensors)
    key = f"unet.{UNET_NORM.replace('norm1', 'attn1.to_k')}"
    a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    changed = np.flatnonzero(maps[UNET_NORM].weight != 1)
    assert a.shape == (len(changed), 16) and (a.sum(dim=0).nonzero().flatten().numpy() == changed).all()
    weight = model.get_submodule(UNET_NORM.replace("norm1", "attn1.to_k")).weight.detach()
    torch.testing.assert_close(b @ a, weight * torch.tensor(maps[UNET_NORM].weight - 1))
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert settings["unet.lora_bias"] is False and settings["unet.rank_pattern"] == settings["unet.alpha_pattern"]
    maps.to_diffusers_lora(model, tmp_path / "slider.safetensors", bias=True)
    tensors, _ = read(tmp_path / "slider.safetensors")
    assert sum(name.endswith("lora_B.bias") for name in tensors) == len(tensors) / 3


def test_metadata_and_the_same_bytes_each_time(tmp_path):
    model = build("UNet")
    maps = lineas.SteeringMaps(dict(one(UNET_LINEAR, 16, 2.0, 1.0)), {"calibration": {"strength": 0.25}})
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        maps.to_diffusers_lora(model, tmp_path / folder / "age.safetensors", "calibrated")
    first, second = ((tmp_path / folder / "age.safetensors").read_bytes() for folder in ("a", "b"))
    assert first == second
    _, metadata = read(tmp_path / "a" / "age.safetensors")
    assert metadata.pop("lora_adapter_metadata")
    assert metadata == {
        "format": "pt",
        "modelspec.title": "age",
        "lineas.version": lineas.__version__,
        "lineas.maps": digest(maps),
        "lineas.strength": "0.25",
        "lineas.scale_1": "strength",
        "lineas.scales": "-1 to 1",
    }


def test_a_file_that_is_there_is_replaced_and_a_failure_leaves_it(tmp_path, monkeypatch):
    model, path, inverse = build("UNet"), tmp_path / "slider.safetensors", tmp_path / "back.safetensors"
    maps = one(UNET_LINEAR, 16, 2.0)
    path.write_bytes(b"old")

    def full(number):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space left"):
            maps.to_diffusers_lora(model, path, inverse=inverse)
    assert path.read_bytes() == b"old" and [one.name for one in tmp_path.iterdir()] == ["slider.safetensors"]
    maps.to_diffusers_lora(model, path, inverse=inverse)
    assert len(read(path)[0]) == len(read(inverse)[0]) == 3
    assert {one.name for one in tmp_path.iterdir()} == {"slider.safetensors", "back.safetensors"}


# --- kohya ------------------------------------------------------------------------------------------------------------


def test_diffusers_reads_the_layout_of_kohya(tmp_path):
    model = build("UNet")
    maps = sparse_maps(model, READ_WITHOUT_BIAS, shift=False)
    maps.to_diffusers_lora(model, tmp_path / "slider.safetensors", layout="kohya")
    pipe = pipeline("UNet")
    pipe.load_lora_weights(str(tmp_path / "slider.safetensors"), adapter_name="slider")
    for scale in (1.0, 0.5, -1.0):
        pipe.set_adapters(["slider"], [scale])
        assert apart(run(pipe.unet), hooked(model, maps, scale)) < 1e-13
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe.unet), run(model))


def test_diffusers_knows_the_kohya_names_of_all_linears_and_convolutions(tmp_path):
    model = build("UNet")
    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    with torch.no_grad():
        for module in plain.values():
            if module.bias is not None:
                module.bias.zero_()  # so that their maps need none
    maps = sparse_maps(model, list(plain), shift=False)
    maps.to_diffusers_lora(model, tmp_path / "slider.safetensors", layout="kohya")
    pipe = pipeline("UNet")
    pipe.unet.load_state_dict(model.state_dict())
    pipe.load_lora_weights(str(tmp_path / "slider.safetensors"))
    assert len(plain) > 60 and apart(run(pipe.unet), hooked(model, maps)) < 1e-13


def test_shifts_are_under_diff_b_which_diffusers_refuses(tmp_path):
    """Where diffusers reads them, the description is to change."""
    model, path = build("UNet"), tmp_path / "slider.safetensors"
    maps = one("conv_in", 8, 1.5, 0.5)
    maps.to_diffusers_lora(model, path, layout="kohya")
    tensors, _ = read(path)
    up, down = tensors["lora_unet_conv_in.lora_up.weight"], tensors["lora_unet_conv_in.lora_down.weight"]
    assert up.shape == (8, 1, 1, 1) and down.shape == (1, 3, 3, 3)
    scale = tensors["lora_unet_conv_in.alpha"] / len(down)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.conv_in.weight += scale * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
        changed.conv_in.bias += tensors["lora_unet_conv_in.diff_b"]
    assert apart(run(changed), hooked(model, maps)) < 1e-13
    with pytest.raises(ValueError, match="have not been correctly renamed"):
        pipeline("UNet").load_lora_weights(str(path))


# --- negative scales, several sliders ---------------------------------------------------------------------------------


def test_the_inverse_undoes_the_maps_and_a_negative_scale_does_not(tmp_path):
    model = build("UNet")
    maps = one(UNET_LINEAR, 16, 0.5, 0.25)
    forth, back = tmp_path / "forth.safetensors", tmp_path / "back.safetensors"
    maps.to_diffusers_lora(model, forth, strength=0.8, inverse=back)
    undone = maps.scaled(0.8).inverse()
    assert apart(run(load("UNet", back)), hooked(model, undone)) < 1e-13
    mirrored = load("UNet", forth)
    mirrored.set_adapters("slider", -1.0)
    assert apart(run(mirrored), hooked(model, maps, -0.8)) < 1e-13 < apart(run(mirrored), hooked(model, undone))
    folded = maps.fold(model, 0.8)
    folded.load_lora_adapter(str(_of_folded(maps.scaled(0.8), folded, tmp_path)), prefix="unet", adapter_name="slider")
    assert apart(run(folded), run(model)) < 1e-13
    _, metadata = read(back)
    assert (metadata["lineas.scale_1"], metadata["lineas.scales"]) == ("inverse", "0 to 1")
    assert metadata["lineas.maps"] == digest(maps) and metadata["lineas.strength"] == "0.8"


def _of_folded(maps, folded, tmp_path):
    """The inverse of maps for a model that they are in already."""
    return maps.inverse().to_diffusers_lora(folded, tmp_path / "of_folded.safetensors")


def load_both(first, second, tmp_path, scales):
    model = build("UNet")
    for name, maps in (("first", first), ("second", second)):
        maps.to_diffusers_lora(build("UNet"), tmp_path / f"{name}.safetensors")
        model.load_lora_adapter(str(tmp_path / f"{name}.safetensors"), prefix="unet", adapter_name=name)
    model.set_adapters(["first", "second"], list(scales))
    return run(model)


def test_several_sliders_are_the_sum_of_the_maps(tmp_path):
    model = build("UNet")
    first, second = (sparse_maps(model, GLOBS["UNet"][3:], seed=seed) for seed in (1, 2))  # of the same modules
    found = load_both(first, second, tmp_path, (0.7, -0.4))
    assert apart(found, hooked(model, 0.7 * first + -0.4 * second)) < 1e-13
    # Attached one after the other the second maps act on what the first ones make.
    with first.attach(model, strength=0.7):
        assert apart(found, hooked(model, second, -0.4)) > 1e-3


def test_a_slider_of_a_norm_and_one_of_its_reader_do_not_see_each_other(tmp_path):
    model = build("UNet")
    norm, reader = one(UNET_NORM, 16, 1.5), one(UNET_NORM.replace("norm1", "attn1.to_v"), 16, 0.5)
    found = load_both(norm, reader, tmp_path, (1.0, 1.0))
    difference = apart(found, hooked(model, norm + reader))
    assert 1e-9 < difference < apart(found, run(model))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "maps", "message"),
    [
        (
            "UNet",
            one("mid_block.resnets.0.norm1", 16, 2.0),
            r"1 of 1 maps cannot be written as LoRA, and nothing was changed; maps.attach\(model\) applies all of them"
            r", and maps.select\(\[...\]\) picks others:\n  mid_block.resnets.0.norm1: its output goes through a "
            "nonlinearity before any weight",
        ),
        ("UNet", one("conv_norm_out", 8, 2.0), "conv_norm_out: its output goes through a nonlinearity"),
        (
            "UNet",
            one("mid_block.attentions.0", 16, 2.0),
            "alone read the output of '0' in ModuleList",
        ),
        ("Flux", one("transformer_blocks.0.attn.norm_q", 8, 2.0), "no weight reads its output: queries and keys"),
        (
            "UNet",
            lineas.SteeringMaps({**one(UNET_NORM, 16, 2.0), **one(UNET_NORM.replace("norm1", "attn1.to_q"), 16, 2.0)}),
            r"norm1: 'mid_block.*attn1.to_q', which reads it, has a map as well",
        ),
        (
            "Flux",
            lineas.SteeringMaps(
                {
                    "transformer_blocks.0.norm1.linear": lineas.AffineMap(np.full(96, 2.0), np.zeros(96)),
                    **one("transformer_blocks.0.norm2", 16, 2.0),
                }
            ),
            r"norm2: the map of 'transformer_blocks.0.norm1.linear' changes '.*norm1.linear' as well",
        ),
    ],
)
def test_what_no_lora_can_do_is_refused(kind, maps, message, tmp_path):
    model = build(kind)
    with pytest.raises(ValueError, match=message):
        maps.to_diffusers_lora(model, tmp_path / "slider.safetensors")
    assert not list(tmp_path.iterdir())


def test_wrong_arguments(tmp_path):
    model, path, maps = build("UNet"), tmp_path / "slider.safetensors", one(UNET_LINEAR, 16, 2.0)
    (tmp_path / "folder.safetensors").mkdir()
    for settings, message in (
        ({"bias": 1}, "bias must be True, False or None, got 1"),
        ({"max_rank": 2.0}, "max_rank must be an int"),
        ({"strength": None}, "strength must be a real number"),
        ({"path": 3}, "path must be a string or a path, got int"),
        ({"inverse": 3}, "inverse must be a string or a path, got int"),
        ({"model": pipeline("UNet")}, r"model must be a torch.nn.Module, got StableDiffusionPipeline \(of a pipeline"),
        ({"readers": [UNET_NORM]}, "readers must be a mapping from module name to names, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            maps.to_diffusers_lora(**{"model": model, "path": path, **settings})
    for settings, message in (
        ({"strength": float("nan")}, "strength must be finite, got nan"),
        ({"strength": "calibrated"}, "strength='calibrated' is for maps that were calibrated"),
        ({"strength": 0.0}, "these maps change nothing: there is nothing to write"),
        ({"layout": "comfyui"}, "layout must be .*'comfyui'"),
        ({"max_rank": 0}, "max_rank must be at least 1, got 0"),
        ({"path": tmp_path / "folder.safetensors"}, "path must be a file, and .*folder.safetensors is a folder"),
        ({"path": tmp_path / "slider.bin"}, "path must end in .safetensors, .* got '.*slider.bin'"),
        ({"path": tmp_path / "no" / "slider.safetensors"}, "path: the folder of .*slider.safetensors does not exist"),
        ({"inverse": tmp_path / "slider.bin"}, "inverse must end in .safetensors"),
        ({"inverse": path}, "inverse must be another file than path, got .* for both"),
        (
            {"model": nn.Sequential(nn.Linear(2, 2))},
            "model must be one that diffusers loads a LoRA into, .* Sequential",
        ),
        ({"model": build("Flux"), "layout": "kohya"}, "has names for UNets, got FluxTransformer2DModel"),
        ({"model": build("Flux")}, "mid_block"),
        ({"bias": False}, r"bias=False, but what the maps do to 1 of 1 modules, such as 'mid_block.*', needs one"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.to_diffusers_lora(**{"model": model, "path": path, **settings})
    assert [one.name for one in tmp_path.iterdir()] == ["folder.safetensors"]


def test_a_rank_that_is_too_large_and_inverses_that_do_not_exist(tmp_path):
    model, path = build("UNet"), tmp_path / "slider.safetensors"
    wide = lineas.SteeringMaps({UNET_LINEAR: lineas.AffineMap(np.full(16, 0.5), np.zeros(16))})
    with pytest.raises(
        ValueError, match=r"max_rank must be at least 16, which 'mid.*' needs, got 8: .* 1 modules .* 0.00205 MB"
    ):
        wide.to_diffusers_lora(model, path, max_rank=8)
    for weight in (0.0, 5e-4, -5e-4):
        with pytest.raises(ValueError, match=r"inverse: the map of 'mid.*' has no inverse .* at strength 1 neuron 0"):
            one(UNET_LINEAR, 16, weight).to_diffusers_lora(model, path, inverse=tmp_path / "back.safetensors")
    with pytest.raises(ValueError, match="at strength 2 neuron 0 is multiplied by 0"):
        one(UNET_LINEAR, 16, 0.5).to_diffusers_lora(model, path, 2.0, inverse=tmp_path / "back.safetensors")
    with pytest.raises(ValueError, match=r"the LoRA of '.*to_out.0' would not be finite in torch.float32"):
        one(UNET_LINEAR, 16, 1e60).to_diffusers_lora(model.float(), path)
    assert not list(tmp_path.iterdir())


def test_wrong_maps_and_models(tmp_path):
    model, path, maps = build("UNet"), tmp_path / "slider.safetensors", one(UNET_LINEAR, 16, 2.0)

    def refused(message, maps=maps, model=model):
        with pytest.raises(ValueError, match=message):
            maps.to_diffusers_lora(model, path)

    gate = lineas.Gate(np.ones(16), 0.0)
    refused("to_diffusers_lora: these maps have gates", maps.gated({UNET_LINEAR: gate}))
    refused(
        r"for the tokens 'last'.*a LoRA would change the others", lineas.SteeringMaps(dict(maps), {"tokens": "last"})
    )
    refused("the map is for 15 neurons, the module has 16", one(UNET_LINEAR, 15, 2.0))
    refused("no module|nothing", one("mid_block.nothing", 16, 2.0))
    refused("these maps change nothing", one(UNET_LINEAR, 16))
    with maps.attach(model):
        refused("maps are attached to")
    loaded = load("UNet", maps.to_diffusers_lora(model, tmp_path / "other.safetensors"))
    refused(r"is a peft.tuners.lora.layer.Linear, no plain Linear or Conv2d: unload the LoRA first", model=loaded)
    fused = build("UNet")
    fused.fuse_qkv_projections()
    refused("the projections of 'attn1' are fused", one(UNET_NORM, 16, 2.0), fused)
    shared = build("UNet")
    shared.get_submodule(UNET_NORM.removesuffix(".norm1")).norm_type = "ada_norm_single"
    refused(r"a modulation that the blocks .* share \(norm_type 'ada_norm_single'\)", one(UNET_NORM, 16, 2.0), shared)
    twice = build("UNet")
    twice.mid_block.resnets[1].conv2 = twice.mid_block.resnets[0].conv2
    refused("it is used in 2 places of the model", one("mid_block.resnets.0.conv2", 16, 2.0), twice)
    packed = build("UNet")
    packed.get_submodule(UNET_LINEAR).weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.uint8), requires_grad=False)
    refused("is torch.uint8 .* quantised", model=packed)
    assert [one.name for one in tmp_path.iterdir()] == ["other.safetensors"]
