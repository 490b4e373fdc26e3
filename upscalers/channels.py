"""Lets a network for colour (or for grey) enlarge pictures of 1 to 4 channels: grey, grey + alpha, RGB, RGBA.

Alpha goes through the network as a grey picture of its own. So that transparent surroundings leave no fringe, the
colour of what can be seen is first spread into what cannot (`VisibleColours`): the network then finds no edge there.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .passes import Compute
from .sources import Source

_SPREAD = (1, 2, 4, 8)  # radii of the boxes that spread colour, one after the other: 15 pixels in all


def for_any_channels(compute: Compute, network_channels: int) -> Compute:
    """A `compute` for 1 to 4 channels from one for 3 (colour) or 1 (grey)."""

    def run(tile: torch.Tensor) -> torch.Tensor:
        """Any of 1 or 3 channels, through the network."""
        batch, channels, height, width = tile.shape
        if channels == network_channels:
            return compute(tile)
        if network_channels == 1:
            out = compute(tile.reshape(batch * channels, 1, height, width))
            return out.reshape(batch, channels, *out.shape[2:])
        return compute(tile.expand(batch, 3, height, width)).float().clamp(0, 1).mean(1, keepdim=True)

    def run_with_alpha(tile: torch.Tensor) -> torch.Tensor:
        channels = tile.shape[1] - 1
        if channels not in (1, 3):
            return run(tile)
        colour, alpha = tile[:, :channels], tile[:, channels:]
        if bool((alpha == alpha[:1, :, :1, :1]).all()) and alpha[0, 0, 0, 0] in (0, 1):
            out = run(colour)
            return torch.cat([out, alpha[:1, :, :1, :1].to(out.dtype).expand(len(out), 1, *out.shape[2:])], 1)
        both = run(torch.cat([colour, alpha.expand_as(colour)])).float()
        out, grown = both.chunk(2)
        return torch.cat([out, _keep_flat(alpha, grown.clamp(0, 1).mean(1, keepdim=True))], 1)

    return run_with_alpha


def _keep_flat(alpha: torch.Tensor, grown: torch.Tensor) -> torch.Tensor:
    """Where alpha is 0 or 1 for a pixel and all around it, the enlarged alpha is exactly that."""
    size = grown.shape[2:]
    least = -functional.max_pool2d(-alpha, 3, 1, 1)
    most = functional.max_pool2d(alpha, 3, 1, 1)
    grown = torch.where(functional.interpolate(least, size=size) == 1, 1.0, grown)
    return torch.where(functional.interpolate(most, size=size) == 0, 0.0, grown)


class VisibleColours:
    """The same picture, (N, 2 or 4, H, W), with the colour of fully transparent pixels taken from their neighbours.

    Reaches 15 pixels from the nearest pixel that can be seen; what lies further keeps the colour it has.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self.batch, self.height, self.width = source.batch, source.height, source.width

    def rows(self, start: int, stop: int) -> torch.Tensor:
        reach = sum(_SPREAD)
        first, last = max(start - reach, 0), min(stop + reach, self.height)
        rows = _spread_colours(self._source.rows(first, last))
        return rows[:, :, start - first : stop - first]


def _spread_colours(picture: torch.Tensor) -> torch.Tensor:
    colour, alpha = picture[:, :-1], picture[:, -1:]
    hidden = alpha == 0
    if not hidden.any():
        return picture
    weight = alpha
    for radius in _SPREAD:
        total = _box(weight, radius)
        average = _box(colour * weight, radius) / total.clamp_min(1e-12)
        reached = hidden & (total > 0)
        colour = torch.where(reached, average, colour)
        weight = torch.where(reached, 1.0, weight)
        hidden = hidden & ~reached
    return torch.cat([colour, alpha], 1)


def _box(picture: torch.Tensor, radius: int) -> torch.Tensor:
    """Sums (but for a constant factor) over a square around each pixel, nothing lying outside the picture."""
    size = 2 * radius + 1
    rows = functional.avg_pool2d(picture, (1, size), 1, (0, radius))
    return functional.avg_pool2d(rows, (size, 1), 1, (radius, 0))
