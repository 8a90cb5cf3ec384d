"""Completions and chats over HTTP: what transformers generates, in OpenAI's form, at the strengths of the request."""

import json

import models_zoo
import pytest
import torch
from served import Reference, TestClient, all_maps, create_app, make_maps, model, tokenizer

from lineas.serving.app import name_of

PROMPT = "the dog is"
CHAT = [{"role": "system", "content": "we are good"}, {"role": "user", "content": "the cat was"}]


def events(response):
    """The events of a stream, whose end is marked."""
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def joined(chunks, index=0, of=lambda choice: choice["text"]):
    return "".join(of(choice) for chunk in chunks for choice in chunk["choices"] if choice["index"] == index)


def content(choice):
    return choice["delta"].get("content", "")


# ---- strengths -------------------------------------------------------------------------------------------------------

STEERED = [
    ({}, {}),
    ({"model": "tiny+a"}, {"a": 1}),
    ({"model": "tiny+b+a"}, {"a": 1, "b": 1}),
    ({"model": "tiny+b", "lineas": {"strength": 0.4}}, {"b": 0.4}),
    ({"model": "tiny+b", "lineas": {"maps": "b", "strength": -0.4}}, {"b": -0.4}),
    ({"lineas": {"maps": "a"}}, {"a": 1}),
    ({"lineas": {"maps": "a", "strength": 0.7}}, {"a": 0.7}),
    ({"lineas": {"maps": ["a", "b"], "strength": 0.5}}, {"a": 0.5, "b": 0.5}),
    ({"lineas": {"maps": ["b", "a"], "strength": {"a": 0.3, "b": 1.2}}}, {"a": 0.3, "b": 1.2}),
    ({"lineas": {"maps": ["b", "a"], "strength": {"b": 2}}}, {"a": 1, "b": 2}),
    ({"lineas": {"strength": {"b": 0.25}}}, {"b": 0.25}),
    ({"lineas": {"maps": "a", "strength": 0}}, {"a": 0}),
    ({"lineas": {"maps": []}}, {}),
    ({"lineas": {}}, {}),
    ({"lineas": None}, {}),
]


@pytest.mark.parametrize(("body", "strengths"), STEERED)
def test_a_completion_is_what_transformers_generates_at_these_strengths(ask, reference, body, strengths):
    found = ask(**body, temperature=0, max_tokens=12)
    assert found.status_code == 200
    expected = reference.text(PROMPT, strengths, max_tokens=12)
    assert found.json()["choices"][0]["text"] == expected
    assert found.json()["lineas"]["strengths"] == pytest.approx(strengths)
    assert list(found.json()["lineas"]["strengths"]) == sorted(strengths)


def test_strengths_make_a_difference(reference):
    made = {reference.text(PROMPT, strengths, max_tokens=12) for _, strengths in STEERED if any(strengths.values())}
    assert len(made) > 6  # else the test above would show little


def test_a_chat_is_what_transformers_generates(ask, reference):
    rendered = reference.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)["input_ids"]
    for strengths in ({}, {"a": 0.5}):
        body = {"lineas": {"strength": strengths}} if strengths else {}
        found = ask("chat/completions", messages=CHAT, temperature=0, max_tokens=9, **body).json()
        expected = reference.tokenizer.decode(
            reference.generate(rendered, strengths, max_tokens=9), skip_special_tokens=True
        )
        assert found["choices"][0]["message"]["content"] == expected
        assert found["usage"]["prompt_tokens"] == len(rendered)


def test_the_strength_of_the_server_is_that_of_requests_without_one():
    app = create_app(model(), tokenizer(), {"a": all_maps()["a"]}, name="tiny", strength="calibrated")
    with TestClient(app, base_url="http://localhost") as client:
        body = {"model": "tiny+a", "prompt": PROMPT, "temperature": 0}
        found = client.post("/v1/completions", json=body).json()
    assert found["lineas"]["strengths"] == {"a": 0.7}
    assert found["choices"][0]["text"] == Reference().text(PROMPT, {"a": 0.7})


def test_maps_come_off_the_model_when_the_application_ends():
    import lineas

    made = model()
    app = create_app(made, tokenizer(), all_maps())
    assert len(lineas.attached(made)) == 2
    with TestClient(app, base_url="http://localhost"):
        pass
    assert lineas.attached(made) == []


# ---- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.6}, {"top_p": 0.5}, {"temperature": 1.7, "top_p": 0.8}])
@pytest.mark.parametrize("seed", [3, 4])
def test_a_seed_draws_what_it_draws_in_transformers(ask, reference, sampling, seed):
    found = ask(**sampling, seed=seed, max_tokens=12, lineas={"maps": "a", "strength": 0.5}).json()
    expected = reference.text(PROMPT, {"a": 0.5}, seed=seed, max_tokens=12, **sampling)
    assert found["choices"][0]["text"] == expected


