"""The examples of docs/serving.md, as they stand there, with a tiny model and another port."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from served import Reference, all_maps, create_app, model, running, tokenizer

from lineas import cli
from lineas.serving import command

PAGE = Path(__file__).parents[2].joinpath("docs", "serving.md").read_text(encoding="utf-8")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "How was your day at work?"}]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def named_maps():
    return dict(zip(("positive", "formal"), all_maps().values(), strict=True))


@pytest.fixture(scope="module")
def address():
    app = create_app(model(context=1000, endless=True), tokenizer(), named_maps(), name=NAME)
    with running(app) as found:
        yield found


def here(source, address):
    assert "http://localhost:8000" in source
    return source.replace("http://localhost:8000", address)


def test_the_command_is_understood():
    install, start = next(block.splitlines() for block in blocks("sh") if "pip" in block)
    assert install == "pip install 'lineas[serve]'"
    args = cli._parser().parse_args(shlex.split(start)[1:])
    assert args.model == NAME and list(command.name_maps(args.maps)) == list(named_maps())
    assert (args.host, args.port, args.concurrency) == ("127.0.0.1", 8000, 4)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_request_of_curl(address):
    (request,) = (block for block in blocks("sh") if "curl" in block)
    script = here(request, address).replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
    made = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    found = json.loads(made.stdout)
    assert found["lineas"]["strengths"] == {"positive": 0.7, "formal": 1.2}
    assert found["usage"]["completion_tokens"] == 40


def test_the_examples_of_openais_package(address, capsys):
    pytest.importorskip("openai")
    (example,) = (block for block in blocks("python") if "OpenAI" in block)
    exec(compile(here(example, address), "serving.md", "exec"), {})
    alone = Reference(model(context=1000, endless=True))
    alone.maps = named_maps()
    ids = alone.tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=True)["input_ids"]
    made = [alone.generate(ids, {"positive": one}, seed=0, max_tokens=40) for one in (0, 0.5, 1.0)]
    texts = [alone.tokenizer.decode(one, skip_special_tokens=True) for one in made]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [f"{strength} {text}" for strength, text in zip((0, 0.5, 1.0), texts, strict=True)]
    assert len(set(texts)) == 3 and len(lines[3].split()) > 10


def test_the_application_in_python(monkeypatch):
    import uvicorn

    started = []
    monkeypatch.setattr(uvicorn, "run", lambda app, port: started.append((app, port)))
    (example,) = (block for block in blocks("python") if "create_app" in block)
    exec(
        compile(example, "serving.md", "exec"),
        {"model": model(), "tokenizer": tokenizer(), "maps": all_maps()["a"]},
    )
    ((app, port),) = started
    assert port == 8000 and app.state.loaded.models == ["mine", "mine+positive"]


def test_the_options_are_those_of_the_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    table = PAGE.partition("| option |")[2].partition("\n\n")[0]
    assert set(re.findall(r"--[a-z][a-z-]+", table)) == shown
