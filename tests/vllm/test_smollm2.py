"""A real model in an engine with processes of its own, as vLLM starts one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import vllm_engines

import lineas

pytest.importorskip("vllm", reason="make vllm has an environment with vLLM")

SCRIPT = """
import json, sys
from vllm_engines import generate, start

if __name__ == "__main__":  # vLLM may start processes that import this file
    folder, files, requests = json.loads(open(sys.argv[1]).read())
    llm = start(folder, files)
    print("FOUND", json.dumps(generate(llm, requests)))
"""


@pytest.mark.slow
def test_smollm2_says_what_it_says_with_hooks(tmp_path):
    from lineas.demo.model import load_smollm2

    model, tokenizer = load_smollm2()
    rng, d = np.random.default_rng(0), model.config.hidden_size
    names = [f"model.layers.{k}.post_attention_layernorm" for k in range(model.config.num_hidden_layers)]
    maps = {
        label: lineas.SteeringMaps(
            {name: lineas.AffineMap(rng.normal(1.0, 0.05, d), rng.normal(0.0, 0.02, d)) for name in names}
        )
        for label in ("a", "b")
    }
    model.save_pretrained(tmp_path / "model")
    texts = ["My day at work today was", "The weather in the mountains", "She opened the door and"]
    wanted = [None, {"lineas": {"maps": "a"}}, {"lineas": {"maps": {"b": 1.5, "a": 0.5}}}]
    requests = [(tokenizer(text).input_ids, extra_args) for text in texts for extra_args in wanted]
    (tmp_path / "run.py").write_text(SCRIPT)
    (tmp_path / "input.json").write_text(
        json.dumps([str(tmp_path / "model"), vllm_engines.save(maps, tmp_path), requests])
    )
    environment = {
        **os.environ,
        **vllm_engines.SETTINGS,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(vllm_engines.__file__), *filter(None, sys.path)]),
    }
    run = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "input.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("FOUND "))
    for (ids, extra_args), (tokens, logprobs, _) in zip(requests, json.loads(line[6:]), strict=True):
        expected = vllm_engines.with_hooks(model, maps, ids, extra_args)
        assert tokens == expected[0]
        assert np.abs(np.subtract(logprobs, expected[1])).max() < 1e-3
