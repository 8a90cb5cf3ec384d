"""What is asked for wrongly: an error object that names the field, and nothing that stays behind."""

import pytest

LONG = "a " * 64
MESSAGE = {"role": "user", "content": "a"}

WRONG = [
    # body, field, message
    ({"model": "other"}, "model", "there is no model 'other', but: tiny, tiny+a, tiny+b"),
    ({"model": "tiny+"}, "model", "there is no model"),
    ({"model": "tiny+c"}, "model", "there is no model"),
    ({"model": "xtiny+a"}, "model", "there is no model"),
    ({"model": "t\ud800"}, "model", "there is no model"),
    ({"model": 3}, "model", "model: input should be a valid string, got 3"),
    ({"model": None}, "model", "model: input should be a valid string, got None"),
    ({"lineas": "a"}, "lineas", "lineas: "),
    ({"lineas": {"map": "a"}}, "lineas.map", "lineas.map: extra inputs are not permitted, got 'a'"),
    ({"lineas": {"maps": "c"}}, "lineas.maps", "lineas.maps: there are no maps 'c', but: a, b"),
    ({"lineas": {"maps": ["a", "c"]}}, "lineas.maps", "there are no maps 'c'"),
    ({"lineas": {"maps": 3}}, "lineas.maps", "lineas.maps must be a name or a list of names, got 3"),
    ({"lineas": {"maps": ["a", 3]}}, "lineas.maps", "must be a name or a list of names"),
    ({"lineas": {"maps": "a", "strength": "0.5"}}, "lineas.strength", "lineas.strength must be a number, got '0.5'"),
    ({"lineas": {"maps": "a", "strength": True}}, "lineas.strength", "lineas.strength must be a number, got True"),
    ({"lineas": {"maps": "a", "strength": [1]}}, "lineas.strength", "lineas.strength must be a number, got [1]"),
    ({"lineas": {"maps": "a", "strength": {"a": "x"}}}, "lineas.strength.a", "lineas.strength.a must be a number"),
    ({"lineas": {"maps": "a", "strength": 10**400}}, "lineas.strength", "lineas.strength must be finite, got inf"),
    ({"lineas": {"strength": 0.5}}, "lineas.maps", "lineas.maps must say which maps the strength is for: a, b"),
    ({"lineas": {"maps": [], "strength": 0.5}}, "lineas.maps", "must say which maps"),
    ({"lineas": {"strength": {"c": 1}}}, "lineas.strength", "lineas.strength: there are no maps 'c'"),
    ({"lineas": {"maps": "a", "strength": {"b": 1}}}, "lineas.strength", "has 'b', which is none of the maps ['a']"),
    ({"model": "tiny+a", "lineas": {"maps": "b"}}, "lineas.maps", "lineas.maps are ['b'], but the model tiny+a is"),
    ({"lineas": {"maps": "a", "strength": 1e38}}, "lineas.strength", "the model's logits are not finite at the"),
    ({"max_tokens": 0}, "max_tokens", "max_tokens: input should be greater than or equal to 1, got 0"),
    ({"max_tokens": 2.5}, "max_tokens", "max_tokens: input should be a valid integer, got 2.5"),
    ({"max_tokens": True}, "max_tokens", "max_tokens: input should be a valid integer, got True"),
    ({"temperature": -1}, "temperature", "temperature: input should be greater than or equal to 0, got -1"),
    ({"temperature": 2.5}, "temperature", "temperature: input should be less than or equal to 2"),
    ({"temperature": "1"}, "temperature", "temperature: input should be a valid number, got '1'"),
    ({"top_p": 1.5}, "top_p", "top_p: input should be less than or equal to 1"),
    ({"n": 0}, "n", "n: input should be greater than or equal to 1"),
    ({"n": 129}, "n", "n: input should be less than or equal to 128"),
    ({"seed": 1.5}, "seed", "seed: input should be a valid integer"),
    ({"seed": 2**63}, "seed", "seed: input should be less than 9223372036854775808"),
    ({"stop": ""}, "stop", "stop must be a text that is not empty, or a list of such texts, got ''"),
    ({"stop": ["a", 3]}, "stop", "stop must be a text"),
    ({"stream": "yes"}, "stream", "stream: input should be a valid boolean"),
    (
        {"stream": False, "stream_options": {"include_usage": True}},
        "stream_options",
        "stream_options needs stream=true",
    ),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty is not supported, got 0.5"),
    ({"logit_bias": {"3": 1}}, "logit_bias", "logit_bias is not supported"),
    ({"strenght": 1}, "strenght", "there is no field strenght"),
    ({"strength\ud800": 1}, None, "the body of the request must be a JSON object"),
]
WRONG_COMPLETIONS = [
    ({"prompt": ""}, "prompt", "prompt must not be empty"),
    ({"prompt": []}, "prompt", "prompt must be a text, a list of tokens, or a list of them, got []"),
    ({"prompt": ["a", ""]}, "prompt[1]", "prompt[1] must not be empty"),
    ({"prompt": [[1], []]}, "prompt[1]", "prompt[1] must not be empty"),
    ({"prompt": ["a", 3]}, "prompt[1]", "prompt[1] must be a text or a list of tokens, got 3"),
    ({"prompt": None}, "prompt", "prompt must be a text"),
    ({"prompt": [1, 99]}, "prompt", "prompt must hold tokens from 0 to 57, got 99"),
    ({"prompt": [-1]}, "prompt", "prompt must hold tokens from 0 to 57, got -1"),
    ({"prompt": "\ud800"}, "prompt", "prompt is no text: surrogates not allowed at character 0"),
    ({"prompt": LONG}, "prompt", "prompt has 64 tokens, and the model's context length is 64: no room for an answer"),
    ({"prompt": ["a", LONG]}, "prompt", "prompt has 64 tokens"),
    ({"max_tokens": 62}, "max_tokens", "max_tokens must be at most 61, got 62: the prompt has 3 tokens of 64"),
    ({"logprobs": 6}, "logprobs", "logprobs: input should be less than or equal to 5"),
    ({"logprobs": True}, "logprobs", "logprobs: input should be a valid integer"),
    ({"echo": True}, "echo", "echo is not supported, got True"),
    ({"suffix": "a"}, "suffix", "suffix is not supported"),
    ({"best_of": 2}, "best_of", "best_of is not supported"),
    ({"messages": [MESSAGE]}, "messages", "there is no field messages"),
]
WRONG_CHATS = [
    ({"messages": []}, "messages", "messages must be a list of at least one message, got []"),
    ({"messages": "a"}, "messages", "messages must be a list"),
    ({"messages": ["a"]}, "messages[0]", "messages[0] must be an object with role and content, got 'a'"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "must be system, user or assistant, got None"),
    ({"messages": [MESSAGE, {"role": "robot", "content": "a"}]}, "messages[1].role", "got 'robot'"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content must be a text or a list of parts"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]", "messages[0].content[0] must be a"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages[0].content[0]",
        "messages[0].content[0] must be a text, as",
    ),
    ({"messages": [{"role": "user", "content": "\udfff"}]}, "messages[0].content", "is no text: surrogates"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", "messages[0]: tools are not supported"),
    ({"messages": [{**MESSAGE, "tool_calls": [{}]}]}, "messages[0]", "tools are not supported"),
    ({"messages": [{"role": "user", "content": LONG}]}, "messages", "messages has 66 tokens, and the model's context"),
    ({"max_completion_tokens": 62}, "max_completion_tokens", "max_completion_tokens must be at most 61"),
    ({"tools": [{"type": "function"}]}, "tools", "tools is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "response_format is not supported"),
    ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs: input should be less than or equal to 20"),
    ({"logprobs": 2}, "logprobs", "logprobs: input should be a valid boolean"),
    ({"prompt": "a"}, "prompt", "there is no field prompt"),
]


def check(response, param, message, status=None):
    assert 400 <= response.status_code < 500 if status is None else response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert message in error["message"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("body", "param", "message"), [*WRONG, *WRONG_COMPLETIONS])
def test_wrong_completions(ask, client, body, param, message, stream):
    check(ask(**{"stream": stream, "max_tokens": 3, **body}), param, message)
    assert client.engine.jobs == 0


@pytest.mark.parametrize(("body", "param", "message"), [*WRONG, *WRONG_CHATS])
def test_wrong_chats(ask, client, body, param, message):
    check(ask("chat/completions", **body), param, message)
    assert client.engine.jobs == 0


def test_missing_fields_are_named(client):
    for body, param in (({"prompt": "a"}, "model"), ({"model": "tiny"}, "prompt")):
        response = client.post("/v1/completions", json=body)
        check(response, param, f"{param} is missing", status=400)
        assert response.json()["error"]["code"] == "missing_required_parameter"


def test_what_asks_for_nothing_is_taken(ask):
    nothing = {"frequency_penalty": 0.0, "presence_penalty": None, "logit_bias": {}, "user": "me", "max_tokens": 2}
    assert ask(**nothing, best_of=1, echo=False, suffix=None, stop=None, seed=None, n=None).status_code == 200
    idle = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "metadata": {"a": "b"}}
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "cat"}]
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": parts, "name": "me"}]
    assert ask("chat/completions", **nothing, **idle, messages=messages).status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(client, number):
    for field, param in (('"temperature": %s', "temperature"), ('"lineas": {"maps": "a", "strength": %s}', None)):
        body = f'{{"model": "tiny", "prompt": "a", {field % number}}}'
        response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        check(response, param or "lineas.strength", "finite" if param is None else "temperature: ")


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        ("{", "application/json", "the body of the request is no JSON: Expecting property name"),
        ("", "application/json", "the body of the request must be a JSON object"),
        ("[]", "application/json", "the body of the request must be a JSON object"),
        ('"a"', "application/json", "the body of the request must be a JSON object"),
        ('{"model": "tiny", "prompt": "a"}', "text/plain", "sent with Content-Type: application/json"),
        (b"\xff\xfe", "application/json", "no JSON"),
    ],
)
def test_bodies_that_are_no_json(client, content, kind, message):
    check(client.post("/v1/completions", content=content, headers={"content-type": kind}), None, message, status=400)


