"""Maps in a folder and on the hub, which is replaced at its boundary: the methods of huggingface_hub."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lineas

huggingface_hub = pytest.importorskip("huggingface_hub")
METADATA = {
    "method": "end-to-end",
    "model": "some/base-model",
    "layers": ["a.*", "b|c"],
    "pooling": "mean",
    "version": "9",
}


def maps(**metadata):
    rng = np.random.default_rng(0)
    made = {f"layer.{i}": lineas.AffineMap(rng.uniform(0.5, 1.5, 4), np.zeros(4)) for i in range(2)}
    return lineas.SteeringMaps(made, {**METADATA, **metadata})


class Hub:
    """Keeps what was asked of the hub; one repository, whose files are in `folder`."""

    def __init__(self, monkeypatch, folder, files=()):
        self.calls, self.folder, self.files = [], folder, set(files)
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "file_exists", self.file_exists)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.download)

    def create_repo(self, *args, **kwargs):
        self.calls.append(("create_repo", args, kwargs))
        return SimpleNamespace(repo_id=f"user/{args[0].rpartition('/')[2]}")

    def file_exists(self, *args, **kwargs):
        self.calls.append(("file_exists", args, kwargs))
        return args[1] in self.files

    def upload_folder(self, *, folder_path, ignore_patterns, **kwargs):
        self.calls.append(("upload_folder", (), kwargs))
        for path in sorted(Path(folder_path).iterdir()):
            if path.name not in (ignore_patterns or []):
                (self.folder / path.name).write_bytes(path.read_bytes())
                self.files.add(path.name)
        return SimpleNamespace(commit_url="https://hub/commit", pr_url="https://hub/pr")

    def download(self, *args, **kwargs):
        self.calls.append(("download", args, kwargs))
        return str(self.folder / args[1])


def test_a_folder_that_is_written_again_has_the_same_bytes(tmp_path):
    found = set()
    for _ in range(10):
        maps().save_pretrained(tmp_path)
        found.add(tuple((path.name, path.read_bytes()) for path in sorted(tmp_path.iterdir())))
    assert len(found) == 1


def test_a_folder_gives_the_maps_back(tmp_path, monkeypatch):
    folder = maps().save_pretrained(tmp_path / "made" / "here")
    assert folder == tmp_path / "made" / "here"
    assert {path.name for path in folder.iterdir()} == {"maps.safetensors", "README.md"}
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # not needed for this
    for place in (folder, str(folder)):
        for read in (lineas.load, lineas.SteeringMaps.from_pretrained):
            assert read(place) == maps() and read(place).metadata == maps().metadata
    assert lineas.load(folder / "maps.safetensors") == maps()


def test_the_card_says_what_the_maps_are(tmp_path):
    maps().save_pretrained(tmp_path)
    card = huggingface_hub.ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "some/base-model" and card.data.library_name == "lineas"
    assert "| layers | `a.*`, `b\\|c` |" in card.text and "| method | `end-to-end` |" in card.text
    assert "They change 8 of 8 neurons in\n2 modules." in card.text and maps().summary() in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_a_folder_of_the_base_model_is_not_told(tmp_path):
    (tmp_path / "secret").mkdir()
    for place in (str(tmp_path / "secret"), "not an id", None, 3):
        maps(model=place).save_pretrained(tmp_path / "card")
        text = (tmp_path / "card" / "README.md").read_text()
        assert "secret" not in text and "base_model" not in text and "base model" not in text


def test_push_and_pull(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path)
    assert maps().push_to_hub("name", private=True) == "https://hub/commit"
    assert hub.calls == [
        ("create_repo", ("name",), {"private": True, "exist_ok": True}),
        ("file_exists", ("user/name", "README.md"), {"revision": None}),
        (
            "upload_folder",
            (),
            {"repo_id": "user/name", "commit_message": "Add steering maps", "revision": None, "create_pr": False},
        ),
    ]
    assert 'lineas.load("user/name")' in (tmp_path / "README.md").read_text()
    hub.calls.clear()
    assert lineas.load("user/name", revision="v1", token="t", cache_dir="c") == maps()
    settings = {"revision": "v1", "token": "t", "cache_dir": "c", "local_files_only": False, "library_name": "lineas"}
    assert hub.calls == [("download", ("user/name", "maps.safetensors"), settings)]


def test_a_card_that_is_there_stays(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("by hand")
    hub = Hub(monkeypatch, tmp_path, files=["README.md"])
    made = maps().push_to_hub("user/name", commit_message="Better", revision="b", create_pr=True)
    assert made == "https://hub/pr" and (tmp_path / "README.md").read_text() == "by hand"
    assert hub.calls[2][2]["revision"] == "b" and hub.calls[2][2]["commit_message"] == "Better"
    assert lineas.load("user/name") == maps()


def test_a_token_reaches_the_hub(tmp_path, monkeypatch):
    seen = []
    Hub(monkeypatch, tmp_path)
    original = huggingface_hub.HfApi.__init__
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", lambda self, **k: (seen.append(k), original(self, **k))[0])
    maps().push_to_hub("user/name", token="secret")
    assert seen == [{"token": "secret", "library_name": "lineas"}]


@pytest.mark.parametrize("name", ["a/b/c", "spaces are/wrong", "-a/b"])
def test_what_is_no_id_never_reaches_the_hub(name, tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match="repo_id must be a hub id such as 'user/name', got"):
        maps().push_to_hub(name)
    with pytest.raises(FileNotFoundError, match="is no file or folder, nor a hub id such as 'user/name'"):
        lineas.load(name)
    with pytest.raises(FileNotFoundError, match="'detox' is no file or folder, nor a hub id such as 'user/name'"):
        lineas.load("detox")  # a name alone would be no user's
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: 'user/maps\.safetensors'"):
        lineas.load("user/maps.safetensors")
    with pytest.raises(TypeError, match="repo_id must be a string, got int"):
        maps().push_to_hub(3)
    assert hub.calls == []


def test_a_file_that_is_missing_here_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    hub = Hub(monkeypatch, tmp_path)
    maps().push_to_hub("user/name")
    hub.calls.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    for name, why in (
        ("results/zz.st", "the folder 'results' is"),
        ("results/zz", "the folder 'results' is"),
        ("./zz", "the folder '.' is"),
        ("elsewhere/maps.PT", "its ending is that of a file"),
    ):
        text = f"{name!r} is no file or folder here ({why}); with revision='main' the hub is asked all the same"
        with pytest.raises(FileNotFoundError, match=re.escape(text)):
            lineas.load(name)
    assert hub.calls == []
    (tmp_path / "user").mkdir()
    for options in ({"revision": "main"}, {"token": True}, {"cache_dir": "c"}, {"local_files_only": True}):
        assert lineas.load("user/name", **options) == maps()
    assert lineas.load("other/maps-v0.2") == maps()  # dots are in many names of the hub


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        ("RepositoryNotFoundError", FileNotFoundError, "'user/name' is no file or folder here, and the hub has"),
        ("RevisionNotFoundError", FileNotFoundError, "the hub's 'user/name' has no revision 'v1'"),
        (
            "RemoteEntryNotFoundError",
            FileNotFoundError,
            "'user/name' at revision 'v1' has no maps.safetensors: it holds no",
        ),
    ],
)
def test_answers_of_the_hub_are_told_plainly(kind, raised, message, monkeypatch):
    def fail(*args, **kwargs):
        error = getattr(huggingface_hub.errors, kind)
        raise error.__new__(error)  # without the answer of a server, whose class depends on the library's version

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(raised, match=message):
        lineas.load("user/name", revision="v1")


@pytest.mark.parametrize("way", ["offline", "local_files_only"])
def test_without_the_hub_the_error_says_so(way, tmp_path, monkeypatch):
    """Through the real library, which is told not to go online."""
    if way == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'user/name' is no file or folder here, and not in the cache of"):
        lineas.load("user/name", cache_dir=tmp_path, local_files_only=way != "offline")


def test_a_push_in_offline_mode_says_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="cannot push to 'user/name': huggingface_hub is in offline mode"):
        maps().push_to_hub("user/name", token="none")


def test_folders_and_files_that_are_no_maps(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .* has no maps.safetensors"):
        lineas.SteeringMaps.from_pretrained(tmp_path)
    maps().save(tmp_path / "one.safetensors")
    assert lineas.SteeringMaps.from_pretrained(tmp_path / "one.safetensors") == maps()
    (tmp_path / "maps.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(ValueError, match="is not a sound safetensors file"):
        lineas.SteeringMaps.from_pretrained(tmp_path)


def test_the_library_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for use in (
        lambda: maps().save_pretrained(tmp_path / "x"),
        lambda: maps().push_to_hub("user/name"),
        lambda: lineas.load("user/name"),
    ):
        with pytest.raises(ImportError, match=r'pip install "lineas\[hub\]"'):
            use()
    assert not (tmp_path / "x").exists()
    with pytest.raises(ImportError, match=r"^'user/name' is no file or folder here, and asking the hub needs hugg"):
        lineas.load("user/name")
