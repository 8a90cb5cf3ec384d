"""``lineas serve``: what is wrong is said before it listens, Ctrl-C ends it, and what runs meanwhile."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn
from served import Reference, all_maps, model, tokenizer

import lineas
from lineas import cli
from lineas.serving import command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that never ends by itself, with a long context, and files of maps."""
    folder = tmp_path_factory.mktemp("serve")
    made = model(context=10**6, endless=True)
    made.save_pretrained(folder / "tiny")
    tokenizer().save_pretrained(folder / "tiny")
    for name, maps in all_maps().items():
        maps.save(folder / f"{name}.safetensors")
    lineas.SteeringMaps({"model.layers.0.mlp": lineas.AffineMap.identity(17)}).save(folder / "wide.safetensors")
    return folder


@pytest.fixture
def fails(folder, capsys, monkeypatch):
    """Run the command in the folder: exit code 2 and the message in one line on stderr, before it listens."""

    def run(*arguments, message):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(command, "listen", lambda *_: pytest.fail("it listens"))
        assert cli.main(["serve", "tiny", "--quiet", "--port", "0", *arguments]) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line]
        assert len(err) == 1 and err[0].startswith("lineas: error: ")
        assert message in err[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--maps", "none.safetensors"], "No such file or directory: 'none.safetensors'"),
        (["--maps", "x=a.safetensors", "x=b.safetensors"], "maps: a.safetensors and b.safetensors are both called 'x'"),
        (["--maps", "a+b=a.safetensors"], "maps must have names without spaces and '+', got 'a+b'"),
        (["--maps", "a="], "maps must be FILE or NAME=FILE, got 'a='"),
        (["--maps", "a.safetensors", "wide.safetensors"], "the maps 'wide' do not fit the model: model.layers.0.mlp"),
        (["--maps", "a.safetensors", "b.safetensors", "--strength", "calibrated"], "(the maps 'b')"),
        (["--maps", "a.safetensors", "--strength", "nan"], "--strength must be finite, got nan"),
        (["--maps", "a.safetensors", "--port", "70000"], "--port must be from 0 to 65535, got 70000"),
        (["--maps", "a.safetensors", "--port", "-1"], "--port must be from 0 to 65535, got -1"),
        (["--maps", "a.safetensors", "--host", "203.0.113.1"], "--host: 203.0.113.1 is no address of this machine"),
        (["--maps", "a.safetensors", "--host", "no name"], "--host: there is no address 'no name'"),
        (["--maps", "a.safetensors", "--concurrency", "0"], "--concurrency must be at least 1, got 0"),
        (["--maps", "a.safetensors", "--allow-origin", "*"], "--allow-origin must be such as http://localhost:3000"),
    ],
)
def test_what_is_wrong_is_said_before_it_listens(fails, arguments, message):
    fails(*arguments, message=message)


def test_a_port_in_use_is_said_before_anything_is_loaded(fails, monkeypatch):
    monkeypatch.setattr(cli, "_load_maps", lambda _: pytest.fail("maps are loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = f"--port {port} of 127.0.0.1 is in use: choose another, or 0 for any free one"
        fails("--maps", "a.safetensors", "--port", str(port), message=message)


def test_two_that_are_bound_do_not_listen_both():
    with command.open_port("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with command.open_port("127.0.0.1", port) as second:
            assert command.listen(first, "127.0.0.1", port) == f"http://127.0.0.1:{port}"
            with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is in use"):
                command.listen(second, "127.0.0.1", port)


def test_missing_packages_are_named(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    fails("--maps", "a.safetensors", message='this command needs FastAPI and uvicorn: pip install "lineas[serve]"')


def test_maps_have_the_names_of_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("odd=name.safetensors").touch()
    given = ["folder/a.safetensors", "b=folder/a.safetensors", "owner/maps", "odd=name.safetensors"]
    assert command.name_maps(given) == {
        "a": "folder/a.safetensors",
        "b": "folder/a.safetensors",
        "maps": "owner/maps",
        "odd=name": "odd=name.safetensors",
    }


def test_help_describes_the_options(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    options = ("--maps", "--strength", "--host", "--port", "--name", "--concurrency", "--allow-host", "--allow-origin")
    assert all(option in shown for option in (*options, "--dtype", "--device"))


@pytest.fixture
def started(folder):
    """Starts the command in a process of its own; gives it and its port."""
    running = []

    def start(*arguments):
        made = subprocess.Popen(
            [sys.executable, "-m", "lineas.cli", "serve", "tiny", "--port", "0", "--quiet", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(made)
        line = made.stdout.readline()
        assert "Ctrl-C ends it" in line, made.stderr.read()
        return made, line

    yield start
    for one in running:
        one.kill()
        one.communicate()


def ask(port, body):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    content = json.dumps({"model": "tiny", "prompt": "the dog is", **body})
    connection.request("POST", "/v1/completions", content, {"Content-Type": "application/json"})
    return connection.getresponse()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_which_ends_what_runs(started, number):
    process, line = started("--maps", "a.safetensors", "second=b.safetensors", "--strength", "0.5")
    assert line.startswith("tiny with maps a, second: http://127.0.0.1:")
    port = int(line.split(":")[3].split()[0])
    found = json.load(ask(port, {"model": "tiny+second", "temperature": 0}))
    alone = Reference(model(context=10**6, endless=True))
    assert found["choices"][0]["text"] == alone.text("the dog is", {"b": 0.5})

    stream = ask(port, {"max_tokens": 10**5, "stream": True, "logprobs": 0})
    assert stream.readline().startswith(b"data: ")
    process.send_signal(number)
    last = stream.read().decode().rstrip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the server is shutting down"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "lineas: the server has ended"
    with pytest.raises(ConnectionRefusedError):
        ask(port, {})


def test_who_opens_it_to_others_is_told(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    arguments = ["tiny", "--quiet", "--port", "0", "--maps", "a.safetensors", "--host", "0.0.0.0", "--name", "mine"]
    assert cli.main(["serve", *arguments]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("mine with maps a: http://0.0.0.0:")
    assert "lineas: everybody who can reach this address can use the model" in err.splitlines()
