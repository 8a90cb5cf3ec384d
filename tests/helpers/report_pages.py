"""Evaluations with known numbers, and the pages that `Evaluation.report` makes of them, parsed."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np

from lineas import Evaluation

METHODS = ("unsteered", "map", "map", "map", "random")
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 1.0)
KL = (0.0, 0.015, 0.08, 0.3, 0.01)
MEANS = (0.1, 0.3, 0.5, 0.9, 0.05)
PROMPTS = ["The film was", "My day was", "Our trip was", "The train was"]
STATISTICS = ("length", "stopped", "distinct_1", "distinct_2", "distinct_3", "repetition_4")
USUAL = (20.0, 0.5, 0.9, 0.95, 0.98, 0.01)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&amp; --> ]]> $x^$ {{ 7*7 }} {% raw %}"


def evaluation(methods=METHODS, strengths=STRENGTHS, prompts=PROMPTS, neutral=3, judges=("joy",), samples=1, **changes):
    """An evaluation with known means; scores and prices differ a little between prompts and between texts."""
    points, count, samples = len(methods), len(prompts), samples if prompts else 0
    spread = np.linspace(-0.02, 0.02, count)[None, :, None] if count else np.zeros((1, 0, 1))
    scores = np.resize(MEANS, points)[:, None, None] + np.zeros((points, count, samples)) + spread
    price = np.zeros((points, neutral, 7))
    price[..., 0], price[..., 1], price[..., 3] = 10, 9, 36
    for k, kl in enumerate(np.resize(KL, points)):
        price[k, :, 4] = 10 * kl * np.linspace(0.9, 1.1, neutral)
        price[k, :, 2] = 36 + 9 * kl
        price[k, :, 5], price[k, :, 6] = kl / 2, round(10 * kl)
    fields = {
        "methods": tuple(methods),
        "strengths": np.array(strengths, np.float64),
        "prompts": list(prompts),
        "continuations": [
            [[f" so good, text {k} {p} {s}" for s in range(samples)] for p in range(count)] for k in range(points)
        ],
        "statistics": np.broadcast_to(USUAL, (points, count, samples, 6)).copy(),
        "scores": {name: scores + k for k, name in enumerate(judges)},
        "price": price,
        "neutral": [f"text {k}" for k in range(neutral)],
        "metadata": {
            "model": "tiny",
            "methods": {"map": {"method": "linear", "layers": ["a.0", "a.1"], "history": {"loss": [1.0] * 50}}},
            "support": {"map": [3, 12]},
            "max_new_tokens": 20,
            "sampling": {"top_p": 0.9},
            "seed": 7,
        },
    }
    return Evaluation(**(fields | changes))


class Node:
    def __init__(self, tag, attributes=(), parent=None):
        self.tag, self.attributes, self.parent, self.children = tag, dict(attributes), parent, []

    def all(self, tag=None, **attributes):
        """Elements below this one, in order; `class_` for "class"."""
        wanted = {name.strip("_").replace("_", "-"): value for name, value in attributes.items()}
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and all(child.attributes.get(n) == v for n, v in wanted.items()):
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    def one(self, tag=None, **attributes):
        (found,) = self.all(tag, **attributes)
        return found

    @property
    def text(self):
        parts = [child if isinstance(child, str) else child.text for child in self.children]
        return " ".join("".join(parts).split())


class Page(HTMLParser):
    """A page as a tree; every element must be closed in the order in which it was opened."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, source):
        super().__init__()
        self.root = self.here = Node("document")
        self.feed(source)
        self.close()
        assert self.here is self.root

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(set(names)) == len(names)
        node = Node(tag, attributes, self.here)
        self.here.children.append(node)
        if tag not in self.VOID:
            self.here = node

    def handle_startendtag(self, tag, attributes):
        self.here.children.append(Node(tag, attributes, self.here))

    def handle_endtag(self, tag):
        assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def check_page(root):
    """What holds for every page: nothing from elsewhere, one script that the policy names, ids that are there."""
    assert root.source.startswith('<!DOCTYPE html>\n<html lang="en">')
    ids = [node.attributes["id"] for node in root.all() if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    for node in root.all():
        assert node.tag not in ("link", "img", "iframe", "object", "embed", "form", "base", "a:href", "image")
        for name, value in node.attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "action", "xlink:href")
            if name == "href":
                assert value.startswith("#") and value[1:] in ids
            if name in ("aria-labelledby", "for"):
                assert value in ids
            assert all(part.startswith("#") for part in re.findall(r"url\(([^)]*)", value or ""))
    style, script = root.one("style"), root.one("script")
    assert "url(" not in style.text and "@import" not in style.text and not script.attributes
    policy = root.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    digest = base64.b64encode(hashlib.sha256(script.children[0].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def rows_of(root, caption):
    """The cells of each row of a table, as nodes."""
    table = next(one for one in root.all("table") if one.one("caption").text == caption)
    return [row.all("th") + row.all("td") for row in table.one("tbody").all("tr")]


def heads_of(root, caption):
    table = next(one for one in root.all("table") if one.one("caption").text == caption)
    return [head.text for head in table.one("thead").all("th")]


def chosen_in(root):
    (chosen,) = [one for one in root.one("select").all("option") if "selected" in one.attributes]
    return chosen.text


def write(folder, found=None, **options):
    """A report of an evaluation, parsed; its text is `source` of what comes back."""
    path = (found or evaluation()).report(folder / "page.html", **options)
    assert path == folder / "page.html"
    source = path.read_bytes().decode()
    root = Page(source).root
    root.source = source
    check_page(root)
    return root


def best_of(root, judge="joy"):
    """The sentences below a judge's heading."""
    section = next(one for one in root.all("section") if one.attributes["aria-labelledby"] == "effect")
    heads = [child for child in section.children if isinstance(child, Node) and child.tag in ("h3", "ul")]
    place = next(k for k, one in enumerate(heads) if one.tag == "h3" and one.text.startswith(judge))
    return [item.text for item in heads[place + 1].all("li")]


def sections(root):
    return [one.attributes["aria-labelledby"] for one in root.all("section")]


def facts_of(node):
    return {one.one("dt").text: one.one("dd").text for one in node.all("div") if one.all("dt")}


def calibrated(**changes):
    facts = {
        "strength": 1.25,
        "range": (1.1, 1.5),
        "budget": {"max_kl": 0.1},
        "measured": {"kl": 0.08, "kl_low": 0.06, "kl_high": 0.12},
    }
    return SimpleNamespace(**(facts | changes))


def calibrations_of(root):
    section = next(one for one in root.all("section") if one.attributes["aria-labelledby"] == "calibration")
    return [one.text for one in section.all("p")]
