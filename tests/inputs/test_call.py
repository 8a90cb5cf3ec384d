"""Calling a model somebody else loaded: batches, freezing, and leaving early."""

import models_zoo
import numpy as np
import pytest
import torch
from torch import nn

import lineas
from lineas.hooks import modules
from lineas.hooks.capture import Capture
from lineas.inputs import batches, call
from lineas.inputs.prompts import read

FAMILIES = list(models_zoo.LANGUAGE_MODELS)


def batches_of(data, batch_size=None, argument="source", **settings):
    settings.setdefault("tokenizer", models_zoo.tokenizer())
    return read(data, argument, **settings).parts(batch_size)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def hooks_on(model):
    return sum(len(module._forward_hooks) for module in model.modules())


# --- batches ----------------------------------------------------------------------------------------------------------


def test_texts_become_padded_batches_on_the_side_of_the_tokenizer():
    texts = ["a good day", "not nice", "we", "a very long night"]
    for side in ("left", "right"):
        tokenizer = models_zoo.tokenizer(padding_side=side)
        first, second = batches_of(texts, tokenizer=tokenizer, batch_size=3)
        expected = tokenizer(texts[:3], padding=True, return_tensors="pt")
        assert torch.equal(first.kwargs["input_ids"], expected["input_ids"])
        assert torch.equal(first.mask, expected["attention_mask"])
        assert first.kwargs["attention_mask"] is first.mask and first.args == ()
        assert second.mask.tolist() == [[1, 1, 1, 1]]


def test_texts_come_in_batches_of_32_unless_told_otherwise():
    assert [len(b.mask) for b in batches_of(models_zoo.texts(70))] == [32, 32, 6]
    assert [len(b.mask) for b in batches_of(tuple(models_zoo.texts(5)), batch_size=2)] == [2, 2, 1]


def test_texts_are_cut_to_max_length():
    (batch,) = batches_of(["a good day", "not nice at all it was"], max_length=2)
    assert batch.mask.shape == (2, 2)


def test_a_tokenizer_without_a_pad_token_is_padded_for_and_left_alone():
    tokenizer = models_zoo.tokenizer(pad_token=False)
    before = dict(tokenizer.special_tokens_map), tokenizer.padding_side, len(tokenizer)
    (batch,) = batches_of(["a good day", "not"], tokenizer=tokenizer)
    assert batch.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.kwargs["input_ids"][0].tolist() == tokenizer("a good day")["input_ids"]
    assert batch.kwargs["input_ids"][1, -1] == tokenizer("not")["input_ids"][0]
    assert (dict(tokenizer.special_tokens_map), tokenizer.padding_side, len(tokenizer)) == before
    assert tokenizer.pad_token is None
    call.call(models_zoo.gpt2(), batch)


def test_token_type_ids_are_padded_too():
    def tokenizer(texts, **settings):
        return {"input_ids": [[5, 6], [7]], "token_type_ids": [[1, 1], [1]], "attention_mask": [[1, 1], [1]]}

    (batch,) = batches_of(["x y", "z"], tokenizer=tokenizer)
    assert batch.kwargs["token_type_ids"].tolist() == [[1, 1], [1, 0]]
    assert batch.kwargs["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_a_mapping_is_one_batch_and_its_attention_mask_the_mask():
    encoded = models_zoo.tokenizer()(models_zoo.texts(3), padding=True, return_tensors="pt")
    (batch,) = batches_of(encoded)
    assert batch.mask is encoded["attention_mask"]
    assert set(batch.kwargs) == set(encoded.keys())
    (batch,) = batches_of({"input_ids": encoded["input_ids"]})
    assert batch.mask is None


def test_a_tensor_or_a_tuple_is_one_batch_and_a_list_or_a_loader_several():
    x = models_zoo.images(4)
    assert batches_of(x)[0].args == (x,)
    assert batches_of((x, x))[0].args == (x, x)
    several = batches_of([x, (x, x), {"x": x}])
    assert [(len(b.args), list(b.kwargs)) for b in several] == [(1, []), (2, []), (0, ["x"])]
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=3)
    assert [len(b.args[0]) for b in batches_of(loader)] == [3, 1]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "^source is empty"),
        ({}, ValueError, "^source is empty"),
        ((), ValueError, "^source is empty"),
        ([{}], ValueError, r"^source\[0\] is empty"),
        ("a text", TypeError, "^source is one string: give a list of texts"),
        (3, TypeError, "^source must be texts, conversations, token ids, a batch .* got int"),
        ([["a", "b"], ["c"]], TypeError, r"^source\[0\] must be a mapping, a tensor or a tuple, got list"),
        ([torch.ones(2), "a"], TypeError, r"^source\[1\] must be a mapping, a tensor or a tuple, got str"),
        (np.ones((2, 2)), TypeError, r"^source\[0\] must be a mapping, a tensor or a tuple, got ndarray"),
        (["a", 3], TypeError, r"^source\[1\] must be a text like the entries before it, got int"),
        (["good", ""], ValueError, r"^source\[1\] has no tokens: ''"),
        (iter(()), ValueError, "^source is empty: an iterator can be read once, and this one gave nothing"),
        ([[1, 2.0]], TypeError, r"^source\[0\] must be whole numbers where it is token ids, got 2.0 at index 1"),
        ([[1, 2], [1, True]], TypeError, r"^source\[1\] must be whole numbers where .*, got True at index 1"),
        ([0.5, 1], TypeError, r"^source must be whole numbers where it is token ids, got 0.5 at index 0"),
        ({"input_ids": [[1, 2]]}, TypeError, "^source: 'input_ids' must be a tensor, got list .*return_tensors"),
        (
            {"attention_mask": torch.ones(1, 1, 2, 2)},
            ValueError,
            r"^source: 'attention_mask' must be \[batch, tokens\], got shape \(1, 1, 2, 2\)",
        ),
    ],
)
def test_data_that_is_no_batch_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        batches_of(data)


