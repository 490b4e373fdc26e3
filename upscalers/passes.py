"""One pass of a network over a picture: cuts tiles, computes them, joins them into strips of finished rows.

Which tiles is arithmetic and lies in `tiles`. When memory runs out, a tile is computed in halves; what is finished
stays finished.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import nn

from diptych.errors import Cancelled, ImageError, OutOfMemory

from .device import is_out_of_memory, tile_pixels
from .sources import Source
from .tiles import Border, Span, auto_tile, fold, span, split
from .transfers import Fetch, Transfers, all_finite

logger = logging.getLogger(__name__)

Compute = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[int, int], None]

_SMALLEST = 16  # side in pixels below which a core is not cut again
_STRIP_PIXELS = 1 << 20  # input pixels in the cores of a strip: they wait in memory until the strip is complete


class Cancel(Protocol):
    """Any object that says whether to stop, for example a `threading.Event`."""

    def is_set(self) -> bool:
        """True: stop."""


@dataclass(frozen=True)
class Model:
    """What to run, and what the engine must know about it."""

    compute: Compute
    """(N, C, h, w) float32 in 0..1, on `device` -> (N, C', h * scale, w * scale), any float."""
    scale: int
    """Output pixels per input pixel, along one side."""
    halo: int
    """Input pixels to read around a core; the network's receptive radius makes tiles exact."""
    multiple: int = 1
    """Sides given to `compute` are multiples of this; a picture's are filled up by mirroring."""
    device: torch.device = torch.device("cpu")
    pixels: int | None = None
    """Input pixels, halos included, that one call should get; None: what suits the device."""
    on_overflow: Callable[[], bool] | None = None
    """Called when `compute` gave NaN or infinity: True if it now computes more precisely and is worth another try."""
    modules: Callable[[], Iterable[nn.Module]] = tuple
    """The modules that `compute` calls, if it does: between two of them progress is told and cancelling heard."""


class Meter:
    """Counts pixels and tells `progress`."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress, self._done, self._told, self._total = progress, 0, 0, 0

    def expect(self, pixels: int) -> None:
        """Adds to what is to be done."""
        self._total += pixels

    def add(self, pixels: int) -> None:
        """Adds to what is done."""
        self._done += pixels
        self._tell(self._done)

    def underway(self, pixels: float) -> None:
        """Tells of pixels that are nearly done, in steps of a hundredth; when memory runs out they begin again."""
        now = min(int(self._done + pixels), self._total - 1)
        if now - self._told >= self._total / 100:
            self._tell(now)

    def _tell(self, done: int) -> None:
        if self._progress and done > self._told:
            self._told = done
            self._progress(done, self._total)


class Tiler:
    """How much goes into one call of `compute`. What one strip teaches about memory holds for those after it."""

    def __init__(self, model: Model, tile: int | Literal["auto"], batch: int) -> None:
        self._model, self._tile, self.batch = model, tile, batch
        self.budget = model.pixels or tile_pixels(model.device)

    def cores(self, height: int, width: int, batch: int) -> tuple[int, int]:
        """The (height, width) of tile cores for a picture of this size."""
        if self._tile != "auto":
            return self._tile, self._tile
        return auto_tile(
            height, width, self._model.halo, self.budget, _STRIP_PIXELS // batch, multiple=self._model.multiple
        )

    def shrink(self, failed: _Region) -> None:
        """Takes note that a call of the size of `failed` does not fit."""
        self._tile, self.batch, self.budget = "auto", 1, max(failed.pixels_read // 2, 1)
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory for a tile of %d pixels: going on with smaller ones", failed.pixels_read)


@dataclass(frozen=True)
class _Region:
    """What goes into one call of `compute`: tiles of one form, side by side, of pictures [first, stop) of a batch."""

    first: int
    stop: int
    rows: Span
    columns: tuple[Span, ...]

    @property
    def pixels(self) -> int:
        return (self.stop - self.first) * self.rows.size * sum(tile.size for tile in self.columns)

    @property
    def pixels_read(self) -> int:
        return (self.stop - self.first) * self.rows.read_size * sum(tile.read_size for tile in self.columns)


class Pass:
    """One pass over the region rows x columns of `source`; with border "reflect" or "wrap" it may reach outside."""

    def __init__(
        self,
        model: Model,
        source: Source,
        rows: tuple[int, int],
        columns: tuple[int, int],
        border: Border,
        tiler: Tiler,
        meter: Meter,
        cancel: Cancel | None,
    ) -> None:
        self._model, self._source, self._rows, self._columns, self._border = model, source, rows, columns, border
        self._tiler, self._meter, self._cancel = tiler, meter, cancel
        self._transfers = Transfers(model.device)
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        self.size = (height * model.scale, width * model.scale)
        meter.expect(source.batch * height * width)

    def strips(self) -> Iterator[torch.Tensor]:
        """The finished rows of the region, (N, C', some, width) float32, clamped to 0..1, where the source is."""
        top, bottom = self._rows
        batch, multiple = self._source.batch, self._model.multiple
        while top < bottom:
            cores = self._tiler.cores(bottom - self._rows[0], self._columns[1] - self._columns[0], batch)
            rows = self._span_rows(*split(top, bottom, cores[0], multiple)[0])
            strip = _Strip(
                self._model, self._transfers, self._read(rows), rows, self._columns, self._source.width, self._border
            )
            for columns in self._side_by_side(cores[1]):
                at_once = max(self._tiler.budget // _Region(0, 1, rows, columns).pixels_read, 1)
                for first in range(0, batch, at_once):
                    self._compute(strip, _Region(first, min(first + at_once, batch), rows, columns))
            yield strip.finish()
            top = rows.stop

    def _side_by_side(self, tile: int) -> Iterator[tuple[Span, ...]]:
        """The columns of the tiles of a strip, together what goes into one call: neighbours of the same form."""
        together: list[Span] = []
        for start, stop in split(*self._columns, tile, self._model.multiple):
            columns = self._span_columns(start, stop)
            if together and (len(together) >= self._tiler.batch or columns.form != together[0].form):
                yield tuple(together)
                together = []
            together.append(columns)
        yield tuple(together)

    def _compute(self, strip: _Strip, region: _Region) -> None:
        """Computes a region, in halves where memory does not suffice for the whole."""
        self._heed_cancel()
        try:
            with self._between_layers(region):
                strip.compute(region)
            self._meter.add(region.pixels)
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler, whose traceback would keep the tensors of the failed call alive.
        halves = self._halves(region)
        if not halves:
            raise OutOfMemory(
                f"{self._model.device} ran out of memory even for a tile of {region.rows.read_size} x"
                f" {region.columns[0].read_size} pixels: close other programs, or use another device"
            )
        self._tiler.shrink(region)
        for half in halves:
            self._compute(strip, half)

    def _heed_cancel(self) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("upscaling was stopped before the picture was complete")

    @contextmanager
    def _between_layers(self, region: _Region) -> Iterator[None]:
        """Cancels, and tells progress, between two layers of the network: a tile of a large one may take a minute."""
        layers = [module for module in self._model.modules() if next(module.children(), None) is None]
        begun: set[int] = set()
        thread = threading.get_ident()

        def layer_begins(layer: nn.Module, _: Any) -> None:
            if threading.get_ident() != thread:  # another picture, in the same network
                return
            self._heed_cancel()
            begun.add(id(layer))
            self._meter.underway(region.pixels * (len(begun) - 1) / len(layers))

        hooks = [layer.register_forward_pre_hook(layer_begins) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _halves(self, region: _Region) -> list[_Region]:
        first, stop, rows, columns = region.first, region.stop, region.rows, region.columns
        if stop - first > 1:
            middle = (first + stop) // 2
            return [replace(region, stop=middle), replace(region, first=middle)]
        if len(columns) > 1:
            middle = len(columns) // 2
            return [replace(region, columns=columns[:middle]), replace(region, columns=columns[middle:])]
        tile, multiple = columns[0], self._model.multiple
        if max(rows.size, tile.size) <= max(_SMALLEST, multiple):
            return []
        if rows.size > tile.size:
            parts = split(rows.start, rows.stop, -(-rows.size // 2) + multiple - 1, multiple)
            return [replace(region, rows=self._span_rows(*part)) for part in parts]
        parts = split(tile.start, tile.stop, -(-tile.size // 2) + multiple - 1, multiple)
        return [replace(region, columns=(self._span_columns(*part),)) for part in parts]

    def _span_rows(self, start: int, stop: int) -> Span:
        model = self._model
        return span(start, stop, self._source.height, model.halo, multiple=model.multiple, border=self._border)

    def _span_columns(self, start: int, stop: int) -> Span:
        model = self._model
        return span(start, stop, self._source.width, model.halo, multiple=model.multiple, border=self._border)

    def _read(self, rows: Span) -> torch.Tensor:
        """The rows that `rows` reads, those outside of the picture folded back into it."""
        source = self._source
        inside = [fold(at, source.height, self._border) for at in range(rows.read_start, rows.read_stop)]
        if self._border == "wrap":  # from both ends of the picture: read each stretch on its own
            breaks = [at for at in range(1, len(inside)) if inside[at] != inside[at - 1] + 1]
            stretches = zip([0, *breaks], [*breaks, len(inside)], strict=True)
            return torch.cat([source.rows(inside[a], inside[b - 1] + 1) for a, b in stretches], 2)
        low, high = min(inside), max(inside) + 1
        read = source.rows(low, high)
        return read if inside == list(range(low, high)) else read[:, :, [at - low for at in inside]]


class _Strip:
    """A row of tiles on its way from the input rows to finished output rows."""

    def __init__(
        self,
        model: Model,
        transfers: Transfers,
        read: torch.Tensor,
        rows: Span,
        columns: tuple[int, int],
        width: int,
        border: Border,
    ) -> None:
        self._model, self._transfers, self._read, self._rows, self._columns = model, transfers, read, rows, columns
        self._width, self._border = width, border
        self._out: torch.Tensor | None = None
        self._waiting: list[tuple[_Region, Fetch]] = []

    def compute(self, region: _Region) -> None:
        """Computes `region` and puts it in its place; on a GPU the latter may end while the next one is computed."""
        out = self._run(region)
        if out.device == self._read.device:
            self._put(region, out, bool(all_finite(out)))
            return
        self._waiting.append((region, self._transfers.download(out)))
        if len(self._waiting) > 1:
            self._put_oldest()

    def finish(self) -> torch.Tensor:
        """The strip, once every region of it was computed."""
        while self._waiting:
            self._put_oldest()
        assert self._out is not None
        return self._out

    def _run(self, region: _Region) -> torch.Tensor:
        """The network's result for the cores of `region`: (tiles * pictures, C', h, w)."""
        tiles = [self._cut(region, columns) for columns in region.columns]
        out = self._model.compute(self._transfers.upload(torch.cat(tiles) if len(tiles) > 1 else tiles[0]))
        scale, rows, columns = self._model.scale, region.rows, region.columns[0]
        made, expected = tuple(out.shape[2:]), (rows.read_size * scale, columns.read_size * scale)
        if made != expected:
            raise ImageError(f"the network made {made} pixels where a scale of {scale} makes {expected}")
        top, left = rows.inset * scale, columns.inset * scale
        return out[:, :, top : top + rows.size * scale, left : left + columns.size * scale]

    def _cut(self, region: _Region, columns: Span) -> torch.Tensor:
        top = region.rows.read_start - self._rows.read_start
        tile = self._read[region.first : region.stop, :, top : top + region.rows.read_size]
        if columns.read_start >= 0 and columns.read_stop <= self._width:
            return tile[..., columns.read_start : columns.read_stop]
        return tile[..., [fold(at, self._width, self._border) for at in range(columns.read_start, columns.read_stop)]]

    def _put_oldest(self) -> None:
        region, fetch = self._waiting[0]
        self._put(region, *fetch())
        del self._waiting[0]

    def _put(self, region: _Region, out: torch.Tensor, finite: bool) -> None:
        while not finite:
            if self._model.on_overflow is None or not self._model.on_overflow():
                raise ImageError("the network gave NaN or infinity for a part of the picture")
            out = self._run(region)
            finite = bool(all_finite(out))
        scale, rows, left = self._model.scale, region.rows, self._columns[0]
        if self._out is None:
            size = (self._rows.size * scale, (self._columns[1] - left) * scale)
            self._out = torch.empty(
                (self._read.shape[0], out.shape[1], *size),
                device=self._read.device,
                memory_format=torch.channels_last,
            )
        for tile, columns in zip(out.chunk(len(region.columns)), region.columns, strict=True):
            place = self._out[
                region.first : region.stop,
                :,
                (rows.start - self._rows.start) * scale : (rows.stop - self._rows.start) * scale,
                (columns.start - left) * scale : (columns.stop - left) * scale,
            ]
            place.copy_(tile).clamp_(0, 1)
