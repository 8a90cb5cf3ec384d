"""Which modules of a model are listed, how, and which of them are suggested."""

import re

import models_zoo as zoo
import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertModel, LlamaConfig, LlamaForCausalLM

import lineas
from lineas.hooks import modules, sites

POST = "model.layers.*.post_attention_layernorm"


def by_glob(found):
    return {row.glob: row for row in found}


def test_modules_are_grouped_by_layer_and_class():
    found = lineas.sites(zoo.llama())
    rows = by_glob(found)
    assert rows["model.layers.*.mlp.gate_proj"].kind == "Linear"
    assert rows["model.layers.*.mlp.gate_proj"].width == 32
    assert rows["model.layers.*.mlp"].width is None  # only a run tells
    row = rows[POST]
    assert (row.kind, row.width, row.count, row.suggested) == ("LlamaRMSNorm", zoo.WIDTH, zoo.LAYERS, True)
    assert row.names == tuple(f"model.layers.{k}.post_attention_layernorm" for k in range(zoo.LAYERS))
    assert found.suggested == [POST] and [row.glob for row in found if row.suggested] == [POST]
    # Neither lists of modules nor cosines.
    assert not {"model.layers", "model.rotary_emb"} & {name for row in found for name in row.names}
    assert len(found) == len(list(found)) and found[0].glob == "model" and found[-1].glob == "lm_head"


@pytest.mark.parametrize("layers", [2, 12, 103])
def test_every_glob_matches_its_modules_and_no_other(layers):
    # Names under numbered layers that end in numbers, as GPT-2's do; more layers than have one digit.
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2, self.parts = (
                nn.LayerNorm(4),
                nn.LayerNorm(4),
                nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
            )

        def forward(self, x):
            return self.parts(self.ln_2(self.ln_1(x)))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.h = nn.ModuleList(Layer() for _ in range(layers))

        def forward(self, x):
            for layer in self.h:
                x = layer(x)
            return x

    model = Stack()
    found = lineas.sites(model)
    for row in found:
        assert set(modules.resolve(model, [row.glob])) == set(row.names)
    names = [name for row in found for name in row.names]
    assert sorted(names) == sorted(name for name, module in model.named_modules() if name and name != "h")
    assert found.suggested == ["h.*.ln_2"]
    assert [row.glob for row in found if row.kind == "Layer"] == ["h.*"]


def test_a_run_tells_order_and_shapes_and_leaves_out_what_is_not_called():
    model = zoo.llama()
    model.spare = nn.Linear(3, 3)
    before = torch.get_rng_state()
    found = lineas.sites(model, zoo.texts(5), tokenizer=zoo.tokenizer())
    rows = by_glob(found)
    assert "spare" not in rows and "spare" in by_glob(lineas.sites(model))
    order = [row.glob.rpartition(".")[2] for row in found if "layers" in row.glob]
    assert order.index("input_layernorm") < order.index("o_proj") < order.index("post_attention_layernorm")
    assert rows["model.layers.*.mlp"].width == zoo.WIDTH
    assert rows[POST].shape[0] == 2 and rows[POST].shape[2] == zoo.WIDTH
    assert found.suggested == [POST]
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), before)


def test_hooks_and_mode_are_restored_when_the_run_fails():
    model = zoo.gpt2(training=True)
    with pytest.raises(RuntimeError, match="no luck"):
        lineas.sites(model, zoo.images(2), forward=lambda model, batch: (_ for _ in ()).throw(RuntimeError("no luck")))
    assert model.training and not any(module._forward_hooks for module in model.modules())


def test_outputs_that_can_take_no_map_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act, self.conv, self.pick = nn.Linear(3, 4), nn.ReLU(), nn.Conv2d(1, 2, 1), Pick()

        def forward(self, x):
            x = self.linear(x)
            return self.pick(self.act(self.conv(x[:, None])))

    class Pick(nn.Module):
        def forward(self, x):
            return x.argmax(dim=1)

    found = lineas.sites(Model(), torch.ones(2, 5, 3))
    # Whole numbers are no activations, and those of an activation function may be on either axis.
    assert [row.glob for row in found] == ["linear", "conv"]
    assert found[1].width == 2 and found[1].shape == (2, 2, 5, 4)


def test_wide_and_narrow_modules_share_a_row():
    found = lineas.sites(nn.ModuleDict({"blocks": nn.ModuleList([nn.LayerNorm(3), nn.LayerNorm(5)])}))
    assert [(row.glob, row.width) for row in found] == [("blocks.*", (3, 5))]
    assert "3, 5" in str(found)


