"""Which glyph does a picture show, where, and how large? The measure behind the embedded model's figures.

Every glyph of the font is laid over the background that was asked for, at every size and place of a grid, and the
composite nearest to the picture (least squares over all pixels) names it. All places are tried at once by correlation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.data.glyphs import Background, Placement, glyph, paint

SIDE = 48  # pictures are compared at this size: fine enough to tell glyphs apart, and small


@dataclass(frozen=True)
class Match:
    """The best composite with one glyph: where the glyph is, and the squared error left over the whole picture."""

    glyph: Placement
    error: float


@lru_cache(maxsize=16)
def _kernels(subjects: tuple[str, ...], length: int) -> tuple[Tensor, Tensor]:
    """Transforms of what a glyph contributes at `length` pixels, (S, 8, SIDE, SIDE//2 + 1), and its constant, (S,).

    With picture I, background B, glyph g of opacity a and D = I - B the squared error of a composite is
    sum |D|^2 - 2 sum D.(a g) + 2 sum (D.B) a + sum a^2 |g|^2 - 2 sum B.(a^2 g) + sum |B|^2 a^2.
    """
    pictures = [glyph(s).resize((length, length), Image.Resampling.LANCZOS) for s in subjects]
    values = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).float().div(255).permute(0, 3, 1, 2)
    g, a = values[:, :3], values[:, 3:]
    parts = torch.cat([-2 * a * g, 2 * a, -2 * a * a * g, a * a], 1)
    canvas = parts.new_zeros(len(subjects), 8, SIDE, SIDE)
    canvas[..., :length, :length] = parts
    return torch.fft.rfft2(canvas).conj(), (a * a * g * g).sum((1, 2, 3))


def _errors(picture: Tensor, ground: Tensor, subjects: tuple[str, ...], length: int) -> Tensor:
    """Squared error against each glyph at each place, (S, SIDE - length + 1, SIDE - length + 1)."""
    d = picture - ground
    fields = torch.cat([d, (d * ground).sum(0, keepdim=True), ground, ground.square().sum(0, keepdim=True)])
    transforms, constant = _kernels(subjects, length)
    room = SIDE - length + 1
    correlation = torch.fft.irfft2((transforms * torch.fft.rfft2(fields)).sum(1), s=(SIDE, SIDE))[:, :room, :room]
    return d.square().sum() + correlation + constant[:, None, None]


def best_matches(
    picture: np.ndarray, background: Background, subjects: Sequence[str], sizes: tuple[float, float] = (0.55, 0.95)
) -> list[Match]:
    """For each of `subjects` its best composite, nearest first.

    picture: uint8 (H, H, 3); sizes: the smallest and largest glyph tried, as fractions of the side.
    """
    small = _shrink(picture)
    ground = _shrink(paint(background, SIDE))
    names = tuple(subjects)
    best: dict[str, Match] = {}
    for length in range(round(sizes[0] * SIDE), round(sizes[1] * SIDE) + 1, 2):
        errors = _errors(small, ground, names, length)
        least, place = errors.flatten(1).min(1)
        for index, (error, flat) in enumerate(zip(least.tolist(), place.tolist(), strict=True)):
            if names[index] not in best or error < best[names[index]].error:
                top, left = divmod(flat, errors.shape[2])
                found = Placement(names[index], left / SIDE, top / SIDE, length / SIDE)
                best[names[index]] = Match(found, error)
    return sorted(best.values(), key=lambda match: match.error)


def two_matches(picture: np.ndarray, background: Background, subjects: Sequence[str]) -> tuple[Match, Match]:
    """The best glyph, and the best other place for a glyph once the first is taken out of the picture."""
    sizes = (0.36, 0.5)
    first = best_matches(picture, background, subjects, sizes)[0]
    rest = np.array(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX))
    left, top, length = (round(v * SIDE) for v in (first.glyph.left, first.glyph.top, first.glyph.size))
    window = (slice(top, top + length), slice(left, left + length))
    rest[window] = paint(background, SIDE)[window]
    return first, best_matches(rest, background, subjects, sizes)[0]


def gradient_energy(picture: np.ndarray) -> float:
    """Mean squared difference of neighbouring pixels, values in 0..1."""
    values = picture.astype(np.float64) / 255
    return float((np.diff(values, axis=0) ** 2).mean() + (np.diff(values, axis=1) ** 2).mean())


def _shrink(picture: np.ndarray) -> Tensor:
    small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).float().div(255).permute(2, 0, 1)
