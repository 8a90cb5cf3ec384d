"""Batches of texts with images: positions under padding, and which images belong to which prompt."""

import compatibility
import families
import numpy as np
import pytest
import torch
import transformers as tf

import lineas
from lineas.inputs import batches
from lineas.inputs.call import call
from lineas.inputs.prompts import read

BY_NAME = {family.name: family for family in families.MULTIMODAL_MODELS}
THREE_AXES = ["Qwen2.5-VL", "Qwen3-VL", "GLM-4V"]
NORM = "model.language_model.layers.1.post_attention_layernorm"


def rows_alone(family, batch, count=4):
    """The mean of each prompt by itself, without padding, with the model's own positions."""
    means = []
    for row in range(count):
        found, _ = compatibility.outputs(family, [NORM], compatibility.alone(batch, row))
        means.append(found[NORM][0].double().mean(dim=0))
    return torch.stack(means)


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THREE_AXES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_with_images_equal_those_alone(name, side):
    family, batch = BY_NAME[name], families.text_and_images(4, 1, side)
    found = lineas.collect(family.model, batch, layers=NORM)[NORM]
    np.testing.assert_allclose(found, rows_alone(family, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", THREE_AXES)
def test_padded_prompts_without_images_equal_those_alone(name):
    family, batch = BY_NAME[name], families.prompts(4, 1)
    found = lineas.collect(family.model, batch, layers=NORM)[NORM]
    np.testing.assert_allclose(found, rows_alone(family, batch), rtol=1e-4, atol=1e-5)


def test_a_model_goes_on_with_its_own_images_after_others_were_collected():
    family = BY_NAME["Qwen2.5-VL"]
    noted, family.model.model.rope_deltas = family.model.model.rope_deltas, torch.tensor([[-3]])
    try:
        lineas.collect(family.model, family.batch(4, 1), layers=NORM)
        assert family.model.model.rope_deltas.tolist() == [[-3]]
    finally:
        family.model.model.rope_deltas = noted


SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
COUNTING = {
    "RoBERTa": (tf.RobertaModel, tf.RobertaConfig, {}),
    "MPNet": (tf.MPNetModel, tf.MPNetConfig, {}),
    "ESM": (tf.EsmModel, tf.EsmConfig, {"position_embedding_type": "absolute", "mask_token_id": 3}),
    "Luke": (tf.LukeModel, tf.LukeConfig, {"entity_vocab_size": 4}),
}
LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("embeds", [False, True], ids=["ids", "embeds"])
def test_models_that_count_from_the_pad_id_skip_the_padding(name, embeds):
    kind, config, settings = COUNTING[name]
    torch.manual_seed(0)
    model = kind(config(**SIZES, max_position_embeddings=20, pad_token_id=1, **settings)).eval()
    ids = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 5]])
    key, given = "input_ids", ids
    if embeds:
        key, given = "inputs_embeds", model.get_input_embeddings()(ids).detach()
    (batch,) = read({key: given, "attention_mask": LEFT}, "data").parts()
    with torch.no_grad():
        padded = call(model, batch)[0][0, 2:]
        alone = model(**{key: given[:1, 2:]}, attention_mask=LEFT[:1, 2:])[0][0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_arguments_without_names_are_known_by_the_names_of_the_model():
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**SIZES, max_position_embeddings=20)).eval()
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 5]])
    named = {"input_ids": ids, "attention_mask": LEFT}
    found, expected = (lineas.collect(model, data, layers="encoder.layer.0") for data in ((ids, LEFT), named))
    np.testing.assert_array_equal(found["encoder.layer.0"], expected["encoder.layer.0"])
    alone = lineas.collect(model, ids[:1, 2:], layers="encoder.layer.0")
    np.testing.assert_allclose(found["encoder.layer.0"][:1], alone["encoder.layer.0"], atol=1e-5)


# --- whose images -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*THREE_AXES, "Gemma3 (text and images)"])
@pytest.mark.parametrize("size", [1, 3])
def test_prompts_are_split_with_their_images(name, size):
    family, batch = BY_NAME[name], BY_NAME[name].batch(4, 1)
    found = lineas.collect(family.model, batch, layers=NORM, batch_size=size)[NORM]
    np.testing.assert_allclose(found, rows_alone(family, batch), rtol=1e-4, atol=1e-5)


