"""Strengths of rows, tokens, passes and threads."""

import asyncio
import copy
import threading

import models_zoo as zoo
import numpy as np
import pytest
import torch
from attached import GREEDY, hooks_on, ids, language_model, logits, pickled, random_maps, seen_by, steered
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def transformed(one, plain, strengths):
    """By hand: T(z) at a strength for each token, which lie one after the other in `plain` [n, d]."""
    weight, bias = (torch.tensor(x, dtype=torch.float64) for x in (one.weight, one.bias))
    s = torch.as_tensor(strengths, dtype=torch.float64)[:, None]
    return (plain.double() + s * (weight * plain.double() + bias - plain.double())).float()


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(zoo.LANGUAGE_MODELS))
@pytest.mark.parametrize("cache", [False, True])
def test_each_row_gets_the_text_of_its_own_strength(family, cache):
    model, maps = steered(family)
    strengths, batch = [0.0, 0.5, 1.0, -0.7], ids([5, 3, 6, 4])
    with maps.attach(model, strength=strengths) as handle:
        together = model.generate(**batch, **GREEDY, use_cache=cache)[:, 6:].tolist()
        alone = []
        for i, strength in enumerate(strengths):
            handle.strength = strength
            alone.append(model.generate(**batch, **GREEDY, use_cache=cache)[i, 6:].tolist())
    assert together == alone


