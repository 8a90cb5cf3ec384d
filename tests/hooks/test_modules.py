"""Finding modules, and the hidden state in what they give."""

import re
from collections import namedtuple

import models_zoo
import pytest
import torch
from families import FAMILIES, LANGUAGE_MODELS, LAYERS
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

import lineas
from lineas.hooks import modules, outputs
from lineas.maps import metadata


@pytest.fixture(scope="module")
def llama():
    return models_zoo.llama()


def norms(kind):
    return [f"model.layers.{i}.{kind}_layernorm" for i in range(models_zoo.LAYERS)]


# --- names ------------------------------------------------------------------------------------------------------------


def test_a_glob_matches_full_names_in_the_order_of_the_model(llama):
    assert modules.resolve(llama, "model.layers.*.input_layernorm") == norms("input")
    assert modules.resolve(llama, "**.1.*_layernorm") == [norms("input")[1], norms("post_attention")[1]]


def test_a_list_of_globs_gives_each_module_once_in_the_order_of_the_model(llama):
    found = modules.resolve(llama, ["**.post_attention_layernorm", "**.*layernorm", "model.layers.0.input_layernorm"])
    assert found == [name for pair in zip(norms("input"), norms("post_attention"), strict=True) for name in pair]


def test_a_regular_expression_must_match_the_whole_name(llama):
    assert modules.resolve(llama, re.compile(r"model\.layers\.[02]")) == ["model.layers.0", "model.layers.2"]
    with pytest.raises(ValueError, match=r"no module matches 'layers"):
        modules.resolve(llama, re.compile(r"layers\.0"))


def test_globs_and_regular_expressions_mix_and_case_counts(llama):
    found = modules.resolve(llama, [re.compile("lm_head"), "model.norm"])
    assert found == ["model.norm", "lm_head"]
    with pytest.raises(ValueError, match=r"no module matches 'LM_HEAD'"):
        modules.resolve(llama, "LM_HEAD")


def test_no_match_lists_near_names_with_layers_written_as_a_star(llama):
    message = r"^loss_layers: no module matches 'model.layers.\*.post_attn_norm'; similar names: "
    with pytest.raises(ValueError, match=message + r"model.layers.\*.post_attention_layernorm"):
        modules.resolve(llama, "model.layers.*.post_attn_norm", argument="loss_layers")


def test_no_match_names_the_glob_of_a_list_that_failed_and_some_modules_where_nothing_is_near(llama):
    with pytest.raises(ValueError, match=r"^layers: no module matches '£££'; the model has model, model.emb"):
        modules.resolve(llama, ["model.norm", "£££"])
    with pytest.raises(ValueError, match=r"the model has no modules"):
        modules.resolve(nn.Linear(2, 2), "*")


def test_one_glob_for_too_many_modules_is_refused_and_a_list_of_it_is_not():
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(101)))
    for layers in ("*", re.compile(".*")):
        with pytest.raises(
            ValueError, match=r"^layers: '\.?\*' matches 101 modules; give narrower globs, such as lineas"
        ):
            modules.resolve(model, layers)
        assert len(modules.resolve(model, [layers])) == 101
        assert len(modules.resolve(model[1:], layers)) == 100


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_advised_for_a_glob_of_everything_works(kind):
    model = models_zoo.LANGUAGE_MODELS[kind]()
    settings = {"tokenizer": models_zoo.tokenizer()}
    with pytest.raises(ValueError, match=r"^layers: '\*\*' matches .*; give narrower globs, such as lineas\.sites\("):
        lineas.collect(model, ["a", "the"], layers="**", **settings)
    assert lineas.collect(model, ["a", "the"], layers=lineas.sites(model).suggested, **settings)


def test_one_glob_for_modules_inside_one_another_is_refused_and_a_list_of_it_is_not(llama):
    message = r"^loss_layers: '\*\*.1\*\*' matches modules inside one another, 'model\.layers\.1' and"
    with pytest.raises(ValueError, match=message):
        modules.resolve(llama, "**.1**", argument="loss_layers")
    assert len(modules.resolve(llama, ["**.1**"])) > 10
    assert modules.resolve(llama, ["model.norm", "model"]) == ["model", "model.norm"]
    assert modules.resolve(llama, "model.norm*") == ["model.norm"]


