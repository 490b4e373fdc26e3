"""SRVGGNetCompact, the small Real-ESRGAN network: plain 3x3 convolutions, one pixel shuffle at the end.

Wang et al., "Real-ESRGAN" (2021), models realesr-general-x4v3 and realesr-animevideov3. Trainable; key names are the
official ones (`body.0.weight`, ...).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from diptych.errors import UnknownArchitecture

from .descriptor import Architecture, Layout, Network, StateDict, receptive_radius

_ACTIVATIONS = ("prelu", "relu", "leakyrelu")


class SRVGGNetCompact(nn.Module):
    """(N, num_in_ch, H, W) in 0..1 -> (N, num_out_ch, H * upscale, W * upscale).

    `num_conv` counts the middle convolutions of `num_feat` channels; a first and a last one come on top. The output is
    the picture enlarged by repetition, plus what the network adds.
    `act_type`: "prelu" (all official files), "relu" or "leakyrelu" (slope 0.1).
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_conv: int = 16,
        upscale: int = 4,
        act_type: str = "prelu",
    ) -> None:
        super().__init__()
        if act_type not in _ACTIVATIONS:
            raise ValueError(f"act_type is {act_type!r}, and must be one of {', '.join(_ACTIVATIONS)}")
        if num_in_ch not in (1, num_out_ch):
            raise ValueError(f"{num_in_ch} input channels cannot be added to {num_out_ch} output channels")
        self.upscale = upscale
        self.body = nn.ModuleList([nn.Conv2d(num_in_ch, num_feat, 3, padding=1), _activation(act_type, num_feat)])
        for _ in range(num_conv):
            self.body.append(nn.Conv2d(num_feat, num_feat, 3, padding=1))
            self.body.append(_activation(act_type, num_feat))
        self.body.append(nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1))
        self.upsampler = nn.PixelShuffle(upscale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x
        for layer in self.body:
            out = layer(out)
        return self.upsampler(out) + functional.interpolate(x, scale_factor=self.upscale, mode="nearest")


def _activation(act_type: str, num_feat: int) -> nn.Module:
    if act_type == "prelu":
        return nn.PReLU(num_parameters=num_feat)
    return nn.ReLU(inplace=True) if act_type == "relu" else nn.LeakyReLU(0.1, inplace=True)


def _infer(weights: StateDict) -> dict[str, Any]:
    """The activations between the convolutions leave no trace unless they are PReLU: "relu" is assumed then."""
    convolutions = [key for key in weights if key.endswith(".weight") and weights[key].ndim == 4]
    last = f"body.{2 * len(convolutions) - 2}.weight"  # a convolution at every even place
    if len(convolutions) < 2 or last not in weights or weights["body.0.weight"].ndim != 4 or weights[last].ndim != 4:
        raise UnknownArchitecture(
            "the weights look like SRVGGNetCompact but do not alternate convolutions and activations"
        )
    num_feat, num_in_ch = weights["body.0.weight"].shape[:2]
    channels = weights[last].shape[0]
    # A picture goes in and comes out with the same channels; only grey (1) may also become colour (3).
    fits = [n for n in (num_in_ch, 3) if (n == num_in_ch or num_in_ch == 1) and _is_square(channels, n)]
    if not fits:
        raise UnknownArchitecture(
            f"the weights look like SRVGGNetCompact but {channels} channels come out of {last!r},"
            f" which no whole scale of {num_in_ch} channels makes"
        )
    return {
        "num_in_ch": num_in_ch,
        "num_out_ch": fits[0],
        "num_feat": num_feat,
        "num_conv": len(convolutions) - 2,
        "upscale": math.isqrt(channels // fits[0]),
        "act_type": "prelu" if "body.1.weight" in weights else "relu",
    }


def _is_square(channels: int, out_channels: int) -> bool:
    factor, rest = divmod(channels, max(out_channels, 1))
    return rest == 0 and factor > 0 and math.isqrt(factor) ** 2 == factor


def _describe(module: nn.Module, hyperparameters: dict[str, Any]) -> Network:
    assert isinstance(module, SRVGGNetCompact)
    return Network(
        architecture="SRVGGNetCompact",
        module=module,
        scale=module.upscale,
        in_channels=hyperparameters["num_in_ch"],
        out_channels=hyperparameters["num_out_ch"],
        radius=receptive_radius([*module.body, module.upsampler], module.upscale),
        hyperparameters=hyperparameters,
    )


SRVGG = Architecture(
    name="SRVGGNetCompact",
    build=SRVGGNetCompact,
    layouts=(Layout(required=("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")),),
    infer=_infer,
    describe=_describe,
    keys="body.0.weight, body.1.weight, ... alternating convolutions and activations",
)
