"""Maps in models that something else has hold of as well: one real run for each row of docs/compatibility.md."""

import copy
import sys
import tempfile

import models_zoo as zoo
import numpy as np
import pytest
import surroundings
import torch
from attached import encode, hooks_on, language_model, logits, random_maps
from fits import prompts, same_maps, short_fit
from surroundings import row
from torch import nn

import lineas

LAYERS = zoo.NORMS["llama"]
BATCH = dict(encode())


@pytest.fixture(scope="module")
def known():
    """What a Llama that nothing else has hold of gives: without maps, with them, its activations and a fit."""
    model, maps = language_model("llama")
    plain = logits(model)
    with maps.attach(model):
        steered = logits(model)
    acts = lineas.collect(model, prompts(6, 1), layers=LAYERS)
    return maps, plain, steered, acts, short_fit(model).maps


def same_acts(found, expected):
    assert list(found) == list(expected)
    for name, rows in expected.items():
        np.testing.assert_array_equal(found[name], rows)


def test_the_page_has_the_table_of_the_tests():
    before = {name: sys.modules.get(name) for name in surroundings.MODULES}
    try:
        assert surroundings.PAGE.read_text() == surroundings.page(surroundings.PAGE.read_text())
    finally:
        sys.modules.update({name: module for name, module in before.items() if module is not None})


# --- accelerate -------------------------------------------------------------------------------------------------------


def offloaded(model, how):
    accelerate = pytest.importorskip("accelerate")
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, tempfile.mkdtemp(), execution_device="cpu")
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tempfile.mkdtemp(), force_hooks=True)


HOW = ["cpu_offload", "disk_offload", "dispatch_model"]


@row("accelerate: `cpu_offload`, `disk_offload`, `dispatch_model` over CPU and disk", "works", "maps before or after")
@pytest.mark.parametrize("how", HOW)
def test_maps_and_the_hooks_of_accelerate_leave_each_other_alone(how, known):
    from accelerate.hooks import remove_hook_from_submodules

    maps, plain, steered, _, _ = known
    model = zoo.llama()
    first = maps.attach(model)
    model = offloaded(model, how)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model), steered)
    first.remove()
    assert any(hasattr(module, "_hf_hook") for module in model.modules())
    assert torch.equal(logits(model), plain)
    with maps.attach(model):
        assert torch.equal(logits(model), steered)
        remove_hook_from_submodules(model)
        assert torch.equal(logits(model), steered)
    assert torch.equal(logits(model), plain) and hooks_on(model) == 0


@row("the same: `collect` and fits", "works", "weights on the meta device are seen where they run; the same bits")
def test_offloaded_models_are_collected_from_and_fitted(known):
    *_, acts, fitted = known
    model = offloaded(zoo.llama(), "dispatch_model")
    same_acts(lineas.collect(model, prompts(6, 1), layers=LAYERS), acts)
    same_maps(short_fit(model).maps, fitted)
    same_maps(short_fit(model, batch_size=3, steps=2).maps, short_fit(zoo.llama(), steps=2).maps, atol=1e-5)
    with pytest.raises(ValueError, match=r"the map is for 5 neurons, the module has 16"):
        random_maps({"model.layers.2.mlp.down_proj": 5}).attach(model)


# --- modes and dtypes -------------------------------------------------------------------------------------------------


@row("`torch.inference_mode`, `torch.no_grad`", "works", "attach, change the strength and fit inside or outside")
def test_maps_attached_in_inference_mode_serve_training_later(known):
    maps, _, steered, acts, fitted = known
    model = zoo.llama()
    with torch.inference_mode():
        handle = maps.attach(model, strength=0.5)
        logits(model)
        handle.strength = 1.0
        assert torch.equal(logits(model), steered)
    model(**BATCH).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    handle.remove()
    with torch.inference_mode():
        same_acts(lineas.collect(model, prompts(6, 1), layers=LAYERS), acts)
        same_maps(short_fit(model).maps, fitted)
    with torch.no_grad():
        same_maps(short_fit(model).maps, fitted)


@row("`torch.autocast` in bfloat16", "works", "maps are computed in float32 and rounded once, also on bfloat16 outputs")
@pytest.mark.parametrize("layers", [LAYERS, "**.down_proj"])
def test_autocast_around_generation_and_fits(layers):
    model = zoo.llama()
    maps = random_maps(dict.fromkeys(lineas.collect(model, prompts(2, 1), layers=layers), zoo.WIDTH))
    last = model.get_submodule(list(maps)[-1])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        seen = []
        keep = [last.register_forward_hook(lambda module, args, output: seen.append(output))]
        with maps.attach(model):
            keep.append(last.register_forward_hook(lambda module, args, output: seen.append(output)))
            model(**BATCH)
            assert model.generate(**BATCH, max_new_tokens=3, do_sample=False, eos_token_id=None).shape[1] > 3
        for handle in keep:
            handle.remove()
        narrow = short_fit(model, layers=layers, steps=2)
    one = maps[list(maps)[-1]]
    before, after = seen[:2]
    weight, bias = torch.tensor(one.weight), torch.tensor(one.bias)
    assert torch.equal(after, torch.addcmul(bias, before.float(), weight).to(before.dtype))
    assert before.dtype == (torch.float32 if layers == LAYERS else torch.bfloat16)
    wide = short_fit(model, layers=layers, steps=2)
    np.testing.assert_allclose(narrow.history["loss"], wide.history["loss"], rtol=0.02)


