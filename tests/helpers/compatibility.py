"""What works with which model family: the steps of the matrix, and the table of docs/compatibility.md.

    python tests/helpers/compatibility.py           run every step on every family and print the table
    python tests/helpers/compatibility.py --write   and put it into docs/compatibility.md

tests/hooks/test_families.py runs the same steps. A step is a function of a family that asserts what it promises.
"""

import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, Family
from torch import nn

import lineas
from lineas.hooks import modules

PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
BEGIN, END = "<!-- measured: python tests/helpers/compatibility.py --write -->", "<!-- end -->"
YES, NONE, REFUSED = "yes", "-", "refused"


def layers(family: Family) -> list[str]:
    """Where a family gets maps; one without norms gets them on its layers."""
    return family.sites or ["?"]


def call(model: nn.Module, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, Mapping) else model(batch)


def tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else []
    return [tensor for value in values for tensor in tensors(value)]


def same(a: Any, b: Any) -> bool:
    """Whether two outputs agree in every bit."""
    first, second = tensors(a), tensors(b)
    return len(first) == len(second) > 0 and all(map(torch.equal, first, second))


def random_maps(family: Family, spread: float = 0.8) -> lineas.SteeringMaps:
    """Maps for the sites of a family, far from the identity."""
    rng = np.random.default_rng(5)
    wanted = modules.resolve(family.model, layers(family))
    shapes, _ = outputs(family, wanted, family.batch(2, 1))
    maps = {}
    for name in wanted:
        d = shapes[name].shape[channels(family, name)]
        maps[name] = lineas.AffineMap(*rng.normal([[1.0], [0.0]], spread, (2, d)).astype(np.float32))
    return lineas.SteeringMaps(maps)


def channels(family: Family, name: str) -> int:
    """Axis of the neurons, by what torch's documentation says of the class."""
    second = (nn.GroupNorm, nn.BatchNorm2d)
    return 1 if isinstance(family.model.get_submodule(name), second) else -1


def keep(found: dict[str, torch.Tensor], name: str, module: nn.Module, args: Any, output: Any) -> None:
    """A hook that keeps the first output of a module."""
    found.setdefault(name, (output[0] if isinstance(output, tuple) else output).detach().clone())


