"""Outputs with the tokens on the first axis, masks under other names, and the number of rows."""

import families
import numpy as np
import pytest
import torch
from torch import nn

import lineas

WIDTH, TOKENS, PROMPTS = 8, 9, 5
LENGTHS = torch.tensor([9, 3, 7, 5, 8])
PADDING = torch.arange(TOKENS) >= LENGTHS[:, None]  # [B, T], True where padded, on the right


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def seeded(build):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def torch_encoder(batch_first=False, layers=2):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


class Text(nn.Module):
    """As open_clip's text tower: ids and what comes in and goes out batch-first, the blocks sequence-first."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2)
            self.ln_2, self.mlp = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x, padding):
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, key_padding_mask=padding)[0]
            return x + self.mlp(self.ln_2(x))

    def __init__(self):
        super().__init__()
        self.embed, self.block, self.ln_final = nn.Embedding(20, WIDTH), self.Block(), nn.LayerNorm(WIDTH)

    def forward(self, input_ids, attention_mask=None):
        padding = None if attention_mask is None else attention_mask == 0
        return self.ln_final(self.block(self.embed(input_ids).transpose(0, 1), padding).transpose(0, 1))


def ids(prompts=PROMPTS, tokens=TOKENS):
    return torch.randint(1, 20, (prompts, tokens), generator=torch.Generator().manual_seed(2))


def expected_text(model, name, given, mask=None):
    """The mean over the real tokens of each prompt run by itself."""
    found = {}

    def keep(module, args, output):
        found[name] = output[0] if isinstance(output, tuple) else output

    handle = model.get_submodule(name).register_forward_hook(keep)
    rows = []
    for row in range(len(given)):
        real = slice(None) if mask is None else mask[row] != 0
        with torch.no_grad():
            model(given[row : row + 1, real])
        rows.append(found[name].flatten(0, -2).mean(dim=0))
    handle.remove()
    return torch.stack(rows)


# --- torch's own modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [TOKENS, PROMPTS], ids=["5x9", "5x5"])
@pytest.mark.parametrize("name", ["layers.0", "layers.1.norm1", "layers.1.self_attn", "layers.0.linear1"])
def test_encoders_of_torch_give_a_row_a_prompt(name, tokens):
    model, x = seeded(torch_encoder), draw(tokens, PROMPTS, WIDTH)
    found = lineas.collect(model, x, layers=name)[name]
    expected = [lineas.collect(model, x[:, i : i + 1], layers=name)[name] for i in range(PROMPTS)]
    assert found.shape[0] == PROMPTS
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)
    again = seeded(lambda: torch_encoder(batch_first=True))
    np.testing.assert_allclose(found, lineas.collect(again, x.transpose(0, 1), layers=name)[name], atol=1e-5)


def test_the_padding_mask_of_torch_is_known_by_its_name():
    model, x = seeded(torch_encoder), draw(TOKENS, PROMPTS, WIDTH)
    expected = [
        lineas.collect(model, x[:length, i : i + 1], layers="layers.1")["layers.1"] for i, length in enumerate(LENGTHS)
    ]
    additive = torch.zeros(PADDING.shape).masked_fill(PADDING, -torch.inf)
    for mask in (PADDING, additive):
        for data in ({"src": x, "src_key_padding_mask": mask}, (x, None, mask)):
            found = lineas.collect(model, data, layers="layers.1")["layers.1"]
            np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-5)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_and_attention_say_their_layout(kind, batch_first):
    x = draw(PROMPTS, PROMPTS, WIDTH)
    model = nn.ModuleDict({"rnn": seeded(lambda: kind(WIDTH, 6, batch_first=batch_first))})
    found = lineas.collect(model, x, layers="rnn", forward=lambda model, x: model["rnn"](x))["rnn"]
    np.testing.assert_allclose(found, model["rnn"](x)[0].mean(dim=int(batch_first)).detach(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_nested_tensors_are_refused():
    model = seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True), 1))
    data = {"src": draw(PROMPTS, TOKENS, WIDTH), "src_key_padding_mask": PADDING}
    with pytest.raises(TypeError, match=r"^layers.0: the output is a nested tensor, .* enable_nested_tensor=False"):
        lineas.collect(model, data, layers="layers.0")


def test_an_output_without_batch_axis_is_refused():
    model = nn.ModuleDict({"rnn": nn.LSTM(WIDTH, 6)})
    with pytest.raises(ValueError, match=r"^rnn: LSTM was called without a batch axis, its output is \(9, 6\)"):
        lineas.collect(model, draw(9, WIDTH), layers="rnn", forward=lambda model, x: model["rnn"](x))


def test_a_sequence_first_batch_is_not_split():
    model = seeded(torch_encoder)
    for tokens in (TOKENS, 2 * PROMPTS):
        with pytest.raises(ValueError, match=r"^layers.0: .* the prompts on the second axis, .* split along the first"):
            lineas.collect(model, draw(tokens, PROMPTS, WIDTH), layers="layers.0", batch_size=5)
    with pytest.raises(ValueError, match=r"^data: a batch can be split .* 'src' has 9, 'src_key_padding_mask' has 5"):
        data = {"src": draw(TOKENS, PROMPTS, WIDTH), "src_key_padding_mask": PADDING}
        lineas.collect(model, data, layers="layers.0", batch_size=2)


# --- blocks that others wrote -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed", "block", "block.ln_1", "block.attn", "block.mlp", "ln_final"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_and_tokens_are_told_apart_by_the_token_ids(name, padded):
    model, mask = seeded(Text), (~PADDING).long() if padded else None
    data = {"input_ids": ids()} | ({"attention_mask": mask} if padded else {})
    expected = expected_text(model, name, ids(), mask)
    for size in (None, 2):
        found = lineas.collect(model, data, layers=name, batch_size=size)[name]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(
        lineas.collect(model, ids(), layers=name)[name], expected_text(model, name, ids()), atol=1e-5
    )


def test_as_many_prompts_as_tokens_are_refused_where_nothing_tells():
    model, square = seeded(Text), ids(5, 5)
    for name in ("block.ln_1", "ln_final"):
        with pytest.raises(
            ValueError, match=rf"^{name}: nothing tells which axis counts the prompts in the output \[5, 5"
        ):
            lineas.collect(model, square, layers=name)
        found = lineas.collect(model, square, layers=name, batch_size=3)[name]
        np.testing.assert_allclose(found, expected_text(model, name, square), atol=1e-5)
    found = lineas.collect(model, square, layers="block.attn")["block.attn"]  # it says batch_first itself
    np.testing.assert_allclose(found, expected_text(model, "block.attn", square), atol=1e-5)


class Between(nn.Module):
    """Layers beside an encoder, which say nothing of their layout."""

    def __init__(self):
        super().__init__()
        self.proj, self.encoder = nn.Linear(WIDTH, WIDTH), torch_encoder(layers=1)

    def forward(self, x, lengths=None):
        return self.encoder(self.proj(x))


def test_a_tensor_of_unknown_layout_is_refused_beside_sequence_first_modules():
    model, x = seeded(Between), draw(TOKENS, PROMPTS, WIDTH)
    with pytest.raises(
        ValueError, match=r"^proj: nothing tells which axis counts .*: give the batch as a mapping with"
    ):
        lineas.collect(model, x, layers="proj")
    found = lineas.collect(model, x, layers="encoder.layers.0")["encoder.layers.0"]
    assert len(found) == PROMPTS
    # With a mask it is told.
    data = {"x": x, "attention_mask": torch.ones(PROMPTS, TOKENS)}
    found = lineas.collect(model, data, layers="proj", forward=lambda model, batch: model(batch["x"]))["proj"]
    np.testing.assert_allclose(found, model.proj(x).mean(dim=0).detach(), atol=1e-5)


def test_images_tell_the_prompts_of_sequence_first_blocks():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.encoder = nn.Conv2d(3, WIDTH, 2, 2), nn.LayerNorm(WIDTH), torch_encoder(layers=1)

        def forward(self, pixels):
            return self.encoder(self.norm(self.conv(pixels).flatten(2).permute(2, 0, 1)))

    model, pixels = seeded(Detector), draw(3, 3, 4, 4)
    found = lineas.collect(model, pixels, layers=["conv", "norm", "encoder"], batch_size=2)
    one = [lineas.collect(model, pixels[i : i + 1], layers=["conv", "norm", "encoder"]) for i in range(3)]
    for name, value in found.items():
        np.testing.assert_allclose(value, np.concatenate([part[name] for part in one]), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"^norm: nothing tells which axis counts the prompts in the output \[4, 4, 8\]"
    ):
        lineas.collect(model, draw(4, 3, 4, 4), layers="norm")


def test_a_layout_against_what_the_batch_says_is_refused():
    model = seeded(lambda: nn.ModuleDict({"encoder": torch_encoder(layers=1)}))
    data = {"x": draw(PROMPTS, TOKENS, WIDTH), "attention_mask": torch.ones(PROMPTS, TOKENS)}
    with pytest.raises(ValueError, match=r"^encoder: the output \[5, 9, 8\] has 9 rows for a batch of 5 prompts"):
        lineas.collect(model, data, layers="encoder", forward=lambda model, batch: model["encoder"](batch["x"]))


# --- maps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "last", slice(0, 2)])
@pytest.mark.parametrize("fit", [lineas.fit_incremental, lineas.fit_end_to_end])
def test_fits_are_those_of_the_batch_first_model(fit, tokens):
    x, y, mask = draw(TOKENS, PROMPTS, WIDTH), draw(TOKENS, PROMPTS, WIDTH) + 1, ~PADDING
    settings = {"layers": "layers.*.norm1", "tokens": tokens, "progress": False}
    if fit is lineas.fit_end_to_end:
        settings |= {"steps": 2, "lr": 0.1}
    found = []
    for first in (False, True):
        model = seeded(lambda first=first: torch_encoder(batch_first=first))
        sets = [{"src": z.transpose(0, 1) if first else z, "src_key_padding_mask": ~mask} for z in (x, y)]
        maps = fit(model, *sets, **settings)
        found.append(maps.maps if fit is lineas.fit_end_to_end else maps)
    for name, affine in found[1].items():
        np.testing.assert_allclose(found[0][name].weight, affine.weight, atol=1e-4)
        np.testing.assert_allclose(found[0][name].bias, affine.bias, atol=1e-4)


def test_tokens_are_not_selected_on_sequence_first_outputs_of_attached_maps():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(20, WIDTH), nn.LSTM(WIDTH, 6)

        def forward(self, input_ids):
            return self.rnn(self.embed(input_ids).transpose(0, 1))[0]

    maps = lineas.SteeringMaps({"rnn": lineas.AffineMap(np.ones(6, np.float32), np.ones(6, np.float32))})
    model = seeded(Model)
    plain = model(ids(5, 5))
    with (
        maps.attach(model, tokens="last"),
        pytest.raises(ValueError, match=r"^rnn: tokens='last' needs an output \[batch"),
    ):
        model(ids(5, 5))
    with maps.attach(model):
        torch.testing.assert_close(model(ids(5, 5)), plain + 1)


# --- masks under other names ------------------------------------------------------------------------------------------


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, 4)

    def forward(self, x, mask=None, padding_mask=None, attention_mask=None, bool_masked_pos=None):
        return self.linear(x)


@pytest.mark.parametrize("key", ["mask", "padding_mask"])
@pytest.mark.parametrize("tokens", ["all", "last"])
def test_a_mask_whose_meaning_its_name_does_not_tell_is_refused(key, tokens):
    model, x = seeded(Masked), draw(PROMPTS, TOKENS, WIDTH)
    match = rf"^linear: which tokens are real cannot be told: '{key}' of the batch may mark padding or what is real"
    for mask in (PADDING, ~PADDING, PADDING.long()):
        with pytest.raises(ValueError, match=match):
            lineas.collect(model, {"x": x, key: mask}, layers="linear", tokens=tokens)
        with pytest.raises(ValueError, match=match):
            lineas.collect(model, (x, mask) if key == "mask" else (x, None, mask), layers="linear", tokens=tokens)
    # One that marks nothing does no harm, nor does one beside a mask that is understood.
    plain = lineas.collect(model, x, layers="linear", tokens=tokens)["linear"]
    for mask in (
        torch.ones(PROMPTS, TOKENS),
        torch.zeros(PROMPTS, TOKENS, dtype=torch.bool),
        torch.ones(TOKENS, TOKENS).tril(),
    ):
        np.testing.assert_array_equal(
            lineas.collect(model, {"x": x, key: mask}, layers="linear", tokens=tokens)["linear"], plain
        )
    data = {"x": x, key: PADDING, "attention_mask": ~PADDING}
    found = lineas.collect(model, data, layers="linear", tokens=tokens)["linear"]
    rows = [model.linear(row[:length]) for row, length in zip(x, LENGTHS, strict=True)]
    expected = [row[-1] if tokens == "last" else row.mean(dim=0) for row in rows]
    np.testing.assert_allclose(found, torch.stack(expected).detach(), atol=1e-5)


def test_masks_that_do_not_speak_of_padding_are_passed_on():
    model, x = seeded(Masked), draw(PROMPTS, TOKENS, WIDTH)
    plain = lineas.collect(model, x, layers="linear")["linear"]
    found = lineas.collect(model, {"x": x, "bool_masked_pos": PADDING}, layers="linear")["linear"]
    np.testing.assert_array_equal(found, plain)


def test_a_mask_of_torch_needs_a_real_token_in_every_row():
    padding = PADDING.clone()
    padding[2] = True
    with pytest.raises(ValueError, match=r"^data: row 2 of 'src_key_padding_mask' has no real token"):
        lineas.collect(
            seeded(torch_encoder), {"src": draw(9, 5, 8), "src_key_padding_mask": padding}, layers="layers.0"
        )


# --- the number of rows -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2 * PROMPTS, 3, WIDTH), (2 * PROMPTS, WIDTH), (2 * PROMPTS, 2, 2, WIDTH)])
def test_other_numbers_of_rows_than_prompts_are_refused(shape):
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return self.linear(torch.ones(shape))

    with pytest.raises(ValueError, match=r"^linear: the output .* has 10 rows for a batch of 5 prompts"):
        lineas.collect(Windows(), draw(PROMPTS, 6, WIDTH), layers="linear")


def test_a_module_that_runs_once_for_all_prompts_is_refused():
    class Timed(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.linear = nn.Linear(1, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, sample, timestep):
            return self.linear(sample) + self.time(timestep[:, None])

    batch = {"sample": draw(PROMPTS, TOKENS, WIDTH), "timestep": torch.ones(1)}
    with pytest.raises(ValueError, match=r"^time: the output \[1, 8\] has 1 rows for a batch of 5 prompts"):
        lineas.collect(Timed(), batch, layers="time")
    assert lineas.collect(Timed(), batch, layers="linear")["linear"].shape == (PROMPTS, WIDTH)


def test_a_mask_across_its_tokens_is_refused():
    class Sums(nn.Module):  # sequence-first without a module of torch that says so
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x, pad):
            return self.linear(x) * pad.T[:, :, None]

    with pytest.raises(
        ValueError, match=r"^linear: nothing tells which axis counts the prompts in the output \[9, 5, 8"
    ):
        lineas.collect(Sums(), (draw(TOKENS, PROMPTS, WIDTH), PADDING), layers="linear")


def test_both_sides_of_a_transformer_of_torch():
    model = seeded(lambda: nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.0))
    model.encoder.enable_nested_tensor = False
    source, target = draw(TOKENS, PROMPTS, WIDTH), draw(4, PROMPTS, WIDTH)
    after = torch.arange(4) >= torch.tensor([4, 2, 1, 3, 4])[:, None]
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    masks = {"src_key_padding_mask": PADDING, "tgt_key_padding_mask": after, "memory_key_padding_mask": PADDING}
    layers = ["encoder.layers.0.norm1", "decoder.layers.0", "decoder.layers.0.multihead_attn", "decoder"]
    batch = {"src": source, "tgt": target, "tgt_mask": causal, **masks}
    found = lineas.collect(model, batch, layers=layers)
    for row, (long, short) in enumerate(zip(LENGTHS, [4, 2, 1, 3, 4], strict=True)):
        alone = (source[:long, row : row + 1], target[:short, row : row + 1])
        expected = lineas.collect(
            model, {"src": alone[0], "tgt": alone[1], "tgt_mask": causal[:short, :short]}, layers=layers
        )
        for name in layers:
            np.testing.assert_allclose(found[name][row], expected[name][0], atol=1e-5)


def test_what_is_made_of_images_does_not_pass_for_the_text():
    family = next(one for one in families.MULTIMODAL_MODELS if one.name == "Qwen2.5-VL")
    batch = {key: value[:1] for key, value in family.batch(4, 1).items()}
    # As many patches as tokens: 8 patches, two tokens of the image and six others.
    batch["input_ids"] = torch.tensor([[5, 6, families.IMAGE, families.IMAGE, 7, 8, 9, 5]] * 2)
    batch["attention_mask"], batch["mm_token_type_ids"] = torch.ones(2, 8), (batch["input_ids"] == families.IMAGE).int()
    batch["pixel_values"] = torch.cat([family.batch(4, seed)["pixel_values"][:8] for seed in (1, 2)])
    batch["image_grid_thw"] = torch.tensor([[1, 4, 2]] * 2)
    with pytest.raises(
        ValueError, match=r"^model.visual.blocks.0.norm1: the output \[16, 16\] is of images, .* 2 prompts"
    ):
        lineas.collect(family.model, batch, layers="model.visual.blocks.0.norm1")
    gemma = next(one for one in families.MULTIMODAL_MODELS if one.name.startswith("Gemma3"))
    batch = {key: value for key, value in gemma.batch(4, 1).items() if key != "attention_mask"}
    name = "model.vision_tower.encoder.layers.0.layer_norm1"
    found = lineas.collect(gemma.model, batch, layers=name)[name]
    alone = lineas.collect(gemma.model.model.vision_tower, batch["pixel_values"], layers="encoder.layers.0.layer_norm1")
    np.testing.assert_allclose(found, alone["encoder.layers.0.layer_norm1"], atol=1e-5)
    batch["input_ids"][1][batch["input_ids"][1] == families.IMAGE] = 5
    with pytest.raises(ValueError, match="which of 'pixel_values' belongs to which prompt cannot be told: row 1 of"):
        lineas.collect(gemma.model, batch | {"pixel_values": batch["pixel_values"]}, layers=name)


# --- attached maps ----------------------------------------------------------------------------------------------------


class Turning(nn.Module):
    """Token ids through a sequence-first encoder."""

    def __init__(self):
        super().__init__()
        self.embed, self.encoder = nn.Embedding(9, WIDTH), torch_encoder()

    def forward(self, input_ids):
        return self.encoder(self.embed(input_ids).transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("name", ["encoder.layers.0.norm1", "encoder.layers.0", "encoder"])
@pytest.mark.parametrize(
    "settings",
    [{"tokens": "last"}, {"strength": [0.0, 1.0, 1.0, 1.0]}, {"strength": np.ones((4, 4))}],
    ids=["tokens", "rows", "rows and tokens"],
)
@pytest.mark.parametrize("prompts", [4, 2])
def test_attached_maps_do_not_take_tokens_for_prompts(name, settings, prompts):
    model = seeded(Turning)
    maps = lineas.SteeringMaps({name: lineas.AffineMap(np.full(WIDTH, 1.5), np.ones(WIDTH))})
    ids = torch.ones(prompts, 4, dtype=torch.long)
    with (
        maps.attach(model, **settings),
        pytest.raises(ValueError, match=rf"^{name}: .* the module gives \[tokens"),
    ):
        model(ids)
    with maps.attach(model, strength=lambda tokens: 0.5), torch.no_grad():
        model(ids)  # a number is the same for all
    embed = lineas.SteeringMaps({"embed": maps[name]})
    with embed.attach(model, **settings):  # before the axes are turned, and still unclear where both are 4
        if prompts == 4:
            with pytest.raises(
                ValueError, match=r"^embed: .* nothing tells which axis counts the prompts in \[4, 4, 8\]"
            ):
                model(ids)
        elif "tokens" in settings:
            model(ids)
