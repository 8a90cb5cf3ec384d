"""The code of docs/token-level.md, as it stands there, with a tiny model."""

import models_zoo as zoo
import numpy as np
from pages import python_blocks

import lineas

BLOCKS = python_blocks("docs/token-level.md")


def test_the_code_of_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sides = {name: zoo.texts(40, seed=k) for k, name in enumerate(("negative", "positive", "more_negative"))}
    for name, lines in sides.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    model, tokenizer = zoo.llama(), zoo.tokenizer()
    namespace: dict = {"model": model, "tokenizer": tokenizer}
    for block in BLOCKS:
        exec(compile(block, "token-level.md", "exec"), namespace)
    assert len(BLOCKS) == 3 and (tmp_path / "negative.safetensors").exists()
    how = {**namespace["settings"], "progress": False}
    rows = lineas.collect(model, sides["negative"] + sides["more_negative"], **how)
    for name, one in namespace["source"].items():
        np.testing.assert_allclose(one.sample(one.count), np.sort(rows[name], axis=0), atol=1e-5)
    assert namespace["path"].metadata["pooling"] == "all" and set(namespace["distances"]) == set(rows)
    assert namespace["maps"].metadata["method"] == "incremental"