@row("`model.to(dtype)`, `model.to(device)` with maps on", "works", "maps follow the outputs")
def test_maps_follow_a_model_to_other_dtypes_and_devices():
    model, x, maps = zoo.mlp(), torch.randn(3, 5), random_maps({"0": 7, "2": 4})
    with torch.no_grad(), maps.attach(model):
        expected = model(x)
        assert (model.bfloat16()(x.bfloat16()).float() - expected).abs().max() < 0.05
        wide = model.double()(x.double())
        assert wide.dtype == torch.float64
        shape = model.to("meta")(x.to("meta"))
    assert shape.is_meta and shape.shape == expected.shape


@row("`state_dict`, `parameters()`, `copy.deepcopy`", "works", "maps are no part of a model; a copy brings them along")
def test_maps_are_no_part_of_a_model_and_go_with_a_copy(known):
    maps, plain, steered, _, _ = known
    model = zoo.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with maps.attach(model):
        logits(model)
        assert list(model.state_dict()) == list(before)
        assert len(list(model.parameters())) == len(list(zoo.llama().parameters()))
        other = copy.deepcopy(model)
    assert torch.equal(logits(model), plain) and torch.equal(logits(other), steered)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- training ---------------------------------------------------------------------------------------------------------


def gradients(model, maps, **checkpointing):
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    with maps.attach(model):
        model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@row(
    "training the model with maps on, with gradient checkpointing",
    "works",
    "maps must stay on until `backward` is done: layers run again there",
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_gradients_of_training_without_it(reentrant, known):
    maps = known[0]
    expected = gradients(zoo.llama(), maps)
    found = gradients(zoo.llama(), maps, use_reentrant=reentrant)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@row("`DistributedDataParallel` (gloo, one process)", "works", "names are those of the model inside")
def test_data_parallel_models(known):
    import torch.distributed as dist

    maps, _, steered, acts, fitted = known
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = zoo.llama()
        parallel = nn.parallel.DistributedDataParallel(model)
        for root in (parallel, model):
            with maps.attach(root):
                assert torch.equal(logits(parallel), steered)
        same_acts(lineas.collect(parallel, prompts(6, 1), layers=LAYERS), acts)
        same_maps(short_fit(parallel).maps, fitted, atol=1e-6)
        texts, settings = zoo.texts(3), {"tokenizer": zoo.tokenizer(padding_side="left"), "layers": "**.h.*.ln_2"}
        inner = lineas.collect(zoo.gpt2(), texts, **settings)
        outer = lineas.collect(nn.parallel.DistributedDataParallel(zoo.gpt2()), texts, **settings)
        same_acts(outer, inner)  # GPT-2 needs positions, which its own forward asks for
    finally:
        dist.destroy_process_group()


# --- graphs -----------------------------------------------------------------------------------------------------------


def traced(model, x):
    with torch.no_grad():
        return torch.jit.trace(model, x)


@row(
    "maps on a traced model (`torch.jit.trace`)",
    "refused",
    "runs as one graph; attach to the model that was traced or exported",
)
def test_traced_models_are_refused():
    random_maps({"0": 7}).attach(traced(zoo.mlp(), torch.randn(3, 5)))


@row("maps on an exported model", "refused", "is a part of a GraphModule, which runs as one graph")
def test_exported_models_are_refused():
    random_maps({"0": 7}).attach(torch.export.export(zoo.mlp(), (torch.randn(3, 5),)).module())


@row("maps on a scripted module", "refused", "cannot call hooks: it is a RecursiveScriptModule")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_scripted_modules_are_refused():
    random_maps({"0": 7}).attach(nn.Sequential(torch.jit.script(nn.Linear(5, 7))))


def test_graphs_whose_modules_are_called_take_maps():
    model, x, maps = zoo.mlp(), torch.randn(3, 5), random_maps({"0": 7})
    whole = random_maps({"0": 3})
    with torch.no_grad():
        with maps.attach(model):
            expected = model(x)
        graph = torch.fx.symbolic_trace(model)
        with maps.attach(graph):
            assert torch.equal(graph(x), expected)
        for closed in (traced(model, x), torch.export.export(model, (x,)).module()):
            outer = nn.Sequential(closed)  # a hook on the whole is called
            with whole.attach(outer):
                weight, bias = (torch.tensor(part) for part in (whole["0"].weight, whole["0"].bias))
                torch.testing.assert_close(outer(x), model(x) * weight + bias)