@pytest.mark.parametrize(("wrong", "seen"), [([1, 58], 58), ([-1, 2], -1), (np.array([60000, 1]), 60000)], ids=str)
def test_token_ids_that_a_model_lacks_are_named(wrong, seen):
    model, good = models_zoo.llama(), [[1, 2], [3, np.int64(57)]]
    text = f"token ids must be from 0 to 57, which LlamaForCausalLM has embeddings for, got {seen}"
    settings = {"layers": models_zoo.NORMS["llama"], "progress": False}
    assert len(lineas.collect(model, good, **settings)) == models_zoo.LAYERS
    with pytest.raises(ValueError, match=f"^data: {text}$"):
        lineas.collect(model, [good[0], wrong], **settings)
    with pytest.raises(ValueError, match=f"^source: {text}$"):
        lineas.fit_end_to_end(model, [good[0], wrong], good, steps=1, **settings)
    with pytest.raises(ValueError, match=f"^target: {text}$"):
        lineas.fit_gates(model, good, [good[0], wrong], **settings)
    assert hooks_on(model) == 0
    batch = {"input_ids": torch.tensor([list(wrong)])}  # as others call it: beyond the vocabulary may be images
    with pytest.raises(IndexError):
        call.call(model, batches.as_batch(batch, "data"))


def test_texts_without_a_tokenizer_are_refused():
    with pytest.raises(ValueError, match=r"^source holds texts: pass tokenizer="):
        batches_of(["a"], tokenizer=None)


# --- calls ------------------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """Records what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.inner = nn.Identity()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None, extra=None):
        self.seen = {k: v for k, v in locals().items() if k not in ("self", "__class__") and v is not None}
        return self.inner(torch.ones(1, 2))


