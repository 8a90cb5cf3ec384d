"""The code of docs/sliders.md, as it stands there, with a tiny pipeline in place of the one from the hub."""

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import fold_cases
from pages import python_blocks
from slider_cases import painter

BLOCKS = python_blocks("docs/sliders.md")


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*")
def test_the_code_of_the_page(tmp_path, monkeypatch):
    pipe = painter()
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda name: pipe)
    monkeypatch.chdir(tmp_path)
    before = fold_cases.state(pipe.unet)
    namespace: dict = {}
    for block in BLOCKS:
        # The tiny model has fewer neurons, of which a fiftieth would be none in most modules.
        exec(compile(block.replace("support=0.02", "support=0.2"), "sliders.md", "exec"), namespace)
    files = {"winter.safetensors", "no-winter.safetensors", "winter-kohya.safetensors"}
    assert len(BLOCKS) == 3 and {path.name for path in tmp_path.iterdir()} == files
    assert fold_cases.same_state(pipe.unet, before)
    maps, image = namespace["maps"], namespace["image"]
    assert all(any(name.endswith(last) for name in maps) for last in ("norm1", "norm3", "conv2"))

    def draw():
        return pipe("a street", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt")

    pipe.load_lora_weights("winter.safetensors", adapter_name="winter")
    pipe.set_adapters(["winter"], [0.7])
    slid = draw().images
    pipe.unload_lora_weights()
    with maps.attach(pipe.unet, strength=0.7):
        hooked = draw().images
    assert image.size == (16, 16)
    assert (slid - hooked).abs().max() < 1e-5 < 1e-4 < (hooked - draw().images).abs().max()