def test_weights_on_the_meta_device_and_wrapped_models():
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, vocab_size=32000, intermediate_size=11008)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    row = by_glob(lineas.sites(model))[POST]
    assert (row.width, row.count) == (4096, 32)

    class Wrapper(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part)

    assert lineas.sites(Wrapper(encoder=zoo.llama())).suggested == ["encoder." + POST]


def test_models_without_norms_have_no_suggestion():
    found = lineas.sites(zoo.mlp())
    assert found.suggested == [] and len(found) > 0
    assert str(found).endswith("nothing is suggested: no module is a norm")


def test_nothing_chosen_is_what_is_suggested_and_one_line_says_so(capfd):
    model = zoo.cnn()
    assert sites.choose_layers(model, None, say=False) == (["bn", "gn"], ["bn", "gn"])
    assert capfd.readouterr() == ("", "")
    model = zoo.llama()
    names, noted = sites.choose_layers(model, None, say=True)
    assert names == modules.resolve(model, POST) and noted == [POST]
    assert capfd.readouterr() == ("", f"layers=['{POST}'], as lineas.sites suggests: {zoo.LAYERS} modules\n")
    assert sites.choose_layers(model, "lm_head", say=True) == (["lm_head"], "lm_head")
    assert capfd.readouterr() == ("", "")
    with pytest.raises(ValueError, match=r"^layers: none are suggested for Sequential, .* lineas\.sites\(model\) li"):
        sites.choose_layers(zoo.mlp(), None, say=True)
    with pytest.raises(TypeError, match=r"^layers must be a glob"):
        sites.choose_layers(model, 3, say=True)


def test_one_glob_that_would_be_refused_is_printed_as_a_list():
    many = nn.Sequential(*(nn.LayerNorm(2) for _ in range(101)))
    assert str(lineas.sites(many)).endswith("\nsuggested: layers=['*']")
    assert str(lineas.sites(many[1:])).endswith("\nsuggested: layers='*'")


def test_the_table_is_aligned_and_marks_what_is_suggested():
    found = lineas.sites(zoo.cnn())
    lines = str(found).splitlines()
    assert lines[0] == "CNN: 5 modules" and repr(found) == str(found)
    assert lines[1].split() == ["glob", "kind", "width", "count"]
    column = lines[1].index("kind")
    assert all(line[column - 1] == " " and line[column] != " " for line in lines[1:-1])
    assert [line.split()[0] for line in lines if line.endswith(" suggested")] == ["bn", "gn"]
    assert lines[-1] == "suggested: layers=['bn', 'gn']"


def test_notebooks_get_a_table_with_nothing_unescaped():
    class Odd(nn.Linear):
        pass

    Odd.__name__ = "<b>"
    text = lineas.sites(nn.Sequential(Odd(2, 3), nn.LayerNorm(3)))._repr_html_()
    assert "<b>" not in text and "&lt;b&gt;" in text
    assert text.count("<tr") == 3 and len(re.findall(r"<tr style=[^>]*>(?:<td>.*?</td>)+", text)) == 1
    assert text.startswith("<table>") and text.endswith("</table>")


def test_a_run_tells_how_often_modules_are_called():
    settings = {"vocab_size": zoo.VOCABULARY, "embedding_size": 8, "hidden_size": 16, "num_hidden_layers": 3}
    model = AlbertModel(AlbertConfig(**settings, num_attention_heads=2, intermediate_size=32)).eval()
    norm = "encoder.albert_layer_groups.*.albert_layers.*.full_layer_layer_norm"
    found = lineas.sites(model, zoo.texts(2), tokenizer=zoo.tokenizer())
    assert by_glob(found)[norm].calls == 3 and by_glob(found)["embeddings.LayerNorm"].calls == 1
    line = next(line for line in str(found).splitlines() if line.startswith(norm))
    assert line.endswith("  suggested, 3 calls")
    assert "<td>suggested, 3 calls</td>" in found._repr_html_()
    assert by_glob(lineas.sites(model))[norm].calls is None


def test_what_is_no_module_is_an_error_that_says_what_to_pass():
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, got dict \(of a pipeline, pass the model"):
        lineas.sites({})
    with pytest.raises(TypeError, match=r"^tokenizer must be a loaded tokenizer, such as .*, got str"):
        lineas.sites(zoo.llama(), ["a"], tokenizer="gpt2")
    with pytest.raises(ValueError, match=r"^data holds texts: pass tokenizer="):
        lineas.sites(zoo.llama(), ["a"])
