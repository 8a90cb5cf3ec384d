"""Sparse paths made by hand, of any size and without a fit."""

import numpy as np

from lineas.maps.path import SparsePath


def path(modules=57, d=2048, points=50, *, seed=0, dtype=np.float32, held_out=True, metadata=None):
    """Neurons of heavy-tailed importance enter one by one as the penalty falls; at last the held-out loss rises again.

    `modules` is a number, for names like those of a decoder, a list of names, or None for a path of one array. `d` is
    the width of all, or a list with the width of each.
    """
    names = modules
    if isinstance(modules, int):
        names = [f"model.layers.{k}.post_attention_layernorm" for k in range(modules)]
    count = 1 if names is None else len(names)
    widths = (d,) * count if isinstance(d, int) else tuple(d)
    total = sum(widths)
    rng = np.random.default_rng(seed)
    importance = np.repeat(rng.gamma(1.0, 1.0, count), widths) * np.abs(rng.standard_t(3, total))
    importance /= np.quantile(importance, 0.999) if total > 1000 else importance.max()
    penalties = np.geomspace(1, 0.01, points)
    change = np.maximum(importance - penalties[:, None], 0).astype(dtype)
    progress = np.linspace(0, 1, points)
    loss = 2.2 + 7 * (1 - progress) ** 2
    return SparsePath(
        penalties=penalties,
        l1_ratio=1.0,
        loss=loss,
        held_out_loss=loss + 0.3 + 1.5 * progress**3 if held_out else None,
        modules=None if names is None else tuple(names),
        widths=widths,
        weight=1 - (0.3 * rng.random(total)).astype(dtype) * change,
        bias=rng.choice(np.array([-1, 1], dtype), total) * change,
        metadata=metadata or {},
    )
