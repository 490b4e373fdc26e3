"""Enlarges a picture of any size by any factor: passes of a network, then at most one Lanczos resize, row by row.

Everything is written against one small contract, `compute(tile) -> tile`: (N, C, h, w) float32 in 0..1 becomes
(N, C', h * scale, w * scale). This module chains the stages; one pass is in `passes`, which tiles it cuts in `tiles`,
the resize in `resize`. It knows nothing of files, kinds of picture or networks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch

from .passes import Cancel, Compute, Meter, Model, Pass, Progress, Tiler
from .resize import Axis, lanczos_rows
from .sources import Source, StripSource, TensorSource
from .tiles import Border, check_border, round_up

__all__ = ["Cancel", "Compute", "Model", "Progress", "output_size", "passes_needed", "upscale_rows", "upscale_tensor"]


def upscale_tensor(
    compute: Compute,
    picture: torch.Tensor,
    *,
    scale: int,
    halo: int,
    multiple: int = 1,
    out_scale: float | None = None,
    tile: int | Literal["auto"] = "auto",
    batch: int = 1,
    border: Border = "zero",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> torch.Tensor:
    """Runs `compute`, which enlarges by `scale`, tile by tile over `picture` (N, C, H, W) in 0..1.

    Returns float32 on the device of `picture`, clamped to 0..1, of round(H * out_scale) x round(W * out_scale) pixels
    (`out_scale` None: `scale`). `halo` and `multiple` are explained at `Model`, the others at `upscale_rows`.
    """
    model = Model(compute, scale, halo, multiple, picture.device)
    out_scale = scale if out_scale is None else out_scale
    height, width = output_size(picture.shape[2], picture.shape[3], out_scale)
    source = TensorSource(picture)
    out: torch.Tensor | None = None
    done = 0
    options: dict[str, Any] = {"tile": tile, "batch": batch, "border": border, "progress": progress, "cancel": cancel}
    for strip in upscale_rows(model, source, out_scale, **options):
        if strip.shape[2] == height:
            return strip
        if out is None:
            out = strip.new_empty((*strip.shape[:2], height, width))
        out[:, :, done : done + strip.shape[2]] = strip
        done += strip.shape[2]
    assert out is not None and done == height
    return out


def upscale_rows(
    model: Model,
    source: Source,
    scale: float,
    *,
    tile: int | Literal["auto"] = "auto",
    batch: int = 1,
    border: Border = "zero",
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Iterator[torch.Tensor]:
    """Yields the enlarged picture as strips (N, C, some, out width) float32 in 0..1, from top to bottom.

    As many passes of the network as reach `scale` (0.1 to 32; at least one), then one Lanczos resize if that is not
    exactly it. Memory: a row of tiles for every pass, whatever the height. Strips are where the source's rows are.

    tile: side of a tile's core in input pixels; "auto" takes what the device likes.
    batch: tiles that go through the network at once, where they have the same form. More than one pays only for tiles
        that are too small for a GPU; "auto" tiles are not.
    border: what lies around the picture: "zero" as networks have it, "reflect" mirrors, "wrap" repeats, so that a
        tileable texture stays tileable. For "wrap" the source must be able to go back.
    progress: called as progress(done, total), in pixels that went into the network.
    Raises Cancelled within one tile (one layer, if the model has `modules`) once `cancel` is set, OutOfMemory when even
    the smallest tile does not fit, ImageError when the network gives NaN, ValueError for wrong arguments (at once, not
    at the first strip).
    """
    check_border(border)
    if tile != "auto" and (not isinstance(tile, int) or isinstance(tile, bool) or tile < 1):
        raise ValueError(f"tile must be auto or a positive number of pixels, not {tile!r}")
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise ValueError(f"batch must be a positive number of tiles, not {batch!r}")
    out_height, out_width = output_size(source.height, source.width, scale)
    count = passes_needed(model.scale, scale)
    grown = (source.height * model.scale**count, source.width * model.scale**count)
    resized = grown != (out_height, out_width)
    margins = _margins(model, grown, (out_height, out_width), count, border)
    meter, tiler = Meter(progress), Tiler(model, tile, batch)
    rows, columns = (0, source.height), (0, source.width)  # where the picture lies in what the stage reads
    for index, margin in enumerate(margins):
        stage = Pass(
            model,
            source,
            (rows[0] - margin, rows[1] + margin),
            (columns[0] - margin, columns[1] + margin),
            border if index == 0 else "zero",
            tiler,
            meter,
            cancel,
        )
        inset = margin * model.scale
        rows = (inset, stage.size[0] - inset)
        columns = (inset, stage.size[1] - inset)
        source = StripSource(stage.strips(), source.batch, *stage.size)
    strips = lanczos_rows(
        stage.strips(),
        Axis(stage.size[0], out_height, rows[0], rows[1] - rows[0]),
        Axis(stage.size[1], out_width, columns[0], columns[1] - columns[0]),
    )
    return (strip.clamp(0, 1) for strip in strips) if resized else strips


def output_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """(height, width) of the result, at least one pixel each. Raises ValueError for a scale outside 0.1 to 32."""
    if not 0.1 <= scale <= 32:
        raise ValueError(f"scale must lie between 0.1 and 32, not {scale:g}")
    return max(math.floor(height * scale + 0.5), 1), max(math.floor(width * scale + 0.5), 1)


def passes_needed(network_scale: int, scale: float) -> int:
    """How often a network runs to reach at least `scale`: once or more, and once if it does not enlarge."""
    count = 1
    while network_scale > 1 and network_scale**count < scale:
        count += 1
    return count


def _margins(model: Model, grown: tuple[int, int], out_size: tuple[int, int], count: int, border: Border) -> list[int]:
    """How far around the picture each pass must compute, in its input pixels, for what the later stages look at.

    With border "zero" nothing lies there. Otherwise the first pass reads the extended picture and the stages after it
    are given more than they need, so that they see no edge of their own. grown: the size after all passes.
    """
    if border == "zero":
        return [0] * count
    needed = 0
    if out_size != grown:
        needed = math.ceil(3 * max(grown[0] / out_size[0], grown[1] / out_size[1], 1)) + 1
    margins = []
    for _ in range(count):
        margin = round_up(-(-needed // model.scale), model.multiple)
        margins.append(margin)
        needed = margin + round_up(model.halo, model.multiple)
    return margins[::-1]