@pytest.mark.parametrize("layers", [3, None, [1], {"a": 1}, b"model"])
def test_layers_of_another_type_are_refused(llama, layers):
    with pytest.raises(
        TypeError, match=r"^layers must be a glob, a compiled regular expression or a list of them, got"
    ):
        modules.resolve(llama, layers)


def test_an_empty_list_of_layers_is_refused(llama):
    with pytest.raises(ValueError, match=r"^layers is empty"):
        modules.resolve(llama, [])


def test_get_module_finds_by_name_or_lists_near_names(llama):
    assert modules.get_module(llama, "model.layers.1.mlp") is llama.model.layers[1].mlp
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM has no module 'layers.1.mlp'; similar names: .*layers"):
        modules.get_module(llama, "layers.1.mlp")
    with pytest.raises(ValueError, match=r"has no module ''"):
        modules.get_module(llama, "")
    with pytest.raises(ValueError, match=r"has no module 'model.config'"):  # an attribute, but not a module
        modules.get_module(llama, "model.config")


def test_spell_writes_a_choice_of_modules_as_text():
    assert metadata.spell_layers("a.*") == "a.*"
    assert metadata.spell_layers(re.compile(r"a\.\d")) == r"a\.\d"
    assert metadata.spell_layers(("a", re.compile("b+"))) == ["a", "b+"]


# --- blocks -----------------------------------------------------------------------------------------------------------

BLOCKS = {
    **{family.name: "model.layers" for family in LANGUAGE_MODELS},
    "GPT-2": "transformer.h",
    "GPT-NeoX": "gpt_neox.layers",
    "OPT": "model.decoder.layers",
    "BERT": "encoder.layer",
    "ViT": "layers",
    "DiT": "transformer_blocks",
}


@pytest.mark.parametrize("name", list(BLOCKS))
def test_blocks_of_a_transformer_are_its_longest_list(name):
    model = next(family.model for family in FAMILIES if family.name == name)
    assert modules.block_names(model) == [f"{BLOCKS[name]}.{k}" for k in range(LAYERS)]
    wrapped = nn.DataParallel(model)
    assert modules.block_names(wrapped) == modules.block_names(model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("T5", r"^T5ForConditionalGeneration has 2 blocks in each of encoder\.block, decoder\.block: name the modules"),
        (
            "Flux",
            r"^FluxTransformer2DModel has 2 blocks in each of transformer_blocks, single_transformer_blocks: name",
        ),
        ("plain CNN", r"^CNN has no list of modules of one class: name the modules instead of numbering blocks$"),
        ("x-transformers", r"^TransformerWrapper has 3 blocks in each of attn_layers"),
    ],
)
def test_blocks_that_cannot_be_told_are_an_error(name, message):
    model = next(family.model for family in FAMILIES if family.name == name)
    with pytest.raises(ValueError, match=message):
        modules.block_names(model)


def test_lists_inside_of_blocks_are_none_and_compiled_blocks_are_alike():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

        def forward(self, x):
            return self.experts[0](x)

    model = nn.Sequential(Experts(), torch.compile(Experts(), backend="eager"))
    assert modules.block_names(model) == ["0", "1"]
    assert modules.block_names(nn.ModuleDict({"encoder": model, "few": nn.ModuleList([Experts()])})) == [
        "encoder.0",
        "encoder.1",
    ]


def test_model_name_is_what_the_model_was_loaded_by():
    model = models_zoo.llama()
    assert modules.model_name(model) is None
    model.config._name_or_path = "some/model"
    assert modules.model_name(model) == "some/model"
    assert modules.model_name(nn.Linear(1, 1)) is None


# --- outputs ----------------------------------------------------------------------------------------------------------

Named = namedtuple("Named", "hidden other")
HIDDEN = torch.arange(12.0).reshape(1, 3, 4)
OTHER = torch.ones(2)


