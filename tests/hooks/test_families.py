"""The matrix: every step on every model family, and the page that shows it."""

import compatibility
import numpy as np
import pytest
from families import FAMILIES

import lineas

CELLS = [(family, step) for family in FAMILIES for step in compatibility.STEPS if compatibility.applies(family, step)]


@pytest.mark.parametrize(("family", "step"), CELLS, ids=[f"{family.name}-{step}" for family, step in CELLS])
def test_every_step_works_with_every_family(family, step):
    compatibility.STEPS[step](family)


def test_the_committed_table_is_what_the_matrix_gives():
    assert compatibility.committed() == compatibility.table(compatibility.expected)


# --- what the page says below the table -------------------------------------------------------------------------------

BY_NAME = {family.name: family for family in FAMILIES}


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_fused_experts_are_pooled_by_prompt_though_they_see_all_tokens_in_one_axis(name):
    family = BY_NAME[name]
    found = lineas.collect(
        family.model, family.batch(4, 1), layers=["model.layers.*.mlp.experts", "model.layers.*.mlp"]
    )
    # The block returns what its experts sum up, in [batch, tokens, d].
    for layer in range(2):
        experts, block = (found[f"model.layers.{layer}.mlp{part}"] for part in (".experts", ""))
        np.testing.assert_allclose(experts, block, atol=1e-6)
    listed = {row.kind for row in lineas.sites(family.model) if "experts" in row.glob}
    assert listed == {f"{name.replace('-MoE', 'Moe')}Experts", "SiLUActivation"}  # no single expert


@pytest.mark.parametrize(
    "name", ["decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.1.layer.1.EncDecAttention.q"]
)
def test_keys_of_attention_to_the_encoder_have_the_tokens_of_the_encoder(name):
    family = BY_NAME["T5"]
    batch = family.batch(4, 1)
    found = lineas.collect(family.model, batch, layers=name)[name]
    for row in range(4):
        alone = compatibility.outputs(family, [name], compatibility.alone(batch, row))[0][name]
        np.testing.assert_allclose(found[row], alone[0].mean(dim=0), atol=1e-5)


def test_a_decoder_without_a_mask_of_its_own_is_pooled_over_all_its_tokens():
    family, name = BY_NAME["T5"], "decoder.block.0.layer.2.layer_norm"
    batch = {key: value for key, value in family.batch(4, 1).items() if key != "decoder_attention_mask"}
    expected = compatibility.outputs(family, [name], batch)[0][name].mean(dim=1)
    np.testing.assert_allclose(lineas.collect(family.model, batch, layers=name)[name], expected, atol=1e-5)


def test_blocks_of_flux_give_the_text_first():
    family, name = BY_NAME["Flux"], "transformer_blocks.0"
    (row,) = [row for row in lineas.sites(family.model, family.batch(2, 1)) if name in row.names]
    assert row.shape == (2, 5, 16)  # five tokens of text, nine of the image


def test_flux_batches_are_not_split():
    family = BY_NAME["Flux"]
    with pytest.raises(
        ValueError, match=r"^(source|target): a batch can be split .*: 'hidden_states' has 4, 'img_ids' has 9"
    ):
        lineas.fit_end_to_end(
            family.model, family.batch(4, 1), family.batch(4, 2), layers="norm_out", batch_size=2, progress=False
        )


def test_blocks_of_images_are_pooled_over_their_pixels():
    family, name = BY_NAME["Stable Diffusion UNet"], "down_blocks.0.resnets.0"
    batch = family.batch(4, 1)
    expected = compatibility.outputs(family, [name], batch)[0][name].mean(dim=(2, 3))
    np.testing.assert_allclose(lineas.collect(family.model, batch, layers=name)[name], expected, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"^conv_act: the output of SiLU has shape .* does not tell whether its channels"
    ):
        lineas.collect(family.model, batch, layers="conv_act")


def test_the_decoder_as_a_whole_goes_by_its_own_mask():
    family = BY_NAME["T5"]
    batch = family.batch(4, 1)
    found = lineas.collect(family.model, batch, layers=["decoder", "decoder.final_layer_norm"])
    np.testing.assert_allclose(found["decoder"], found["decoder.final_layer_norm"], atol=1e-6)
