"""Model families: one tiny model with random weights of each, its batches, and the modules that the paper would map.

A family is an entry of `FAMILIES`; tests/compatibility.py says what is done with it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import models_zoo as zoo
import torch
import transformers as tf
import x_transformers
from torch import nn

WIDTH, LAYERS = 16, 2
BLOCKS = "model.layers.*"
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
ATTENTION = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 2 * WIDTH}


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes
    ----------
    name : str
        What the table calls it.
    build : callable
        Makes the model, in eval mode.
    batch : callable
        ``batch(count, seed)`` makes a batch of prompts or images.
    sites : list of str
        What `lineas.sites` suggests: globs of the modules that the paper maps, or their like.
    count : int
        How many modules these match.
    generate : callable, optional
        ``generate(model, batch, use_cache)`` returns greedy tokens.
    selects : bool
        Whether maps can act on some tokens only at these sites.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Any]
    sites: list[str]
    count: int
    generate: Callable[[nn.Module, Any, bool], torch.Tensor] | None = None
    selects: bool = True

    @functools.cached_property
    def model(self) -> nn.Module:
        """The model, made once: no step may leave a trace on it."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    # As wide as makes activations differ between prompts; gains and biases are not left at 1 and 0.
                    parameter.add_(torch.randn(parameter.shape) * 0.15)
            return model


# --- language models --------------------------------------------------------------------------------------------------


