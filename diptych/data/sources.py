"""Where a trainer's batches come from: glyph compositions or a folder of pictures, behind one method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from diptych.data import folders, glyphs


class Source(Protocol):
    def batch(self, rng: np.random.Generator, number: int, side: int) -> tuple[np.ndarray, list[str]]:
        """Pictures, uint8 (number, side, side, 3), and their captions, all drawn from `rng`."""

    def captions(self, rng: np.random.Generator, number: int) -> list[str]:
        """About `number` captions to learn words from; none where the data has none."""

    def held_out(self) -> Source:
        """What is not trained on; of a folder: other crops of the same pictures."""

    def words(self) -> dict[str, list[str]] | None:
        """`{"subjects": [...], "words": [...]}`, what a model of these data can draw and what it can read, if known."""


@dataclass(frozen=True)
class DataConfig:
    """The TOML table `[data]`: either `folder`, or `subjects`, a list of glyph names (see `glyphs.read_subjects`).

    counts, sizes, grid, spread: of the compositions, see `glyphs.compose`.
    """

    folder: str | None = None
    subjects: str | None = None
    counts: tuple[float, ...] = (0.7, 0.2, 0.1)
    sizes: tuple[float, float] = (0.55, 0.95)
    grid: int = 0
    spread: float = 1.0

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.subjects is None):
            raise ValueError("data needs either `folder` or `subjects`.")
        if len(self.counts) != 3 or min(self.counts) < 0 or sum(self.counts) <= 0:
            raise ValueError(f"counts must be three probabilities, not {self.counts}.")

    def open(self) -> Source:
        """Raises ImageError, ModelNotFound or ValueError where there is nothing to read."""
        if not 0 < self.sizes[0] <= self.sizes[1] <= 1:
            raise ValueError(f"sizes must be two fractions of the side, the smaller first, not {self.sizes}.")
        if self.grid < 0 or not 0 <= self.spread <= 1:
            raise ValueError(f"grid must be at least 0 and spread from 0 to 1, not {self.grid} and {self.spread}.")
        if self.folder is not None:
            return FolderSource(tuple(folders.find_pictures(self.folder)))
        assert self.subjects is not None
        return GlyphSource(glyphs.read_subjects(self.subjects), self.counts, False, self.sizes, self.grid, self.spread)


@dataclass(frozen=True)
class FolderSource:
    pictures: tuple[folders.Picture, ...]

    def batch(self, rng: np.random.Generator, number: int, side: int) -> tuple[np.ndarray, list[str]]:
        chosen = [self.pictures[i] for i in rng.integers(len(self.pictures), size=number)]
        pictures = [folders.random_crop(folders.load_rgb(picture.path), side, rng) for picture in chosen]
        return np.stack(pictures), [picture.caption for picture in chosen]

    def captions(self, rng: np.random.Generator, number: int) -> list[str]:
        return [picture.caption for picture in self.pictures if picture.caption]

    def held_out(self) -> FolderSource:
        return self

    def words(self) -> None:
        return None


@dataclass(frozen=True)
class GlyphSource:
    """Compositions of the training split; `held_out()` gives the other one."""

    subjects: tuple[str, ...]
    counts: tuple[float, ...] = (0.7, 0.2, 0.1)
    test_split: bool = False
    sizes: tuple[float, float] = (0.55, 0.95)
    grid: int = 0
    spread: float = 1.0

    @cached_property
    def vocabulary(self) -> dict[str, tuple[str, ...]]:
        return glyphs.vocabulary(self.subjects)

    def held_out(self) -> GlyphSource:
        return replace(self, test_split=True)

    def compositions(self, rng: np.random.Generator, number: int) -> list[glyphs.Composition]:
        found: list[glyphs.Composition] = []
        while len(found) < number:
            composition = glyphs.compose(rng, self.vocabulary, self.counts, self.sizes, self.grid, self.spread)
            if composition.held_out == self.test_split:
                found.append(composition)
        return found

    def batch(self, rng: np.random.Generator, number: int, side: int) -> tuple[np.ndarray, list[str]]:
        chosen = self.compositions(rng, number)
        return glyphs.render_batch(chosen, side), [composition.caption for composition in chosen]

    def captions(self, rng: np.random.Generator, number: int) -> list[str]:
        return [composition.caption for composition in self.compositions(rng, number)]

    def words(self) -> dict[str, list[str]]:
        known = {word for names in self.vocabulary.values() for name in names for word in name.split()}
        return {"subjects": sorted(self.subjects), "words": sorted(known | glyphs.COMMON_WORDS)}
