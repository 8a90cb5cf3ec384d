"""The protocol of images: a rehearsal of all of it, held against CLIP and DINOv2 of transformers, and its parts."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import _paper  # noqa: E402
import _paper_pictures  # noqa: E402
import _paper_prompts  # noqa: E402
import paper_images  # noqa: E402

import lineas  # noqa: E402
from lineas.hooks.modules import resolve  # noqa: E402


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """A rehearsal that is cut off when the second concept is fitted, and goes on: folder, and what was there before."""
    pytest.importorskip("diffusers")
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    folder = tmp_path_factory.mktemp("images")
    command = ["--rehearse", "--results", str(folder)]
    whole = lineas.fit_incremental

    def cut_off(*args, **kwargs):
        if cut_off.calls:
            raise KeyboardInterrupt
        cut_off.calls = 1
        return whole(*args, **kwargs)

    cut_off.calls = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lineas, "fit_incremental", cut_off)
        with pytest.raises(KeyboardInterrupt):
            paper_images.main(command)
    found = {file: file.stat().st_mtime_ns for file in folder.iterdir() if file.suffix in (".npz", ".safetensors")}
    paper_images.main(command)
    return folder, found


@pytest.fixture(scope="module")
def everything(rehearsed):
    return json.loads((rehearsed[0] / "rehearsal.json").read_text())


def points(everything):
    return {(point["method"], point["strength"]): point["images"] for point in everything["points"]}


@pytest.mark.slow
def test_a_rehearsal_measures_everything_and_says_what_it_is(rehearsed, everything):
    lines = (rehearsed[0] / "rehearsal.md").read_text().splitlines()
    assert lines[0] == "# Rehearsal of paper_images.py" and lines[2] == _paper.REHEARSAL
    assert "The paper's means" not in "\n".join(lines) and not (rehearsed[0] / "table.md").exists()
    strengths = (0.5, 1.0, -0.5, -1.0)
    found = points(everything)
    assert [*found] == [("none", 0.0), *((m, s) for m in _paper_pictures.METHODS for s in strengths)]
    for (method, strength), by in found.items():
        assert [*by] == ["vaporwave", "robot"]
        for concept, scores in by.items():
            values = np.array([scores["img"], scores["clip"]])
            assert values.shape == (2, 3) and (np.abs(values) <= 1 + 1e-6).all()
            alone = np.array([found["none", 0.0][concept][name] for name in ("img", "clip")])
            assert (values == alone).all() == (method == "none"), (method, strength, concept)
    np.testing.assert_allclose(found["none", 0.0]["robot"]["img"], 1.0, atol=1e-6)
    assert all(min(by.values()) > 0 for by in everything["support"].values())


@pytest.mark.slow
def test_a_run_that_was_cut_off_went_on(rehearsed):
    folder, before = rehearsed
    assert any(file.name.startswith("maps-lineas-vaporwave") for file in before)
    assert not any(file.name.startswith("maps-lin-act-robot") for file in before)
    assert all(file.stat().st_mtime_ns == time for file, time in before.items())
    assert not [*folder.glob("fit-*")], "fits that are done leave no checkpoint"


@pytest.mark.slow
def test_scores_are_those_of_clip_and_dino(rehearsed, everything):
    """Of the images that were kept, which are small enough to be kept as they were drawn."""
    from PIL import Image

    folder, settings = rehearsed[0], everything["settings"]
    clip = transformers.CLIPModel.from_pretrained(settings["clip"]).eval()
    dino = transformers.AutoModel.from_pretrained(settings["dino"]).eval()
    words = transformers.AutoTokenizer.from_pretrained(settings["clip"])
    looks = [
        transformers.AutoImageProcessor.from_pretrained(settings[name], backend="pil") for name in ("clip", "dino")
    ]

    def look(name):
        image = Image.open(folder / "images" / f"{name}-0.png")
        return [look(image, return_tensors="pt")["pixel_values"] for look in looks]

    seen, plain = look("robot-lin-act-1"), look("robot-none")
    with torch.no_grad():
        both = clip(**words(["A picture of robot."], return_tensors="pt"), pixel_values=seen[0])
        tokens = [dino(pixel_values=pixels[1]).last_hidden_state[0, 0] for pixels in (seen, plain)]
    expected = {
        "img": torch.nn.functional.cosine_similarity(*tokens, dim=0).item(),
        "clip": torch.nn.functional.cosine_similarity(both.image_embeds, both.text_embeds).item(),
    }
    files = sorted(file.name for file in (folder / "images").glob("robot-lin-act-*"))
    assert files == [f"robot-lin-act-{s}-0.png" for s in ("0.5", "1", "inverse-0.5", "inverse-1")]
    found = points(everything)["Lin-AcT", 1.0]["robot"]
    assert {name: values[0] for name, values in found.items()} == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_the_fit_comes_nearer_to_the_target_through_the_generator(rehearsed, everything, monkeypatch):
    """Maps and activations of the script, with noise that stays: the distance falls, at all norms together."""
    folder = rehearsed[0]
    parser = paper_images._parser()
    args = _paper.parse(parser, ["--rehearse", "--fixed-noise", "--steps", "12"], paper_images.SMALL)
    vars(args).update({name: everything["settings"][name] for name in ("base", "unet", "clip", "dino")})
    args.mini_batch = None
    study = _paper_pictures.Study(args, _paper.Results(folder / "again"))
    source, target = (study.generator.batch(prompts, k) for k, prompts in enumerate(study.sets("robot")))
    maps = study.maps("LinEAS", "robot")

    def activations(batch):
        run = {"forward": lambda unet, batch: study.generator.run(batch, "latent"), "batch_size": 3, "progress": False}
        return lineas.collect(study.generator.unet, batch, layers=[re.compile(args.layers)], **run)

    wanted, before = activations(target), activations(source)
    with maps.attach(study.generator.unet):
        after = activations(source)

    def distance(found):
        return np.mean([lineas.wasserstein(found[name], wanted[name]).mean() for name in wanted])

    assert len(wanted) == len(maps) == len(resolve(study.generator.unet, [re.compile(args.layers)]))
    assert distance(after) < 0.8 * distance(before)


def test_the_norms_are_those_that_the_paper_counts():
    """Table 3: 256 normalisations in the UNet of SDXL, 34 of them in the residual blocks."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20],
            cross_attention_dim=2048,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
            use_linear_projection=True,
        )
    layers = paper_images._parser().get_default("layers")
    assert len(resolve(unet, [re.compile(layers)])) == 256
    assert len(resolve(unet, [re.compile(r".*resnets.*norm.*")])) == 34


