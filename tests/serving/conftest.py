"""Clients of the application, and a real server."""

import json

import pytest


@pytest.fixture(scope="session")
def reference():
    from served import Reference

    return Reference()


@pytest.fixture(scope="module")
def client():
    """A client of the application, in this process."""
    from served import TestClient, all_maps, create_app, model, tokenizer

    app = create_app(model(), tokenizer(), all_maps(), name="tiny")
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as made:
        made.engine = app.state.engine
        yield made


@pytest.fixture
def ask(client):
    """Post to a route, with the model and a prompt unless others are given; the response."""

    def post(path="completions", **body):
        usual = {"prompt": "the dog is"} if path == "completions" else {"messages": [{"role": "user", "content": "a"}]}
        content = json.dumps({"model": "tiny", **usual, **body})  # escaped, so that it may hold what UTF-8 does not
        return client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})

    return post


@pytest.fixture(scope="module")
def server():
    """A real server of the tiny model, with a context that takes long to fill and no end of a text but a limit."""
    from served import all_maps, create_app, model, running, tokenizer

    app = create_app(model(context=10**6, endless=True), tokenizer(), all_maps(), name="tiny")
    with running(app) as address:
        yield address, app.state.engine
