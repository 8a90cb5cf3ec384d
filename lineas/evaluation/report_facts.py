"""What `report` says of maps: where they come from, their calibrations, and their diagnoses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from .report_words import KL, PERCENT, by_size, compact, cut, is_number, spelled

# ---- metadata --------------------------------------------------------------------------------------------------------


_FACTS = {
    "method": "Method",
    "model": "Fitted on",
    "layers": "Modules",
    "loss_layers": "Loss taken at",
    "pooling": "Pooling",
    "tokens": "Tokens",
    "settings": "Settings",
    "version": "Version of lineas",
}


def origin(metadata: Any, support: Any) -> list[tuple[str, str]]:
    """What the metadata of maps say, in short: no histories, no long lists."""
    if not isinstance(metadata, Mapping):
        return []
    found = [(_FACTS["method"], cut(compact(metadata["method"])))] if metadata.get("method") else []
    if isinstance(support, list) and len(support) == 2 and all(map(is_number, support)) and support[1]:
        share = PERCENT.write(support[0] / support[1])
        found.append(("Neurons changed", f"{support[0]:,} of {support[1]:,} ({share})"))
    for key, value in metadata.items():
        if key in ("method", "history", "parts", "calibration") or value is None or value == {}:
            continue
        if key == "loss_layers" and value == metadata.get("layers"):
            continue
        if isinstance(value, list) and len(value) > 3:
            value = f"{', '.join(map(compact, value[:2]))}, …, {compact(value[-1])} ({len(value)})"
        found.append((_FACTS.get(key, str(key)), spelled(value) if key == "settings" else cut(compact(value))))
    parts = metadata.get("parts")
    if isinstance(parts, list) and parts:
        of = [compact(part.get("method", "maps")) if isinstance(part, Mapping) else "maps" for part in parts]
        found.append(("Made of", cut(", ".join(of))))
    return found


# ---- calibration and diagnosis ---------------------------------------------------------------------------------------

_BUDGETS = {
    "max_kl": ("a KL divergence of at most ", " nats"),
    "max_loss_rise": ("a rise of the loss of at most ", " nats a token"),
    "max_perplexity_ratio": ("a perplexity of at most ", " times the unsteered one"),
    "effect": ("a mean score of ", ""),
}
_MEASURED = {"kl": "KL divergence", "loss_rise": "rise of the loss", "perplexity_ratio": "ratio of the perplexities"}


def calibrations(metadata: Mapping[str, Any], given: Any) -> list[tuple[str, list[str]]]:
    """Calibrations by name, in sentences: those that are given, then those that metadata hold and are not given."""
    records: dict[str, Any] = {}
    if given is not None:
        named = dict(given) if isinstance(given, Mapping) else {"": given}
        for name, one in named.items():
            record = {field: getattr(one, field, None) for field in ("strength", "range", "budget", "measured")}
            if not isinstance(name, str) or not _is_calibration(record):
                raise TypeError(
                    f"calibration must be a Calibration or a mapping from name to Calibration, got {type(one).__name__}"
                )
            records[name] = record
    methods = metadata.get("methods")
    for name, one in methods.items() if isinstance(methods, dict) else ():
        noted = one.get("calibration") if isinstance(one, dict) else None
        known = [(record["strength"], record["budget"]) for record in records.values()]
        if _is_calibration(noted) and (noted["strength"], noted["budget"]) not in known:
            records.setdefault(name, noted)
    return [(name, _calibrated(record)) for name, record in records.items()]


def _is_calibration(record: Any) -> TypeGuard[Mapping[str, Any]]:
    if not isinstance(record, Mapping) or not is_number(record.get("strength")):
        return False
    ends, tables = record.get("range"), [record.get("budget"), record.get("measured")]
    sound = isinstance(ends, Sequence) and len(ends) == 2 and all(map(is_number, ends))
    return sound and all(isinstance(one, Mapping) and all(map(is_number, one.values())) for one in tables)


def _calibrated(record: Mapping[str, Any]) -> list[str]:
    """What a calibration found, in sentences."""
    budget, measured, (low, high) = record["budget"], record["measured"], record["range"]
    asked = " and ".join(
        f"{value:g}".join(_BUDGETS.get(str(name), (f"{name} = ", ""))) for name, value in budget.items()
    )
    found = [
        f"For {asked}, the strength is {record['strength']:.4g}; with other texts of the same kind it would have been "
        f"{low:.4g} to {high:.4g} (95 % interval)."
    ]
    for name, value in measured.items():
        base = str(name).rpartition("_")[0]
        if base in measured and str(name).endswith(("_low", "_high", "_unsteered")):
            continue
        ends = (measured.get(f"{name}_low", math.nan), measured.get(f"{name}_high", math.nan))
        style = KL if name == "kl" else by_size([value, *ends])
        said = f"{_MEASURED.get(str(name), f'mean score by {name}')} is {style.both((value, *ends))}"
        most = budget.get(f"max_{name}")
        if most is not None:
            verdict = "within the budget" if value <= most else "over the budget"
            found.append(f"On held-out neutral texts, which the strength was not chosen by, the {said}: {verdict}.")
        else:
            before = measured.get(f"{name}_unsteered")
            against = "" if before is None else f", against {style.write(float(before))} of the unsteered model"
            found.append(f"On the prompts that it was chosen by, the {said}{against}.")
    return found


def diagnoses(given: Any) -> list[dict[str, Any]]:
    """Diagnoses by name: checks, each a number, a verdict and a reason."""
    if given is None:
        return []
    found = []
    for name, one in given.items() if isinstance(given, Mapping) else [("", given)]:
        checks = getattr(one, "checks", None)
        fields = ("name", "value", "verdict", "why")
        sound = isinstance(checks, Sequence) and all(hasattr(check, field) for check in checks for field in fields)
        if not isinstance(name, str) or not sound:
            raise TypeError(
                f"diagnosis must be a Diagnosis or a mapping from name to Diagnosis, got {type(one).__name__}"
            )
        assert checks is not None
        found.append({"name": name, "checks": [_check(check) for check in checks]})
    return found


def _check(check: Any) -> dict[str, str]:
    numbers = [check.value, *(getattr(check, "interval", None) or (None, None))]
    value, low, high = (f"{x:.3g}".replace("-", "−") if is_number(x) and not math.isnan(x) else "" for x in numbers)
    span = f"[{low}, {high}]" if low and high else ""
    return {"name": str(check.name), "value": value, "span": span, "verdict": str(check.verdict), "why": str(check.why)}