class Wrapped(nn.Module):
    """As PEFT wraps a model: a forward without named arguments."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_base_model(self):
        return self.model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


LEFT = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


@pytest.mark.parametrize("wrapped", [False, True])
def test_use_cache_is_off_and_left_padding_gives_positions(wrapped):
    model = Recorder()
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": LEFT}
    call.call(Wrapped(model) if wrapped else model, batches_of(batch)[0])
    assert model.seen["use_cache"] is False
    assert model.seen["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert set(batch) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("mask", [LEFT.flip(1), torch.ones_like(LEFT), None], ids=["right", "full", "none"])
def test_without_left_padding_the_model_counts_itself(mask):
    model = Recorder()
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long)} | ({} if mask is None else {"attention_mask": mask})
    call.call(model, batches_of(batch)[0])
    assert "position_ids" not in model.seen


def test_positions_and_use_cache_of_the_batch_are_kept():
    model = Recorder()
    mine = torch.zeros(2, 4, dtype=torch.long)
    batch = {"input_ids": mine, "attention_mask": LEFT, "position_ids": mine, "use_cache": True}
    call.call(model, batches_of(batch)[0])
    assert model.seen["position_ids"] is mine and model.seen["use_cache"] is True


def test_a_mask_longer_than_the_input_gives_no_positions():
    model = Recorder()  # a cached prefix: the mask speaks of more tokens than are given
    batch = {"input_ids": torch.ones(2, 1, dtype=torch.long), "attention_mask": LEFT}
    call.call(model, batches_of(batch)[0])
    assert "position_ids" not in model.seen


def test_models_that_skip_padding_by_themselves_get_no_positions():
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    model = RobertaModel(
        RobertaConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=20,
            pad_token_id=1,
        )
    ).eval()
    ids = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 5]])
    with torch.no_grad():
        (batch,) = batches_of({"input_ids": ids, "attention_mask": LEFT})
        padded = call.call(model, batch).last_hidden_state[0, 2:]
        alone = model(input_ids=ids[:1, 2:]).last_hidden_state[0]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


def test_models_without_these_arguments_are_called_as_they_are():
    x = models_zoo.images(2)
    model = models_zoo.cnn()
    (batch,) = batches_of(x)
    assert torch.equal(call.call(model, batch), model(x))
    two = nn.Bilinear(3, 3, 2)
    (batch,) = batches_of((x[0, 0, :, :3], x[1, 0, :, :3]))
    assert torch.equal(call.call(two, batch), two(*batch.args))


@pytest.mark.parametrize(
    ("data", "given"),
    [
        ({"a": torch.ones(1), "count": [3]}, {"a": torch.ones(1), "count": [3]}),
        (torch.ones(2), torch.ones(2)),
        ((torch.ones(2), [torch.ones(1)]), (torch.ones(2), [torch.ones(1)])),
    ],
    ids=["mapping", "tensor", "tuple"],
)
def test_forward_gets_the_model_and_the_batch_as_given(data, given):
    model = Recorder()
    seen = []
    (batch,) = batches_of(data)
    assert call.call(model, batch, lambda *arguments: seen.append(arguments) or "result") == "result"
    ((first, second),) = seen
    assert first is model and type(second) is type(given)
    torch.testing.assert_close(second, given)


def test_tensors_are_moved_to_the_device_of_the_first_parameter():
    model = nn.Linear(2, 2, device="meta")
    batch = batches.Batch(args=(torch.ones(1, 2), {"deep": [torch.ones(1)]}))
    # Offloaded weights are on the meta device while they are not in use: the input stays.
    assert call._device(model) is None
    assert call._to(batch.args, None)[0] is batch.args[0]
    moved = call._to(batch.args, torch.device("meta"))
    assert moved[0].is_meta and moved[1]["deep"][0].is_meta
    assert call._device(models_zoo.mlp()) == torch.device("cpu")


def test_offloaded_models_work():
    accelerate = pytest.importorskip("accelerate")
    settings = {"layers": models_zoo.NORMS["llama"], "tokenizer": models_zoo.tokenizer()}
    expected = lineas.collect(models_zoo.llama(), models_zoo.texts(3), **settings)
    model = accelerate.cpu_offload(models_zoo.llama(), execution_device="cpu")
    assert next(model.parameters()).is_meta
    found = lineas.collect(model, models_zoo.texts(3), **settings)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_activations_equal_unpadded_ones(family, side):
    model = models_zoo.LANGUAGE_MODELS[family]()
    texts = models_zoo.texts(6)
    settings = {"layers": models_zoo.NORMS[family], "tokenizer": models_zoo.tokenizer(padding_side=side)}
    padded = lineas.collect(model, texts, **settings)
    alone = lineas.collect(model, texts, batch_size=1, **settings)
    for name, value in alone.items():
        np.testing.assert_allclose(padded[name], value, atol=1e-5)


# --- capturing --------------------------------------------------------------------------------------------------------


def nothing(name, module, tensor):
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_the_forward_is_left_after_the_last_module_without_running_the_head(family):
    model = models_zoo.LANGUAGE_MODELS[family]()
    (batch,) = batches_of(models_zoo.texts(3))
    names = modules.resolve(model, models_zoo.NORMS[family])
    head, norm = count_calls(model.lm_head), count_calls(modules.get_module(model, names[1]))
    assert Capture().run(model, batch, names[::-1], nothing) == names
    assert Capture().run(model, batch, names[:1], nothing) == names[:1]
    assert Capture().run(model, batch, names, nothing, last=names[-1]) == names
    assert (len(head), len(norm)) == (0, 2)


def test_execution_order_is_that_of_the_calls_not_of_the_names():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.a(self.b(x))

    (batch,) = batches_of(torch.ones(1, 2))
    assert Capture().run(Swapped(), batch, ["a", "b"], nothing) == ["b", "a"]


def test_outputs_are_replaced_for_what_runs_later():
    model = models_zoo.mlp()
    (batch,) = batches_of(torch.randn(3, 5))
    seen = {}

    def on_output(name, module, tensor):
        seen[name] = tensor.clone()
        return torch.zeros_like(tensor) if name == "1" else None

    Capture().run(model, batch, ["0", "1", "2"], on_output)
    assert torch.equal(seen["0"], model[0](batch.args[0]))
    assert torch.equal(seen["2"], model[2].bias.expand(3, 4))


class Swallowing(nn.Module):
    """User code that catches every Exception on its way."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.swallowed = []

    def forward(self, x):
        try:
            x = self.first(x)
        except Exception as error:
            self.swallowed.append(error)
        return self.second(x)