def test_prompts_are_taken_in_any_order_with_their_images():
    family, batch = BY_NAME["Qwen2.5-VL"], families.text_and_images(4, 1)
    (part,) = read(batch, "data").take([3, 0, 1])
    found = lineas.collect(family.model, part.kwargs, layers=NORM)[NORM]
    np.testing.assert_allclose(found, rows_alone(family, batch)[[3, 0, 1]], rtol=1e-4, atol=1e-5)
    assert len(part.kwargs["image_grid_thw"]) == 5


def test_prompts_without_images_are_split_from_those_with_some():
    family, batch = BY_NAME["Qwen3-VL"], families.text_and_images(4, 1)
    plain = families.prompts(1, 9)["input_ids"]
    batch["input_ids"][1] = torch.nn.functional.pad(plain[0], (batch["input_ids"].shape[1] - plain.shape[1], 0))
    batch["attention_mask"][1] = (batch["input_ids"][1] != 0).long()
    batch["mm_token_type_ids"][1] = 0
    first, last = 8, 8 + 12 + 16  # patches of the images that were the second prompt's
    batch["pixel_values"] = torch.cat([batch["pixel_values"][:first], batch["pixel_values"][last:]])
    batch["image_grid_thw"] = batch["image_grid_thw"][[0, *range(3, len(batch["image_grid_thw"]))]]
    whole, split = (lineas.collect(family.model, batch, layers=NORM, batch_size=size)[NORM] for size in (None, 1))
    np.testing.assert_allclose(split, whole, rtol=1e-4, atol=1e-5)


def test_a_fit_draws_prompts_with_their_images():
    family = BY_NAME["Qwen2.5-VL"]
    sets, settings = (family.batch(4, 1), family.batch(5, 2)), {"layers": NORM, "steps": 2, "progress": False}
    whole = lineas.fit_end_to_end(family.model, *sets, **settings)
    parts = lineas.fit_end_to_end(family.model, *sets, **settings, batch_size=2)
    np.testing.assert_allclose(parts.history["loss"], whole.history["loss"], rtol=1e-4)
    drawn = lineas.fit_end_to_end(family.model, *sets, **settings, mini_batch=2)
    assert np.isfinite(drawn.history["loss"]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_token_type_ids": None}, "^data: a batch with 'image_grid_thw' can be split .* only with 'mm_token"),
        ({"image_grid_thw": torch.tensor([[1, 2, 2]] * 3)}, "^data: 'image_grid_thw' and 'mm_token_type_ids' do not"),
    ],
)
def test_images_of_unknown_prompts_are_not_split(change, message):
    with pytest.raises(ValueError, match=message):
        read(families.text_and_images(4, 1) | change, "data").parts(2)
    assert len(read(families.text_and_images(4, 1) | change, "data").parts()) == 1


def test_two_images_of_one_prompt_and_none_of_another_are_not_split():
    family, batch = BY_NAME["Gemma3 (text and images)"], families.text_and_an_image(4, 1)
    batch["input_ids"], batch["attention_mask"] = (batch[key].clone() for key in ("input_ids", "attention_mask"))
    long, short = 0, 1
    batch["input_ids"][short][batch["input_ids"][short] == families.IMAGE] = 5
    row = batch["input_ids"][long]
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (0, 4), value=6)
    batch["input_ids"][long, -4:] = families.IMAGE
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
    batch["token_type_ids"] = (batch["input_ids"] == families.IMAGE).int()
    assert (row == families.IMAGE).sum() == 4
    lineas.collect(family.model, batch, layers=NORM)
    with pytest.raises(ValueError, match=r"^which of 'pixel_values' belongs to which prompt cannot be told: row 1 of"):
        lineas.collect(family.model, batch, layers=NORM, batch_size=2)


def test_images_without_tokens_are_one_a_prompt():
    data = {"input_ids": torch.ones(4, 3, dtype=torch.long), "pixel_values": torch.arange(4.0)[:, None]}
    parts = read(data, "data").parts(3)
    assert [batches.count(part, "data") for part in parts] == [3, 1]
    assert parts[1].kwargs["pixel_values"].tolist() == [[3.0]]
