"""Tiny models with random weights, and a tokenizer for them, made without any download."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = (
    "a the one this that my your our we you they it is was are were very quite not never good bad nice poor great "
    "awful happy sad warm cold long short day night work food film train garden school house dog cat neighbour weather "
    "morning evening and but so because today yesterday again always"
).split()
SPECIAL = ("<pad>", "<eos>", "<unk>")
VOCABULARY = len(SPECIAL) + len(WORDS)
WIDTH = 16
LAYERS = 3

# A glob for each language model: modules that return a tensor, one a layer.
NORMS = {
    "llama": "model.layers.*.post_attention_layernorm",
    "gpt2": "transformer.h.*.ln_2",
    "qwen2": "model.layers.*.post_attention_layernorm",
    "gemma2": "model.layers.*.post_feedforward_layernorm",
}


def tokenizer(*, pad_token: bool = True, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """One token a word of `WORDS`; any other word is ``<unk>``."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>"}
    if pad_token:
        special["pad_token"] = "<pad>"
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side=padding_side, **special)


def texts(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 9) -> list[str]:
    """Random sentences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator)) for length in lengths]


def _decoder(config_class, model_class, seed: int, **settings) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_class(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
            # Wide enough that activations differ clearly between prompts.
            initializer_range=0.2,
            **settings,
        )
        return model_class(config).eval()


def llama(seed: int = 0) -> LlamaForCausalLM:
    return _decoder(LlamaConfig, LlamaForCausalLM, seed)


def qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    return _decoder(Qwen2Config, Qwen2ForCausalLM, seed)


def gemma2(seed: int = 0) -> Gemma2ForCausalLM:
    return _decoder(Gemma2Config, Gemma2ForCausalLM, seed, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)


def gpt2(seed: int = 0, *, training: bool = False) -> GPT2LMHeadModel:
    """GPT-2: absolute positions, and dropout of 0.1 where it is left in training mode, as it is when freshly built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=64,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=2,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=1,
            initializer_range=0.2,
        )
        return GPT2LMHeadModel(config).train(training)


LANGUAGE_MODELS = {"llama": llama, "gpt2": gpt2, "qwen2": qwen2, "gemma2": gemma2}


class CNN(nn.Module):
    """Images [B, 3, H, W] to [B, classes], through a BatchNorm of 6 channels and a GroupNorm of 8."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1)
        self.gn = nn.GroupNorm(4, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv1(x)))
        x = torch.relu(self.gn(self.conv2(x)))
        return self.head(x.mean(dim=(2, 3)))


def cnn(seed: int = 0) -> CNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CNN()
        # Running statistics of a trained model, not the identity.
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2.0)
        return model.eval()


def images(count: int, *, seed: int = 0, size: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int = 0) -> nn.Sequential:
    """[B, 5] or [B, T, 5] to 3 channels; modules "0" (Linear 7), "1" (Tanh), "2" (Linear 4), "3" (Tanh), "4"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3)).eval()


class Twice(nn.Module):
    """A model that calls a module, `shared`, twice in a pass."""

    def __init__(self):
        super().__init__()
        self.shared, self.end = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.end(self.shared(self.shared(x)))
