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


class Naturalness:
    """NIQE (Mittal et al. 2013, "Making a completely blind image quality analyzer"): how far patches are from natural.

    36 statistics of contrast-normalised luma at two scales, patches of 96 and 48 pixels; the distance between the
    Gaussians fitted to those of the pictures and of natural ones. Lower is more natural. Here the natural ones are
    `pictures` (N, 3, H, W) in 0..1, at least 96 pixels a side: scores compare with each other, not with published ones.
    """

    def __init__(self, pictures: Tensor) -> None:
        features, sharpness = _natural_statistics(pictures)
        self._mean, self._cov = _gaussian(features[sharpness > 0.75 * sharpness.max()])

    def distance(self, pictures: Tensor) -> float:
        """The score of all patches of `pictures` (N, 3, H, W) in 0..1 together."""
        mean, cov = _gaussian(_natural_statistics(pictures)[0])
        inverse = torch.linalg.pinv((cov + self._cov) / 2)
        difference = mean - self._mean
        return float((difference @ inverse @ difference).sqrt())


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), torch.cov(features.T)


def _natural_statistics(pictures: Tensor, patch: int = 96) -> tuple[Tensor, Tensor]:
    """Statistics (P, 36) and mean local deviation (P,) of all whole patches."""
    luma = 255 * (pictures.double() * pictures.new_tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(1, True)
    rows, columns = luma.shape[2] // patch, luma.shape[3] // patch
    luma = luma[:, :, : rows * patch, : columns * patch]
    ramp = torch.arange(7, dtype=torch.float64, device=luma.device) - 3
    line = torch.exp(-(ramp**2) / (2 * (7 / 6) ** 2))
    window = (line[:, None] * line[None] / line.sum() ** 2)[None, None]

    def blur(x: Tensor) -> Tensor:
        return functional.conv2d(functional.pad(x, (3, 3, 3, 3), mode="replicate"), window)

    found, sharpness = [], None
    for side in (patch, patch // 2):
        mean = blur(luma)
        deviation = (blur(luma * luma) - mean * mean).clamp_min(0).sqrt()
        normalised = (luma - mean) / (deviation + 1)
        parts = [normalised] + [normalised * normalised.roll(s, (2, 3)) for s in ((0, 1), (1, 0), (1, 1), (1, -1))]
        for index, values in enumerate(parts):
            patches = functional.unfold(values, side, stride=side).transpose(1, 2).flatten(0, 1)
            shape, left, right = generalised_gaussian(patches)
            if index == 0:
                found += [shape, (left + right) / 2]
            else:
                skew = (right - left) * torch.exp(torch.lgamma(2 / shape) - torch.lgamma(1 / shape))
                found += [shape, skew, left, right]
        if sharpness is None:
            sharpness = functional.avg_pool2d(deviation, side).flatten()
            luma = functional.interpolate(luma, scale_factor=0.5, mode="bicubic", antialias=True)
    assert sharpness is not None
    return torch.stack(found, 1), sharpness


def generalised_gaussian(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shape and both scales (P,) of the asymmetric generalised Gaussian that has the moments of `values` (P, n)."""
    shapes = torch.arange(0.2, 10.001, 0.001, dtype=torch.float64, device=values.device)
    gamma = torch.lgamma
    ratios = torch.exp(2 * gamma(2 / shapes) - gamma(1 / shapes) - gamma(3 / shapes))
    squares = values.square()

    def side(chosen: Tensor) -> Tensor:
        return ((squares * chosen).sum(1) / chosen.sum(1).clamp_min(1)).sqrt()

    left, right = side(values < 0), side(values > 0)
    skew = left / right.clamp_min(1e-12)
    ratio = values.abs().mean(1).square() / squares.mean(1).clamp_min(1e-12)
    ratio = ratio * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = shapes[torch.searchsorted(ratios, ratio).clamp_max(len(shapes) - 1)]
    scale = torch.exp((gamma(1 / shape) - gamma(3 / shape)) / 2)
    return shape, left * scale, right * scale