def prompts(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Sentences of different lengths, padded on the left."""
    tokens = zoo.tokenizer()(zoo.texts(count, seed=seed), return_tensors="pt", padding=True)
    return {key: tokens[key] for key in ("input_ids", "attention_mask")}


def greedy(model: nn.Module, batch: dict[str, torch.Tensor], use_cache: bool) -> torch.Tensor:
    inputs = {key: value for key, value in batch.items() if not key.startswith("decoder_")}
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    if "pixel_values" in batch:  # a part of an image cannot be generated
        settings["suppress_tokens"] = [IMAGE, IMAGE + 1]
    return model.generate(**inputs, **settings, use_cache=use_cache)


def decoder(
    name: str, config: type, model: type, sites: list[str], count: int = LAYERS, selects: bool = True, **settings: Any
) -> Family:
    """A decoder-only language model of transformers."""
    common = {"vocab_size": zoo.VOCABULARY, "max_position_embeddings": 64} | SIZES | ATTENTION
    return Family(name, lambda: model(config(**common | settings)), prompts, sites, count, greedy, selects)


POST = [f"{BLOCKS}.post_attention_layernorm"]
POST_BOTH = [*POST, f"{BLOCKS}.post_feedforward_layernorm"]
HEADS = {"head_dim": WIDTH // 2}

LANGUAGE_MODELS = [
    decoder("Llama", tf.LlamaConfig, tf.LlamaForCausalLM, POST),
    decoder("Qwen2", tf.Qwen2Config, tf.Qwen2ForCausalLM, POST),
    decoder("Qwen3", tf.Qwen3Config, tf.Qwen3ForCausalLM, POST, **HEADS),
    decoder("Mistral", tf.MistralConfig, tf.MistralForCausalLM, POST, sliding_window=8),
    decoder("Gemma2", tf.Gemma2Config, tf.Gemma2ForCausalLM, POST_BOTH, 4, **HEADS, sliding_window=8),
    decoder("Gemma3 (text)", tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, POST_BOTH, 4, **HEADS, sliding_window=8),
    decoder("Phi3", tf.Phi3Config, tf.Phi3ForCausalLM, POST),
    decoder("GPT-2", tf.GPT2Config, tf.GPT2LMHeadModel, ["transformer.h.*.ln_2"]),
    decoder("GPT-NeoX", tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, ["gpt_neox.layers.*.post_attention_layernorm"]),
    decoder("OLMo2", tf.Olmo2Config, tf.Olmo2ForCausalLM, POST_BOTH, 4),
    decoder("OPT", tf.OPTConfig, tf.OPTForCausalLM, ["model.decoder.layers.*.final_layer_norm"], selects=False,
            ffn_dim=2 * WIDTH, word_embed_proj_dim=WIDTH),
    decoder("Mixtral", tf.MixtralConfig, tf.MixtralForCausalLM, POST, num_local_experts=4),
    decoder("Qwen3-MoE", tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, POST, **HEADS, num_experts=4,
            num_experts_per_tok=2, moe_intermediate_size=WIDTH),
]  # fmt: skip


def states(
    name: str, config: type, model: type, sites: list[str], count: int = LAYERS, batch: Any = prompts, **settings: Any
) -> Family:
    """A language model of transformers whose layers, some or all, keep a state in place of keys and values."""
    common = {"vocab_size": zoo.VOCABULARY} | SIZES
    return Family(name, lambda: model(config(**common | settings)), batch, sites, count, greedy)


def one_length(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Prompts without padding, for models that take padding for tokens."""
    return {"input_ids": tokens_alone(count, seed)}


def greedy_alone(model: nn.Module, batch: dict[str, torch.Tensor], use_cache: bool) -> torch.Tensor:
    """RWKV of transformers goes on with states only where there is one text."""
    return torch.cat([greedy(model, {"input_ids": row[None]}, use_cache) for row in batch["input_ids"]])


def xlstm() -> nn.Module:
    sizes = {"hidden_size": 128, "num_heads": 8, "num_blocks": LAYERS, "chunk_size": 16}  # its smallest
    return tf.xLSTMForCausalLM(tf.xLSTMConfig(vocab_size=zoo.VOCABULARY, **SIZES | sizes))


MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {f"linear_{part}": 2 for part in ("num_value_heads", "num_key_heads")} | {
    f"linear_{part}_head_dim": 8 for part in ("key", "value")
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}

STATE_MODELS = [
    states("Mamba", tf.MambaConfig, tf.MambaForCausalLM, ["backbone.layers.*.norm"], state_size=4),
    states("Mamba-2", tf.Mamba2Config, tf.Mamba2ForCausalLM, ["backbone.layers.*.norm"], state_size=4, num_heads=4,
           head_dim=8, n_groups=1, chunk_size=8),
    states("Falcon-Mamba", tf.FalconMambaConfig, tf.FalconMambaForCausalLM, ["backbone.layers.*.norm"], state_size=4),
    Family("RWKV", lambda: tf.RwkvForCausalLM(tf.RwkvConfig(
        vocab_size=zoo.VOCABULARY, attention_hidden_size=WIDTH, intermediate_size=2 * WIDTH, context_length=64, **SIZES,
    )), one_length, ["rwkv.blocks.*.ln2"], LAYERS, greedy_alone),
    Family("xLSTM", xlstm, one_length, ["backbone.blocks.*.norm_ffn"], LAYERS, greedy),
    states("Jamba", tf.JambaConfig, tf.JambaForCausalLM, ["model.layers.*.pre_ff_layernorm"], **ATTENTION, **EXPERTS,
           attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False),
    states("Bamba", tf.BambaConfig, tf.BambaForCausalLM, ["model.layers.*.pre_ff_layernorm"], **ATTENTION, **MAMBA2,
           attn_layer_indices=[1]),
    states("LFM2", tf.Lfm2Config, tf.Lfm2ForCausalLM, ["model.layers.*.ffn_norm"], **ATTENTION,
           layer_types=["conv", "full_attention"]),
    states("Falcon-H1", tf.FalconH1Config, tf.FalconH1ForCausalLM, ["model.layers.*.pre_ff_layernorm"], **ATTENTION,
           **MAMBA2, mamba_d_ssm=32),
    states("RecurrentGemma", tf.RecurrentGemmaConfig, tf.RecurrentGemmaForCausalLM,
           ["model.layers.*.channel_pre_norm"], 3, one_length, **ATTENTION, num_hidden_layers=3, lru_width=WIDTH,
           attention_window_size=32, head_dim=8),
    states("Qwen3-Next", tf.Qwen3NextConfig, tf.Qwen3NextForCausalLM, POST, **ATTENTION, **EXPERTS, **HEADS, **LINEAR,
           layer_types=["linear_attention", "full_attention"], moe_intermediate_size=WIDTH,
           shared_expert_intermediate_size=WIDTH),
]  # fmt: skip


# --- other models of text ---------------------------------------------------------------------------------------------


def bert() -> nn.Module:
    return tf.BertModel(
        tf.BertConfig(
            vocab_size=zoo.VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=zoo.VOCABULARY,
            d_model=WIDTH,
            d_kv=8,
            d_ff=2 * WIDTH,
            num_layers=LAYERS,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def question_and_answer(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Both sides padded, to different lengths."""
    answers = zoo.tokenizer(padding_side="right")(
        zoo.texts(count, seed=seed + 100, shortest=2, longest=5), return_tensors="pt", padding=True
    )
    return prompts(count, seed) | {
        "decoder_input_ids": answers["input_ids"],
        "decoder_attention_mask": answers["attention_mask"],
    }


def x_decoder() -> nn.Module:
    layers = x_transformers.Decoder(dim=WIDTH, depth=LAYERS, heads=2, attn_dim_head=8)
    return x_transformers.TransformerWrapper(num_tokens=zoo.VOCABULARY, max_seq_len=32, attn_layers=layers)


def tokens_alone(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, zoo.VOCABULARY, (count, 7), generator=torch.Generator().manual_seed(seed))


def x_greedy(model: nn.Module, batch: torch.Tensor, use_cache: bool) -> torch.Tensor:
    wrapper = x_transformers.AutoregressiveWrapper(model)
    return wrapper.generate(batch, 6, temperature=0.0, cache_kv=use_cache)


TEXT_MODELS = [
    Family("BERT", bert, prompts, ["encoder.layer.*.attention.output.LayerNorm"], LAYERS),
    Family("T5", t5, question_and_answer, ["decoder.block.*.layer.2.layer_norm", "encoder.block.*.layer.1.layer_norm"],
           2 * LAYERS, greedy, selects=False),
    Family("x-transformers", x_decoder, tokens_alone, ["attn_layers.final_norm", "attn_layers.layers.*.0.0"],
           2 * LAYERS + 1, x_greedy, selects=False),
]  # fmt: skip


# --- models of images -------------------------------------------------------------------------------------------------


def images(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Of another mean for another seed, as two concepts would be."""
    return {"pixel_values": zoo.images(count, seed=seed, size=8) + 0.5 * seed}


def vit() -> nn.Module:
    return tf.ViTModel(
        tf.ViTConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
    )


def resnet() -> nn.Module:
    config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    return tf.ResNetModel(config)


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=4,
    )


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + 0.5 * seed


def latents_and_text(count: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "sample": noise(0, count, 4, 8, 8),
        "timestep": torch.full((count,), 399),
        "encoder_hidden_states": noise(seed, count, 5, WIDTH),
    }


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )


def packed_latents_and_text(count: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": noise(0, count, 9, 4),
        "encoder_hidden_states": noise(seed, count, 5, WIDTH),
        "pooled_projections": noise(seed, count, WIDTH),
        "timestep": torch.full((count,), 0.5),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=LAYERS,
        norm_num_groups=4,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )


def latents_and_class(count: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": noise(0, count, 4, 4, 4),
        "timestep": torch.full((count,), 3),
        "class_labels": torch.full((count,), seed),
    }


def rows(count: int, seed: int) -> torch.Tensor:
    return noise(seed, count, 5)


IMAGE_MODELS = [
    Family("ViT", vit, images, ["layers.*.layernorm_after"], LAYERS),
    Family("ResNet", resnet, images, ["**.*norm*"], 6),
    Family("Stable Diffusion UNet", unet, latents_and_text, ["**.*norm*"], 33),
    Family("Flux", flux, packed_latents_and_text, [
        "norm_out", "single_transformer_blocks.*.norm", "transformer_blocks.*.norm1",
        "transformer_blocks.*.norm1_context", "transformer_blocks.*.norm2", "transformer_blocks.*.norm2_context",
    ], 11),
    Family("DiT", dit, latents_and_class, ["norm_out", "transformer_blocks.*.norm1", "transformer_blocks.*.norm3"], 5),
    Family("plain CNN", zoo.cnn, lambda count, seed: images(count, seed)["pixel_values"], ["bn", "gn"], 2),
    Family("nn.Sequential", zoo.mlp, rows, [], 0),
]  # fmt: skip

# --- models of text and images ----------------------------------------------------------------------------------------


VISION = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "out_hidden_size": WIDTH, "depth": LAYERS,
          "num_heads": 2, "patch_size": 2}  # fmt: skip
IMAGE = zoo.VOCABULARY  # the token that stands for a part of an image
GRIDS = [(1, 4, 2), (1, 2, 6), (1, 4, 4)]  # patches of the images; four of them make a token


def multimodal(name: str, config: type, model: type, sites: list[str], *, vision: dict, **settings: Any) -> Family:
    """A model of text and images whose tokens of images have positions along three axes."""
    text = {
        "vocab_size": zoo.VOCABULARY + 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        **SIZES,
        **ATTENTION,
    }

    def build() -> nn.Module:
        tokens = {"image_token_id": IMAGE, "video_token_id": IMAGE + 1}
        made = model(config(text_config=text | settings, vision_config=VISION | vision, **tokens))
        made.generation_config.pad_token_id = 0
        return made

    return Family(name, build, text_and_images, sites, len(sites) * LAYERS, greedy)


def text_and_images(count: int, seed: int, side: str = "left") -> dict[str, torch.Tensor]:
    """Texts of different lengths around one image or two, which differ in size."""
    rows, grids = [], []
    for row, ids in enumerate(zoo.tokenizer()(zoo.texts(count, seed=seed))["input_ids"]):
        mine = [GRIDS[(row + k) % len(GRIDS)] for k in range(1 + row % 2)]
        images = [token for _, height, width in mine for token in [*[IMAGE] * (height * width // 4), ids[0]]]
        rows.append(torch.tensor([*ids[:2], *images, *ids[2:]]))
        grids += mine
    padded = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side=side)
    patches = sum(height * width for _, height, width in grids)
    return {
        "input_ids": padded(rows),
        "attention_mask": padded([torch.ones_like(row) for row in rows]),
        "mm_token_type_ids": padded([(row == IMAGE).int() for row in rows]),
        "pixel_values": noise(seed, patches, 3 * 2 * 2 * 2),
        "image_grid_thw": torch.tensor(grids),
    }


def gemma3() -> nn.Module:
    text = {"vocab_size": zoo.VOCABULARY + 1} | SIZES | ATTENTION
    vision = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 2}  # fmt: skip
    made = tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text | HEADS, vision_config=vision, mm_tokens_per_image=4, image_token_id=IMAGE)
    )
    made.generation_config.pad_token_id = 0
    return made


