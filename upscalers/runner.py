"""A loaded network made ready to run: on its device, in its precision, in the memory layout that is fast.

The policy of devices is in `device`; this module applies it to one network and looks whether the result is good.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from .device import pick_device, pick_dtype, tile_pixels
from .networks import Network

logger = logging.getLogger(__name__)

# dB of the probe against fp32, below which "auto" does not use half precision: 40 for any picture, and photographs come
# out up to 1.5 dB lower than the probe.
_LEAST_PSNR = 42.0


_LARGEST_EXACT_HALO = 72  # what costs no more than it is worth: 66 is the radius of an SRVGG with 64 convolutions
_HALO = 32


def halo_of(network: Network) -> int:
    """Input pixels to read around a tile: the receptive radius, which makes tiles exact, up to 72 pixels.

    Beyond that (RRDBNet with 23 blocks: 349), or where it is unknown, 32; docs/upscaling.md has the error of it.
    """
    radius = network.radius
    return radius if radius is not None and radius <= _LARGEST_EXACT_HALO else _HALO


def pixels_for(network: Network, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> int:
    """How many input pixels a tile should have, halos included, for what `network` holds in memory."""
    shape = network.hyperparameters
    wide = shape.get("num_feat", 64)
    if network.architecture == "SRVGGNetCompact":  # three layers at once, as large as the picture
        features = 3.0 * wide
    elif network.architecture == "RRDBNet" and not compiled:  # those, and a dense block's widest layer twice
        features = (3 * wide + 2 * (wide + 4 * shape["num_grow_ch"])) / network.multiple**2
    else:  # three layers as large as the result
        features = 3.0 * wide * network.scale**2
    held = features * (torch.finfo(dtype).bits // 8) + 12 * network.out_channels * network.scale**2
    return tile_pixels(device, math.ceil(held))


class Runner:
    """Computes tiles with a network: (N, in_channels, h, w) float32 in 0..1 -> (N, out_channels, ...), any float.

    `dtype` "auto" (or None) chooses what is fast on `device`; half precision only if it gives this network's result to
    40 dB of PSNR. `dtype` and `device` of the runner say what was chosen. `compile`: with torch.compile, which needs
    a C++ compiler (on a GPU Triton) and half a minute or more; ValueError where that fails.
    """

    def __init__(
        self,
        network: Network,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
    ) -> None:
        self._network, self._compile = network, False
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self._module = self._made(self.dtype)
        if dtype in (None, "auto") and self.dtype is not torch.float32:
            psnr = self._psnr()
            if psnr < _LEAST_PSNR:
                logger.info("%s gives only %.1f dB with this %s: using fp32", self.dtype, psnr, network.architecture)
                self.widen()
        if compile:
            self._compile, self._module = True, _compiled(self._module)
            self._check_compiled()

    def __call__(self, tile: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode(), _true_fp32() if self._needs_true_fp32 else nullcontext():
            return self._module(tile.to(self.dtype, memory_format=torch.channels_last))

    @property
    def _needs_true_fp32(self) -> bool:
        return self.dtype is torch.float32 and self.device.type == "cuda"

    def widen(self) -> bool:
        """Goes over to fp32. False if the network already ran in it."""
        if self.dtype is torch.float32:
            return False
        logger.info("%s does not do for this %s: going on in fp32", self.dtype, self._network.architecture)
        self.dtype = torch.float32
        self._module = self._made(torch.float32)
        if self._compile:
            self._module = _compiled(self._module)
        return True

    def modules(self) -> Iterable[nn.Module]:
        """The modules that a call goes through; none where they were compiled into one."""
        return () if self._compile else self._module.modules()

    def _made(self, dtype: torch.dtype) -> nn.Module:
        module = copy.deepcopy(self._network.module).requires_grad_(False).eval()
        return module.to(self.device, dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _psnr(self) -> float:
        """Of a small probe in the chosen precision against fp32, in dB, both clamped to 0..1."""
        probe = self._probe()
        with torch.inference_mode():
            exact = self._made(torch.float32)(probe.contiguous(memory_format=torch.channels_last)).clamp(0, 1)
        error = (self(probe).float().clamp(0, 1) - exact).square().mean().item()
        if not math.isfinite(error):
            return -math.inf
        return -10 * math.log10(error) if error else math.inf

    def _check_compiled(self) -> None:
        try:
            self(self._probe())
        except Exception as error:  # whatever a compiler of a compiler raises
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"torch.compile does not work here, so leave compile out: {reason}") from error

    def _probe(self) -> torch.Tensor:
        return _probe(self._network.in_channels).to(self.device)


def _true_fp32() -> Any:
    """Without TF32, torch's default for convolutions on a GPU, which has the mantissa of fp16."""
    flags = torch.backends.cudnn
    return flags.flags(
        enabled=flags.enabled, benchmark=flags.benchmark, deterministic=flags.deterministic, allow_tf32=False
    )


def _compiled(module: nn.Module) -> Any:
    """For sizes of any kind from the start: tiles at the edges of a picture have others than those inside."""
    return torch.compile(module, dynamic=True)


def _probe(channels: int) -> torch.Tensor:
    """(1, channels, 32, 32): a slope, edges and some noise, the same every time."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 32), torch.linspace(0, 1, 32), indexing="ij")
    planes = [(x + y * (1 + k)) / (2 + k) * 0.6 + 0.3 * ((x * 5 + k).floor() % 2) for k in range(channels)]
    noise = torch.rand((1, channels, 32, 32), generator=torch.Generator().manual_seed(0))
    return (torch.stack(planes)[None] + 0.1 * noise).clamp(0, 1)
