"""Pictures that are read by rows, whatever they come from: the engine's only way to see its input.

Decoding of files is elsewhere: a file that is decoded by rows becomes a `StripSource`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from diptych.errors import ImageError


class Source(Protocol):
    """A batch of pictures (batch, C, height, width) of the same size."""

    batch: int
    height: int
    width: int

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The rows [start, stop) as (batch, C, stop - start, width) float32 in 0..1."""


class TensorSource:
    """A tensor (N, C, H, W) float, on any device."""

    def __init__(self, picture: torch.Tensor) -> None:
        self.batch, _, self.height, self.width = picture.shape
        self._picture = picture

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self._picture[:, :, start:stop].float()


class ArraySource:
    """An array (N, H, W, C) of uint8, uint16 or float32: only the rows in use exist as float."""

    def __init__(self, array: np.ndarray) -> None:
        self.batch, self.height, self.width, _ = array.shape
        self._array = array

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return array_to_tensor(self._array[:, start:stop])


class StripSource:
    """A picture that comes in strips (N, C, any, width) from top to bottom, for example another stage's finished rows.

    Holds the rows of the last request and what has come after them; requests must not go further back.
    """

    def __init__(self, strips: Iterable[torch.Tensor], batch: int, height: int, width: int) -> None:
        self.batch, self.height, self.width = batch, height, width
        self._strips = iter(strips)
        self._held: list[torch.Tensor] = []
        self._first = self._end = 0

    def rows(self, start: int, stop: int) -> torch.Tensor:
        assert start >= self._first, "rows that were let go are asked for again"
        while self._held and self._first + self._held[0].shape[2] <= start:
            self._first += self._held.pop(0).shape[2]
        while self._end < stop:
            strip = next(self._strips, None)
            if strip is None:
                raise ImageError(f"the picture ends after {self._end} of its {self.height} rows")
            self._end += strip.shape[2]
            if self._end > start:
                self._held.append(strip)
            else:
                self._first = self._end
        offset = start - self._first
        rows = torch.cat([strip[:, :, max(offset - before, 0) :] for before, strip in self._placed()], 2)
        return rows[:, :, : stop - start]

    def _placed(self) -> list[tuple[int, torch.Tensor]]:
        placed, before = [], 0
        for strip in self._held:
            placed.append((before, strip))
            before += strip.shape[2]
        return placed


def array_to_tensor(array: np.ndarray) -> torch.Tensor:
    """(N, H, W, C) uint8, uint16 or float32 -> (N, C, H, W) float32 in 0..1, channels last in memory."""
    if array.dtype == np.uint16:  # torch 2.1 has no uint16
        array = array.astype(np.int32)
    array = np.ascontiguousarray(array)
    tensor = torch.from_numpy(array if array.flags.writeable else array.copy()).permute(0, 3, 1, 2)
    if tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32).div_(255 if tensor.dtype == torch.uint8 else 65535)


def tensor_to_array(tensor: torch.Tensor, dtype: np.dtype) -> np.ndarray:
    """(N, C, H, W) float in 0..1 -> (N, H, W, C) of `dtype` (uint8, uint16, float32), clamped, rounded to nearest."""
    rows = tensor.permute(0, 2, 3, 1)
    if dtype == np.float32:
        return rows.clamp(0, 1).cpu().numpy()
    levels = 255 if dtype == np.uint8 else 65535
    rows = rows.mul(levels).round_().clamp_(0, levels)
    return rows.to(torch.uint8 if dtype == np.uint8 else torch.int32).cpu().numpy().astype(dtype, copy=False)