def test_choices_have_the_seeds_that_follow(ask):
    found = ask(n=3, seed=7, max_tokens=9, lineas={"maps": "a"}).json()
    alone = [ask(seed=7 + k, max_tokens=9, lineas={"maps": "a"}).json() for k in range(3)]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert [one["text"] for one in found["choices"]] == [one["choices"][0]["text"] for one in alone]
    assert len({one["text"] for one in found["choices"]}) == 3
    assert found["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in alone)


def test_without_a_seed_texts_differ_and_the_seed_is_told(ask):
    first, second = (ask(max_tokens=12).json() for _ in range(2))
    assert first["choices"][0]["text"] != second["choices"][0]["text"]
    again = ask(max_tokens=12, seed=first["lineas"]["seed"]).json()
    assert again["choices"] == first["choices"]


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_works(ask, seed):
    first, second = (ask(seed=seed, n=2, max_tokens=5).json()["choices"] for _ in range(2))
    assert first == second


def test_tiny_temperatures_are_greedy(ask, reference):
    for temperature in (1e-300, 1e-5, 2e-4):
        assert ask(temperature=temperature, seed=1).json()["choices"][0]["text"] == reference.text(PROMPT)


# ---- prompts, ends, numbers ------------------------------------------------------------------------------------------


def test_several_prompts_and_tokens(ask, reference):
    prompts = ["the cat", "a good dog is never"]
    found = ask(prompt=prompts, temperature=0, n=2, max_tokens=5).json()
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    expected = [reference.text(prompt, max_tokens=5) for prompt in prompts]
    assert [choice["text"] for choice in found["choices"]] == [expected[0]] * 2 + [expected[1]] * 2
    ids = [reference.ids(prompt) for prompt in prompts]
    assert found["usage"]["prompt_tokens"] == sum(map(len, ids))
    for prompt in (ids, ids[1]):
        same = ask(prompt=prompt, temperature=0, max_tokens=5).json()["choices"]
        assert [choice["text"] for choice in same] == expected[-len(same) :]


def test_a_stop_sequence_ends_a_text_and_is_no_part_of_it(ask, reference):
    whole = reference.text(PROMPT, max_tokens=12)
    words = whole.split()
    for stop in (words[4], [words[6], words[4]], f"{words[3]} {words[4]}", whole[-3:], ["zebra", whole[5:9]]):
        found = ask(temperature=0, max_tokens=12, stop=stop).json()
        cut = min(whole.find(one) for one in ([stop] if isinstance(stop, str) else stop) if one in whole)
        assert found["choices"][0] | {"logprobs": None} == {
            "index": 0,
            "text": whole[:cut],
            "logprobs": None,
            "finish_reason": "stop",
        }
        streamed = events(ask(temperature=0, max_tokens=12, stop=stop, stream=True))
        assert joined(streamed) == whole[:cut]
    assert ask(temperature=0, max_tokens=12, stop="zebra").json()["choices"][0]["text"] == whole


def test_a_text_ends_by_itself_or_at_its_limit(ask, reference):
    eos = reference.tokenizer.eos_token_id
    seed = next(k for k in range(200) if eos in reference.generate(reference.ids(PROMPT), seed=k, max_tokens=12))
    tokens = reference.generate(reference.ids(PROMPT), seed=seed, max_tokens=12)
    found = ask(seed=seed, max_tokens=12).json()
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": tokens.index(eos) + 1,
        "total_tokens": tokens.index(eos) + 4,
    }
    cut = ask(seed=seed, max_tokens=tokens.index(eos)).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert cut["choices"][0]["text"] == found["choices"][0]["text"]


def test_lengths_where_none_is_asked_for(ask):
    assert ask(temperature=0).json()["usage"]["completion_tokens"] == 16
    assert ask(temperature=0, prompt="a " * 60).json()["usage"]["completion_tokens"] <= 4
    chat = ask("chat/completions", temperature=0).json()
    assert chat["usage"]["total_tokens"] == 64 or chat["choices"][0]["finish_reason"] == "stop"
    limited = ask("chat/completions", temperature=0, max_tokens=9, max_completion_tokens=4).json()
    assert limited["usage"]["completion_tokens"] == 4


