"""RRDBNet, the large network of ESRGAN and Real-ESRGAN: residual blocks of densely connected convolutions.

Wang et al., "ESRGAN" (2018) and "Real-ESRGAN" (2021). Trainable; key names are Real-ESRGAN's
(`body.0.rdb1.conv1.weight`, ...). ESRGAN's two older key styles are renamed while they are read; nothing writes them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from diptych.errors import UnknownArchitecture

from .descriptor import Architecture, Layout, Network, StateDict, receptive_radius

_BAND = 1 << 13  # pixels of features that are enlarged at once


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each seeing the outputs of all before it; a fifth of the result is added to the input."""

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, padding=1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, padding=1)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:  # a small start keeps the residual sum of many blocks near the identity
                nn.init.kaiming_normal_(parameter)
                parameter.data.mul_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = x
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat((seen, functional.leaky_relu(convolution(seen), 0.2)), 1)
        return x + 0.2 * self.conv5(seen)


class RRDB(nn.Module):
    """Residual in residual: three dense blocks; a fifth of their result is added to the input."""

    def __init__(self, num_feat: int = 64, num_grow_ch: int = 32) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.2 * self.rdb3(self.rdb2(self.rdb1(x)))


class RRDBNet(nn.Module):
    """(N, num_in_ch, H, W) in 0..1 -> (N, num_out_ch, H * scale, W * scale); H, W multiples of `unshuffle`.

    The picture is first folded by `unshuffle` (cells of pixels become channels), then doubled as often as it takes.
    None: Real-ESRGAN's rule, 2 at scale 2 and 4 at scale 1; ESRGAN's older networks of these scales have 1.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        scale: int = 4,
        num_feat: int = 64,
        num_block: int = 23,
        num_grow_ch: int = 32,
        unshuffle: int | None = None,
    ) -> None:
        super().__init__()
        unshuffle = {1: 4, 2: 2}.get(scale, 1) if unshuffle is None else unshuffle
        doublings = int(math.log2(scale * unshuffle)) if scale > 0 and unshuffle > 0 else -1
        if doublings < 0 or 2**doublings != scale * unshuffle:
            raise ValueError(f"an RRDBNet of scale {scale} with unshuffle {unshuffle}: both must be powers of two")
        self.scale, self.unshuffle, self.doublings = scale, unshuffle, doublings
        self.fold = nn.PixelUnshuffle(unshuffle)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.conv_first = nn.Conv2d(num_in_ch * unshuffle**2, num_feat, 3, padding=1)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch) for _ in range(num_block)))
        self.conv_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        for number in range(1, doublings + 1):
            self.add_module(f"conv_up{number}", nn.Conv2d(num_feat, num_feat, 3, padding=1))
        self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 3, padding=1)
        self._last_radius = receptive_radius(self._last_steps(), 2**doublings)

    @property
    def up_convolutions(self) -> list[nn.Module]:
        """`conv_up1`, `conv_up2`, ...: the one after each doubling."""
        return [self.get_submodule(f"conv_up{number}") for number in range(1, self.doublings + 1)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.conv_first(self.fold(x))
        features = features + self.conv_body(self.body(features))
        compiling: Any = getattr(torch.compiler, "is_compiling", bool)  # a loop of unknown length; torch 2.1 cannot say
        if torch.is_grad_enabled() or compiling():
            return self._enlarged(features)
        # In bands of rows, since what is enlarged takes five times the memory of all that comes before.
        factor, radius = 2**self.doublings, self._last_radius
        rows = max(_BAND // (len(features) * features.shape[3]), 8)
        bands = []
        for start in range(0, features.shape[2], rows):
            first, last = max(start - radius, 0), min(start + rows + radius, features.shape[2])
            band = self._enlarged(features[:, :, first:last])
            bands.append(band[:, :, (start - first) * factor :][:, :, : rows * factor])
        return torch.cat(bands, 2)

    def _enlarged(self, features: torch.Tensor) -> torch.Tensor:
        for convolution in self.up_convolutions:
            features = functional.leaky_relu(convolution(self.upsample(features)), 0.2, inplace=True)
        return self.conv_last(functional.leaky_relu(self.conv_hr(features), 0.2, inplace=True))

    def _last_steps(self) -> Iterator[nn.Module]:
        for convolution in self.up_convolutions:
            yield from (self.upsample, convolution)
        yield from (self.conv_hr, self.conv_last)

    def longest_path(self) -> Iterator[nn.Module]:
        """The modules on the way of a pixel through every convolution, in order."""
        yield from (self.fold, self.conv_first)
        yield from (module for module in self.body.modules() if isinstance(module, nn.Conv2d))
        yield self.conv_body
        yield from self._last_steps()


_TRUNK_KEYS = (
    "conv_first.weight",
    "body.0.rdb1.conv1.weight",
    "conv_body.weight",
    "conv_hr.weight",
    "conv_last.weight",
)
_ESRGAN_NAMES = {"RRDB_trunk": "body", "trunk_conv": "conv_body", "HRconv": "conv_hr"}


def _from_esrgan(weights: StateDict) -> dict[str, torch.Tensor]:
    """`RRDB_trunk.0.RDB1.conv1.weight`, `trunk_conv`, `upconv1`, `HRconv` -> official names."""

    def rename(key: str) -> str:
        stem, dot, rest = key.partition(".")
        stem = _ESRGAN_NAMES.get(stem, re.sub("^upconv", "conv_up", stem))
        return stem + dot + rest.replace("RDB", "rdb")

    return {rename(key): weight for key, weight in weights.items()}


def _from_old_esrgan(weights: StateDict) -> dict[str, torch.Tensor]:
    """`model.0.weight`, `model.1.sub.0.RDB1.conv1.0.weight`, `model.3.weight`, ... -> official names.

    The numbers are places in a flat list: first, trunk, then upsample, convolution, activation for each doubling, then
    the last two convolutions with an activation between them.
    """

    flat = sorted(int(match[1]) for key in weights if (match := re.fullmatch(r"model\.(\d{1,6})\.weight", key)))
    if len(flat) < 3:
        raise UnknownArchitecture("the weights look like an old ESRGAN but lack its last convolutions")
    first, *doublings, hr, last = flat
    names = {first: "conv_first", hr: "conv_hr", last: "conv_last"}
    names.update({place: f"conv_up{number}" for number, place in enumerate(doublings, 1)})

    def rename(key: str) -> str:
        key = re.sub(r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3.", key)
        key = re.sub(r"^model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1", key)
        return re.sub(r"^model\.(\d{1,6})\.", lambda match: names.get(int(match[1]), match[0][:-1]) + ".", key)

    return {rename(key): weight for key, weight in weights.items()}


def _infer(weights: StateDict) -> dict[str, Any]:
    first, last, dense = (weights[key] for key in ("conv_first.weight", "conv_last.weight", "body.0.rdb1.conv1.weight"))
    if not first.ndim == last.ndim == dense.ndim == 4:
        raise UnknownArchitecture("the weights look like RRDBNet but are no 3x3 convolutions")
    num_feat, folded = first.shape[:2]
    num_out_ch = last.shape[0]
    doublings = sum(bool(re.fullmatch(r"conv_up\d+\.weight", key)) for key in weights)
    # Folded channels are told from plain ones by their number: 12 or 48 in, 3 out.
    unshuffle = next((factor for factor in (4, 2) if folded == num_out_ch * factor**2 and 2**doublings >= factor), 1)
    return {
        "num_in_ch": folded // unshuffle**2,
        "num_out_ch": num_out_ch,
        "scale": 2**doublings // unshuffle,
        "num_feat": num_feat,
        "num_block": sum(bool(re.fullmatch(r"body\.\d+\.rdb1\.conv1\.weight", key)) for key in weights),
        "num_grow_ch": dense.shape[0],
        "unshuffle": unshuffle,
    }


def _describe(module: nn.Module, hyperparameters: dict[str, Any]) -> Network:
    assert isinstance(module, RRDBNet)
    return Network(
        architecture="RRDBNet",
        module=module,
        scale=module.scale,
        in_channels=hyperparameters["num_in_ch"],
        out_channels=hyperparameters["num_out_ch"],
        radius=receptive_radius(module.longest_path(), module.scale, module.unshuffle),
        multiple=module.unshuffle,
        hyperparameters=hyperparameters,
    )


RRDB_ARCHITECTURE = Architecture(
    name="RRDBNet",
    build=RRDBNet,
    layouts=(
        Layout(_TRUNK_KEYS),
        Layout(("conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight", "trunk_conv.weight"), _from_esrgan),
        Layout(("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), _from_old_esrgan),
    ),
    infer=_infer,
    describe=_describe,
    keys="conv_first.weight, body.0.rdb1.conv1.weight, ... (or ESRGAN's RRDB_trunk.0... or model.1.sub.0...)",
)
