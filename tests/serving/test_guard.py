"""Pages of others, names of others, and requests that are too large."""

import socket

import pytest
from served import TestClient, all_maps, create_app, model, tokenizer

from lineas.serving import guard


def status(client, **headers):
    response = client.get("/v1/models", headers=headers)
    if response.status_code != 200:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8000",
        "LOCALHOST:8000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.168.0.7",
        socket.gethostname(),
    ],
)
def test_own_names_and_addresses_are_taken(client, host):
    assert status(client, host=host) == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "[::1"]
)
def test_other_names_are_refused(client, host):
    assert status(client, host=host) == 403


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://localhost", 200),
        ("http://localhost:3000", 403),
        ("http://evil.example", 403),
        ("https://localhost.evil.example", 403),
        ("null", 403),
        ("localhost", 200),
    ],
)
def test_pages_of_others_are_refused(client, origin, expected):
    response = client.get("/v1/models", headers={"origin": origin, "host": "localhost"})
    assert response.status_code == expected
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_names_and_pages_may_be_allowed():
    allowed = {"allow_hosts": ["models.example"], "allow_origins": ["http://localhost:3000"]}
    app = create_app(model(), tokenizer(), all_maps(), **allowed)
    with TestClient(app, base_url="http://localhost") as client:
        assert status(client, host="Models.example") == 200
        assert status(client, host="other.example") == 403
        asked = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
        for origin, expected in (("http://localhost:3000", 200), ("http://localhost:3001", 403)):
            before = client.options("/v1/completions", headers={"origin": origin, **asked})
            assert before.status_code == expected
            assert before.headers.get("access-control-allow-origin") == (origin if expected == 200 else None)
        found = client.get("/v1/models", headers={"origin": "http://localhost:3000"})
        assert found.headers["access-control-allow-origin"] == "http://localhost:3000"


def test_large_requests_are_refused(client, monkeypatch):
    monkeypatch.setattr(guard, "LARGEST", 1000)
    small, large = (
        b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "user": "%s"}' % (b"a" * k) for k in (900, 1000)
    )
    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=small, headers=headers).status_code == 200

    def in_parts():
        yield from (large[k : k + 100] for k in range(0, len(large), 100))

    for content in (large, in_parts()):
        response = client.post("/v1/completions", content=content, headers=headers)
        assert response.status_code == 413
        assert response.json()["error"]["message"] == "the request must have at most 1000 bytes"


def test_types_are_not_guessed(client):
    for path in ("/", "/page.js", "/v1/models", "/nothing"):
        assert client.get(path).headers["x-content-type-options"] == "nosniff"