def test_logprobs_are_those_of_the_model(ask, reference):
    ids, how = reference.ids(PROMPT), {"temperature": 1.5, "top_p": 0.9}
    made = ((seed, reference.generate(ids, {"b": 1}, seed=seed, max_tokens=6, **how)) for seed in range(99))
    seed, tokens = next((seed, tokens) for seed, tokens in made if min(tokens) > 2)  # words alone
    body = {**how, "seed": seed, "max_tokens": 6, "lineas": {"maps": "b"}}
    with reference.maps["b"].attach(reference.model), torch.no_grad():
        logits = reference.model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    expected = logits.log_softmax(-1)
    names = [reference.tokenizer.decode([token]) for token in tokens]
    likeliest = [{reference.tokenizer.decode([int(k)]): float(row[k]) for k in row.topk(3).indices} for row in expected]
    of_tokens = [float(row[token]) for row, token in zip(expected, tokens, strict=True)]

    found = ask(**body, logprobs=3).json()["choices"][0]
    assert found["logprobs"]["tokens"] == names
    assert found["logprobs"]["token_logprobs"] == pytest.approx(of_tokens, abs=1e-4)
    for entry, wanted, name, value in zip(found["logprobs"]["top_logprobs"], likeliest, names, of_tokens, strict=True):
        assert entry == pytest.approx({**wanted, name: value}, abs=1e-4)
    starts = found["logprobs"]["text_offset"]
    assert [found["text"][start:].split()[0] for start in starts] == names
    none = ask(**body, logprobs=0).json()["choices"][0]["logprobs"]
    assert [list(entry) for entry in none["top_logprobs"]] == [[name] for name in names]

    chunks = events(ask(**body, logprobs=3, stream=True))
    assert [name for chunk in chunks for name in chunk["choices"][0]["logprobs"]["tokens"]] == names


def test_logprobs_of_chats(ask, reference):
    tokenizer, seen = reference.tokenizer, set()
    words = [[{"role": "user", "content": word}] for word in models_zoo.WORDS[:4]]
    for messages in (CHAT, *words):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        with torch.no_grad():
            values, places = reference.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(2)
        chat = {"messages": messages, "temperature": 0, "max_tokens": 1, "logprobs": True}
        found = ask("chat/completions", **chat, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
        seen.add(len(found))
        if int(places[0]) == tokenizer.eos_token_id:  # the end of a text is no token of it
            assert found == []
            continue
        (entry,) = found
        assert [one["token"] for one in entry["top_logprobs"]] == [tokenizer.decode([int(k)]) for k in places]
        assert [one["logprob"] for one in entry["top_logprobs"]] == pytest.approx(values.tolist(), abs=1e-4)
        assert bytes(entry["bytes"]).decode() == entry["token"] == entry["top_logprobs"][0]["token"]
        (entry,) = ask("chat/completions", **chat).json()["choices"][0]["logprobs"]["content"]
        assert entry["top_logprobs"] == []
    assert seen == {0, 1}


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_is_the_same_text_in_pieces(ask):
    body = {"seed": 3, "n": 2, "max_tokens": 10, "lineas": {"maps": "a", "strength": 0.5}}
    whole = ask(**body).json()
    chunks = events(ask(**body, stream=True))
    for choice in whole["choices"]:
        assert joined(chunks, choice["index"]) == choice["text"]
        last = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]][-1]
        assert last["finish_reason"] == choice["finish_reason"]
    assert len(chunks) > 10
    assert len({chunk["id"] for chunk in chunks}) == 1 and "usage" not in chunks[0]

    chat = {**body, "messages": CHAT}
    whole = ask("chat/completions", **chat).json()
    chunks = events(ask("chat/completions", **chat, stream=True, stream_options={"include_usage": True}))
    for choice in whole["choices"]:
        mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert joined(chunks, choice["index"], content) == choice["message"]["content"]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [one["finish_reason"] for one in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1] == {"index": choice["index"], "delta": {}, "finish_reason": choice["finish_reason"]}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert {chunk["usage"] for chunk in chunks[:-1]} == {None}


