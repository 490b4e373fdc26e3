"""How far pictures are from each other: PSNR, SSIM and a Frechet distance that needs no download."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of pictures (N, C, H, W) in 0..1, one value a picture: (N,)."""
    return -10 * torch.log10((a - b).square().flatten(1).mean(1).clamp_min(1e-12))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004, 11x11 Gaussian window of sigma 1.5), mean over channels: (N,)."""
    ramp = torch.arange(11, device=a.device, dtype=torch.float32) - 5
    line = torch.exp(-(ramp**2) / (2 * 1.5**2))
    window = (line[:, None] * line[None]).div(line.sum() ** 2).expand(a.shape[1], 1, 11, 11)

    def mean(x: Tensor) -> Tensor:
        return functional.conv2d(x, window, groups=x.shape[1])

    a, b = a.float(), b.float()
    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b, cov = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2, mean(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    index = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return index.flatten(1).mean(1)


def random_features(pictures: Tensor) -> Tensor:
    """Features of a fixed random convolutional network (4 layers, seed 0), (N, C, H, W) in 0..1 -> (N, 128).

    A random embedding compares sets of pictures without any trained weights (Naeem et al. 2020, section 4); its
    distances are not those of Inception features and say so by the name `fd_random`.
    """
    generator = torch.Generator().manual_seed(0)
    x = pictures.float() * 2 - 1
    for width in (32, 64, 128, 128):
        weight = torch.randn(width, x.shape[1], 3, 3, generator=generator) * (2 / (9 * x.shape[1])) ** 0.5
        x = functional.leaky_relu(functional.conv2d(x, weight.to(x), stride=2, padding=1), 0.2)
    return x.mean((2, 3))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (N, D) (Heusel et al. 2017, equation 6)."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