# ---- prompts ----


def test_prompts_of_this_project_are_enough_for_all():
    found = _paper_prompts.read(None)
    assert len(found["neutral"]) == len(found["evaluation"]) == 32
    assert len({*found["neutral"], *found["evaluation"]}) == 64 and len(_paper_prompts.CONCEPTS) == 15
    assert _paper_prompts.tagged(["A hill. "], "robot") == ["A hill, with a robot"]


def test_prompts_of_a_file_are_found_by_their_names(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"none": ["A cup. "], "Low_poly": ["A low-poly cup"], "robots": ["A robot"]}))
    found = _paper_prompts.read(str(file))
    assert found["neutral"] == found["evaluation"] == ["A cup."]
    assert found[_paper_prompts.plain("low-poly")] == ["A low-poly cup"]
    assert found[_paper_prompts.plain("robot")] == ["A robot"]


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "expected a JSON object of lists of prompts"),
        ({"none": "x"}, "expected a JSON object of lists"),
        ({"robot": []}, "there are no prompts called neutral or none"),
    ],
)
def test_bad_prompts_are_named(tmp_path, content, message):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        _paper_prompts.read(str(file))


@pytest.mark.parametrize(
    "given, message",
    [
        (["--clip-text", "A picture."], "--clip-text must have {} where the concept stands"),
        (["--strengths", "0"], "expected a number above 0, got 0"),
        (["--concepts", "unicorn"], "invalid choice: 'unicorn'"),
    ],
)
def test_bad_options_are_named(given, message, capsys):
    with pytest.raises(SystemExit):
        paper_images.main(given)
    assert message in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_weights_are_tensors_of_a_file(tmp_path):
    weights = {"a": torch.arange(3.0)}
    torch.save(weights, tmp_path / "a.bin")
    assert torch.equal(_paper_pictures._weights(str(tmp_path / "a.bin"))["a"], weights["a"])
    torch.save({"a": Path("code")}, tmp_path / "b.bin")  # anything but tensors is refused
    with pytest.raises(Exception, match=r"[Ww]eights.?only"):
        _paper_pictures._weights(str(tmp_path / "b.bin"))
    with pytest.raises(SystemExit, match="--unet: there is no file nowhere"):
        _paper_pictures._weights("nowhere")