def test_deep_json_is_refused(client):
    body = b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500 and "message" in response.json()["error"]


def test_routes_that_there_are_not(client):
    check(client.get("/v1/nothing"), None, "GET /v1/nothing: Not Found", status=404)
    wrong = client.get("/v1/completions")
    check(wrong, None, "GET /v1/completions: Method Not Allowed", status=405)
    assert wrong.headers["allow"] == "POST"
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_a_template_that_refuses_messages_says_why(client, monkeypatch):
    template = "{% if messages | length == 1 %}{{ raise_exception('a system message, please') }}{% endif %}"
    monkeypatch.setattr(client.engine.codec.tokenizer, "chat_template", template)
    for messages, message in (
        ([MESSAGE], "messages: the model's chat template refuses them: a system message, please"),
        ([MESSAGE] * 2, "messages: the chat template makes no tokens of them"),
    ):
        response = client.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        check(response, "messages", message, status=400)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_server_is_no_error_of_the_next_request(ask, client, reference, monkeypatch, caplog, stream):
    def broken(*args, **kwargs):
        raise RuntimeError("secret of the server")

    with monkeypatch.context() as patch:
        patch.setattr(client.engine.model, "generate", broken)
        response = ask(lineas={"maps": "a"}, stream=stream)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "server_error" and error["message"] == "the server failed (RuntimeError); its log says more"
    assert "secret of the server" in caplog.text
    assert ask(temperature=0).json()["choices"][0]["text"] == reference.text("the dog is")
