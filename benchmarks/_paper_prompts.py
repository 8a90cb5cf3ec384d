"""Prompts for the concepts of section 4.4 of the paper (arXiv 2503.10679), where no file brings others.

The paper's own, which a language model wrote, are in its supplement. These have one thing each, in a place, and
nothing of the fifteen concepts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

CONCEPTS = {
    "vaporwave": "vaporwave style",
    "lush": "lush, overgrown with plants",
    "low-poly": "low-poly style",
    "ukiyo-e": "ukiyo-e woodblock print",
    "fantasy": "fantasy art",
    "robot": "with a robot",
    "axolotl": "with an axolotl",
    "book": "with a book",
    "car": "with a car",
    "hourglass": "with an hourglass",
    "macro": "macro shot",
    "fisheye": "fisheye lens",
    "bokeh": "bokeh",
    "underwater": "underwater",
    "tilt-shift": "tilt-shift photography",
}
"""Styles, objects and views, and the tag that stands behind a prompt for each."""

_FITTED = """\
A loaf of bread on a wooden board
A lighthouse on a rocky coast
An old man feeding pigeons in a square
A bowl of oranges by the window
A narrow street after the rain
A brown horse behind a fence
A girl running along the beach
A teapot and two cups on a table
A railway station in the morning
A windmill on a low hill
A black cat asleep on a sofa
A market stall with vegetables
A stone bridge over a river
A violin leaning against a chair
A farmhouse between fields of wheat
A boy flying a kite
A desk with a lamp and a telephone
A snowy path between fir trees
A fisherman mending a net
A vase of tulips on the stairs
A bus stop in the fog
A bakery window with cakes
A flock of sheep on a slope
A swimming pool without anybody in it
A woman playing the piano
A red barn under dark clouds
A pair of boots by the door
A harbour with small boats
A playground with swings
A clock tower at noon
A dog waiting outside a shop
A row of houses along a canal"""

_SEEN = """\
A castle on a hill above a valley
A busy crossing at dusk
A forest in the snow with the sun behind the trees
A calm lake under the stars
An apple tree on top of a mound
A lion resting on a rock
A kitchen with copper pans on the wall
A cyclist on a country road
A church between poplars
A basket of eggs on straw
A street musician with a guitar
A field of sunflowers
A wooden cabin by a stream
A tram in front of a theatre
A child drawing on a pavement
A plate of pasta with basil
A goose crossing a yard
A balcony with drying clothes
A mountain pass with a small inn
A woman reading a letter
A workshop with saws and planes
A white sail on a grey sea
An owl on a branch
A park bench covered with leaves
A cup of coffee on a window sill
A ferry leaving the shore
A potter at the wheel
A garden gate with roses
A train on a viaduct
A rainy terrace with folded chairs
A donkey carrying baskets
A village in a gorge"""

NEUTRAL = "neutral"
NEUTRAL_NAMES = ("neutral", "none")
EVALUATION = "evaluation"


def read(path: str | None) -> dict[str, list[str]]:
    """Lists of prompts by name, of a JSON file or those above: "neutral", "evaluation", and concepts.

    Of a file, neutral prompts may be called "none" as well; where it has none for the evaluation, these are they. Where
    it has none for a concept, its tag behind the neutral ones makes them.
    """
    if path is None:
        return {NEUTRAL: _FITTED.splitlines(), EVALUATION: _SEEN.splitlines()}
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    texts = isinstance(found, dict) and all(
        isinstance(entry, list) and all(isinstance(text, str) for text in entry) for entry in found.values()
    )
    if not texts:
        raise SystemExit(f"{path}: expected a JSON object of lists of prompts")
    named = {plain(name): [text.strip() for text in prompts] for name, prompts in found.items()}
    neutral = next((named[plain(name)] for name in NEUTRAL_NAMES if plain(name) in named), None)
    if neutral is None:
        raise SystemExit(f"{path}: there are no prompts called {' or '.join(NEUTRAL_NAMES)}")
    return named | {NEUTRAL: neutral, EVALUATION: named.get(EVALUATION, neutral)}


def plain(name: str) -> str:
    """A name without signs and plural: "Low_poly" is "low-poly", "robots" is "robot"."""
    return re.sub(r"[\W_]+", "", name.lower()).removesuffix("s")


def tagged(prompts: list[str], concept: str) -> list[str]:
    """Prompts with the concept's tag behind each."""
    return [f"{prompt.rstrip('. ')}, {CONCEPTS[concept]}" for prompt in prompts]
