"""Maps in models that other libraries wrap, quantise or draw with: a real run for each row of docs/compatibility.md."""

import copy
import warnings

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import encode, hooks_on, language_model, logits, random_maps
from fits import prompts, same_maps, short_fit
from surroundings import row
from torch import nn

import lineas
from lineas.hooks import modules

LAYERS = zoo.NORMS["llama"]
INSIDE = random_maps({"model.layers.1.mlp.down_proj": 16, "model.layers.0.self_attn.q_proj": 16})


@pytest.fixture(scope="module")
def steered():
    """Maps for a Llama, and what it gives with them."""
    model, maps = language_model("llama")
    with maps.attach(model):
        return maps, logits(model)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def adapted(model):
    """The model with a LoRA of random weights on some of its projections."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(model, settings).eval()


@row(
    "PEFT: wrapped models",
    "works",
    "names are those of the model inside; maps from before stay on; adapters on or off",
)
def test_maps_in_a_model_with_adapters(steered):
    maps, without_adapters = steered
    model = zoo.llama()
    with maps.attach(model):
        early = adapted(model)
        before = logits(early)
    bare = logits(early)
    with maps.attach(early):
        assert torch.equal(logits(early), before) and not torch.equal(before, bare)
        with early.disable_adapter():
            assert torch.equal(logits(early), without_adapters)
        settings = dict(max_new_tokens=4, do_sample=False, eos_token_id=None)
        tokens = early.generate(**encode(), **settings)
    assert torch.equal(logits(early), bare) and hooks_on(early) == 0
    merged = adapted(zoo.llama()).merge_and_unload()
    with maps.attach(merged):
        assert torch.equal(merged.generate(**encode(), **settings), tokens)
        torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)


@row("PEFT: `collect` and fits", "works", "the adapters count, and stay as trainable as they were")
def test_models_with_adapters_are_fitted():
    model = adapted(zoo.llama())
    trained = [parameter.requires_grad for parameter in model.parameters()]
    found = short_fit(model).maps
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    same_maps(found, short_fit(adapted(zoo.llama()).merge_and_unload()).maps, atol=1e-5)


@row(
    "PEFT: a module that has an adapter",
    "works",
    "maps act on the sum; on the layer alone under its name + `.base_layer`",
)
def test_maps_on_layers_with_adapters():
    model = zoo.llama()
    with INSIDE.attach(model):
        expected = logits(model)
        early = adapted(model)  # what was hooked becomes the base layer
        kept = logits(early)
        with early.disable_adapter():
            assert torch.equal(logits(early), expected)
    with INSIDE.rename(lambda name: f"{name}.base_layer").attach(early):
        assert torch.equal(logits(early), kept)
    names = [f"model.layers.1.mlp.down_proj{end}" for end in ("", ".base_layer")]
    acts = lineas.collect(early, prompts(4, 1), layers=names)
    assert not np.allclose(acts[names[0]], acts[names[1]])
    with INSIDE.attach(early):
        assert not torch.allclose(logits(early), kept)


@row(
    "PEFT: `merge_and_unload` with maps on",
    "needs",
    "attach again if maps were on layers with adapters: those are replaced",
)
def test_merging_under_maps(steered):
    maps, model = steered[0], adapted(zoo.llama())
    with maps.attach(model):
        before = logits(model)
        torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-4, rtol=1e-4)
    model = adapted(zoo.llama())
    with INSIDE.attach(model):
        before = logits(model)
        merged = model.merge_and_unload()
        assert hooks_on(merged) == 1  # the layers are others now, the model itself is the same
        with INSIDE.attach(merged):
            torch.testing.assert_close(logits(merged), before, atol=1e-4, rtol=1e-4)


# --- pipelines --------------------------------------------------------------------------------------------------------


@row("transformers pipelines", "works", "attach to `pipe.model`")
def test_a_text_generation_pipeline(steered):
    from transformers import pipeline

    maps, _ = steered
    pipe = pipeline("text-generation", model=zoo.llama(), tokenizer=zoo.tokenizer())

    def write(batch_size=1):
        settings = dict(max_new_tokens=4, do_sample=False, batch_size=batch_size, return_full_text=False)
        return [one[0]["generated_text"] for one in pipe(zoo.texts(3), **settings)]

    plain = write()
    with maps.attach(pipe.model):
        changed = write()
        assert write(batch_size=3) == changed != plain
    assert write() == plain


@pytest.fixture(scope="module")
def pipe():
    """A tiny Stable Diffusion."""
    pytest.importorskip("diffusers")
    from tiny_diffusion import stable_diffusion

    return stable_diffusion()


PAINTED = ["down_blocks.0.resnets.0.norm1", "down_blocks.1.attentions.0.transformer_blocks.0.norm2", "conv_norm_out"]
DRAWING = dict(num_inference_steps=2, height=8, width=8)


def draw(pipe, **settings):
    generator = torch.Generator().manual_seed(0)
    return pipe("a good dog", generator=generator, output_type="np", **{**DRAWING, **settings}).images


@pytest.fixture(scope="module")
def drawn(pipe):
    """Maps for the U-Net, and pictures without and with them."""
    maps = random_maps({name: modules.output_width(pipe.unet.get_submodule(name)) for name in PAINTED})
    plain = draw(pipe)
    with maps.attach(pipe.unet):
        changed = draw(pipe)
    assert np.abs(changed - plain).max() > 1e-3
    return maps, plain, changed


@row(
    "diffusers pipelines, with guidance", "works", "attach to `pipe.unet` or `pipe.transformer`; both halves are mapped"
)
def test_guidance_doubles_the_batch_and_maps_act_on_both_halves(pipe, drawn):
    maps, plain, _ = drawn
    assert np.array_equal(draw(pipe), plain)
    module, seen = pipe.unet.get_submodule(PAINTED[0]), []
    first = module.register_forward_hook(lambda module, args, output: seen.append(output))
    with maps.attach(pipe.unet):
        last = module.register_forward_hook(lambda module, args, output: seen.append(output))
        draw(pipe, guidance_scale=4.0, num_inference_steps=1)
        first.remove()
        last.remove()
    weight, bias = (torch.tensor(part)[:, None, None] for part in (maps[PAINTED[0]].weight, maps[PAINTED[0]].bias))
    assert len(seen[0]) == 2
    torch.testing.assert_close(seen[1], weight * seen[0] + bias)


def offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe):
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


@row(
    "diffusers: `enable_model_cpu_offload`, `enable_group_offload`, `enable_attention_slicing`",
    "works",
    "tried on a CPU",
)
@pytest.mark.parametrize("change", [offload, group_offload, lambda pipe: pipe.enable_attention_slicing(1)])
def test_pipelines_that_save_memory(change, pipe, drawn):
    maps, plain, changed = drawn
    pipe = copy.deepcopy(pipe)
    change(pipe)
    with maps.attach(pipe.unet):
        np.testing.assert_allclose(draw(pipe), changed, atol=1e-5)
    np.testing.assert_allclose(draw(pipe), plain, atol=1e-5)


@row("diffusers: LoRA beside maps", "works", "loaded, switched and removed with maps on")
def test_adapters_of_a_pipeline_come_and_go_under_maps(pipe, drawn):
    peft = pytest.importorskip("peft")
    maps, plain, changed = drawn
    pipe = copy.deepcopy(pipe)
    with maps.attach(pipe.unet):
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        assert not np.array_equal(draw(pipe), changed)
        pipe.unet.disable_adapters()
        np.testing.assert_allclose(draw(pipe), changed, atol=1e-6)
        pipe.unet.delete_adapters("default")
        assert np.array_equal(draw(pipe), changed)
    assert np.array_equal(draw(pipe), plain)


def run(pipe, gradients):
    call = type(pipe).__call__.__wrapped__ if gradients else type(pipe).__call__

    def forward(model, batch):
        generator = torch.Generator().manual_seed(0)
        settings = {**DRAWING, "num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        return call(pipe, batch["prompt"], generator=generator, **settings)

    return forward


SETS = {"prompt": ["a good dog", "a bad dog"]}, {"prompt": ["the cat", "the day"]}


@row("diffusers: `collect` and fits", "works", "`forward` calls the pipeline, for fits without its `torch.no_grad`")
def test_a_pipeline_is_collected_from_and_fitted(pipe):
    acts = lineas.collect(pipe.unet, [SETS[0]], layers=PAINTED[:2], forward=run(pipe, False))
    assert [rows.shape for rows in acts.values()] == [(2, 8), (2, 16)]
    # The last norm alone comes after the text.
    settings = dict(layers=PAINTED[2], forward=run(pipe, True), steps=3, progress=False)
    fitted = lineas.fit_end_to_end(pipe.unet, *SETS, **settings)
    assert fitted.history["loss"][-1] < fitted.history["loss"][0]


@row("fits through the `__call__` of a diffusers pipeline", "refused", "give a forward that runs it with them")
def test_a_fit_without_gradients_is_refused(pipe):
    lineas.fit_end_to_end(pipe.unet, *SETS, layers=PAINTED[:2], forward=run(pipe, False), progress=False)


# --- quantised models -------------------------------------------------------------------------------------------------


def quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    return model


def torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def bitsandbytes(model):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            new = bitsandbytes.nn.Linear8bitLt(
                module.in_features, module.out_features, bias=module.bias is not None, has_fp16_weights=False
            )
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new.to("cpu"))
    return model


def dynamic(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still the only one that comes with torch
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def dequantised(model):
    """A model of plain weights, those that the quantised one computes with: linear layers tell them on unit vectors."""
    plain = zoo.llama()
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                module.weight.copy_(model.get_submodule(name)(torch.eye(module.in_features)).T)
    return plain


QUANTISED = [quanto, torchao, bitsandbytes]


@row("int8 weights: optimum-quanto, torchao, bitsandbytes; torch's dynamic quantisation", "works", "maps on any module")
@pytest.mark.parametrize("quantise", [*QUANTISED, dynamic])
def test_maps_on_norms_and_layers_of_quantised_models(quantise, steered):
    model = quantise(zoo.llama())
    plain = logits(model)
    for maps in (steered[0], INSIDE):
        name = next(iter(maps))
        maps = maps.select(name)
        expected = lineas.collect(model, prompts(4, 1), layers=name)[name] * maps[name].weight + maps[name].bias
        with maps.attach(model):
            found = lineas.collect(model, prompts(4, 1), layers=name)[name]
            assert not torch.allclose(logits(model), plain)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert torch.equal(logits(model), plain)
    with pytest.raises(ValueError, match="the map is for 5 neurons, the module has 16"):
        random_maps({"model.layers.1.mlp.down_proj": 5}).attach(model)


@row("fits through int8 weights: optimum-quanto, torchao", "works", "gradients are those of the dequantised weights")
@pytest.mark.parametrize("quantise", [quanto, torchao])
def test_fits_through_quantised_weights_are_those_of_their_values(quantise):
    sets = {"layers": "model.layers.0.mlp.down_proj", "loss_layers": LAYERS.replace("*", "2")}
    model = quantise(zoo.llama())
    found, expected = short_fit(model, **sets), short_fit(dequantised(model), **sets)
    np.testing.assert_allclose(found.history["loss"], expected.history["loss"], rtol=1e-4)
    same_maps(found.maps, expected.maps, atol=1e-3)


@row(
    "fits through torch's dynamic quantisation",
    "refused",
    "has no gradient, so maps cannot",
)
def test_fits_through_operations_without_gradient_are_refused():
    short_fit(dynamic(zoo.llama()))


@row(
    "fits through torchao's quantised activations",
    "refused",
    "of torchao that quantises activations, which stops gradients",
)
def test_fits_through_quantised_activations_are_refused():
    quantization = pytest.importorskip("torchao.quantization")
    model = zoo.llama()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    short_fit(model)
