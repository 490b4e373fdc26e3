"""The losses of the GAN upscaler, and the sharpening of their targets (Wang et al. 2021, arXiv:2107.10833).

Pictures are (N, 3, H, W), RGB, 0..1; every loss is a scalar.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from diptych.errors import CheckpointError
from diptych.upscalers.checkpoints import read_state_dict


def unsharp_mask(pictures: Tensor, weight: float = 0.5, threshold: float = 10.0) -> Tensor:
    """Pictures sharpened where they differ from their blur by more than `threshold` levels of 8 bits; same shape.

    Real-ESRGAN trains L1 and perceptual loss on such targets (arXiv:2107.10833, section 3.6): Gaussian of 51 pixels,
    `weight` times the difference added, and a mask softened by the same Gaussian so that flat parts stay as they are.
    """
    blurred = _blur51(pictures)
    difference = pictures - blurred
    mask = _blur51((difference.abs() * 255 > threshold).to(pictures.dtype))
    return torch.lerp(pictures, (pictures + weight * difference).clamp(0, 1), mask)


def _blur51(pictures: Tensor) -> Tensor:
    sigma = 0.3 * ((51 - 1) * 0.5 - 1) + 0.8  # what OpenCV takes for a kernel of 51
    line = torch.exp(-0.5 * (torch.arange(-25, 26, device=pictures.device, dtype=pictures.dtype) / sigma) ** 2)
    line = (line / line.sum()).expand(pictures.shape[1], 1, 1, 51)
    padded = functional.pad(pictures, (25, 25, 25, 25), mode="reflect")
    along = functional.conv2d(padded, line, groups=pictures.shape[1])
    return functional.conv2d(along, line.transpose(2, 3), groups=pictures.shape[1])


def gan_generator(fake: Tensor) -> Tensor:
    """The non-saturating loss of the generator on the logits of its pictures (Goodfellow et al. 2014)."""
    return functional.softplus(-fake).mean()


def gan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross entropy of the logits of true and of made pictures (Goodfellow et al. 2014)."""
    return functional.softplus(-real).mean() + functional.softplus(fake).mean()


def laplacian(a: Tensor, b: Tensor, levels: int = 3) -> Tensor:
    """L1 between Laplacian pyramids, coarse levels weighing more (Bojanowski et al. 2018, arXiv:1707.05776).

    The coarsest level, the mean colours, is left to the plain L1 loss.
    """
    difference, total = a - b, a.new_zeros(())
    for level in range(levels):
        smaller = functional.avg_pool2d(difference, 2)
        detail = difference - functional.interpolate(smaller, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + 2**level * detail.abs().mean()
        difference = smaller
    return total / (2**levels - 1)


def feature_matching(made: Sequence[Tensor], true: Sequence[Tensor]) -> Tensor:
    """L1 between a discriminator's features of made and true pictures, relative to the size of the true ones.

    Wang et al. 2018, arXiv:1711.11585, equation 4; dividing by the mean activation makes layers count alike.
    """
    terms = [(m - t.detach()).abs().mean() / t.detach().abs().mean() for m, t in zip(made, true, strict=True)]
    return torch.stack(terms).mean()


class VGGPerceptual(nn.Module):
    """The perceptual loss of Real-ESRGAN: L1 between features of VGG-19 before five of its activations.

    Layers conv1_2, 2_2, 3_4, 4_4, 5_4 with weights 0.1, 0.1, 1, 1, 1 (Johnson et al. 2016, arXiv:1603.08155). `path`:
    the state dict of torchvision's `vgg19`, which is never downloaded. Raises CheckpointError if it is anything else.
    """

    _CHANNELS = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512)
    _WEIGHTS = {2: 0.1, 7: 0.1, 16: 1.0, 25: 1.0, 34: 1.0}

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in self._CHANNELS:
            if width:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        weights = {key: value for key, value in read_state_dict(path).items() if key.startswith("features.")}
        try:
            self.load_state_dict(weights)
        except RuntimeError:
            raise CheckpointError(f"{path} does not hold the weights of torchvision's vgg19.") from None
        self.eval().requires_grad_(False)

    def forward(self, made: Tensor, true: Tensor) -> Tensor:
        mean, std = (made.new_tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        a, b = (made - mean) / std, (true.detach() - mean) / std
        total = made.new_zeros(())
        for index, layer in enumerate(self.features):
            a, b = layer(a), layer(b)
            if index in self._WEIGHTS:
                total = total + self._WEIGHTS[index] * (a - b).abs().mean()
        return total
