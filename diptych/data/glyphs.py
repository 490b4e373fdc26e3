"""Glyph compositions: an endless, deterministic set of captioned pictures.

A composition is one to three glyphs of Noto Color Emoji on a plain, gradient or patterned background, with a caption
made by the same recipe. Names are Unicode's, synonyms are CLDR's, colours are CSS's. The font and the CLDR file are
needed to make pictures, never to run a model that was trained on them.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from diptych.errors import ModelNotFound

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR = "/usr/share/unicode/cldr/common/annotations/en.xml"
STRIKE = 109  # the only size of the bitmaps in the font; glyphs are 136 x 128 there

# CSS Color Module Level 4, section 6.1, with the words told apart.
COLOURS: dict[str, tuple[int, int, int]] = {
    name: ImageColor.getrgb(name.replace(" ", ""))  # type: ignore[misc]
    for name in (
        "black,white,grey,silver,dark grey,red,dark red,crimson,tomato,salmon,orange,dark orange,gold,yellow,khaki,"
        "beige,brown,chocolate,tan,olive,green,dark green,light green,lime,spring green,teal,turquoise,cyan,sky blue,"
        "light blue,steel blue,royal blue,blue,dark blue,navy,indigo,purple,violet,orchid,magenta,pink,hot pink,"
        "lavender,plum,maroon"
    ).split(",")
}
PATTERNS = ("striped", "checkered", "dotted")
HELD_OUT = 10  # one composition in so many is never trained on


@dataclass(frozen=True)
class Background:
    """kind: "plain", "gradient" or one of PATTERNS; colours: one name of COLOURS for plain, else two."""

    kind: str
    colours: tuple[str, ...]

    def words(self) -> str:
        if self.kind == "plain":
            return self.colours[0]
        if self.kind == "gradient":
            return f"{self.colours[0]} to {self.colours[1]} gradient"
        return f"{self.kind} {self.colours[0]} and {self.colours[1]}"


@dataclass(frozen=True)
class Placement:
    """A glyph in a picture: left, top and size as fractions of the picture's side."""

    subject: str
    left: float
    top: float
    size: float


@dataclass(frozen=True)
class Composition:
    """What is in a picture, and one way to say it."""

    glyphs: tuple[Placement, ...]
    background: Background
    caption: str

    @property
    def held_out(self) -> bool:
        """Whether this pairing of subjects and background belongs to the test split, whatever its wording."""
        key = "|".join(sorted(g.subject for g in self.glyphs)) + "|" + self.background.words()
        return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT == 0


# ------------------------------------------------------------------------------------------------ the font


def font_file() -> Path:
    """The glyph font: `$DIPTYCH_GLYPH_FONT` or Debian's place. Raises ModelNotFound with what to install."""
    path = Path(os.environ.get("DIPTYCH_GLYPH_FONT", FONT))
    if not path.is_file():
        raise ModelNotFound(
            f"The glyph font {path} is not there: install Noto Color Emoji (Debian: fonts-noto-color-emoji) or set "
            "DIPTYCH_GLYPH_FONT to NotoColorEmoji.ttf."
        )
    return path


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(font_file()), STRIKE)


@cache
def glyph(subject: str) -> Image.Image:
    """The glyph named `subject` (a Unicode name in lower case) as a square RGBA picture of side 136."""
    try:
        character = unicodedata.lookup(subject)
    except KeyError:
        raise ValueError(f"{subject!r} is not the name of a character.") from None
    return draw_character(character)


