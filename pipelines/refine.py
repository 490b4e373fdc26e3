"""Denoising in tiles: pictures larger than a model can hold, drawn by the model at the size it was made for.

At every step the UNet looks at overlapping tiles of the latents, and where they overlap its predictions are averaged,
so that one scheduler takes one step for the whole picture: MultiDiffusion (Bar-Tal et al. 2023, equation 5), with
weights that fall to nothing at a tile's border in place of equal ones, and with the tiles inside a little elsewhere at
every step, so that what one step leaves of a border the next one looks over. It knows no pipeline's loop: it stands in
for the UNet within it. Enlarging the picture beforehand, and what is denoised how far, is `finish`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from diptych.errors import Cancelled
from diptych.upscalers.passes import Cancel

OVERLAP = 0.25
"""Of a tile's side, what it has in common with its neighbour, at least."""
HOLDS = 1.5
"""How many times the area that a model was made for it draws as a whole."""
_GOLDEN = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, never come near each other soon


class TiledUNet:
    """A UNet for latents of any size. Has the attributes of the one that it runs.

    tile: (height, width) of tiles in latent pixels. overlap: what neighbours have in common on average, at least, in
    latent pixels; at some steps it is half of that.
    """

    def __init__(self, unet: Any, tile: tuple[int, int], overlap: tuple[int, int], cancel: Cancel | None) -> None:
        self._unet, self._tile, self._overlap, self._cancel = unet, tile, overlap, cancel
        self._timestep: float | None = None
        self._step = -1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __call__(self, sample: torch.Tensor, timestep: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor]:
        """What the UNet predicts for `sample` (N, C, h, w), from its tiles. Raises Cancelled within one tile."""
        kwargs["return_dict"] = False
        total: torch.Tensor | None = None
        weights = sample.new_zeros(sample.shape[2:], dtype=torch.float32)
        if self._timestep != float(timestep):  # prompt and negative prompt, if not together, see the same tiles
            self._timestep, self._step = float(timestep), self._step + 1
        aside = [(self._step * _GOLDEN + phase) % 1 * 2 - 1 for phase in (0.0, 0.5)]
        rows = _places(sample.shape[2], self._tile[0], self._overlap[0], aside[0])
        columns = _places(sample.shape[3], self._tile[1], self._overlap[1], aside[1])
        for top, high in rows:
            for left, wide in columns:
                if self._cancel is not None and self._cancel.is_set():
                    raise Cancelled("the generation was stopped before the picture was complete")
                part = sample[:, :, top : top + high, left : left + wide]
                made = self._unet(part, timestep, *args, **kwargs)[0]
                weight = torch.outer(_ramp(high), _ramp(wide)).to(weights.device)
                if total is None:
                    total = made.new_zeros((*made.shape[:2], *sample.shape[2:]), dtype=torch.float32)
                total[:, :, top : top + high, left : left + wide] += made * weight
                weights[top : top + high, left : left + wide] += weight
        assert total is not None
        return ((total / weights).to(sample.dtype),)


@contextmanager
def in_tiles(
    pipeline: Any,
    size: tuple[int, int],
    *,
    overlap: float = OVERLAP,
    whole: float = HOLDS,
    cancel: Cancel | None = None,
) -> Iterator[None]:
    """While it is open, `pipeline` denoises latents of `size` (height, width) in tiles of its native size.

    overlap: of a tile's side. Latents of at most `whole` times the native area are denoised as they are.
    """
    native = pipeline.unet.config.sample_size
    tile = (native, native) if isinstance(native, int) else tuple(native)
    if size[0] * size[1] <= whole * tile[0] * tile[1]:
        yield
        return
    unet = pipeline.unet
    common = (round(tile[0] * overlap), round(tile[1] * overlap))
    # Past the pipeline's own bookkeeping, which would take it for another component.
    vars(pipeline)["unet"] = TiledUNet(unet, tile, common, cancel)
    try:
        yield
    finally:
        vars(pipeline)["unet"] = unet


def steps_for(steps: int, strength: float) -> int:
    """The `num_inference_steps` with which image-to-image at `strength` takes that many steps."""
    whole = math.ceil(steps / strength)
    return whole if int(whole * strength) >= steps else whole + 1


def _places(length: int, tile: int, overlap: int, aside: float = 0.0) -> list[tuple[int, int]]:
    """(start, size) of tiles along an axis: as few as overlap by `overlap`, spread evenly, the last one at the end.

    aside: -1..1, how far those between the first and the last are moved, of the way that leaves half the overlap.
    """
    if length <= tile:
        return [(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    gap = (length - tile) / (count - 1)
    moved = round(aside * min(tile - overlap // 2 - math.ceil(gap), math.ceil(gap) - 1))
    return [(round(i * gap) + (moved if 0 < i < count - 1 else 0), tile) for i in range(count)]


def _ramp(size: int) -> torch.Tensor:
    """Weights along a tile, rising to its middle; over their sum they blend two tiles across all of their overlap."""
    at = torch.arange(size) + 0.5
    return torch.minimum(at, size - at)
