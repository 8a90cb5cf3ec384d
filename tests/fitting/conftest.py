"""Two processes that run all fits on several, once for the tests of all files: most of their time goes into imports."""

import models_zoo as zoo
import processes
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """The folder of what the two have found, with a tiny Llama whose key-value heads can be divided between them."""
    folder = tmp_path_factory.mktemp("processes")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(**zoo.llama().config.to_dict() | {"num_key_value_heads": 2})
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="session")
def said(results):
    """What each of the two has said; one of them is killed in the last of the fits."""
    found, logs = processes.finish(processes.start(results), results)
    assert all(one.get("ready") for one in found) and found[0].get("done"), "\n".join(logs)
    return found
