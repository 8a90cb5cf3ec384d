"""The modules of a model that maps can sit on, as a table, and those that suit best."""

import glob
import html
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

from torch import nn
from tqdm.auto import tqdm

from .._names import matching
from ..inputs.batches import Batch
from ..inputs.call import Forward, call, unwrap
from ..inputs.frozen import frozen
from ..inputs.prompts import read
from ..maps.metadata import Layers
from . import outputs
from .modules import check_model, check_runs, likely_slip, named_modules, output_width, resolve
from .settings import as_tokenizer, optional

# Norms between attention and feed-forward, where their name does not say "post"; with a number before them, in a block.
_AFTER_ATTENTION = re.compile(
    r"\.ln_?2$"  # GPT-2 and its like, RWKV
    r"|\.norm_2$"  # MPT
    r"|\.layer_norm2$"  # CLIP, SigLIP
    r"|\.layernorm_after$"  # ViT
    r"|\.final_layer_norm$"  # OPT, BART, Whisper: of the layer, not of the model
    r"|\.attention\.output\.LayerNorm$"  # BERT and its like
    r"|\.sa_layer_norm$"  # DistilBERT
    r"|\.(pre_ff_layernorm|channel_pre_norm|norm_ffn)$"  # Jamba, Bamba and Falcon-H1, RecurrentGemma, xLSTM
    r"|\.layers\.\d+\.ffn_norm$"  # LFM2
    r"|backbone\.layers\.\d+\.norm$"  # Mamba, whose blocks are one thing alone
    r"|encoder\.block\.\d+\.layer\.1\.layer_norm$|decoder\.block\.\d+\.layer\.2\.layer_norm$"  # T5
)
_POST = re.compile(r"\.post_\w*norm$")
_IN_A_BLOCK = re.compile(r"(^|\.)\d+\.")
# Norms of queries and keys, which act on one attention head at a time.
_OF_HEADS = re.compile(r"(^|\.)((q|k|query|key)_?(layer)?_?norm|norm_(added_)?[qk])$", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """A row of `Sites`: modules of one class with names alike; several widths are ascending."""

    glob: str
    kind: str
    width: int | tuple[int, ...] | None
    count: int
    suggested: bool
    names: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    calls: int | None = None


class Sites(Sequence[Site]):
    """The modules of a model that maps can sit on, as `lineas.sites` returns them: printed as a table.

    A sequence of rows, each for modules of one class whose names differ in numbers only, with ``glob`` (what to pass as
    ``layers=``; it matches these modules and no other), ``kind`` (their class), ``width`` (neurons of their outputs: a
    number, several, or None where only a run tells), ``count``, ``suggested``, ``names``, and where the model ran
    ``shape`` (of the output of the first of them) and ``calls`` (how often the one that is called most was: beyond 1,
    fits look at the first call, and attached maps act at every call)::

        found = lineas.sites(model)
        maps = lineas.fit_incremental(model, source, target, layers=found.suggested, tokenizer=tokenizer)
        wide = [row.glob for row in found if row.kind == "Linear" and row.width == 4096]

    Attributes
    ----------
    suggested : list of str
        Globs of the modules that suit best, which fits and `lineas.collect` take where no layers are given; empty where
        no module is a norm.
    """

    def __init__(self, rows: Iterable[Site], suggested: Sequence[str], model: str) -> None:
        self._rows, self.suggested, self._model = tuple(rows), list(suggested), model

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...
    def __getitem__(self, index: int | slice) -> Site | Sequence[Site]:
        return self._rows[index]

    def _cells(self) -> list[list[str]]:
        """Texts of the table, the head first."""
        ran = any(row.shape is not None for row in self)
        table = [["glob", "kind", "width", "count", *(["shape"] if ran else []), ""]]
        for row in self:
            width = "-" if row.width is None else str(row.width).strip("()")
            shape = [str(list(row.shape)) if row.shape is not None else "-"] if ran else []
            notes = ["suggested"] if row.suggested else []
            notes += [f"{row.calls} calls"] if row.calls is not None and row.calls > 1 else []
            table.append([row.glob, row.kind, width, str(row.count), *shape, ", ".join(notes)])
        return table

    def _summary(self) -> str:
        if not self.suggested:
            return "nothing is suggested: no module is a norm"
        names = [name for row in self if row.suggested for name in row.names]
        alone = len(self.suggested) == 1 and not likely_slip(names)
        return f"suggested: layers={self.suggested[0] if alone else self.suggested!r}"

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        right = {"width", "count"}
        lines = [
            "  ".join(
                cell.rjust(width) if name in right else cell.ljust(width)
                for cell, width, name in zip(cells, widths, table[0], strict=True)
            ).rstrip()
            for cells in table
        ]
        return "\n".join([f"{self._model}: {sum(row.count for row in self)} modules", *lines, self._summary()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = self._cells()
        rows = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
        for row, cells in zip(self, body, strict=True):
            texts = [f"<code>{html.escape(cells[0])}</code>", *map(html.escape, cells[1:])]
            style = ' style="font-weight: bold"' if row.suggested else ""
            rows.append(f"<tr{style}>" + "".join(f"<td>{text}</td>" for text in texts) + "</tr>")
        caption = f"{html.escape(self._model)}. {html.escape(self._summary())}"
        return f"<table><caption>{caption}</caption>{''.join(rows)}</table>"


def sites(
    model: nn.Module,
    data: Any = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    forward: Forward | None = None,
) -> Sites:
    """List the modules of a model that maps can sit on, and suggest some of them.

    Modules of one class whose names differ in numbers only, such as those of a layer, share a row. Suggested are the
    sites of the paper (LinEAS, arXiv 2503.10679): in language models the norms after attention, in image models every
    norm; in models that it does not treat, the norms in their place. Lists of modules, dropout and rotary embeddings
    are left out. Experts that are fused into one tensor have no module of their own to be listed.

    Parameters
    ----------
    model : torch.nn.Module
        A model. Without `data` nothing is run: its weights may be on any device, also on "meta".
    data : texts, conversations, token ids, batch or list of batches, optional
        As in `collect`. The first batch (of texts, the first two) is run once. Then rows come in the order of their
        first calls and tell widths and shapes that only a run can, and which modules are called several times; those
        that were not called or whose output can take no map are left out.
    tokenizer, max_length, forward
        As in `collect`.

    Returns
    -------
    lineas.Sites
        A sequence of rows, printed as a table, in notebooks too; its ``suggested`` are globs for all suggested modules.

    Raises
    ------
    TypeError
        If `model` is no torch module, `tokenizer` no tokenizer, or `data` no texts or batch.
    ValueError
        If texts come without a tokenizer, or `data` with a model without weights.

    Examples
    --------
    >>> found = lineas.sites(model)  # doctest: +SKIP
    >>> acts = lineas.collect(model, texts, layers=found.suggested, tokenizer=tokenizer)  # doctest: +SKIP
    """
    check_model(model)
    optional(as_tokenizer, tokenizer, "tokenizer")
    modules = named_modules(model)
    found = {name: module for name, module in modules.items() if _is_candidate(module)}
    ran: dict[str, _Ran] = {}
    if data is not None:
        check_runs(model)
        batch = read(data, "data", tokenizer=tokenizer, max_length=max_length).first()
        ran = _run(model, batch, found, forward)
        found = {name: found[name] for name in ran}
    chosen = _suggest(modules, found)
    groups: dict[tuple[str, str, bool], list[str]] = {}
    for name, module in found.items():
        groups.setdefault((_template(name), type(module).__name__, name in chosen), []).append(name)
    rows = []
    for (_, kind, suggested), names in groups.items():
        for pattern, members in _patterns(names, list(modules)):
            widths = {ran[name].width if name in ran else output_width(found[name]) for name in members}
            told = (ran[members[0]].shape, max(ran[name].calls for name in members)) if ran else (None, None)
            rows.append(Site(pattern, kind, _common(widths), len(members), suggested, tuple(members), *told))
    if ran:
        order = list(ran)
        rows.sort(key=lambda row: order.index(row.names[0]))
    return Sites(rows, _layers([row for row in rows if row.suggested], modules), type(unwrap(model)).__name__)


def choose_layers(model: nn.Module, layers: Layers | None, *, say: bool) -> tuple[list[str], Layers]:
    """Names of the modules that a user chose, and what to note as "layers".

    None stands for those that `sites` suggests, which with `say` a line on stderr names; ValueError where there are
    none.
    """
    if layers is not None:
        return resolve(model, layers), layers
    found = sites(model).suggested
    if not found:
        raise ValueError(
            f"layers: none are suggested for {type(unwrap(model)).__name__}, which has no norms: choose some of those "
            "that lineas.sites(model) lists"
        )
    names = resolve(model, found)
    if say:
        tqdm.write(f"layers={found}, as lineas.sites suggests: {len(names)} modules", file=sys.stderr)
    return names, found


def _is_candidate(module: nn.Module) -> bool:
    """Whether maps may sit on a module: lists of modules have no output, others none of their own."""
    if type(module).forward is nn.Module.forward:
        return False
    if isinstance(module, nn.modules.dropout._DropoutNd | nn.Identity):
        return False
    return "rotary" not in type(module).__name__.lower()  # cosines and sines


def _common(widths: set[int | None]) -> int | tuple[int, ...] | None:
    known = sorted(width for width in widths if width is not None)
    if len(known) < len(widths) or not known:
        return None
    return known[0] if len(known) == 1 else tuple(known)


@dataclass
class _Ran:
    """What a run tells of a module: shape and width of its first output, and how often it was called."""

    shape: tuple[int, ...]
    width: int
    calls: int = 0


def _run(model: nn.Module, batch: Batch, found: dict[str, nn.Module], forward: Forward | None) -> dict[str, _Ran]:
    """What a run tells of the modules whose outputs take a map, in the order of their first calls."""
    ran: dict[str, _Ran] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        try:
            tensor = outputs.take(output, name)
            axis = outputs.channel_axis(module, tensor, name)
        except (TypeError, ValueError):
            return
        if tensor.ndim > 1:
            ran.setdefault(name, _Ran(tuple(tensor.shape), tensor.shape[axis])).calls += 1

    with ExitStack() as hooks:
        for name, module in found.items():
            hooks.enter_context(module.register_forward_hook(partial(note, name)))
        with frozen(model, gradients=False):
            call(model, batch, forward)
    return ran


# --- what to suggest --------------------------------------------------------------------------------------------------


def _suggest(modules: dict[str, nn.Module], found: dict[str, nn.Module]) -> set[str]:
    """Names of the suggested modules among `found`.

    Language models: the norms after attention that the paper maps (`post_attention_layernorm` and, where a block has
    it, `post_feedforward_layernorm`), or the ones in their place. Others: every norm, as the paper does in UNets. Norms
    inside of norms and those of attention heads are no sites.
    """
    candidates = {name: type(module).__name__ for name, module in modules.items() if _is_candidate(module)}
    norms = {name for name, kind in candidates.items() if "norm" in kind.lower()}
    outer = [name for name in found if name in norms and not _OF_HEADS.search(name) and not _inside(name, norms)]
    blocks = [name for name in outer if _IN_A_BLOCK.search(name)]
    post = [name for name in blocks if _POST.search(name)]
    return set(post or [name for name in blocks if _AFTER_ATTENTION.search(name)] or outer)


def _inside(name: str, norms: set[str]) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in norms for end in range(1, len(parts)))


def _layers(rows: Sequence[Site], modules: dict[str, nn.Module]) -> list[str]:
    """Globs for all modules of the rows: the paper's for UNets where it matches just them, else those of the rows."""
    if len(rows) > 2 and set(matching("**.*norm*", modules)) == {name for row in rows for name in row.names}:
        return ["**.*norm*"]
    return [row.glob for row in rows]


# --- globs ------------------------------------------------------------------------------------------------------------


def _template(name: str) -> str:
    """A name with its numbers as ``*``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _patterns(names: Sequence[str], everything: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Globs that together match `names`, all of one template, and each of them none but its own of `everything`.

    As few as are found: ``*`` for every number, or for those that differ; else `names` are divided by the number that
    differs least.
    """
    split = [name.split(".") for name in names]
    numbers = [k for k, part in enumerate(split[0]) if part.isdigit()]
    differing = [k for k in numbers if len({parts[k] for parts in split}) > 1]
    for places in (numbers, differing):
        pattern = ".".join("*" if k in places else glob.escape(part) for k, part in enumerate(split[0]))
        if set(matching(pattern, everything)) == set(names):
            return [(pattern, list(names))]
    place = min(differing, key=lambda k: len({parts[k] for parts in split}))
    divided: dict[str, list[str]] = {}
    for name, parts in zip(names, split, strict=True):
        divided.setdefault(parts[place], []).append(name)
    return [pair for members in divided.values() for pair in _patterns(members, everything)]
