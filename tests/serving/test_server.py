"""The server itself, over sockets: streams, OpenAI's own client, many at a time, clients that go away."""

import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import pytest
from served import Reference, model

PROMPTS = ("the dog is", "my neighbour was very happy today and")
STRENGTHS = ({}, {"a": 1.0}, {"a": 0.3, "b": 1.2}, {"b": -0.5})


@pytest.fixture(scope="module")
def endless():
    return Reference(model(context=10**6, endless=True))


@pytest.fixture(scope="module")
def openai_client(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(address, body, path="/v1/completions"):
    """A connection that has asked."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    connection.request(
        "POST", path, json.dumps({"model": "tiny", "prompt": "a", **body}), {"Content-Type": "application/json"}
    )
    return connection


def wait_for_none(engine):
    """Until no request runs or waits; a generation that nobody ended would take hours."""
    for _ in range(6000):
        if not engine.jobs:
            return
        time.sleep(0.01)
    raise AssertionError(f"{engine.jobs} requests go on")


# ---- OpenAI's own client ---------------------------------------------------------------------------------------------


def test_completions_of_openais_client(openai_client, endless):
    asked = {"model": "tiny", "prompt": "the dog is", "max_tokens": 8, "temperature": 0}
    plain = openai_client.completions.create(**asked)
    assert plain.choices[0].text == endless.text("the dog is", max_tokens=8)
    steering = {"lineas": {"maps": ["a", "b"], "strength": {"a": 0.7, "b": 1.2}}}
    steered = openai_client.completions.create(**asked, extra_body=steering)
    expected = endless.text("the dog is", {"a": 0.7, "b": 1.2}, max_tokens=8)
    assert steered.choices[0].text == expected
    assert steered.lineas == {"strengths": {"a": 0.7, "b": 1.2}, "seed": steered.lineas["seed"]}
    stream = openai_client.completions.create(**asked, stream=True, extra_body=steering)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected


def test_chats_of_openais_client(openai_client, endless):
    messages = [{"role": "system", "content": "we are"}, {"role": "user", "content": "the cat"}]
    ids = endless.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    made = endless.generate(ids, {"b": 1}, max_tokens=8)
    expected = endless.tokenizer.decode(made, skip_special_tokens=True)
    asked = {"model": "tiny+b", "messages": messages, "max_completion_tokens": 8, "temperature": 0}
    whole = openai_client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    assert whole.usage.total_tokens == len(ids) + 8
    said, usage = "", None
    for chunk in openai_client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        said += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage
    assert said == expected and usage == whole.usage


def test_errors_of_openais_client(openai_client):
    import openai

    with pytest.raises(openai.BadRequestError, match=r"lineas\.strength must be a number") as error:
        openai_client.completions.create(
            model="tiny", prompt="a", extra_body={"lineas": {"maps": "a", "strength": "much"}}
        )
    assert error.value.param == "lineas.strength" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'") as error:
        openai_client.chat.completions.create(model="other", messages=[{"role": "user", "content": "a"}])
    assert error.value.code == "model_not_found" and error.value.param == "model"
    assert [one.id for one in openai_client.models.list()] == ["tiny", "tiny+a", "tiny+b"]
    assert openai_client.models.retrieve("tiny+a").id == "tiny+a"


def test_a_stream_that_openais_client_closes_ends(openai_client, server):
    with openai_client.completions.create(model="tiny", prompt="a", max_tokens=10**5, stream=True) as stream:
        assert next(stream).choices[0].text
    wait_for_none(server[1])


def test_an_error_in_a_stream_is_raised_by_openais_client(openai_client, monkeypatch):
    import openai

    from lineas.serving import generation

    add = generation._Choice.add

    def broken(self, token, scored):
        if self.tokens == 5:
            raise RuntimeError("lost")
        return add(self, token, scored)

    monkeypatch.setattr(generation._Choice, "add", broken)
    with pytest.raises(openai.APIError, match=r"the server failed \(RuntimeError\)"):
        for _ in openai_client.completions.create(model="tiny", prompt="a", max_tokens=10, stream=True, logprobs=0):
            pass


# ---- many at a time --------------------------------------------------------------------------------------------------


def test_requests_at_the_same_time_get_each_what_it_asked_for(server, endless):
    asked = [(prompt, strengths, stream) for prompt in PROMPTS for strengths in STRENGTHS for stream in (False, True)]
    found, ready = [None] * len(asked), threading.Barrier(len(asked))

    def work(k):
        prompt, strengths, stream = asked[k]
        steering = {"lineas": {"strength": strengths}} if strengths else {}
        ready.wait()
        body = {"prompt": prompt, "temperature": 1.2, "seed": k, "max_tokens": 9, "stream": stream, **steering}
        response = post(server[0], body).getresponse()
        if not stream:
            found[k] = json.load(response)["choices"][0]["text"]
            return
        lines = response.read().decode().split("\n\n")
        chunks = [json.loads(line[6:]) for line in lines if line not in ("", "data: [DONE]")]
        found[k] = "".join(chunk["choices"][0]["text"] for chunk in chunks)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, (prompt, strengths, _) in enumerate(asked):
        assert found[k] == endless.text(prompt, strengths, seed=k, temperature=1.2, max_tokens=9)


def test_a_stream_comes_while_it_is_made_and_leaves_others_their_turn(server):
    address, engine = server
    long = post(address, {"max_tokens": 10**5, "stream": True, "seed": 0})
    response = long.getresponse()
    for _ in range(5):
        assert response.readline().startswith(b"data: ") and response.readline() == b"\n"
    assert engine.jobs == 1  # it goes on
    short = json.load(post(address, {"max_tokens": 5, "lineas": {"maps": "a"}}).getresponse())
    assert short["usage"]["completion_tokens"] == 5 and engine.jobs == 1
    response.close()
    long.close()
    wait_for_none(engine)


# ---- clients that go away --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_its_generation(server, stream):
    address, engine = server
    connections = [post(address, {"max_tokens": 10**5, "stream": stream}) for _ in range(6)]  # two of them wait
    while engine.jobs < 6:
        time.sleep(0.01)
    responses = [connections[0].getresponse()] if stream else []
    assert not responses or responses[0].readline().startswith(b"data: ")
    for one in (*responses, *connections):
        one.close()
    wait_for_none(engine)
    assert json.load(post(address, {"max_tokens": 3}).getresponse())["usage"]["completion_tokens"] == 3
