"""What the paper reports (arXiv 2503.10679v3): table 7, N = 32, means over four seeds, by model and row of our table.

Tox RTP in %, Tox TET in %, perplexity on Wikipedia, MMLU in %. And tables 2 and 3 for images: IMGScore and CLIPScore.
"""

from __future__ import annotations

MEASURES = ("rtp", "tet", "ppl", "mmlu")

_TEXT = {
    "Qwen/Qwen2.5-1.5B": {
        "none": (3.00, 23.09, 13.67, 60.95),
        "prompt": (4.07, 21.02, 13.65, 60.96),
        "CAA": (1.15, 5.77, 19.30, 37.67),
        "CAA (middle)": (2.86, 23.33, 13.69, 60.47),
        "ITI-C": (1.87, 18.16, 12.39, 60.88),
        "Lin-AcT": (1.50, 13.88, 13.88, 60.09),
        "LinEAS": (1.07, 12.70, 14.10, 59.97),
    },
    "google/gemma-2-2b": {
        "none": (4.00, 13.39, 14.79, 53.03),
        "prompt": (4.60, 12.32, 14.81, 53.18),
        "CAA": (0.80, 2.44, 23.52, 26.86),
        "CAA (middle)": (4.93, 14.04, 14.88, 51.49),
        "ITI-C": (1.17, 7.15, 14.00, 52.78),
        "Lin-AcT": (1.60, 7.76, 14.78, 52.43),
        "LinEAS": (0.73, 4.02, 15.46, 52.22),
    },
    "deepseek-ai/deepseek-llm-7b-base": {
        "none": (4.30, 18.62, 8.49, 48.31),
        "prompt": (4.20, 15.69, 8.51, 48.23),
        "CAA (middle)": (4.72, 19.07, 8.73, 44.76),  # all layers: a perplexity of more than 1000
        "ITI-C": (2.83, 15.18, 7.71, 48.47),
        "Lin-AcT": (2.23, 11.08, 8.67, 47.71),
        "LinEAS": (2.30, 12.09, 8.38, 48.13),
    },
    "Qwen/Qwen2.5-7B": {
        "none": (3.92, 25.16, 10.67, 74.26),
        "prompt": (6.80, 21.22, 10.65, 74.23),
        "CAA": (1.20, 9.25, 12.83, 48.58),
        "CAA (middle)": (4.00, 22.32, 10.66, 73.45),
        "ITI-C": (2.63, 19.98, 9.63, 74.08),
        "Lin-AcT": (2.72, 21.64, 11.42, 72.18),
        "LinEAS": (1.95, 14.95, 10.91, 73.67),
    },
}

IMAGES = {"ITI-C": (0.24, 0.19), "Lin-AcT": (0.45, 0.18), "LinEAS": (0.66, 0.18)}
"""Table 2, at strength 1. Table 3 has 0.714 and 0.131 for LinEAS on all norms."""


def published(model: str, method: str) -> dict[str, float]:
    """What the paper has for a method on a model, by measure; empty where it has nothing."""
    return dict(zip(MEASURES, _TEXT.get(model, {}).get(method, ()), strict=False))
