"""Fits that aim at a point on the way from the source to the target."""

import math

import models_zoo as zoo
import numpy as np
import pytest
import torch
from fits import prompts, same_maps, short_fit
from hypothesis import given
from hypothesis import strategies as st

from lineas import fit_jointly, wasserstein
from lineas.models.problem import shrink

SHARES = (0.25, 0.4, 0.9)


@pytest.fixture(scope="module")
def llama():
    return zoo.llama().double()


def columns(n, seed, d=3):
    return torch.from_numpy(np.sort(np.random.default_rng(seed).normal(size=(n, d)) * [1, 3, 0.1], axis=0))


@pytest.mark.parametrize("share", SHARES)
def test_shrunk_targets_lie_on_the_geodesic(share):
    """Its points divide the distance in the ratio of the shares; the distances are POT's."""
    ot = pytest.importorskip("ot")
    u, v = columns(20, 0), columns(20, 1) + 2
    (between,) = shrink([v], [u], share)
    far, left, gone = (
        np.sqrt(ot.wasserstein_1d(a.numpy(), b.numpy(), p=2)) for a, b in ((u, v), (u, between), (between, v))
    )
    np.testing.assert_allclose(left, (1 - share) * far)
    np.testing.assert_allclose(gone, share * far)


@given(n=st.integers(1, 12), m=st.integers(1, 12), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_targets_of_other_numbers_move_to_the_means_of_their_partners(n, m, share, seed):
    u, v = columns(n, seed), columns(m, seed + 100)
    (between,) = shrink([v], [u], share)
    size = math.lcm(n, m)  # copies of the samples make both sets equally large
    partners = u.repeat_interleave(size // n, dim=0).reshape(m, size // m, -1).mean(dim=1)
    np.testing.assert_allclose(between, (1 - share) * v + share * partners, atol=1e-12)
    assert (between.diff(dim=0) >= -1e-12).all()
    np.testing.assert_allclose(shrink([v], [v], share)[0], v, atol=1e-15)


def test_float32_targets_stay_float32():
    (between,) = shrink([columns(5, 0).float()], [columns(7, 1).float()], 0.5)
    assert between.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(6, 6), (6, 4)])
def test_the_loss_before_the_first_step_is_that_of_the_shrunk_targets(llama, sizes):
    source, target = prompts(sizes[0], 1), prompts(sizes[1], 2)
    full, half = (short_fit(llama, source, target, shrinkage=s, steps=1).history["loss"][0] for s in (0.0, 0.5))
    if sizes[0] == sizes[1]:
        assert half == pytest.approx(full / 4)
    else:
        assert half < full / 2


def test_a_fit_by_shrunk_targets_is_one_to_samples_in_that_place():
    """In one module the maps are those of targets that really lie there."""
    z, wanted = columns(9, 0), columns(9, 1) + 1
    settings = dict(layers="0", steps=6, lr="auto")
    (between,) = shrink([wanted], [z], 0.4)

    identity = torch.nn.Sequential(torch.nn.Identity())
    found = short_fit(identity, z, wanted, shrinkage=0.4, **settings)
    same_maps(found.maps, short_fit(identity, z, between, **settings).maps, rtol=1e-12)
    assert found.maps.metadata["settings"]["shrinkage"] == 0.4
    left = wasserstein(found.maps["0"].transform(z.numpy()), wanted.numpy()).sum()
    assert 0 < left < wasserstein(z.numpy(), wanted.numpy()).sum()


@pytest.mark.parametrize("settings", [{"mini_batch": 3}, {"batch_size": 2}], ids=str)
def test_the_whole_source_shrinks_the_targets_of_parts(llama, settings):
    """The goal does not depend on how the prompts are split, nor on which of them a step draws."""
    goals = []
    for extra in ({}, settings):
        goals.append(short_fit(llama, steps=1, shrinkage=0.4, **extra, seed=3).history["loss"][0])
    plain = short_fit(llama, steps=1, **settings, seed=3).history["loss"][0]
    if "mini_batch" in settings:
        assert goals[1] < plain
    else:
        assert goals[1] == pytest.approx(goals[0])


def test_held_out_targets_are_not_shrunk(llama):
    held_out = prompts(6, 3), prompts(6, 4)
    losses = [short_fit(llama, held_out=held_out, shrinkage=s, steps=1).history["held_out_loss"][0] for s in (0.0, 0.5)]
    assert losses[0] == losses[1]


def test_every_task_is_shrunk_toward_its_own_source(llama):
    tasks = {"a": (prompts(6, 1), prompts(6, 2)), "b": (prompts(5, 3), prompts(5, 4))}
    settings = dict(layers=zoo.NORMS["llama"], steps=1, progress=False)
    full, half = (fit_jointly(llama, tasks, shrinkage=s, **settings).history["task_loss"][0] for s in (0.0, 0.5))
    np.testing.assert_allclose(half, full / 4)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.1, ValueError, "shrinkage must be finite and >= 0, got -0.1"),
        (1.0, ValueError, "shrinkage must be < 1, got 1: at 1 there is nothing to fit"),
        (math.nan, ValueError, "shrinkage must be finite and >= 0, got nan"),
        ("0.4", TypeError, "shrinkage must be a number, got str"),
    ],
)
def test_errors(llama, value, error, message):
    with pytest.raises(error, match=message):
        short_fit(llama, shrinkage=value)