def test_answers_are_what_openais_own_types_say(ask):
    types = pytest.importorskip("openai.types")
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    body = {"n": 2, "max_tokens": 4, "seed": 1}
    types.Completion.model_validate(ask(**body, logprobs=2).json(), strict=True)
    chat = {**body, "logprobs": True, "top_logprobs": 2}
    ChatCompletion.model_validate(ask("chat/completions", **chat).json(), strict=True)
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    for chunk in events(ask("chat/completions", **chat, **streamed)):
        ChatCompletionChunk.model_validate(chunk, strict=True)
    for chunk in events(ask(**body, logprobs=2, **streamed)):
        # A completion's chunk has no type of its own, and no reason to end before it ends.
        for choice in chunk["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        types.Completion.model_validate(chunk, strict=True)


# ---- models and other routes -----------------------------------------------------------------------------------------


def test_models_are_listed_and_found(client):
    listed = client.get("/v1/models").json()
    assert [one["id"] for one in listed["data"]] == ["tiny", "tiny+a", "tiny+b"]
    assert client.get("/v1/models/tiny+b").json() == listed["data"][2]
    assert client.get("/v1/models/tiny+a+b").json()["id"] == "tiny+a+b"
    missing = client.get("/v1/models/tiny+c")
    assert missing.status_code == 404 and missing.json()["error"]["param"] == "model"


def test_a_model_is_called_as_its_folder_or_by_its_hub_id(tmp_path):
    made = model()
    assert name_of(made) == "model"
    made.config._name_or_path = made.name_or_path = "owner/name"
    assert name_of(made) == "owner/name"
    (tmp_path / "folder").mkdir()
    made.config._name_or_path = made.name_or_path = f"{tmp_path}/folder/"
    assert name_of(made) == "folder"


def test_what_is_loaded_is_described(client):
    assert client.get("/lineas").json() == {
        "model": "tiny",
        "chat": True,
        "context_length": 64,
        "maps": [
            {"name": "a", "strength": 1, "calibrated": 0.7, "range": [0, 1.4], "modules": 3, "method": None},
            {"name": "b", "strength": 1, "calibrated": None, "range": [0, 2], "modules": 3, "method": None},
        ],
    }
    assert client.get("/health").json() == {"status": "ok", "requests": 0}


@pytest.mark.parametrize(
    ("strength", "calibrated", "expected"),
    [(1, None, [0, 2]), (5, None, [0, 5]), (-1, None, [-2, 2]), (1, 3, [0, 6]), (1, -3, [-6, 6])],
)
def test_sliders_reach_what_they_must_show(strength, calibrated, expected):
    maps = make_maps(0, {} if calibrated is None else {"calibration": {"strength": calibrated}})
    app = create_app(model(), tokenizer(), {"a": maps}, strength=strength)
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/lineas").json()["maps"][0]["range"] == expected


def test_a_model_without_chat_template_says_so(ask):
    app = create_app(model(), tokenizer(chat=False), all_maps(), name="tiny")
    with TestClient(app, base_url="http://localhost") as client:
        assert client.get("/lineas").json()["chat"] is False
        found = client.post("/v1/chat/completions", json={"model": "tiny", "messages": CHAT})
    assert found.status_code == 400
    assert found.json()["error"]["param"] == "messages"
    assert found.json()["error"]["message"].endswith("has no chat template; ask for /v1/completions instead")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"concurrency": 0}, ValueError, "concurrency must be at least 1, got 0"),
        ({"concurrency": 1.5}, TypeError, "concurrency must be an int, got float"),
        ({"strength": "strong"}, ValueError, "strength must be a number or 'calibrated', got 'strong'"),
        ({"strength": "calibrated"}, ValueError, r"is for maps that were calibrated.*\(the maps 'b'\)"),
        ({"strength": float("nan")}, ValueError, "strength must be finite, got nan"),
        ({"allow_origins": ["localhost"]}, ValueError, "allow_origin must be such as http://localhost:3000"),
        ({"allow_origins": ["*"]}, ValueError, r"allow_origin must be .*, got '\*'"),
        ({"maps": {"a b": make_maps(0)}}, ValueError, "maps must have names without spaces and '\\+', got 'a b'"),
        ({"maps": {"": make_maps(0)}}, ValueError, "got ''"),
    ],
)
def test_bad_arguments_leave_nothing_on_the_model(arguments, error, message):
    import lineas

    made = model()
    with pytest.raises(error, match=message):
        create_app(made, tokenizer(), arguments.pop("maps", all_maps()), **arguments)
    assert lineas.attached(made) == []


@pytest.mark.parametrize(
    ("module", "width", "message"),
    [
        ("model.layers.9.mlp", 16, "the maps 'wrong' do not fit the model: LlamaForCausalLM has no module"),
        ("model.layers.0.input_layernorm", 17, "'wrong' do not fit the model: .* for 17 neurons, the module has 16"),
        # What tells its width only when it is called.
        ("model.layers.0.mlp", 17, "'wrong' do not fit the model: .* for 17 neurons, the output has 16"),
    ],
)
def test_maps_that_do_not_fit_are_refused_at_once(module, width, message):
    import lineas

    made = model()
    wrong = lineas.SteeringMaps({module: lineas.AffineMap.identity(width)})
    with pytest.raises(ValueError, match=message):
        create_app(made, tokenizer(), {**all_maps(), "wrong": wrong})
    assert lineas.attached(made) == []
