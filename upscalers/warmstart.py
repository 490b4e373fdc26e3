"""A start for SRVGGNetCompact that already restores pictures: thousands of steps are saved on a small budget.

Under torch's own initialisation its plain stack of convolutions loses the picture on the way, and training first has to
find it again. Here the middle layers begin as nearly the identity, and the last one at its least-squares solution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from diptych.upscalers.networks import SRVGGNetCompact


@torch.no_grad()
def near_identity(network: SRVGGNetCompact, noise: float = 0.1) -> None:
    """Random first layer; middle layers that pass their input on, plus `noise` times a random initialisation."""
    convolutions = [layer for layer in network.body if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        nn.init.kaiming_normal_(layer.weight, a=0.25)  # the slope that PReLU begins with
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    for layer in convolutions[1:-1]:
        identity = nn.init.dirac_(torch.empty_like(layer.weight))
        layer.weight.copy_(identity + noise * layer.weight)
    nn.init.zeros_(convolutions[-1].weight)


@torch.no_grad()
def fit_last_layer(network: SRVGGNetCompact, small: Tensor, large: Tensor, ridge: float = 1e-4) -> None:
    """Sets the last convolution to the one that brings `network(small)` nearest to `large` in squared error.

    small (N, C, h, w), large (N, C, H, W) in 0..1. Ridge regression of what repetition of pixels lacks on the 3 x 3
    neighbourhoods of the last features; `ridge` is relative to their mean square.
    """
    last = network.body[-1]
    assert isinstance(last, nn.Conv2d) and last.bias is not None
    products = torch.zeros((), dtype=torch.float64, device=small.device)
    targets = torch.zeros((), dtype=torch.float64, device=small.device)
    for low, high in zip(small.split(16), large.split(16), strict=True):
        x = low
        for layer in list(network.body)[:-1]:
            x = layer(x)
        patches = functional.unfold(x, 3, padding=1).transpose(1, 2).flatten(0, 1)
        patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
        lacking = high - functional.interpolate(low, scale_factor=network.upscale, mode="nearest")
        lacking = functional.pixel_unshuffle(lacking, network.upscale).flatten(2).transpose(1, 2).flatten(0, 1)
        products = products + (patches.T @ patches).double()
        targets = targets + (patches.T @ lacking).double()
    weight = ridge * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64, device=small.device)
    solution = torch.linalg.solve(products + weight, targets).float()
    last.weight.copy_(solution[:-1].T.reshape(last.weight.shape))
    last.bias.copy_(solution[-1])
