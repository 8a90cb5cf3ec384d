"""Architectures and sites that maps are folded into, for the tests and for the table in docs/compatibility.md.

Tiny models with random weights, gains and biases (fresh models have gains of 1 and biases of 0, which hide errors).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import lineas
from lineas.hooks import modules

WIDTH = 16
_COMMON = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
_GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
_SETTINGS = {
    "gemma": {"head_dim": 8},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": {"n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 2},
    "gpt_neox": {},
    "granite": {"residual_multiplier": 0.7},
    "llama": {},
    "mistral": {"sliding_window": None},
    "mixtral": _EXPERTS,
    "olmo2": {},
    "phi": {},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "smollm3": {},
}


def shake(model: nn.Module, seed: int) -> nn.Module:
    """Random gains and biases, as a trained model has them; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.8 + 0.1)
                if name.endswith("bias"):
                    parameter -= 0.5
    return model.eval()


def language_model(kind: str, seed: int = 0, dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    """A causal language model of `kind`, a model_type of transformers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "gpt2":
            common = {key: _COMMON[key] for key in ("vocab_size", "initializer_range", "bos_token_id", "eos_token_id")}
        else:
            common = _COMMON
        config = AutoConfig.for_model(kind, **{**common, **_SETTINGS[kind], **settings})
        # Experts one by one: grouped matrix products know no float64.
        return shake(AutoModelForCausalLM.from_config(config, experts_implementation="eager"), seed).to(dtype)


def unet(seed: int = 0) -> nn.Module:
    """The UNet of a small latent diffusion model."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
        )
    return shake(model, seed).double()


