"""Maps in a folder or a repository of the Hugging Face Hub: the safetensors file and a card, nothing that is run."""

import os
import tempfile
from pathlib import Path
from typing import Any

from .files import FILE, save, write_atomically
from .metadata import calibrated_strength
from .steering import SteeringMaps

CARD = "README.md"
_OF_FILES = {".bin", ".ckpt", ".json", ".npy", ".npz", ".pkl", ".pt", ".pth", ".safetensor", ".sft", ".st", ".tmp"}

_CARD = """\
---
{data}
---

# Steering maps{of}

Sparse affine maps of activations, one slope and one shift a neuron, for lineas. They change {support} of {d} neurons in
{modules}.

| | |
| --- | --- |
{rows}

```python
import lineas

maps = lineas.load({place})
with maps.attach(model, strength=0.8):  # 0 is off, 1 the maps as they were fitted
    ...
```

## Modules

```text
{summary}
```
"""


def _library(purpose: str = "this") -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors  # it imports neither by itself
        import huggingface_hub.utils
    except ImportError as error:
        raise ImportError(f'{purpose} needs huggingface_hub: pip install "lineas[hub]"') from error
    return huggingface_hub


def card(maps: SteeringMaps, repo_id: str | None = None) -> str:
    """A model card in Markdown, with metadata that the hub reads."""
    hub, metadata = _library(), maps.metadata
    base = metadata.get("model")
    # A model that was loaded from a folder has its path for a name, which is nobody's business.
    base = base if isinstance(base, str) and not os.path.exists(base) and _is_id(hub, base) else None
    tags = ["lineas", "activation-steering", "steering-vector"]
    facts = {"base model": base} | {name: metadata.get(name) for name in ("method", "layers", "pooling", "tokens")}
    facts["lineas"] = metadata.get("version")
    rows = [f"| {name} | {_cell(value)} |" for name, value in facts.items() if value is not None]
    strength = calibrated_strength(metadata)
    if strength is not None:
        budget = metadata["calibration"].get("budget")
        asked = [f"{name} = {value}" for name, value in budget.items()] if isinstance(budget, dict) else []
        rows.append(f"| calibrated strength | {_cell([f'{strength:.4g}', *asked])} |")
    rows.append(f"| changed neurons | {maps.support} of {maps.d} ({maps.support / maps.d:.1%}) |")
    return _CARD.format(
        data=hub.ModelCardData(library_name="lineas", base_model=base, tags=tags).to_yaml(),
        of=f" for {base}" if base else "",
        support=maps.support,
        d=maps.d,
        modules=f"{len(maps)} module{'s' if len(maps) > 1 else ''}",
        rows="\n".join(rows),
        place=f'"{repo_id}"' if repo_id else '"this-folder"',
        summary=maps.summary(),
    )


def _cell(value: Any) -> str:
    texts = value if isinstance(value, list) else [value]
    return ", ".join(f"`{text}`" for text in texts).replace("|", "\\|").replace("\n", " ")


def _is_id(hub: Any, name: str) -> bool:
    try:
        hub.utils.validate_repo_id(name)
    except hub.errors.HFValidationError:
        return False
    return True


def save_pretrained(maps: SteeringMaps, folder: str | os.PathLike[str], *, repo_id: str | None = None) -> Path:
    """Write the maps and a card that describes them into a folder, as a repository of the hub has them.

    Parameters
    ----------
    folder : str or PathLike
        Made where it is missing. ``maps.safetensors`` and ``README.md`` in it are replaced.
    repo_id : str, optional
        The repository that the card loads the maps from. Default: this folder.

    Returns
    -------
    pathlib.Path
        The folder.

    Raises
    ------
    ImportError
        If huggingface_hub, which writes the card's metadata, is not installed (``pip install "lineas[hub]"``).
    OSError
        If the files cannot be written.
    """
    text = card(maps, repo_id)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save(maps, folder / FILE)
    write_atomically(str(folder / CARD), text.encode())
    return folder


def push_to_hub(
    maps: SteeringMaps,
    repo_id: str,
    *,
    commit_message: str = "Add steering maps",
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload the maps and a card to the Hugging Face Hub, into a new or an existing model repository.

    The metadata go along as they are, the base model's name or folder among them. A card that is there already
    stays.

    Parameters
    ----------
    repo_id : str
        ``"user/name"``.
    commit_message : str, default "Add steering maps"
    private : bool, optional
        Whether a new repository is private. Default: as the hub does it.
    token : str or bool, optional
        Default: that of ``hf auth login``.
    revision : str, optional
        The branch. Default: the main one.
    create_pr : bool, default False
        Open a pull request instead.

    Returns
    -------
    str
        The address of the commit or pull request.

    Raises
    ------
    ImportError
        If huggingface_hub is not installed (``pip install "lineas[hub]"``).
    TypeError, ValueError
        If `repo_id` is no id of a repository.
    ConnectionError
        If huggingface_hub is in offline mode.
    huggingface_hub.errors.HfHubHTTPError
        If the hub refuses.
    """
    hub = _library()
    if not isinstance(repo_id, str):
        raise TypeError(f"repo_id must be a string, got {type(repo_id).__name__}")
    if not _is_id(hub, repo_id):
        raise ValueError(f"repo_id must be a hub id such as 'user/name', got {repo_id!r}")
    api = hub.HfApi(token=token, library_name="lineas")
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(maps, folder, repo_id=repo_id)  # before anything is made on the hub
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            save_pretrained(maps, folder, repo_id=repo_id)  # with the user's name in front
            # A card that somebody wrote stays.
            kept = [CARD] if api.file_exists(repo_id, CARD, revision=revision) else None
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                ignore_patterns=kept,
            )
        except hub.errors.OfflineModeIsEnabled as error:
            raise ConnectionError(f"cannot push to {repo_id!r}: huggingface_hub is in offline mode") from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def download(name: str, revision: str | None, **options: Any) -> str:
    """The file with the maps of a repository on the hub, in the cache; options and errors as those of `load`."""
    nothing = f"{name!r} is no file or folder"
    folder, _, file = name.partition("/")
    if name.count("/") != 1:
        raise FileNotFoundError(f"{nothing}, nor a hub id such as 'user/name'")
    # A slip in the name of a file here is told at once: offline, asking the hub takes half a minute.
    meant = revision is not None or any(options.values())
    if not meant and (os.path.isdir(folder) or os.path.splitext(file)[1].lower() in _OF_FILES):
        why = f"the folder {folder!r} is" if os.path.isdir(folder) else "its ending is that of a file"
        raise FileNotFoundError(f"{nothing} here ({why}); with revision='main' the hub is asked all the same")
    hub = _library(f"{nothing} here, and asking the hub")
    if not _is_id(hub, name):
        raise FileNotFoundError(f"{nothing}, nor a hub id such as 'user/name'")
    what = repr(name) + (f" at revision {revision!r}" if revision is not None else "")
    try:
        return hub.hf_hub_download(name, FILE, revision=revision, library_name="lineas", **options)
    except hub.errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"{what} is no file or folder here, and not in the cache of huggingface_hub, and the hub was not asked or "
            "could not be reached"
        ) from error
    except hub.errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"the hub's {name!r} has no revision {revision!r}") from error
    except hub.errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{nothing} here, and the hub has no such repository, or a private one (token=)"
        ) from error
    except hub.errors.EntryNotFoundError as error:
        raise FileNotFoundError(f"the hub's {what} has no {FILE}: it holds no maps of lineas") from error
