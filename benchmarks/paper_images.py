"""Concepts removed from images as in section 4.4 of the LinEAS paper (arXiv 2503.10679), in one command.

    python benchmarks/paper_images.py
    python benchmarks/paper_images.py --rehearse

SDXL with the one-step UNet of DMD2 makes images of 32 prompts that name a concept and of 32 that do not. For each of 15
concepts LinEAS, Lin-AcT and ITI-C are fitted on all 256 normalisations of the UNet, so that the first become like the
second; LinEAS through the generator, all at once. Then 32 neutral prompts with the concept's tag are drawn with the
maps at several strengths, always with the same noise. IMGScore is the cosine of DINOv2-small's embedding to that of the
image without maps, CLIPScore that of CLIP's embedding to the concept's. The table has means over concepts, standard
deviations and 95 % intervals over them, by Student's t.

Findings are kept in --results: the same command goes on where a run was cut off, also in the midst of a fit. With
--rehearse the whole protocol runs in seconds, offline, on random stand-ins; its figures mean nothing and are marked so.
Nothing is written into the documentation. Needs ``pip install 'lineas[torch,sklearn,hub]' diffusers accelerate``.
docs/paper.md says what was tried of all this.

Where the paper leaves a choice open, or its published code decides otherwise, this script does as follows.

- Prompts: the paper's were written by a language model. --prompts takes a JSON file of them, in the form of the code's
  ``diffusion_prompts.json``. Without one, prompts of this project are taken, and a concept's are the neutral ones with
  its tag; those of the evaluation are others.
- The fit of LinEAS: the paper says AdamW at 1e-4, 1000 steps, batches of 4; the code's README says 1e-5 for the paper,
  and has 50 steps of Adam at 1e-3. Here it is Adam without decay at 1e-4. A step takes 4 images of the source against
  all 32 of the target; the code compares it with 4 of them. Its noise is new in every step, as in the code;
  --fixed-noise keeps it.
- Lin-AcT and ITI-C: each prompt has one noise, the same at all modules. Lin-AcT goes from module to module as they run.
  Both have strength 1 and, as LinEAS, averages over pixels.
- CLIP is openai/clip-vit-large-patch14 and the concept's text "A picture of CONCEPT.", both as in the code of AcT.
- DINOv2's embedding of an image is that of its class token after the last norm.
- Tags are not published; those here stand in ``_paper_prompts.py``.
- With --inverse the maps are inverted too, at the same strengths below 0, as in table 15.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _paper import (
    REHEARSAL,
    Results,
    as_json,
    device_name,
    device_of,
    dtype_of,
    parse,
    spell,
    spread,
    table,
    versions,
    write,
)
from _paper_pictures import METHODS, NONE, Study, mean
from _paper_prompts import CONCEPTS
from _paper_published import IMAGES
from _study import ROOT

Found = dict[tuple[str, float], dict[str, dict[str, list[float]]]]
"""By method and strength, then by concept: IMGScore and CLIPScore of each image."""
HEADS = {"img": "IMGScore", "clip": "CLIPScore"}
# Smaller everything; models are made in the folder of the results.
SMALL = {
    "concepts": ["vaporwave", "robot"],
    "count": 3,
    "steps": 3,
    "lr": 0.05,
    "mini_batch": 2,
    "fit_batch": 2,
    "local_batch": 2,
    "batch_size": 2,
    "strengths": [0.5, 1.0],
    "inverse": True,
    "keep": 1,
    "dtype": torch.float32,
    "device": "cpu",
    "variant": "",
    "size": 8,
}


def measure(study: Study, show: Callable[[Found], None]) -> None:
    """Measure everything, concept by concept; `show` gets what is known after each."""
    args = study.args
    strengths = [*args.strengths, *(-strength for strength in args.strengths if args.inverse)]
    found: Found = {(NONE, 0.0): {}}
    for concept in args.concepts:
        found[NONE, 0.0][concept] = study.measure(NONE, concept, 0.0)
        for method in args.methods:
            for strength in strengths:
                by = found.setdefault((method, strength), {})
                if strength < 0 and not study.invertible(method, concept):
                    print(f"  {concept} {method}: a slope is 0, so that the maps have no inverse", flush=True)
                    continue
                by[concept] = study.measure(method, concept, strength)
        show(found)


def report(study: Study, found: Found) -> tuple[list[str], dict[str, Any]]:
    """The tables, and everything as JSON has it."""
    args, done = study.args, list(found[NONE, 0.0])
    lines = [f"# {args.unet}", ""]
    if args.rehearse:
        lines = [f"# Rehearsal of {Path(__file__).name}", "", REHEARSAL, ""]
    lines += [
        f"{len(done)} of {len(args.concepts)} concepts, {args.count} images of each. Mean ± standard deviation "
        "[95 % interval] over concepts, of the means of each concept's images. Strengths below 0: inverse maps.",
        "",
    ]
    summary = {
        point: {name: spread([mean(one[name]) for one in by.values()], -1, 1) for name in HEADS}
        for point, by in found.items()
        if by
    }
    rows = [
        [method, f"{strength:g}" if strength else "", *(spell(by[name], 3) for name in HEADS)]
        for (method, strength), by in summary.items()
    ]
    lines += table(["method", "strength", *HEADS.values()], rows)
    if not args.rehearse:
        rows = [[method, "1", *(f"{value:.2f}" for value in values)] for method, values in IMAGES.items()]
        lines += ["", "The paper's means (table 2):", "", *table(["method", "strength", *HEADS.values()], rows)]
    last = max(args.strengths)
    lines += ["", f"By concept, IMGScore / CLIPScore at strength {last:g}:", ""]
    rows = [
        [c, f"{mean(found[NONE, 0.0][c]['clip']):.3f}"]
        + [" / ".join(f"{mean(found[m, last][c][name]):.3f}" for name in HEADS) for m in args.methods]
        for c in done
    ]
    lines += table(["concept", "CLIPScore without maps", *args.methods], rows)
    lines += ["", f"{device_name(device_of(args.device))}; {', '.join(f'{k} {v}' for k, v in versions().items())}."]
    everything = {
        "rehearsal": args.rehearse,
        "settings": as_json(args),
        "points": [
            {"method": method, "strength": strength, "summary": summary.get((method, strength)), "images": by}
            for (method, strength), by in found.items()
        ],
        "support": {m: {c: study.maps(m, c).support for c in done} for m in args.methods},
        "published": IMAGES,
        "device": device_name(device_of(args.device)),
        "versions": versions(),
    }
    return lines, everything


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--results", type=Path, help="folder of the findings (default: build/paper/images)")
    add("--device", default="auto", help="torch device (default: the first CUDA device, or else the CPU)")
    add("--dtype", type=dtype_of, default=torch.bfloat16, help="of the generator (default: bfloat16, as in the code)")
    add("--concepts", nargs="+", choices=CONCEPTS, default=list(CONCEPTS), metavar="NAME", help=", ".join(CONCEPTS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--strengths", type=_strength, nargs="+", default=[0.2, 0.4, 0.6, 0.8, 1.0], help="default: 0.2 to 1")
    add("--inverse", action="store_true", help="draw with the inverse maps as well")
    add("--prompts", help="JSON file of lists of prompts: neutral (or none), the concepts', and evaluation")
    add("--count", type=int, default=32, help="prompts of each side, and of the evaluation (default: 32)")
    add("--seed", type=int, default=0, help="of noise and fits (default: 0)")

    group = parser.add_argument_group("generator")
    add = group.add_argument
    add("--base", default="stabilityai/stable-diffusion-xl-base-1.0", help="hub id or folder of the pipeline")
    add("--variant", default="fp16", help='of its files; "" for none (default: fp16)')
    add("--unet", default="hf://tianweiy/DMD2/dmd2_sdxl_1step_unet_fp16.bin", help="file of its weights")
    add("--timestep", type=int, default=399, help="of the one step (default: 399, as DMD2)")
    add("--guidance", type=float, default=0.0, help="guidance scale (default: 0)")
    add("--size", type=int, default=1024, help="height and width in pixels (default: 1024)")
    add("--batch-size", type=int, default=8, help="images that are drawn together (default: 8)")
    add("--keep", type=int, default=2, help="images of each concept and strength to keep (default: 2)")
    add("--keep-size", type=int, default=512, help="their size in pixels (default: 512)")

    group = parser.add_argument_group("fits")
    add = group.add_argument
    add("--layers", default=r".*norm.*", help="regular expression of modules of the UNet (default: .*norm.*)")
    add("--steps", type=int, default=1000, help="of LinEAS (default: 1000)")
    add("--lr", type=float, default=1e-4, help="rate of LinEAS (default: 1e-4)")
    add("--optimizer", choices=["sgd", "adam"], default="adam", help="of LinEAS (default: adam)")
    add("--scaling", choices=["reference", "paper", "layer-mean"], default="reference", help="of its loss")
    add("--penalty", type=float, default=0.0, help="the paper's gamma, for lasso and group lasso (default: 0)")
    add("--mini-batch", type=int, default=4, help="prompts in a step of LinEAS (default: 4)")
    add("--fit-batch", type=int, default=4, help="prompts in a forward pass of LinEAS (default: 4)")
    add("--fixed-noise", action="store_true", help="the same noise for a prompt in all steps of LinEAS")
    add("--local-batch", type=int, default=32, help="prompts in a forward pass of the other fits (default: 32)")

    group = parser.add_argument_group("scores")
    add = group.add_argument
    add("--clip", default="openai/clip-vit-large-patch14", help="hub id or folder of a CLIP")
    add("--clip-text", default="A picture of {}.", help='the concept\'s text (default: "A picture of {}.")')
    add("--dino", default="facebook/dinov2-small", help="hub id or folder of a DINOv2")
    return parser


def _strength(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parse(parser, argv, SMALL)
    if "{}" not in args.clip_text:
        parser.error("--clip-text must have {} where the concept stands")
    args.results = args.results or ROOT / "build" / "paper" / ("images-rehearsal" if args.rehearse else "images")
    results = Results(args.results)
    if args.rehearse:
        from _paper_image_rehearsal import stand_ins

        for name, value in stand_ins(results.folder / "stand-ins").items():
            if getattr(args, name) == parser.get_default(name):
                setattr(args, name, value)
    study = Study(args, results)
    name = "rehearsal" if args.rehearse else "table"

    def show(found: Found) -> None:
        lines, everything = report(study, found)
        write(results.folder / f"{name}.md", "\n".join(lines) + "\n")
        write(results.folder / f"{name}.json", json.dumps(everything, indent=1) + "\n")
        print("\n".join(["", *lines, ""]), flush=True)

    measure(study, show)
    print(f"{results.folder / name}.md and .json")


if __name__ == "__main__":
    main()