@pytest.mark.parametrize(
    "output",
    [
        (HIDDEN, OTHER, None),
        [HIDDEN, OTHER],
        Named(HIDDEN, OTHER),
        BaseModelOutput(last_hidden_state=HIDDEN, attentions=(OTHER,)),
    ],
    ids=lambda output: type(output).__name__,
)
def test_the_first_entry_is_taken_and_put_back_in_a_copy(output):
    assert outputs.take(output) is HIDDEN
    new = outputs.put(output, HIDDEN + 1)
    assert type(new) is type(output)
    assert torch.equal(outputs.take(new), HIDDEN + 1)
    assert outputs.take(output) is HIDDEN
    if isinstance(output, BaseModelOutput):
        assert new.attentions is output.attentions and new.last_hidden_state is new[0]
    else:
        assert new[1] is OTHER and len(new) == len(output)


def test_a_tensor_is_taken_whole_never_its_first_row():
    assert outputs.take(HIDDEN) is HIDDEN
    assert outputs.put(HIDDEN, OTHER) is OTHER


@pytest.mark.parametrize(
    ("output", "seen"),
    [
        (None, "got NoneType"),
        ((None, HIDDEN), r"got tuple of \(NoneType, Tensor\)"),
        ((), r"got tuple of \(\)"),
        ({"hidden": HIDDEN}, "got dict"),
        (BaseModelOutput(), "got BaseModelOutput"),
        (torch.arange(3), "a floating-point tensor, got torch.int64"),
    ],
    ids=["none", "none first", "empty", "dict", "empty output", "integers"],
)
def test_an_output_without_a_hidden_state_is_an_error_that_names_the_module(output, seen):
    with pytest.raises(TypeError, match=rf"^blocks.3: the output must be .*{seen}"):
        outputs.take(output, "blocks.3")


# --- channels and tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv1d(3, 5, 1), (2, 3, 4)),
        (nn.Conv2d(3, 5, 1), (2, 3, 4, 4)),
        (nn.ConvTranspose2d(3, 5, 2), (2, 3, 4, 4)),
        (nn.Conv3d(3, 5, 1), (2, 3, 2, 2, 2)),
        (nn.BatchNorm1d(3), (2, 3)),
        (nn.BatchNorm1d(3), (2, 3, 4)),
        (nn.BatchNorm2d(3), (2, 3, 4, 4)),
        (nn.GroupNorm(1, 3), (2, 3, 4)),
        (nn.GroupNorm(1, 3), (2, 3, 4, 4)),
        (nn.InstanceNorm2d(3), (2, 3, 4, 4)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else f"{len(value)}d",
)
def test_channels_are_on_axis_1_for_convolutions_and_their_norms(module, shape):
    output = module(torch.randn(shape))
    assert outputs.channel_axis(module, output) == 1
    assert modules.output_width(module) in (None, output.shape[1])
    tokens = outputs.to_tokens(module, output)
    assert tokens.shape == (2, output[0, 0].numel(), output.shape[1])
    assert torch.equal(tokens, output.flatten(2).transpose(1, 2) if output.ndim > 2 else output[:, None])
    assert tokens.is_contiguous()


@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(3, 5), (2, 4, 3)), (nn.LayerNorm(3), (2, 4, 3)), (nn.LayerNorm(3), (2, 4, 4, 3)), (nn.ReLU(), (2, 3))],
    ids=["Linear", "LayerNorm", "LayerNorm 4d", "ReLU 2d"],
)
def test_channels_are_on_the_last_axis_otherwise(module, shape):
    output = module(torch.randn(shape))
    assert outputs.channel_axis(module, output) == -1
    tokens = outputs.to_tokens(module, output)
    assert torch.equal(tokens, output.reshape(2, -1, output.shape[-1]))
    assert tokens.is_contiguous()


class Patches(nn.Module):
    """As of a vision transformer: three channels come in, not out."""

    num_channels = 3

    def __init__(self):
        super().__init__()
        self.projection = nn.Conv2d(3, 5, 2)


class AdaLayerNorm(nn.Module):
    """The norm of a diffusion transformer, which tells its width by the norm inside."""

    def __init__(self, d):
        super().__init__()
        self.linear, self.norm = nn.Linear(d, 2 * d), nn.LayerNorm(d, elementwise_affine=False)


class ChannelsLast(nn.Module):
    def forward(self, x):
        return x.movedim(1, -1)