def outputs(family: Family, names: list[str], batch: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """First outputs of modules, as hooks see them that come last, and what the model returns."""
    found: dict[str, torch.Tensor] = {}
    modules = {name: family.model.get_submodule(name) for name in names}
    handles = [module.register_forward_hook(functools.partial(keep, found, name)) for name, module in modules.items()]
    try:
        output = call(family.model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found, output


def alone(batch: Any, row: int) -> Any:
    """One prompt of a batch of four, without its padding and with its own images."""
    if not isinstance(batch, Mapping):
        return batch[row : row + 1]
    one = {key: value[row : row + 1] if len(value) == 4 else value for key, value in batch.items()}
    for side in ("", "decoder_"):
        if (mask := one.get(f"{side}attention_mask")) is not None:
            for key in (f"{side}input_ids", f"{side}attention_mask", *(("mm_token_type_ids", "token_type_ids"))):
                if key in one and one[key].shape[1] == len(mask[0]):
                    one[key] = one[key][:, mask[0] != 0]
    if (grids := batch.get("image_grid_thw")) is not None:  # four patches to a token
        ends = 4 * (batch["mm_token_type_ids"] == 1).sum(dim=1).cumsum(dim=0)
        images = grids.prod(dim=1).cumsum(dim=0)
        start, end = (int(ends[row - 1]) if row else 0), int(ends[row])
        one["pixel_values"] = batch["pixel_values"][start:end]
        one["image_grid_thw"] = grids[(images > start) & (images <= end)]
    return one


# --- steps ------------------------------------------------------------------------------------------------------------


def sites(family: Family) -> None:
    """`lineas.sites` suggests the modules that the paper maps, and every glob it lists matches just its modules."""
    found = lineas.sites(family.model)
    assert sorted(found.suggested) == sorted(family.sites)
    chosen = modules.resolve(family.model, found.suggested) if found.suggested else []
    assert len(chosen) == family.count and set(chosen) == {n for row in found if row.suggested for n in row.names}
    for row in found:
        assert set(modules.resolve(family.model, row.glob)) == set(row.names) and row.count == len(row.names)
    # A run tells the same widths, and others as well.
    told = {name: row.width for row in lineas.sites(family.model, family.batch(2, 1)) for name in row.names}
    assert set(chosen) <= set(told) and all(told.values())
    for name in told:
        assert modules.output_width(family.model.get_submodule(name)) in (None, *np.atleast_1d(told[name]))


def collect(family: Family) -> None:
    """Rows are the means over tokens or pixels of what each prompt gives alone, without padding."""
    wanted, batch = modules.resolve(family.model, layers(family)), family.batch(4, 1)
    found = lineas.collect(family.model, batch, layers=layers(family))
    assert set(found) == set(wanted)
    for row in range(4):
        for name, tensor in outputs(family, wanted, alone(batch, row))[0].items():
            tokens = tensor.movedim(channels(family, name), -1)
            expected = tokens.reshape(-1, tokens.shape[-1]).double().mean(dim=0)
            np.testing.assert_allclose(found[name][row], expected, rtol=1e-4, atol=1e-5)


def attach(family: Family) -> None:
    """Maps are w z + b at each module, change what comes out, and are gone to the last bit when taken off."""
    model, maps, batch = family.model, random_maps(family), family.batch(4, 1)
    before = call(model, batch)
    raw: dict[str, torch.Tensor] = {}
    watches = [model.get_submodule(name).register_forward_hook(functools.partial(keep, raw, name)) for name in maps]
    with maps.attach(model) as handle:
        mapped, after = outputs(family, list(maps), batch)
        for watch in watches:
            watch.remove()
        handle.strength = 0.0
        assert same(call(model, batch), before)
    assert not same(after, before)
    for name, affine in maps.items():
        z = np.moveaxis(raw[name].double().numpy(), channels(family, name), -1)
        expected = np.moveaxis(z * affine.weight.astype(float) + affine.bias.astype(float), -1, channels(family, name))
        np.testing.assert_allclose(mapped[name], expected, rtol=1e-5, atol=1e-6)
    assert same(call(model, batch), before) and not any(module._forward_hooks for module in model.modules())


def fit(family: Family) -> None:
    """Three steps of an end-to-end fit lower the loss, and leave the model as it was."""
    before = {name: value.clone() for name, value in family.model.state_dict().items()}
    result = lineas.fit_end_to_end(
        family.model, family.batch(4, 1), family.batch(5, 2), layers=layers(family), steps=3, progress=False
    )
    loss = result.history["loss"]
    assert len(loss) == 3 and np.isfinite(loss).all() and loss[-1] < loss[0]
    assert all(map(torch.equal, family.model.state_dict().values(), before.values()))
    assert all(parameter.requires_grad for parameter in family.model.parameters() if parameter.is_floating_point())


def generate(family: Family) -> None:
    """Greedy tokens under maps are the same with and without a cache, and others than without maps."""
    assert family.generate is not None
    batch, maps = family.batch(3, 1), random_maps(family)
    plain = family.generate(family.model, batch, True)
    with maps.attach(family.model):
        cached, recomputed = (family.generate(family.model, batch, use_cache) for use_cache in (True, False))
    assert torch.equal(cached, recomputed) and not torch.equal(cached, plain)
    assert torch.equal(family.generate(family.model, batch, True), plain)


def some_tokens(family: Family) -> None:
    """Maps on some tokens write the same text with and without a cache, another than maps on all, or are refused."""
    assert family.generate is not None
    batch, maps = family.batch(3, 1), random_maps(family)
    with maps.attach(family.model):
        everywhere = family.generate(family.model, batch, True)
    if not family.selects:
        with pytest.raises(ValueError, match="tokens='last' needs "), maps.attach(family.model, tokens="last"):
            family.generate(family.model, batch, True)
        return
    texts = []
    for chosen in ("prompt", "generated", "last", slice(2, 9)):
        with maps.attach(family.model, tokens=chosen):
            cached, recomputed = (family.generate(family.model, batch, use_cache) for use_cache in (True, False))
        assert torch.equal(cached, recomputed)
        texts.append(cached)
    assert any(not torch.equal(text, everywhere) for text in texts)


def save_and_load(family: Family) -> None:
    """Maps from a file steer to the same bits."""
    maps, batch = random_maps(family), family.batch(4, 1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "maps.safetensors")
        maps.save(file)
        loaded = lineas.load(file)
    with maps.attach(family.model):
        expected = call(family.model, batch)
    with loaded.attach(family.model):
        assert same(call(family.model, batch), expected)


STEPS: dict[str, Callable[[Family], None]] = {
    "sites": sites,
    "collect": collect,
    "attach": attach,
    "fit end to end": fit,
    "generate": generate,
    "some tokens": some_tokens,
    "save, load": save_and_load,
}


# --- the table --------------------------------------------------------------------------------------------------------


def applies(family: Family, step: str) -> bool:
    return step not in ("generate", "some tokens") or family.generate is not None


def expected(family: Family, step: str) -> str:
    """What the tests hold a cell to."""
    return cell(family, step) if applies(family, step) else NONE


def cell(family: Family, step: str) -> str:
    """What the table says of a step that does what it promises."""
    return REFUSED if step == "some tokens" and not family.selects else YES


def status(family: Family, step: str) -> str:
    """What a cell is found to be."""
    if not applies(family, step):
        return NONE
    try:
        STEPS[step](family)
    except Exception as error:
        print(f"{family.name}, {step}: {type(error).__name__}: {error}", file=sys.stderr)
        return f"no: {type(error).__name__}"
    return cell(family, step)


def table(of: Callable[[Family, str], str]) -> str:
    """The table of the page, between its marks."""
    lines = [
        f"| family | {' | '.join(STEPS)} | class | the paper's sites, or their like |",
        "| --- |" + " :---: |" * len(STEPS) + " --- | --- |",
    ]
    for family in FAMILIES:
        cells = " | ".join(of(family, step) for step in STEPS)
        globs = ", ".join(f"`{pattern}`" for pattern in family.sites) or "none"
        lines.append(f"| {family.name} | {cells} | {type(family.model).__name__} | {globs} |")
    return "\n".join([BEGIN, "", *lines, "", END])


def committed() -> str:
    """The table as it stands in the page."""
    text = PAGE.read_text()
    return text[text.index(BEGIN) : text.index(END, text.index(BEGIN)) + len(END)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"put the table into docs/{PAGE.name}")
    arguments = parser.parse_args()
    measured = table(status)
    if arguments.write:
        PAGE.write_text(PAGE.read_text().replace(committed(), measured))
    print(measured)


if __name__ == "__main__":
    main()
