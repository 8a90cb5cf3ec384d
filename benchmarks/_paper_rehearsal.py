"""Stand-ins for a rehearsal of the table of the paper: tiny random models, and data out of the demo's sentences.

They come in the forms that the real ones have, so that a rehearsal takes the same ways: folders of transformers, the
columns of Jigsaw and RealToxicityPrompts, a folder that `datasets` loads, a task of lm-eval.
"""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _paper_data import JIGSAW
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lineas.demo import sentences

# In the form of MMLU, whose answers are one letter.
TASK = """\
task: rehearsal_mmlu
dataset_path: json
dataset_kwargs:
  data_files: {files}
  cache_dir: {cache}
test_split: test
fewshot_split: dev
fewshot_config:
  sampler: first_n
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\nAnswer:"
doc_to_choice: ["A", "B"]
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte pairs of the demo's sentences; the pad token is the one that ends a text, as of Qwen2.5."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(), trainer)
    special = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    made = PreTrainedTokenizerFast(tokenizer_object=core, padding_side="right", **special)
    made.save_pretrained(folder)
    return made


def _texts() -> list[str]:
    return [text for name in ("negative.txt", "positive.txt", "neutral_text.txt") for text in sentences(name)]


def stand_ins(folder: Path) -> dict[str, Any]:
    """Make all stand-ins in a folder; what the options of the table are to be for them."""
    with torch.random.fork_rng(devices=[]):
        _models(folder)
    _data(folder)
    return {
        "model": str(folder / "model"),
        "judge": str(folder / "judge"),
        "jigsaw": str(folder / "jigsaw.csv"),
        "rtp": str(folder / "rtp.jsonl"),
        "tet": str(folder / "tet.txt"),
        "wikipedia": str(folder / "wikipedia"),
        "mmlu_task": "rehearsal_mmlu",
        "mmlu_folder": str(folder / "tasks"),
    }


def _models(folder: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = tokenizer(folder / "model")
    ids = {"vocab_size": len(made), "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    # Wide enough that activations and judgements differ between texts.
    config = LlamaConfig(**size, **ids, max_position_embeddings=1024, initializer_range=0.2)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    config = RobertaConfig(
        **size,
        **ids,
        max_position_embeddings=130,
        initializer_range=0.5,
        id2label={0: "neutral", 1: "toxic"},
        label2id={"neutral": 0, "toxic": 1},
    )
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(folder / "judge")
    made.save_pretrained(folder / "judge")


def _data(folder: Path) -> None:
    negative, positive, neutral = (sentences(f"{name}.txt") for name in ("negative", "positive", "neutral_text"))
    with open(folder / "jigsaw.csv", "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow(["id", "comment_text", *JIGSAW])
        for k, (text, label) in enumerate([*((t, 1) for t in negative), *((t, 0) for t in positive)]):
            out.writerow([k, text, label, *[0] * (len(JIGSAW) - 1)])
        out.writerow(["other", neutral[0], 0, 0, 0, 0, 1, 0])  # left out: of another label alone
    halves = [" ".join(text.split()[: len(text.split()) // 2]) for text in negative]
    prompts = [{"prompt": {"text": half, "toxicity": 0.5}} for half in halves]
    _lines(folder / "rtp.jsonl", [*prompts, {"prompt": {"text": "left out", "toxicity": None}}])
    (folder / "tet.txt").write_text("\n".join(sentences("neutral_prompts.txt")) + "\n", encoding="utf-8")
    (folder / "wikipedia").mkdir(exist_ok=True)
    _lines(folder / "wikipedia" / "train.jsonl", [{"sentence": text} for text in ["", "a", *neutral]])
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    questions = [
        {"question": "Which of the two is said?", "choices": [right, wrong][:: 1 - 2 * turn], "answer": turn}
        for right, wrong, turn in zip(positive, negative, itertools.cycle([0, 1]), strict=False)
    ]
    _lines(tasks / "dev.jsonl", questions[:5])
    _lines(tasks / "test.jsonl", questions[5:20])
    files = json.dumps({split: str(tasks / f"{split}.jsonl") for split in ("dev", "test")})
    task = TASK.format(files=files, cache=json.dumps(str(folder / "cache")))
    (tasks / "rehearsal_mmlu.yaml").write_text(task, encoding="utf-8")


def _lines(file: Path, entries: Iterable[Any]) -> None:
    file.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries), encoding="utf-8")
