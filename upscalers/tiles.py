"""Which tiles: pure arithmetic over one axis at a time, no tensors, no pictures.

A tile computes a core (the pixels it is responsible for) from a wider stretch that it reads: the core and a halo on
both sides. Cores cover their range once and without gaps. With border "zero" the stretch ends where the picture
ends, so that the network's own zero padding does there what it does for the whole picture; with "reflect" and "wrap"
it goes on outside, and `fold` says which pixel of the picture lies there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

Border = Literal["zero", "reflect", "wrap"]


def check_border(border: str) -> None:
    """Raises ValueError unless `border` is one of "zero", "reflect", "wrap"."""
    if border not in get_args(Border):
        raise ValueError(f"border must be one of {', '.join(get_args(Border))}, not {border!r}")


@dataclass(frozen=True)
class Span:
    """One tile along one axis, in input pixels: computes [start, stop), reads [read_start, read_stop)."""

    start: int
    stop: int
    read_start: int
    read_stop: int

    @property
    def size(self) -> int:
        """Pixels of the core."""
        return self.stop - self.start

    @property
    def read_size(self) -> int:
        """Pixels read."""
        return self.read_stop - self.read_start

    @property
    def inset(self) -> int:
        """Pixels read before the core."""
        return self.start - self.read_start

    @property
    def form(self) -> tuple[int, int, int]:
        """What two tiles must have in common to go through the network together."""
        return self.read_size, self.inset, self.size


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is not below `value` (also for negative values)."""
    return -(-value // multiple) * multiple


def span(start: int, stop: int, length: int, halo: int, *, multiple: int = 1, border: Border = "zero") -> Span:
    """The stretch to read for the core [start, stop) on an axis of `length` pixels.

    `start` must be a multiple of `multiple`; the stretch begins and ends at multiples of it, counted from pixel 0, so
    that a network which first folds `multiple` pixels into channels folds the same pixels in every tile. With border
    "zero" only this rounding can lead beyond the end of the picture.
    """
    halo = round_up(halo, multiple)
    read_start, read_stop = start - halo, round_up(stop, multiple) + halo
    if border == "zero":
        read_start, read_stop = max(read_start, 0), min(read_stop, round_up(length, multiple))
    return Span(start, stop, read_start, read_stop)


def split(start: int, stop: int, tile: int, multiple: int = 1) -> list[tuple[int, int]]:
    """Cuts [start, stop) into cores of at most `tile` pixels: all of one size but the last, cut at multiples.

    `start` must be a multiple of `multiple`; `tile` is rounded down to one (but not to nothing). The parts are as
    even as that allows: 100 pixels in tiles of 60 are 50 and 50.
    """
    tile = max(tile // multiple * multiple, multiple)
    parts = -(-(stop - start) // tile)
    size = round_up(-(-(stop - start) // parts), multiple)
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def fold(position: int, length: int, border: Border) -> int:
    """The pixel in [0, length) that stands for `position`, which may lie any distance outside.

    "wrap" repeats the picture; "reflect" mirrors it at its outermost pixels, which are not doubled. "zero" mirrors
    too: it gets here only for the few pixels that fill a side up to a multiple.
    """
    if border == "wrap":
        return position % length
    if length == 1:
        return 0
    position %= 2 * (length - 1)
    return min(position, 2 * (length - 1) - position)


@lru_cache(maxsize=64)  # asked again for every strip
def auto_tile(height: int, width: int, halo: int, pixels: int, strip: int, multiple: int = 1) -> tuple[int, int]:
    """The (height, width) of tile cores for which the whole picture costs least.

    The cost is the number of pixels read, halos included, with border "zero". A tile reads at most `pixels`, and a row
    of tiles has at most `strip` pixels in its cores, but no core becomes smaller than 16 pixels for that. A picture
    that fits is one tile.
    """
    best, best_cost = (min(16, height), min(16, width)), 0
    for rows in _cuts(height, multiple):
        for columns in _cuts(width, multiple):
            read = min(rows + 2 * halo, height) * min(columns + 2 * halo, width)
            if read > pixels or (rows * width > strip and rows > 16):
                continue
            cost = read * -(-height // rows) * -(-width // columns)
            if not best_cost or cost < best_cost:
                best, best_cost = (rows, columns), cost
    return best


def _cuts(length: int, multiple: int) -> list[int]:
    """The sizes that cut `length` into 1, 2, 3 ... even parts, the larger first, none below 16 pixels."""
    sizes = {round_up(-(-length // parts), multiple) for parts in range(1, max(length // 16, 1) + 1)}
    return sorted(sizes, reverse=True)
