"""Steering a one-step image generator, and how far its images move: to a concept, and from what they were."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _paper import Results, device_of, local, slug
from _paper_prompts import EVALUATION, NEUTRAL, plain, read, tagged
from _study import Kept, digest
from numpy.typing import NDArray
from torch import Tensor

import lineas
from lineas import baselines

METHODS = ("ITI-C", "Lin-AcT", "LinEAS")
NONE = "none"


class Generator:
    """A one-step text-to-image pipeline of diffusers: SDXL with the UNet of DMD2, or another of its kind."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, device_of(args.device)
        self.pipe = self._load()
        self.pipe.set_progress_bar_config(disable=True)
        self.unet = self.pipe.unet.eval()

    def _load(self) -> Any:
        from diffusers import DiffusionPipeline, LCMScheduler, UNet2DConditionModel
        from diffusers.utils import logging

        logging.set_verbosity_error()  # at every call it warns of a timestep that is meant
        args = self.args
        settings = UNet2DConditionModel.load_config(args.base, subfolder="unet")
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(settings)
        unet.load_state_dict(_weights(args.unet), assign=True)
        variant = {"variant": args.variant} if args.variant else {}
        pipe = DiffusionPipeline.from_pretrained(args.base, unet=unet, **variant)
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        pipe.watermark = None
        return pipe.to(self.device, args.dtype)

    def batch(self, prompts: list[str], seed: int) -> dict[str, Tensor]:
        """What the pipeline is called with, one row a prompt, on the CPU; the noise depends on `seed` and the row."""
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipe.encode_prompt(
                prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        side = self.args.size // self.pipe.vae_scale_factor
        shape = (len(prompts), self.unet.config.in_channels, side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return {"prompt_embeds": embeds.cpu(), "pooled_prompt_embeds": pooled.cpu(), "latents": noise.to(embeds.dtype)}

    def run(self, batch: dict[str, Tensor], output: str, gradients: bool = False) -> Any:
        """Call the pipeline on a batch; with `gradients` without the ``torch.no_grad`` that its call stands under."""
        call = type(self.pipe).__call__.__wrapped__ if gradients else type(self.pipe).__call__
        return call(
            self.pipe,
            **batch,
            height=self.args.size,
            width=self.args.size,
            num_inference_steps=1,
            timesteps=[self.args.timestep],
            guidance_scale=self.args.guidance,
            output_type=output,
        ).images

    def images(self, batch: dict[str, Tensor]) -> list[Any]:
        """Images of PIL, as many prompts at a time as --batch-size says."""
        parts = zip(*(value.to(self.device).split(self.args.batch_size) for value in batch.values()), strict=True)
        return [image for part in parts for image in self.run(dict(zip(batch, part, strict=True)), "pil")]


def _weights(source: str) -> dict[str, Tensor]:
    """Weights out of a file; of torch's files tensors alone are read."""
    file = local(source)
    if not file.is_file():
        raise SystemExit(f"--unet: there is no file {source}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


class Scores:
    """Embeddings of images by CLIP and DINOv2, and of texts by CLIP, each of length 1."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, CLIPModel

        self.device, self.size = device_of(args.device), args.batch_size
        self.tokenizer = AutoTokenizer.from_pretrained(args.clip)
        self.clip = CLIPModel.from_pretrained(args.clip).to(self.device).eval()
        self.dino = AutoModel.from_pretrained(args.dino).to(self.device).eval()
        # Not torchvision's, which need not be there, and gives slightly other pixels.
        self.processors = {
            name: AutoImageProcessor.from_pretrained(name, backend="pil") for name in (args.clip, args.dino)
        }
        self.names = args.clip, args.dino

    @torch.no_grad()
    def of_images(self, images: list[Any]) -> dict[str, NDArray]:
        """ "clip" [n, D] and "dino" [n, D]."""
        models: list[tuple[str, str, Callable[[Any], Tensor]]] = [
            ("clip", self.names[0], lambda pixels: _features(self.clip.get_image_features(pixel_values=pixels))),
            ("dino", self.names[1], lambda pixels: self.dino(pixel_values=pixels).pooler_output),
        ]
        found = {}
        for key, name, embed in models:
            pixels = self.processors[name](images, return_tensors="pt")["pixel_values"]
            parts = [embed(part.to(self.device)) for part in pixels.split(self.size)]
            found[key] = _unit(torch.cat(parts))
        return found

    @torch.no_grad()
    def of_text(self, text: str) -> NDArray:
        """[1, D]."""
        tokens = self.tokenizer([text], return_tensors="pt", truncation=True).to(self.device)
        tokens.pop("token_type_ids", None)
        return _unit(_features(self.clip.get_text_features(**tokens)))


def _features(found: Any) -> Tensor:
    """What CLIP projects, which later versions of transformers give with more."""
    return found if isinstance(found, Tensor) else found.pooler_output


def _unit(rows: Tensor) -> NDArray:
    return torch.nn.functional.normalize(rows.float(), dim=-1).cpu().numpy()


class Study:
    """Generator, scores and prompts, loaded when they are needed first; everything that is found is kept on disk."""

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args, self.results = args, results
        self.kept = Kept(str(results.folder))
        self.prompts = read(args.prompts)
        self.loaded = {name: getattr(args, name) for name in ("base", "unet", "size", "timestep", "guidance")}
        self.loaded |= {"dtype": str(args.dtype)}
        self.progress = sys.stderr.isatty() and not args.rehearse

    @functools.cached_property
    def generator(self) -> Generator:
        return Generator(self.args)

    @functools.cached_property
    def scores(self) -> Scores:
        return Scores(self.args)

    def sets(self, concept: str) -> tuple[list[str], list[str]]:
        """Prompts with the concept, and neutral ones."""
        neutral, own, count = self.prompts[NEUTRAL], self.prompts.get(plain(concept)), self.args.count
        found = (own or tagged(neutral, concept))[:count], neutral[:count]
        if min(map(len, found)) < count:
            raise SystemExit(f"{concept}: {count} prompts are asked for, there are {min(map(len, found))}")
        return found

    def shown(self, concept: str) -> list[str]:
        """The prompts of the evaluation: neutral ones, with the concept's tag behind them."""
        return tagged(self.prompts[EVALUATION][: self.args.count], concept)

    # ---- maps --------------------------------------------------------------------------------------------------------

    def facts(self, method: str, concept: str) -> dict[str, Any]:
        """Everything that the maps of a method depend on."""
        args = self.args
        found = {"method": method, "layers": args.layers, "seed": args.seed, "data": digest(self.sets(concept))}
        return self.loaded | found | (self.settings() if method == "LinEAS" else {"batch": args.local_batch})

    def settings(self) -> dict[str, Any]:
        """How LinEAS is fitted."""
        args = self.args
        found = {"optimizer": args.optimizer, "lr": args.lr, "steps": args.steps, "mini_batch": args.mini_batch}
        return found | {"scaling": args.scaling, "l1": args.penalty, "group": args.penalty}

    @functools.cache  # noqa: B019
    def maps(self, method: str, concept: str) -> lineas.SteeringMaps:
        facts = self.facts(method, concept)
        return self.results.maps(f"{method} {concept}", facts, lambda: self._fit(method, concept, facts))

    def _fit(self, method: str, concept: str, facts: dict[str, Any]) -> lineas.SteeringMaps:
        args, made = self.args, self.generator
        # The noises of both sides differ, as those of different images do.
        source, target = (made.batch(prompts, 2 * args.seed + k) for k, prompts in enumerate(self.sets(concept)))
        layers = [re.compile(args.layers)]
        if method == "LinEAS":

            def forward(unet: Any, batch: dict[str, Tensor]) -> Any:
                if not args.fixed_noise:
                    batch = batch | {"latents": torch.randn_like(batch["latents"])}
                return made.run(batch, "latent", gradients=True)

            kept = self.results.path(f"fit {method} {concept}", facts, ".safetensors")
            result = lineas.fit_end_to_end(
                made.unet,
                source,
                target,
                **self.settings(),
                layers=layers,
                forward=forward,
                batch_size=args.fit_batch,
                seed=args.seed,
                checkpoint=kept,
                progress=self.progress,
            )
            if result.stopped != "finished":
                raise SystemExit(f"LinEAS, {concept}: {result.stopped}; the same command goes on from there")
            kept.unlink()
            return result.maps
        reading = {
            "layers": layers,
            "forward": lambda unet, batch: made.run(batch, "latent"),
            "batch_size": args.local_batch,
            "progress": self.progress,
        }
        if method == "Lin-AcT":
            return lineas.fit_incremental(made.unet, source, target, **reading)
        return baselines.iti_c(*(lineas.collect(made.unet, data, **reading) for data in (source, target)))

    def invertible(self, method: str, concept: str) -> bool:
        return all(bool(one.weight.all()) for one in self.maps(method, concept).values())

    # ---- images ------------------------------------------------------------------------------------------------------

    def embeddings(self, method: str, concept: str, strength: float) -> dict[str, NDArray]:
        """Embeddings of the images of the evaluation; strengths below 0 are those of the inverse maps."""
        args = self.args
        told = self.loaded | {"shown": digest(self.shown(concept)), "seed": args.seed}
        told |= {"clip": args.clip, "dino": args.dino}
        if method != NONE:
            told |= {"maps": digest(self.facts(method, concept)), "strength": strength}
        way = " inverse" if strength < 0 else ""
        name = f"{concept} {method}{'' if method == NONE else f'{way} {abs(strength):g}'}"

        def compute() -> dict[str, NDArray]:
            # Its own noise, and the same for all methods and strengths.
            batch = self.generator.batch(self.shown(concept), 2 * args.seed + 1_000_003)
            if method == NONE:
                images = self.generator.images(batch)
            else:
                maps = self.maps(method, concept)
                with (maps if strength > 0 else maps.inverse()).attach(self.generator.unet, abs(strength)):
                    images = self.generator.images(batch)
            self._keep(images, name)
            return self.scores.of_images(images)

        return self.kept(f"{slug(name)}-{digest(told)}", compute)

    def _keep(self, images: list[Any], name: str) -> None:
        folder = self.results.folder / "images"
        for k, image in enumerate(images[: self.args.keep]):
            folder.mkdir(exist_ok=True)
            size = min(self.args.keep_size, image.width)
            image.resize((size, size)).save(folder / f"{slug(name)}-{k}.png")

    def description(self, concept: str) -> NDArray:
        """CLIP's embedding of the concept."""
        text = self.args.clip_text.format(concept)
        name = f"text-{slug(concept)}-{digest([text, self.args.clip])}"
        return self.kept(name, lambda: {"text": self.scores.of_text(text)})["text"]

    def measure(self, method: str, concept: str, strength: float) -> dict[str, list[float]]:
        """IMGScore and CLIPScore of each image."""
        found = self.embeddings(method, concept, strength)
        plain_images = self.embeddings(NONE, concept, 0.0)
        return {
            "img": (found["dino"] * plain_images["dino"]).sum(axis=1).tolist(),
            "clip": (found["clip"] @ self.description(concept)[0]).tolist(),
        }


def mean(values: list[float]) -> float:
    return float(np.mean(values))