def draw_character(character: str) -> Image.Image:
    """One character of the font in the middle of a transparent square of side 136."""
    canvas = Image.new("RGBA", (136, 136))
    ImageDraw.Draw(canvas).text((0, 0), character, font=_font(), embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise ValueError(f"The glyph font has no picture of {character!r}.")
    cut = canvas.crop(box)
    square = Image.new("RGBA", (136, 136))
    square.paste(cut, ((136 - cut.width) // 2, (136 - cut.height) // 2))
    return square


@lru_cache(maxsize=1)
def all_subjects() -> tuple[str, ...]:
    """Unicode names, in lower case, of every single character beyond Latin-1 that the font draws in colour."""
    names = []
    for code in (*range(0x2010, 0x3300), *range(0x1F000, 0x1FB00)):
        name = unicodedata.name(chr(code), "").lower()
        if name and _font().getmask(chr(code)).getbbox() is not None:
            names.append(name)
    return tuple(names)


def read_subjects(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Subject names from a text file, one a line, `#` begins a comment; every one must be a glyph of the font."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"The list of subjects {path} cannot be read: {error.strerror}.") from None
    subjects = tuple(name for line in lines if (name := line.split("#")[0].strip()))
    if not subjects:
        raise ValueError(f"The list of subjects {path} is empty.")
    for subject in subjects:
        glyph(subject)
    return subjects


# ------------------------------------------------------------------------------------------------ words


Vocabulary = Mapping[str, tuple[str, ...]]


def vocabulary(subjects: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each subject its own name and CLDR's words that mean this subject alone among `subjects`.

    Where the CLDR file is missing (`$DIPTYCH_CLDR` or Debian's place) there are only the names.
    """
    path = Path(os.environ.get("DIPTYCH_CLDR", CLDR))
    words: dict[str, list[str]] = {subject: [subject.removesuffix(" face")] for subject in subjects}
    if path.is_file():
        by_character = {unicodedata.lookup(subject): subject for subject in subjects}
        for node in ElementTree.parse(path).iter("annotation"):
            subject = by_character.get(node.get("cp", ""))
            if subject and node.text:
                words[subject] += [word.strip() for word in node.text.lower().split("|") if re.search("[a-z]", word)]
    uses = Counter(word for found in words.values() for word in set(found))
    return {
        subject: (subject, *sorted({w for w in found if uses[w] == 1 and w != subject and w.isascii()}))
        for subject, found in words.items()
    }


COMMON_WORDS = frozenset(
    ["a", "an", "and", "background", "gradient", "next", "on", "the", "three", "to", "two", *PATTERNS]
    + [word for name in COLOURS for word in name.split()]
)


def article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun[:-1] + "ies" if noun.endswith("y") and noun[-2] not in "aeiou" else noun + "s"


def _caption(
    rng: np.random.Generator, vocabulary: Vocabulary, subjects: Sequence[str], same: bool, background: Background
) -> str:
    def said(subject: str) -> str:
        return subject if rng.random() < 0.7 else str(rng.choice(vocabulary[subject]))

    articles = rng.random() < 0.8
    if same:
        count = ("two ", "three ")[len(subjects) - 2]
        what = count + plural(said(subjects[0]))
    else:
        nouns = [article(said(s)) if articles else said(s) for s in subjects]
        joint = " and " if rng.random() < 0.6 else " next to "
        what = nouns[0] if len(nouns) == 1 else ", ".join(nouns[:-1]) + joint + nouns[-1]
    style, words = rng.random(), background.words()
    if style < 0.7:
        return f"{what} on {article(words) if articles else words} background"
    if style < 0.8:
        return f"on {article(words)} background, {what}"
    if style < 0.9:
        return f"{what}, {words} background"
    return f"{what} on {words}" if background.kind == "plain" else f"{what} on {article(words)}"


# ------------------------------------------------------------------------------------------------ compositions


def compose(
    rng: np.random.Generator,
    vocabulary: Vocabulary,
    counts: Sequence[float] = (0.7, 0.2, 0.1),
    sizes: tuple[float, float] = (0.55, 0.95),
    grid: int = 0,
    spread: float = 1.0,
) -> Composition:
    """One composition of either split, drawn from `rng`.

    counts: probabilities of one, two and three glyphs; sizes: the smallest and largest single glyph, of the side;
    grid: places and sizes are whole parts of the side, 1/grid each, 0 for any (with one part for each latent of an
    autoencoder a glyph has the same latents everywhere); spread: 1 for any place, and any size of several glyphs, 0 for
    the middle of both, several in a row.
    """
    subjects = list(vocabulary)
    number = 1 + int(rng.choice(3, p=np.asarray(counts) / np.sum(counts)))
    same = number > 1 and rng.random() < 0.2
    chosen = (
        [str(rng.choice(subjects))] * number if same else [str(s) for s in rng.choice(subjects, number, replace=False)]
    )
    kind = str(rng.choice(["plain", "gradient", *PATTERNS], p=[0.7, 0.15, 0.05, 0.05, 0.05]))
    names = [str(c) for c in rng.choice(list(COLOURS), 1 if kind == "plain" else 2, replace=False)]
    background = Background(kind, tuple(names))
    caption = _caption(rng, vocabulary, chosen, same, background)
    return Composition(_place(rng, chosen, sizes, grid, spread), background, caption)


def _place(
    rng: np.random.Generator, subjects: Sequence[str], sizes: tuple[float, float], grid: int, spread: float
) -> tuple[Placement, ...]:
    """One glyph anywhere; several side by side or, with spread, one above the other, anywhere in cells of their own."""

    def between(low: float, high: float) -> float:
        if not grid:
            return float(rng.uniform(low, high))
        first, last = math.ceil(low * grid - 1e-6), math.floor(high * grid + 1e-6)
        return float(rng.integers(min(first, last), last + 1)) / grid

    def somewhere(low: float, high: float) -> float:
        middle, reach = (low + high) / 2, spread * (high - low) / 2
        return between(middle - reach, middle + reach)

    number = len(subjects)
    if number == 1:
        size = between(*sizes)
        return (Placement(subjects[0], somewhere(0, 1 - size), somewhere(0, 1 - size), size),)
    across = rng.random() < 1 - spread / 4
    cell = 1 / number
    placements = []
    for index, subject in enumerate(subjects):
        size = somewhere(0.75 * cell, cell)
        along = somewhere(index * cell, (index + 1) * cell - size)
        aside = somewhere(0, 1 - size)
        placements.append(Placement(subject, *((along, aside) if across else (aside, along)), size))
    return tuple(placements)


# ------------------------------------------------------------------------------------------------ pictures


def render(composition: Composition, side: int) -> np.ndarray:
    """The picture, uint8 (side, side, 3)."""
    canvas = Image.fromarray(paint(composition.background, side))
    for placed in composition.glyphs:
        length = max(1, round(placed.size * side))
        picture = glyph(placed.subject).resize((length, length), Image.Resampling.LANCZOS)
        left, top = (min(round(v * side), side - length) for v in (placed.left, placed.top))
        canvas.paste(picture, (left, top), picture)
    return np.asarray(canvas)


def paint(background: Background, side: int) -> np.ndarray:
    """The background alone, uint8 (side, side, 3)."""
    first, second = (np.array(COLOURS[c], np.float32) for c in (background.colours * 2)[:2])
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / side
    if background.kind == "plain":
        mix = np.zeros_like(x)
    elif background.kind == "gradient":
        mix = y
    elif background.kind == "striped":
        mix = np.floor(x * 8) % 2
    elif background.kind == "checkered":
        mix = (np.floor(x * 8) + np.floor(y * 8)) % 2
    else:
        mix = ((x * 6 % 1 - 0.5) ** 2 + (y * 6 % 1 - 0.5) ** 2 < 0.08).astype(np.float32)
    return (first + (second - first) * mix[..., None]).round().astype(np.uint8)


def render_batch(batch: Iterable[Composition], side: int) -> np.ndarray:
    """uint8 (N, side, side, 3)."""
    return np.stack([render(composition, side) for composition in batch])
