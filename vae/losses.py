"""The losses of the adversarial KL autoencoder (Esser et al. 2021, Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Perceptual = Callable[[Tensor, Tensor], Tensor]


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's hinge loss on its logits, halved as in the VQGAN recipe."""
    return 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())


def adaptive_weight(nll: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|grad of nll| / |grad of the generator's loss| at the decoder's last layer (Esser et al. 2021, equation 7).

    With it the adversarial term pulls as hard as the reconstruction does, whatever the two are measured in.
    """
    pull_nll = torch.autograd.grad(nll, last_layer, retain_graph=True)[0].norm()
    pull_adversarial = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (pull_nll / (pull_adversarial + 1e-4)).clamp(0, 1e4).detach()


def gradient_difference(a: Tensor, b: Tensor, scales: int = 3) -> Tensor:
    """A perceptual term without weights: L1 between gradients at 1, 1/2, 1/4 ... of the size; (N, 1, 1, 1)."""
    total = a.new_zeros(len(a))
    for _ in range(scales):
        d = a - b
        total = total + d.diff(dim=2).abs().flatten(1).mean(1) + d.diff(dim=3).abs().flatten(1).mean(1)
        a, b = functional.avg_pool2d(a, 2), functional.avg_pool2d(b, 2)
    return (total / scales).view(-1, 1, 1, 1)


def perceptual_term(name: str, device: torch.device) -> Perceptual:
    """`"gradients"`, or `"lpips"` where the package and its weights are installed; pictures in -1..1 -> (N, 1, 1, 1).

    Raises ValueError where LPIPS is asked for and cannot be had.
    """
    if name == "gradients":
        return gradient_difference
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False).eval().requires_grad_(False).to(device)
    except Exception as error:  # the package downloads on first use and raises whatever its downloader raises
        raise ValueError(f"perceptual = 'lpips' needs the package lpips with its VGG weights: {error}") from None
    return network