def test_except_exception_in_user_code_does_not_swallow_the_exit():
    model = Swallowing()
    second = count_calls(model.second)
    (batch,) = batches_of(torch.ones(1, 2))
    assert Capture().run(model, batch, ["first"], nothing) == ["first"]
    assert model.swallowed == [] and second == []


def test_an_exit_of_an_outer_run_passes_through_an_inner_one():
    model = models_zoo.mlp()
    (batch,) = batches_of(torch.ones(1, 5))
    after = []

    def forward(outer, x):
        # The inner run fires the outer run's hook on "0", which ends both.
        Capture().run(model, batch, ["4"], nothing)
        after.append(1)

    assert Capture().run(model, batch, ["0"], nothing, forward=forward) == ["0"]
    assert after == []
    assert hooks_on(model) == 0


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("place", ["hook", "model"])
def test_hooks_are_removed_after_errors(held, place):
    model = models_zoo.mlp()
    (batch,) = batches_of(torch.ones(1, 5 if place == "hook" else 4))

    def on_output(name, module, tensor):
        raise ZeroDivisionError

    capture = Capture()
    with pytest.raises(ZeroDivisionError if place == "hook" else RuntimeError):
        if held:
            with capture:
                capture.run(model, batch, ["0", "2"], on_output)
        else:
            capture.run(model, batch, ["0", "2"], on_output)
    assert hooks_on(model) == 0


def test_hooks_of_a_held_capture_stay_until_the_block_ends_and_no_two_runs_add_up():
    model = models_zoo.mlp()
    (batch,) = batches_of(torch.ones(1, 5))
    with Capture() as capture:
        capture.run(model, batch, ["0", "2"], nothing)
        capture.run(model, batch, ["0", "2"], nothing)
        assert hooks_on(model) == 2
    assert hooks_on(model) == 0
    capture.run(model, batch, ["0"], nothing)
    assert hooks_on(model) == 0


def test_a_module_that_is_never_called_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.other = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    model = Unused()
    (batch,) = batches_of(torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"^module 'unused' was not called when the model ran \(nor were 1 others\)"):
        Capture().run(model, batch, ["used", "unused", "other"], nothing)
    with pytest.raises(ValueError, match=r"^module 'unused' was not called before 'used' when the model ran"):
        Capture().run(model, batch, ["used", "unused"], nothing, last="used")
    assert hooks_on(model) == 0


def test_a_module_called_twice_counts_with_its_first_call_and_is_mapped_at_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.end = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.end(self.shared(self.shared(x)))

    model = Twice()
    x = torch.randn(3, 2)
    (batch,) = batches_of(x)
    seen = []

    def on_output(name, module, tensor):
        seen.append((name, tensor.detach()))
        return tensor + 1 if name == "shared" else None

    assert Capture().run(model, batch, ["end", "shared"], on_output) == ["shared", "end"]
    first = model.shared(x)
    second = model.shared(first + 1)
    assert [name for name, _ in seen] == ["shared", "shared", "end"]
    for (_, value), expected in zip(seen, (first, second, model.end(second + 1)), strict=True):
        torch.testing.assert_close(value, expected)
    found = lineas.collect(model, x, layers=["shared", "end"])
    np.testing.assert_allclose(found["shared"], first.detach(), rtol=1e-6)
    # Alone it is left at its first call.
    del seen[:]
    Capture().run(model, batch, ["shared"], on_output)
    assert len(seen) == 1


def test_an_output_without_a_hidden_state_names_the_module():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.Module()
            self.part.forward = lambda x: {"x": x}

        def forward(self, x):
            return self.part(x)

    (batch,) = batches_of(torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"^part: the output must be a tensor, .*got dict"):
        Capture().run(Odd(), batch, ["part"], nothing)


def test_a_run_leaves_no_activations_behind():
    import gc
    import weakref

    model = models_zoo.mlp()
    (batch,) = batches_of(torch.ones(1, 5))
    alive = []

    def on_output(name, module, tensor):
        alive.append(weakref.ref(tensor))

    gc.disable()  # by counting references alone: no cycle may hold them
    try:
        Capture().run(model, batch, ["0", "2"], on_output)
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()