def flux(seed: int = 0) -> nn.Module:
    """The transformer of a small Flux."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(2, 2, 4),
        )
    return shake(model, seed).double()


class Pictures(nn.Module):
    """Convolutions of every kind of torch, with norms between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.batch = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 8, 2, stride=2, groups=2)
        self.group = nn.GroupNorm(4, 8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.layer = nn.LayerNorm((4, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.batch(self.conv(x)))
        x = self.instance(torch.relu(self.group(self.up(x))))
        return self.head(self.layer(x.mean(dim=2).transpose(1, 2)[:, :4]))


def pictures(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Pictures()
        model.batch.running_mean.normal_()
        model.batch.running_var.uniform_(0.5, 2.0)
    return shake(model, seed).double()


OTHERS = {"SD-type UNet": unet, "Flux": flux, "torch.nn": pictures}


def build(architecture: str) -> nn.Module:
    return OTHERS[architecture]() if architecture in OTHERS else language_model(architecture)


def widths(model: nn.Module, names: list[str]) -> dict[str, int]:
    """Neurons by name; of the adaptive norms of Flux, which do not tell, the width of the model."""
    return {name: modules.output_width(model.get_submodule(name)) or WIDTH for name in names}


def random_maps(model: nn.Module, glob: str | list[str], *, gain: bool = True, shift: bool = True, seed: int = 0):
    """Dense float64 maps of the modules that match, with slopes from 0.5 to 1.5."""
    rng = np.random.default_rng(seed)
    maps = {}
    for name, d in widths(model, modules.resolve(model, glob)).items():
        weight, bias = rng.uniform(0.5, 1.5, d), rng.normal(0.0, 0.3, d)
        maps[name] = lineas.AffineMap(weight if gain else np.ones(d), bias if shift else np.zeros(d))
    return lineas.SteeringMaps(maps)


def one_map(name: str, d: int, weight: float = 1.5, bias: float = 0.5) -> lineas.SteeringMaps:
    """The same map for each of d neurons of one module."""
    return lineas.SteeringMaps({name: lineas.AffineMap(np.full(d, weight), np.full(d, bias))})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state of a model, for same_state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    """Whether names and bits are those of before."""
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


def run(model: nn.Module) -> torch.Tensor:
    """What the model makes of fixed inputs: of language models, the hidden state before the final norm.

    The final norm of the Llama family rounds to float32, after which small differences cannot be seen.
    """
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kind = type(model).__name__
    with torch.no_grad():
        if kind == "UNet2DConditionModel":
            return model(normal(2, 3, 8, 8), torch.tensor(7), normal(2, 5, 8)).sample
        if kind == "FluxTransformer2DModel":
            return model(
                hidden_states=normal(2, 6, 4),
                encoder_hidden_states=normal(2, 5, 8),
                pooled_projections=normal(2, 8),
                timestep=torch.tensor([0.3, 0.7], dtype=torch.float64),
                img_ids=torch.arange(18).reshape(6, 3).double(),
                txt_ids=torch.zeros(5, 3).double(),
            ).sample
        if kind == "Pictures":
            return model(normal(2, 3, 4, 4))
        seen = []
        final = {"transformer.ln_f", "gpt_neox.final_layer_norm", "model.final_layernorm", "model.norm"}
        norm = next(module for name, module in model.named_modules() if name in final)
        handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(tokens(), use_cache=False)
        handle.remove()
        return seen[0]


def tokens() -> torch.Tensor:
    return torch.arange(2, 22).view(2, 10)


@dataclass(frozen=True)
class Case:
    """What is folded where.

    Attributes
    ----------
    architecture : str
        A model_type of transformers, or a key of OTHERS.
    glob : str
    shift : bool
        Whether shifts can be folded as well; if not, they must be refused.
    how : str
        For the table.
    convert : bool
        Whether a LlamaForCausalLM is made.
    """

    architecture: str
    glob: str
    shift: bool
    how: str
    convert: bool = False

    @property
    def name(self) -> str:
        return f"{self.architecture} {self.glob}" + (" as Llama" if self.convert else "")

    def cells(self) -> list[str]:
        """The part of the row in docs/compatibility.md that is not measured."""
        parted = self.shift and not self.convert and "; " in self.how
        how, shifts = self.how.split("; ", 1) if parted else (self.how, "with them" if self.shift else "only 0")
        return [self.architecture, f"`{self.glob}`", how, shifts]


HEADER = ("model", "modules", "slopes go into", "shifts", "change by the maps", "fold against hooks")
_OWN = "own gain; own bias"
_ATTENTION = "gain; W b into q, k, v by `attention_bias`"
_MLP = "gain; W b into gate, up by `mlp_bias`"
_GEMMA_GAIN = "1 + gain"
_CONVERTED = "LlamaForCausalLM by `convert=True`"

CASES = (
    Case("gpt2", "**.ln_[12]", True, _OWN),
    Case("gpt2", "**.attn.c_attn", True, "columns of the weight; own bias"),
    Case("gpt_neox", "**.*layernorm", True, _OWN),
    Case("phi", "**.input_layernorm", True, _OWN),
    Case("llama", "**.input_layernorm", True, _ATTENTION),
    Case("llama", "**.post_attention_layernorm", True, _MLP),
    Case("llama", "**.mlp.down_proj", True, "rows of the weight; bias by `mlp_bias`"),
    Case("granite", "**.input_layernorm", True, _ATTENTION),
    Case("granite", "**.post_attention_layernorm", True, _MLP),
    Case("smollm3", "**.input_layernorm", True, _ATTENTION),
    Case("smollm3", "**.post_attention_layernorm", True, _MLP),
    Case("mistral", "**.*layernorm", False, "gain"),
    Case("mistral", "**.*layernorm", True, _CONVERTED, convert=True),
    Case("qwen2", "**.input_layernorm", True, "gain; W b into q, k, v"),
    Case("qwen2", "**.post_attention_layernorm", False, "gain"),
    Case("qwen2", "**.*layernorm", True, _CONVERTED, convert=True),
    Case("qwen3", "**.input_layernorm", True, _ATTENTION),
    Case("qwen3", "**.post_attention_layernorm", False, "gain"),
    Case("qwen3", "**.[qk]_norm", False, "gain"),
    Case("gemma", "**.input_layernorm", True, f"{_GEMMA_GAIN}; W b into q, k, v by `attention_bias`"),
    Case("gemma", "**.post_attention_layernorm", False, _GEMMA_GAIN),
    Case("gemma2", "**.input_layernorm", True, f"{_GEMMA_GAIN}; W b into q, k, v by `attention_bias`"),
    Case("gemma2", "**.pre_feedforward_layernorm", False, _GEMMA_GAIN),
    Case("gemma2", "**.post_*_layernorm", False, _GEMMA_GAIN),
    Case("gemma3_text", "**.input_layernorm", True, f"{_GEMMA_GAIN}; W b into q, k, v by `attention_bias`"),
    Case("gemma3_text", "**.pre_feedforward_layernorm", False, _GEMMA_GAIN),
    Case("gemma3_text", "**.post_*_layernorm", False, _GEMMA_GAIN),
    Case("phi3", "**.*layernorm", False, "gain"),
    Case("olmo2", "**.post_*_layernorm", False, "gain"),
    Case("mixtral", "**.*layernorm", False, "gain"),
    Case("qwen3_moe", "**.input_layernorm", True, _ATTENTION),
    Case("qwen3_moe", "**.post_attention_layernorm", False, "gain"),
    Case("torch.nn", "[cbugilh]*", True, "own gain, rows of the weight; own bias"),
    Case("SD-type UNet", "**.*norm*", True, _OWN),
    Case("Flux", "transformer_blocks.?.norm1", True, "rows of the modulation; its rows and bias"),
    Case("Flux", "transformer_blocks.?.norm1_context", True, "rows of the modulation; its rows and bias"),
    Case("Flux", "**.norm2", True, "rows of `norm1.linear`; its rows and bias"),
    Case("Flux", "**.norm2_context", True, "rows of `norm1_context.linear`; its rows and bias"),
    Case("Flux", "norm_out", True, "rows of the modulation; its rows and bias"),
    Case("Flux", "single_transformer_blocks.*.norm", True, "rows of the modulation; its rows and bias"),
)


def measure(case: Case) -> tuple[float, float]:
    """Largest change that the maps make by hooks, and largest difference of the folded model to it."""
    model = build(case.architecture)
    maps = random_maps(model, case.glob, shift=case.shift)
    plain = run(model)
    with maps.attach(model):
        hooked = run(model)
    folded = run(maps.fold(model, convert=case.convert))
    return float((hooked - plain).abs().max()), float((folded - hooked).abs().max())
