"""What few and many prompts do to maps of SmolLM2-135M: 8 to 1024 a side, at two kinds of modules.

Insults and clean comments are fitted, `size` of each; as many others, but at most 32 of each, choose steps, starts and
strengths (validation), and 64 of each are looked at (test). Fits through the model take 20 steps of all comments or,
where there are more than 32 a side, 40 steps of 32. The loss is the mean over the modules of the sum over their
neurons of squared W2, of the test comments, with the maps on at strength 1 and at the strength of the lowest validation
loss. Then every method is turned up until the loss on clean text has risen by a set amount, and the toxic share of
continuations is judged, as in benchmarks/toxicity.py.

    python benchmarks/sample_sizes.py [--write] [--sizes 8 32 128 1024] [--seeds 0 1 2] [--sites norm o_proj]
                                      [--methods NAME ...] [--toxic-sizes 8 32] [--threads 2] [--bf16]

With --write the tables go into docs/sample-sizes.md and the picture into docs/sample-sizes.png. What is finished is
kept in build/sample-sizes and build/toxicity, so that a run that was cut off goes on where it was; remove the folders
for a run of its own.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from _machine import cpu_name
from _study import ROOT, Kept, digest, set_up, write_between
from _toxicity import JUDGES, insults_sets
from _toxicity_results import at_rise, interval
from numpy.typing import NDArray
from toxicity import MAX_LENGTH, Study

import lineas
from lineas import SteeringMaps, baselines
from lineas.hooks.modules import resolve

MARKS = "<!-- measured: python benchmarks/sample_sizes.py --write -->", "<!-- end -->"
SITES = {"norm": "model.layers.*.post_attention_layernorm", "o_proj": "model.layers.*.self_attn.o_proj"}
SIZES = (8, 32, 128, 1024)
STRENGTHS = (0.25, 0.5, 0.75, 1.0)  # of which the validation set chooses
RISE, SET_AT = 0.1, 0.12  # nats a token at which methods are compared, and which the calibration texts are to reach

IDENTITY = "identity"
RIVALS = ("mean", "ITI-c", "linear incremental", "LinEAS")
SHRUNK = ("mean, shrunk", "linear incremental, shrunk")
OURS = "LinEAS, best start"
METHODS = (*RIVALS, *SHRUNK, OURS)
END_TO_END: dict[str, dict[str, Any]] = {
    "LinEAS": {"lr": "auto", "steps": 20},
    OURS: {"lr": "auto", "steps": 20, "init": "best"},
}
MINI_BATCH, MINI_BATCH_STEPS = 32, 40  # where there are more comments than that, as the paper does

kept = Kept("sample-sizes")


class Sized(Study):
    """The study of toxicity with other modules and another number of comments."""

    def __init__(self, shared: Study, site: str, size: int) -> None:
        vars(self).update(vars(shared))
        self.site, self.size = site, size
        self.names = resolve(self.model, SITES[site])
        self.end_to_end = END_TO_END
        if size > MINI_BATCH:
            few = {"mini_batch": MINI_BATCH, "steps": MINI_BATCH_STEPS}
            self.end_to_end = {method: settings | few for method, settings in END_TO_END.items()}
        self.protocol = digest([shared.protocol, SITES[site], size, self.end_to_end])
        self.reading = {"layers": SITES[site], "tokenizer": self.tokenizer, "max_length": MAX_LENGTH, "progress": False}

    def sets(self, seed: int) -> dict[str, tuple[list[str], list[str]]]:
        return insults_sets(seed, self.size)

    def _fit(self, method: str, seed: int) -> SteeringMaps:
        sets = self.sets(seed)
        if method in self.end_to_end:
            settings = {**self.reading, **self.end_to_end[method], "seed": seed, "held_out": sets["validation"]}
            result = lineas.fit_end_to_end(self.model, *sets["fit"], **settings)
            if result.stopped == "interrupted" or result.stopped.startswith("not finite"):
                raise SystemExit(result.stopped)
            print(f"  {self.site} {self.size} {seed} {method}: {result}, {result.maps.metadata.get('init', '')}")
            return result.maps
        shrinkage = "auto" if method in SHRUNK else None
        if method.startswith("linear incremental"):  # in one batch, which takes one pass
            batch = {"batch_size": max(self.size, 32)}
            return lineas.fit_incremental(self.model, *sets["fit"], **self.reading, **batch, shrinkage=shrinkage)
        collected = [lineas.collect(self.model, texts, **self.reading) for texts in sets["fit"]]
        if method == "ITI-c":
            return baselines.iti_c(*collected)
        return lineas.fit(*collected, method="mean", shrinkage=shrinkage)

    def distances(self, method: str, seed: int) -> dict[str, NDArray]:
        """ "validation" and "test": the losses of these sets [S] at `STRENGTHS`, of the identity [1] at 0."""

        def compute() -> dict[str, list[float]]:
            found = {}
            for name in ("validation", "test"):
                source, target = self.sets(seed)[name]
                wanted = lineas.collect(self.model, target, **self.reading)
                if method == IDENTITY:
                    found[name] = [_loss(lineas.collect(self.model, source, **self.reading), wanted)]
                    continue
                with self.maps(method, seed).attach(self.model) as handle:
                    found[name] = []
                    for strength in STRENGTHS:
                        handle.strength = strength
                        found[name].append(_loss(lineas.collect(self.model, source, **self.reading), wanted))
            return found

        return kept(f"distances-{self._key(method, seed)}-{digest(STRENGTHS)}", compute)


def _loss(moved: Any, wanted: Any) -> float:
    return float(np.mean([lineas.wasserstein(moved[name], wanted[name]).sum(dtype=np.float64) for name in wanted]))


# ---- tables ----------------------------------------------------------------------------------------------------------


def relative(study: Sized, method: str, seeds: list[int]) -> tuple[NDArray, NDArray]:
    """Test losses over that of the identity, [seeds]: at strength 1, and at that of the lowest validation loss."""
    full, chosen = [], []
    for seed in seeds:
        off, found = study.distances(IDENTITY, seed), study.distances(method, seed)
        test, validation = [1.0, *found["test"] / off["test"]], [*off["validation"], *found["validation"]]
        full.append(test[-1])
        chosen.append(test[int(np.argmin(validation))])
    return np.array(full), np.array(chosen)


def with_error(values: NDArray) -> str:
    """The mean and, of several seeds, its standard error."""
    error = "" if len(values) < 2 else f" ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"
    return f"{values.mean():.3f}{error}"


Distances = dict[tuple[str, int, str], tuple[NDArray, NDArray]]


def distance_tables(found: Distances, sites: list[str], sizes: list[int], methods: list[str]) -> list[str]:
    """For each site test losses over that of the identity, at strength 1 / at the chosen one, and the verdict."""
    lines = []
    for site in sites:
        lines += [
            f"### `{SITES[site]}`: distance",
            "",
            f"| method | {' | '.join(f'{size} + {size}' for size in sizes)} |",
            f"| --- |{' --- |' * len(sizes)}",
        ]
        for method in methods:
            cells = (" / ".join(map(with_error, found[site, size, method])) for size in sizes)
            lines.append(f"| {method} | {' | '.join(cells)} |")
        lines.append("")
        if OURS in methods:
            for size in sizes:
                # At its best: each rival at the strength that the validation loss chooses.
                rivals = {method: found[site, size, method][1] for method in RIVALS if method in methods}
                best = min(rivals, key=lambda method: rivals[method].mean())
                difference = with_error(found[site, size, OURS][1] - rivals[best])
                lines.append(f"- {size} + {size}: the best of the others is {best}; {OURS} less it: {difference}.")
            lines.append("")
    return lines


def toxicity_table(study: Sized, methods: list[str], seeds: list[int]) -> list[str]:
    """One line a method: toxic share at an equal rise of the loss on clean text, by both judges."""
    offs = [study.outcome("none", seed) for seed in seeds]
    lines = [
        f"### `{SITES[study.site]}`, {study.size} + {study.size}: toxic at +{RISE:g} nats",
        "",
        f"| method | strength | {' | '.join(JUDGES)} |",
        "| --- | ---: | --- | --- |",
    ]

    def shares(toxic: list[NDArray]) -> str:
        return " | ".join(
            f"{mean:.1%} [{low:.1%}, {high:.1%}]" for mean, low, high in map(interval, np.stack(toxic, axis=1))
        )

    lines.append(f"| none | | {shares([off.toxic for off in offs])} |")
    for method in methods:
        outcomes = [study.outcome(method, seed, SET_AT) for seed in seeds]
        strength = f"{np.mean([one.strength for one in outcomes]):.2f}"
        at = [
            at_rise([0.0, one.loss - off.loss], [off.toxic, one.toxic], RISE)
            for one, off in zip(outcomes, offs, strict=True)
        ]
        reached = [toxic for toxic in at if toxic is not None]
        cells = shares(reached) if len(reached) == len(at) else "rise not reached | "
        lines.append(f"| {method} | {strength} | {cells} |")
    return [*lines, ""]


def draw(found: Distances, sites: list[str], sizes: list[int], methods: list[str]) -> None:
    """Test loss over that of the identity against the number of comments, one panel a site."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from lineas.notebook.plot import BLUE, ORANGE

    figure = Figure(figsize=(6 * len(sites), 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(sites), squeeze=False)[0]
    colors = dict(zip(METHODS, ("tab:green", "tab:red", "tab:purple", BLUE, "#8fce8f", "#c9a6e0", ORANGE), strict=True))
    for ax, site in zip(axes, sites, strict=True):
        for method in methods:
            losses = np.array([found[site, size, method][1].mean() for size in sizes])
            style = {"linewidth": 2.5, "zorder": 3} if method == OURS else {"linewidth": 1.3}
            dashes = "--" if method in SHRUNK else "-"
            ax.plot(sizes, losses, "o", linestyle=dashes, color=colors[method], label=method, markersize=4, **style)
        ax.axhline(1, color="0.6", linestyle=":", label="identity")
        ax.set(title=SITES[site], xscale="log", xlabel="comments fitted on each side")
        ax.set_xticks(sizes, [str(size) for size in sizes])
        ax.minorticks_off()
    axes[0].set_ylabel("distance of the test set, identity = 1")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(sites), frameon=False)
    figure.savefig(ROOT / "docs" / "sample-sizes.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write docs/sample-sizes.md and docs/sample-sizes.png")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="default 8 32 128 1024")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default 0 1 2")
    parser.add_argument("--sites", nargs="+", choices=SITES, default=list(SITES), help="default: both")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument(
        "--toxic-sizes", type=int, nargs="*", help="sizes of which continuations are judged, or none; default: all"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch and of the engine")
    parser.add_argument("--bf16", action="store_true", help="fit with factors rounded to bfloat16, judge in bfloat16")
    args = parser.parse_args()
    set_up(args.threads, args.bf16)

    shared = Study(args.bf16)
    found: Distances = {}
    for size in args.sizes:  # the small ones first: they are done soon
        for site in args.sites:
            study = Sized(shared, site, size)
            for method in args.methods:
                found[site, size, method] = relative(study, method, args.seeds)
                print(site, size, method, *map(with_error, found[site, size, method]), flush=True)

    precision = "products of bfloat16 factors" if args.bf16 else "float32"
    lines = [
        f"{cpu_name()}, torch {torch.__version__}, {precision}; seeds {', '.join(map(str, args.seeds))}.",
        "",
        *distance_tables(found, args.sites, args.sizes, args.methods),
    ]
    for site in args.sites:
        for size in args.sizes if args.toxic_sizes is None else args.toxic_sizes:
            lines += toxicity_table(Sized(shared, site, size), args.methods, args.seeds)
    print("\n".join(lines))
    if args.write:
        write_between(ROOT / "docs" / "sample-sizes.md", MARKS, lines[:-1])
        draw(found, args.sites, args.sizes, args.methods)


if __name__ == "__main__":
    main()