KINDS = [list, tuple, np.array, torch.tensor, lambda x: np.array(x, np.float32), lambda x: torch.tensor(x).bfloat16()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_for_each_row_in_any_kind_of_array(kind):
    model, maps, x = zoo.mlp(), random_maps({"0": 7}), torch.randn(3, 5)
    plain = model[0](x)
    given = kind([0.5, 0.0, 2.0])
    with maps.attach(model, strength=given) as handle:
        torch.testing.assert_close(model[0](x), transformed(maps["0"], plain, [0.5, 0.0, 2.0]))
        assert torch.equal(model[0](x)[1], plain[1])
        assert handle.strength.tolist() == [0.5, 0.0, 2.0] and repr(handle) == "Handle(1 modules, strength=array(3,))"
        handle.strength[0] = 9  # a copy
        assert handle.strength.tolist() == [0.5, 0.0, 2.0]
    assert hooks_on(model) == 0


def test_what_was_given_may_change_afterwards():
    model, maps, x = zoo.mlp(), random_maps({"0": 7}), torch.randn(2, 5)
    for rows in (np.array([0.5, 1.0]), torch.tensor([0.5, 1.0])):
        with maps.attach(model, strength=rows):
            expected = model(x)
            rows[:] = 0
            assert torch.equal(model(x), expected)


def test_rows_switched_off_and_neurons_outside_the_support_keep_their_bits():
    model = nn.Sequential(nn.Identity())
    maps = random_maps({"0": 3})
    weight, bias = maps["0"].weight.copy(), maps["0"].bias.copy()
    weight[1], bias[1] = 1, 0
    maps = type(maps)({"0": type(maps["0"])(weight, bias)})
    x = torch.tensor([[-0.0, float("nan"), float("inf")], [1.0, 0.7, 3.0], [float("-inf"), float("inf"), 0.1]])
    with maps.attach(model, strength=[False, True, 1 / 3]):
        found = model(x)
    assert found[0].numpy().tobytes() == x[0].numpy().tobytes()
    assert found[:, 1].numpy().tobytes() == x[:, 1].numpy().tobytes()


def test_images_have_rows():
    model, x = zoo.cnn(), zoo.images(3)
    maps = random_maps({"conv1": 6})
    plain = model.conv1(x)
    with maps.attach(model, strength=[1.0, 0.0, 0.5]):
        found = model.conv1(x)
    assert torch.equal(found[1], plain[1])
    for k, strength in ((0, 1.0), (2, 0.5)):
        torch.testing.assert_close(found[k], maps["conv1"].transform(plain[k], strength, axis=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept_and_rounded_to_once(dtype):
    model, maps = nn.Sequential(nn.Identity()), random_maps({"0": 64})
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    strengths = torch.linspace(-1, 2, 40)
    with maps.attach(model, strength=strengths):
        found = model(x)
    assert found.dtype == dtype
    weight, bias = (torch.tensor(v).double() for v in (maps["0"].weight, maps["0"].bias))
    exact = x.double() + strengths.double()[:, None] * (weight * x.double() + bias - x.double())
    unit = torch.finfo(dtype).eps * 2.0 ** torch.floor(torch.log2(exact.abs()))
    assert ((found.double() - exact).abs() <= (8 if dtype == torch.float64 else 0.501) * unit + 1e-7).all()


# --- tokens -----------------------------------------------------------------------------------------------------------


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.sampled_from(["left", "right"]),
    st.integers(1, 9),
    st.integers(0, 99),
)
def test_a_strength_for_each_position_whatever_the_padding(lengths, side, columns, seed):
    model, maps = steered("llama")
    batch, longest = ids(lengths, side), max(lengths)
    table = np.random.default_rng(seed).choice([0.0, 0.5, 1.0, 2.0], (len(lengths), columns))
    with maps.attach(model, strength=table):
        before, after = seen_by(model, maps, lambda: model(**batch))
    for row, n in enumerate(lengths):
        part = slice(longest - n, longest) if side == "left" else slice(0, n)
        strengths = [table[row, min(k, columns - 1)] for k in range(n)]
        plain, found = before[0][row, part], after[0][row, part]
        torch.testing.assert_close(found, transformed(maps[next(iter(maps))], plain, strengths), atol=1e-5, rtol=1e-5)
        off = torch.tensor(strengths) == 0
        assert torch.equal(found[off], plain[off])
        padding = torch.ones(longest, dtype=torch.bool)
        padding[part] = False
        assert torch.equal(after[0][row, padding], before[0][row, padding])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_strength_for_each_position_goes_on_through_the_cache(family):
    model, maps = steered(family)
    lengths, table = [5, 3], [[1.0, 0, 0, 0, 0.5, 2.0, -0.5], [0.3, 0.3, 0.3, 1.0, 0, 0, 1.5]]
    batch = ids(lengths)
    with maps.attach(model, strength=table) as handle:
        texts = [model.generate(**batch, **GREEDY, use_cache=cache)[:, 5:].tolist() for cache in (True, False)]
        for row, n in enumerate(lengths):
            handle.strength = [table[row]]
            alone = model.generate(batch["input_ids"][row : row + 1, 5 - n :], **GREEDY)[0, n:].tolist()
            assert texts[0][row] == texts[1][row] == alone


def test_a_strength_for_each_position_and_a_selection_of_tokens():
    model, maps = steered("llama")
    with maps.attach(model, strength=[[0.0, 0.5, 1.0, 2.0]], tokens=slice(0, 3)):
        [before], [after] = seen_by(model, maps, lambda: model(**ids([4])))
    expected = transformed(maps[next(iter(maps))], before[0], [0.0, 0.5, 1.0, 0.0])
    torch.testing.assert_close(after[0], expected, atol=1e-6, rtol=1e-5)
    assert torch.equal(after[0, [0, 3]], before[0, [0, 3]])


# --- schedules --------------------------------------------------------------------------------------------------------


def test_a_schedule_may_fade_with_the_position_or_the_step():
    model, maps = steered("llama")
    batch, n = ids([5, 3]), 5

    def fades(tokens):
        return 0.8**tokens.positions

    table = [[0.8**k for k in range(n + 6)]] * 2
    with maps.attach(model, strength=fades) as handle:
        assert handle.strength is fades and repr(handle) == "Handle(3 modules, strength=fades)"
        found = model.generate(**batch, **GREEDY)
        handle.strength = table
        assert torch.equal(model.generate(**batch, **GREEDY), found)
        handle.strength = lambda tokens: 1.0 if tokens.step < 2 else 0
        before, after = seen_by(model, maps, lambda: model.generate(**batch, **GREEDY))
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, True, *[False] * 4]


def test_a_schedule_may_give_a_strength_for_each_row():
    model, maps = steered("llama")
    batch = ids([5, 3])
    with maps.attach(model, strength=lambda tokens: tokens.prompt_length / 5) as handle:
        found = logits(model, batch)
        handle.strength = [1.0, 0.6]
        torch.testing.assert_close(logits(model, batch), found)


class Denoiser(nn.Module):
    """Called as a pipeline of diffusers calls its model: sample and timestep by position."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return self.conv(sample)


def test_a_schedule_over_the_timesteps_of_a_diffusion_model():
    model, maps, x = Denoiser(), random_maps({"conv": 3}), zoo.images(2)
    plain, seen = model(x, torch.tensor(0)), []

    def early(tokens):
        seen.append((tokens.step, int(tokens.args[1]), tokens.positions))
        return float(tokens.kwargs["timestep"] > 500)

    with maps.attach(model, strength=early) as handle, torch.no_grad():
        found = [model(x, torch.tensor(timestep)) for timestep in (900, 600, 300)]
        with handle.at(strength=lambda tokens: [0.0, tokens.step]):  # its own count
            rows = [model(x, torch.tensor(timestep)) for timestep in (900, 600)]
        handle.strength = early  # counts anew
        model(x, torch.tensor(1))
    mapped = maps["conv"].transform(plain, axis=1).detach()
    for got, expected in zip(found, (mapped, mapped, plain), strict=True):
        torch.testing.assert_close(got, expected)
    assert torch.equal(rows[0], plain) and torch.equal(rows[1][0], plain[0])
    torch.testing.assert_close(rows[1][1], mapped[1])
    assert seen == [(0, 900, None), (1, 600, None), (2, 300, None), (0, 1, None)]


def test_a_schedule_sees_the_timesteps_of_a_pipeline():
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = diffusers.UNet2DModel(sample_size=8, layers_per_block=1, norm_num_groups=4, **blocks)
    pipeline = diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler(num_train_timesteps=1000))
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipeline(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images

    def rows_then_none(tokens):
        timestep = int(tokens.kwargs["timestep"])
        seen.append((tokens.step, timestep))
        return [0.0, 1.0] if timestep > 400 else 0.0

    plain = run()
    with random_maps({"conv_in": 8}).attach(unet, strength=rows_then_none) as handle:
        steered = run()
        with handle.at(strength=0):
            assert np.array_equal(run(), plain)
    assert seen == [(0, 750), (1, 500), (2, 250), (3, 0)]
    np.testing.assert_allclose(steered[0], plain[0], atol=1e-5)
    assert np.abs(steered[1] - plain[1]).max() > 0.01


def test_a_schedule_is_asked_once_a_pass():
    model, maps = steered("llama")
    steps = []
    with maps.attach(model, strength=lambda tokens: steps.append(tokens.step) or 1.0):
        model.generate(**ids([4]), **GREEDY)
    assert steps == list(range(6)) and len(maps) > 1


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "error", "message"),
    [
        ([], ValueError, r"^strength must be a number, \[rows\] or \[rows, tokens\], got the shape \[0\]"),
        (np.ones((2, 2, 2)), ValueError, r"^strength must be a number, .* got the shape \[2, 2, 2\]"),
        ([1.0, float("nan")], ValueError, r"^strength must be finite"),
        (torch.tensor([float("inf")]), ValueError, r"^strength must be finite"),
        (["a", "b"], TypeError, r"^strength must be a real number, an array of them or a callable, got <U1"),
        (torch.tensor([1j]), TypeError, r"^strength must be real, got torch.complex64"),
        (np.array([1j]), TypeError, r"^strength must be a real number, .* got complex128"),
    ],
)
def test_an_array_that_is_no_strength(strength, error, message):
    model, maps = zoo.mlp(), random_maps({"0": 7})
    with pytest.raises(error, match=message):
        maps.attach(model, strength=strength)
    with maps.attach(model, strength=0.5) as handle:
        with pytest.raises(error, match=message):
            handle.strength = strength
        with pytest.raises(error, match=message), handle.at(strength=strength):
            pass
        assert handle.strength == 0.5
    assert hooks_on(model) == 0 and not model._forward_pre_hooks


def test_arrays_and_tensors_of_one_number_are_numbers():
    model, maps = zoo.mlp(), random_maps({"0": 7})
    for one in (np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        with maps.attach(model, strength=one) as handle:
            assert type(handle.strength) is float and handle.strength == 0.5


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        ([1.0, 0.5, 0.2], r"^{}: the strength has the shape \[3\], the output \[2, 5, 16\]"),
        (np.ones((3, 4)), r"^{}: the strength has the shape \[3, 4\], the output \[2, 5, 16\]"),
        (lambda tokens: np.ones((2, 4)), r"^{}: the strength has the shape \[2, 4\], the output \[2, 5, 16\]"),
        (lambda tokens: [1.0], r"^{}: the strength has the shape \[1\], the output \[2, 5, 16\]"),
        (lambda tokens: float("nan"), r"^strength must be .*finite.*, from <lambda>"),
    ],
)
def test_a_strength_that_does_not_fit_the_batch_names_both_shapes(strength, message):
    model, maps = steered("llama")
    batch = ids([5, 3])
    plain = logits(model, batch)
    with maps.attach(model, strength=strength) as handle:
        with pytest.raises(ValueError, match=message.format(next(iter(maps)))):
            model(**batch)
        handle.strength = 1.0
        assert not torch.equal(logits(model, batch), plain)
        handle.strength = 0
        assert torch.equal(logits(model, batch), plain)
    assert torch.equal(logits(model, batch), plain)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"^strength must be a .*None.*, from <lambda>"),
        (len, r"^strength: <lambda> must return a number or an array, got builtin_function_or_method"),
    ],
)
def test_what_a_schedule_must_give(answer, message):
    model, maps = steered("llama")
    with maps.attach(model, strength=lambda tokens: answer), pytest.raises(TypeError, match=message):
        model(**ids([3]))


def test_strengths_by_position_need_the_tokens_of_the_model():
    model, maps = zoo.cnn(), random_maps({"conv1": 6})
    message = r"^conv1: a strength of the shape \[2, 3\] needs a model that takes text"
    with maps.attach(model, strength=np.ones((2, 3))), pytest.raises(ValueError, match=message):
        model(zoo.images(2))


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["all", "generated"])
def test_threads_generate_at_the_same_time_each_at_its_own_strength(tokens):
    model, maps = steered("llama")
    batch = ids([5, 4])
    strengths = [0.0, 0.4, 1.0, [0.2, -0.6], lambda one: 0.9**one.positions]
    with maps.attach(model, tokens=tokens, strength=0.7) as handle:
        expected = []
        for strength in strengths:
            handle.strength = strength
            expected.append(model.generate(**batch, **GREEDY).tolist())
        handle.strength = 0.7
        own = model.generate(**batch, **GREEDY).tolist()
        found, together = [[] for _ in strengths], threading.Barrier(len(strengths) + 1)

        def work(k):
            together.wait()
            with handle.at(strength=strengths[k]) as same:
                assert same is handle
                for _ in range(4):
                    found[k].append(model.generate(**batch, **GREEDY).tolist())

        threads = [threading.Thread(target=work, args=(k,)) for k in range(len(strengths))]
        for thread in threads:
            thread.start()
        together.wait()
        for _ in range(3):
            assert model.generate(**batch, **GREEDY).tolist() == own
        for thread in threads:
            thread.join()
        assert handle.strength == 0.7
        assert model.generate(**batch, **GREEDY).tolist() == own
    assert found == [[one] * 4 for one in expected]
    assert len({str(one) for one in expected}) > 2


def test_maps_exchanged_while_threads_run_hold_from_then_on():
    model, x = zoo.mlp(), torch.randn(2, 5)
    several = [random_maps({"0": 7}, seed) for seed in range(2)]
    with torch.no_grad(), several[0].attach(model) as handle:
        expected = []
        for maps in several:
            handle.maps = maps
            expected.append(model(x))
        stop, wrong = threading.Event(), []

        def work():
            with torch.no_grad():
                while not stop.is_set():
                    got = model(x)
                    if not any(torch.equal(got, one) for one in expected):
                        wrong.append(got)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for k in range(300):
            handle.maps = several[k % 2]
            assert torch.equal(model(x), expected[k % 2])
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_blocks_may_be_nested_and_end_after_errors():
    model, maps, x = zoo.mlp(), random_maps({"0": 7}), torch.randn(3, 5)
    plain = model[0](x)

    def now():
        return model[0](x)

    def at(strength):
        return maps["0"].transform(plain, strength)

    with maps.attach(model, strength=0.5) as handle, maps.attach(model, strength=0) as other:
        with handle.at(strength=1.0):
            torch.testing.assert_close(now(), at(1.0))
            with handle.at(strength=0), other.at(strength=2.0):
                torch.testing.assert_close(now(), at(2.0))
            handle.strength = 0.3  # does not show in here
            torch.testing.assert_close(now(), at(1.0))
            with pytest.raises(KeyError), handle.at(strength=0.1):
                raise KeyError
            torch.testing.assert_close(now(), at(1.0))
        torch.testing.assert_close(now(), at(0.3))
        assert handle._settings.same_for_all
    with pytest.raises(RuntimeError, match=r"^these maps were removed from the model: attach them again"):
        with handle.at(strength=1.0):
            pass


def test_tasks_of_one_thread_have_strengths_of_their_own():
    model, maps, x = zoo.mlp(), random_maps({"0": 7}), torch.randn(3, 5)

    async def serve(handle, strength):
        with handle.at(strength=strength):
            await asyncio.sleep(0)
            return model[0](x)

    async def all_of_them(handle):
        return await asyncio.gather(*(serve(handle, strength) for strength in (0.0, 0.5, 1.0)))

    with maps.attach(model) as handle, torch.no_grad():
        plain = nn.functional.linear(x, model[0].weight, model[0].bias)
        for got, strength in zip(asyncio.run(all_of_them(handle)), (0.0, 0.5, 1.0), strict=True):
            torch.testing.assert_close(got, maps["0"].transform(plain, strength))


# --- copies, gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("strength", [[0.5, 1.0], [[0.5, 1.0, 0.0], [1.0, 1.0, 2.0]]])
def test_a_copy_of_the_model_keeps_the_strength_of_the_handle(duplicate, strength):
    model, maps = language_model("llama")
    batch = ids([5, 3])
    with maps.attach(model, strength=strength) as handle:
        expected = logits(model, batch)
        with handle.at(strength=0):
            other = duplicate(model)
    assert torch.equal(logits(other, batch), expected)


def test_gradients_pass_through_strengths_of_rows():
    model, maps = zoo.mlp().double(), random_maps({"0": 7, "2": 4})
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with maps.attach(model, strength=[0.0, 0.5, 1.0]):
        with torch.inference_mode():
            first = model(x)
        assert torch.equal(first, model(x).detach())
        assert torch.autograd.gradcheck(model, (x,))
        assert torch.autograd.gradgradcheck(model, (x,))


def test_a_first_schedule_in_inference_mode_does_not_spoil_later_gradients():
    model, maps, x = zoo.mlp(), random_maps({"0": 7}), torch.randn(3, 5)
    with torch.inference_mode():
        rows = torch.tensor([0.5, 1.0, 0.0])
    for strength in (rows, lambda tokens: rows):
        with maps.attach(model, strength=strength):
            with torch.inference_mode():
                first = model(x)
            second = model(x)
            second.sum().backward()
            assert torch.equal(first, second.detach())
