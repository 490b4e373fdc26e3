"""Lanczos resampling of rows as they come: the last step to a scale that no number of network passes gives.

Separable, with a = 3, widened when making smaller (antialiasing), normalised; pixel centres at i + 0.5. The same
weights as Pillow's LANCZOS on mode "F". It never clips: values may overshoot 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

_BLOCK = 64  # outputs per matrix product: their weights form a dense matrix of about _BLOCK * step + 6 columns


class Axis:
    """How `out` pixels along one axis arise from a stretch of `length` pixels, beginning at `start`, of `size` pixels.

    The stretch may be any part of the axis; what lies outside it, up to the ends of the axis, is used for the
    pixels near its borders.
    """

    def __init__(self, size: int, out: int, start: float = 0.0, length: float | None = None) -> None:
        self.size, self.out, self._start = size, out, start
        self._step = (size if length is None else length) / out
        self._stretch = max(self._step, 1.0)
        self.identity = out == size and start == 0 and self._step == 1

    def reads(self, first: int, stop: int) -> tuple[int, int]:
        """The input pixels [low, high) that the outputs [first, stop) need."""
        return self._window(first)[0], self._window(stop - 1)[1]

    def ready(self, available: int) -> int:
        """How many outputs, from the first on, need only the first `available` input pixels."""
        if available >= self.size:
            return self.out
        reach = (available - 3 * self._stretch - 0.5 - self._start) / self._step - 0.5
        return min(max(int(reach), 0), self.out)

    def weights(self, first: int, stop: int) -> torch.Tensor:
        """(stop - first, high - low) float32: outputs [first, stop) from the inputs that `reads` names."""
        low, high = self.reads(first, stop)
        centres = self._start + (np.arange(first, stop) + 0.5) * self._step
        x = (np.arange(low, high)[None] + 0.5 - centres[:, None]) / self._stretch
        values = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
        for row, output in enumerate(range(first, stop)):  # a window is cut to whole pixels, as Pillow cuts it
            begin, end = self._window(output)
            values[row, : begin - low] = 0
            values[row, end - low :] = 0
        return torch.from_numpy((values / values.sum(1, keepdims=True)).astype(np.float32))

    def _window(self, output: int) -> tuple[int, int]:
        centre = self._start + (output + 0.5) * self._step
        support = 3 * self._stretch
        low = min(max(math.floor(centre - support + 0.5), 0), self.size - 1)
        return low, max(min(math.floor(centre + support + 0.5), self.size), low + 1)


def lanczos_rows(strips: Iterable[torch.Tensor], rows: Axis, columns: Axis) -> Iterator[torch.Tensor]:
    """Resizes a picture that comes in strips (N, C, any, columns.size) from top to bottom, `rows.size` rows in all.

    Yields strips (N, C, some, columns.out), `rows.out` rows in all, and holds only the rows that outputs still need.
    """
    if rows.identity and columns.identity:
        yield from strips
        return
    held: torch.Tensor | None = None
    first_held = done = 0
    for strip in strips:
        strip = _along_width(strip, columns)
        held = strip if held is None else torch.cat([held, strip], 2)
        available = first_held + held.shape[2]
        ready = rows.ready(available)
        while done < ready:
            stop = min(done + _BLOCK, ready)
            low, high = rows.reads(done, stop)
            weights = rows.weights(done, stop).to(held.device)
            yield weights @ held[:, :, low - first_held : high - first_held]
            done = stop
        if done < rows.out:
            keep_from = min(rows.reads(done, done + 1)[0], available)
            held, first_held = held[:, :, keep_from - first_held :].clone(), keep_from


def _along_width(strip: torch.Tensor, axis: Axis) -> torch.Tensor:
    if axis.identity:
        return strip.contiguous()
    strip = strip.contiguous()
    out = strip.new_empty((*strip.shape[:3], axis.out))
    for first in range(0, axis.out, _BLOCK):
        stop = min(first + _BLOCK, axis.out)
        low, high = axis.reads(first, stop)
        out[..., first:stop] = strip[..., low:high] @ axis.weights(first, stop).to(strip.device).T
    return out
