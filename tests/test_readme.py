"""The code of the README runs as it stands there, with a tiny model in place of the one from the hub."""

import pytest
from pages import python_blocks

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")
pytest.importorskip("peft")
pytest.importorskip("huggingface_hub")

BLOCKS = python_blocks("README.md")


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A tiny model and texts that it knows; what is pushed to the hub goes into a folder, and comes from there."""
    import models_zoo

    import lineas.demo
    from lineas.maps import hub

    auto = {"AutoModelForCausalLM": models_zoo.llama, "AutoTokenizer": models_zoo.tokenizer}
    for name, make in auto.items():
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda name, make=make: make())
    monkeypatch.setattr(
        lineas.demo,
        "sentences",
        lambda name: models_zoo.texts(64 if name == "neutral_text.txt" else 8, seed=1 if name == "positive.txt" else 2),
    )
    monkeypatch.setattr(hub, "push_to_hub", lambda maps, name: hub.save_pretrained(maps, tmp_path / name))
    monkeypatch.chdir(tmp_path)


def test_there_is_code():
    assert len(BLOCKS) >= 5


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_the_code_of_the_readme_runs(no_hub):
    namespace = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["maps"] == namespace["result"].maps