class Block(nn.Module):
    """Convolutions in a block, as in UNets and ResNets."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x):
        return self.parts(x)


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (Block(nn.Conv2d(3, 5, 1), nn.ReLU()), (2, 3, 4, 4), 1),
        (Block(nn.Conv2d(3, 4, 1), nn.GroupNorm(1, 4)), (2, 3, 4, 4), 1),  # pixels as many as channels
        (Block(nn.Linear(3, 5), nn.ReLU()), (2, 4, 4, 3), -1),
        (Block(nn.Conv2d(3, 5, 1), ChannelsLast()), (2, 3, 4, 4), -1),  # patches of a vision transformer
        (nn.MaxPool2d(2), (2, 3, 4, 4), 1),
        (nn.AdaptiveAvgPool2d(1), (2, 3, 4, 4), 1),
        (nn.Upsample(scale_factor=2), (2, 3, 4, 4), 1),
        (models_zoo.llama().model.norm, (2, 4, 2, models_zoo.WIDTH), -1),  # norms of queries and keys, by head
        (Block(nn.Conv1d(3, 3, 1)), (2, 3, 4), -1),  # three axes: a state space model also holds convolutions
    ],
    ids=["conv block", "square images", "linear block", "patches", "max", "average", "upsample", "heads", "3 axes"],
)
def test_blocks_of_images_have_their_channels_where_their_convolutions_have_them(module, shape, axis):
    output = module(torch.randn(shape))
    assert outputs.channel_axis(module, output) == axis
    d = output.shape[axis]
    assert torch.equal(outputs.to_tokens(module, output), output.movedim(axis, -1).reshape(2, -1, d))


def test_a_module_that_does_not_tell_its_channels_is_refused():
    match = (
        r"^act: the output of ReLU has shape \(2, 3, 4, 4\), and the module does not tell whether its channels are on"
    )
    with pytest.raises(ValueError, match=match):
        outputs.to_tokens(nn.ReLU(), torch.ones(2, 3, 4, 4), "act")


def test_tokens_of_a_transposed_output_are_contiguous():
    output = torch.randn(2, 3, 4).transpose(1, 2)
    tokens = outputs.to_tokens(nn.Identity(), output)
    assert tokens.is_contiguous() and torch.equal(tokens, output)


def test_an_empty_batch_has_empty_tokens():
    assert outputs.to_tokens(nn.Linear(3, 5), torch.empty(0, 4, 5)).shape == (0, 4, 5)


def test_a_convolution_without_a_batch_axis_is_refused():
    conv = nn.Conv2d(3, 5, 1)
    with pytest.raises(ValueError, match=r"^the output of Conv2d must have a batch axis, got shape \(5, 4, 4\)"):
        outputs.channel_axis(conv, conv(torch.randn(3, 4, 4)))


def test_an_output_without_tokens_and_channels_is_refused():
    with pytest.raises(ValueError, match=r"^the output of Identity must be \[batch, .*got shape \(3,\)"):
        outputs.to_tokens(nn.Identity(), torch.ones(3))


@pytest.mark.parametrize(
    ("module", "width"),
    [
        (nn.Linear(3, 5), 5),
        (nn.Conv2d(3, 5, 1), 5),
        (nn.BatchNorm2d(6, affine=False), 6),
        (nn.GroupNorm(2, 6, affine=False), 6),
        (nn.LayerNorm(7), 7),
        (nn.LayerNorm((4, 7), elementwise_affine=False), 7),
        (nn.RMSNorm(7), 7),
        (nn.Embedding(9, 5), 5),
        (Conv1D(5, 3), 5),
        (models_zoo.llama().model.norm, models_zoo.WIDTH),
        (models_zoo.gemma2().model.norm, models_zoo.WIDTH),
        (AdaLayerNorm(7), 7),
        (Patches(), None),
        (nn.PReLU(), None),  # one weight for all channels
        (nn.LazyLinear(4), 4),
        (nn.LazyBatchNorm1d(), None),
        (nn.Tanh(), None),
        (nn.Sequential(nn.Linear(3, 5)), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_that_tell_their_width(module, width):
    assert modules.output_width(module) == width