def text_and_an_image(count: int, seed: int) -> dict[str, torch.Tensor]:
    """Texts of different lengths with an image each, padded on the left."""
    rows = [[*ids[:2], *[IMAGE] * 4, *ids[2:]] for ids in zoo.tokenizer()(zoo.texts(count, seed=seed))["input_ids"]]
    padded = functools.partial(nn.utils.rnn.pad_sequence, batch_first=True, padding_side="left")
    ids, mask = (padded([torch.tensor(row) ** power for row in rows]) for power in (1, 0))
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": (ids == IMAGE).int()} | images(count, seed)


TOWER = ["model.language_model.layers.*.post_attention_layernorm"]
MULTIMODAL_MODELS = [
    multimodal("Qwen2.5-VL", tf.Qwen2_5_VLConfig, tf.Qwen2_5_VLForConditionalGeneration, TOWER,
               vision={"fullatt_block_indexes": [1], "window_size": 8}),
    multimodal("Qwen3-VL", tf.Qwen3VLConfig, tf.Qwen3VLForConditionalGeneration, TOWER,
               vision={"deepstack_visual_indexes": [0], "num_position_embeddings": 16}, **HEADS),
    multimodal("GLM-4V", tf.Glm4vConfig, tf.Glm4vForConditionalGeneration,
               [*TOWER, *(f"model.language_model.layers.*.post_{part}_layernorm" for part in ("self_attn", "mlp"))],
               vision={"image_size": 8}),
    Family("Gemma3 (text and images)", gemma3, text_and_an_image,
           [*TOWER, "model.language_model.layers.*.post_feedforward_layernorm"], 2 * LAYERS, greedy),
]  # fmt: skip

FAMILIES = [*LANGUAGE_MODELS, *STATE_MODELS, *TEXT_MODELS, *IMAGE_MODELS, *MULTIMODAL_MODELS]
