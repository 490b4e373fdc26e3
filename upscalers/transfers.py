"""Tiles between host and device: on a CUDA device in pinned memory and on streams of their own, so that one tile is
carried while another is computed. Elsewhere plain copies. Nothing here knows what is in a tile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Fetch = Callable[[], tuple[torch.Tensor, bool]]


class Transfers:
    """The way to `device` and back."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None
        if device.type == "cuda":
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def upload(self, tile: torch.Tensor) -> torch.Tensor:
        """`tile` on the device, for work on its current stream."""
        if self._streams is None or tile.device.type == "cuda":
            return tile.to(self.device)
        current, stream = torch.cuda.current_stream(self.device), self._streams[0]
        pinned = tile.pin_memory()
        with torch.cuda.stream(stream):
            there = pinned.to(self.device, non_blocking=True)
        current.wait_stream(stream)
        there.record_stream(current)  # its memory is not given away before that stream is through with it
        return there

    def download(self, out: torch.Tensor) -> Fetch:
        """Begins to carry `out` to the host. The result waits for it and gives it, and whether all of it is finite."""
        finite = all_finite(out)
        if self._streams is None or out.device.type != "cuda":
            return lambda: (out.cpu(), bool(finite))
        out = out.clamp(0, 1)  # here, where it costs nothing
        stream, event = self._streams[1], torch.cuda.Event()
        here, fine = (torch.empty(each.shape, dtype=each.dtype, pin_memory=True) for each in (out, finite))
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            here.copy_(out, non_blocking=True)
            fine.copy_(finite, non_blocking=True)
            event.record(stream)
        out.record_stream(stream)
        finite.record_stream(stream)

        def fetch() -> tuple[torch.Tensor, bool]:
            event.synchronize()
            return here, bool(fine)

        return fetch


def all_finite(out: torch.Tensor) -> torch.Tensor:
    """Whether all of `out` is finite, as a tensor of one element on its device: nobody has to wait for it yet."""
    return torch.isfinite(out.sum(dtype=torch.float32))
