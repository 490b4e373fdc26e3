"""The discriminator of Real-ESRGAN: one logit for each pixel, from a U-Net with spectral normalisation."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import spectral_norm


class UNetDiscriminatorSN(nn.Module):
    """(N, num_in_ch, H, W) in 0..1 -> logits (N, 1, H, W), unbounded; H and W multiples of 8.

    Wang et al. 2021, arXiv:2107.10833, section 3.6; the U-shape judges both the whole and each pixel (Schoenfeld et
    al. 2020, arXiv:2002.12655), spectral normalisation keeps it smooth (Miyato et al. 2018, arXiv:1802.05957). Key
    names are those of the published discriminators.
    """

    def __init__(self, num_in_ch: int = 3, num_feat: int = 64) -> None:
        super().__init__()
        n = num_feat
        self.conv0 = nn.Conv2d(num_in_ch, n, 3, padding=1)
        self.conv1 = spectral_norm(nn.Conv2d(n, n * 2, 4, 2, 1, bias=False))
        self.conv2 = spectral_norm(nn.Conv2d(n * 2, n * 4, 4, 2, 1, bias=False))
        self.conv3 = spectral_norm(nn.Conv2d(n * 4, n * 8, 4, 2, 1, bias=False))
        self.conv4 = spectral_norm(nn.Conv2d(n * 8, n * 4, 3, 1, 1, bias=False))
        self.conv5 = spectral_norm(nn.Conv2d(n * 4, n * 2, 3, 1, 1, bias=False))
        self.conv6 = spectral_norm(nn.Conv2d(n * 2, n, 3, 1, 1, bias=False))
        self.conv7 = spectral_norm(nn.Conv2d(n, n, 3, 1, 1, bias=False))
        self.conv8 = spectral_norm(nn.Conv2d(n, n, 3, 1, 1, bias=False))
        self.conv9 = nn.Conv2d(n, 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.conv9(self.features(pictures)[-1])

    def features(self, pictures: Tensor) -> list[Tensor]:
        """The activations behind every convolution but the last, which makes the logits of the last of them."""
        down = [_leaky(self.conv0(pictures))]
        for convolution in (self.conv1, self.conv2, self.conv3):
            down.append(_leaky(convolution(down[-1])))
        up = [down[-1]]
        for convolution, skipped in ((self.conv4, down[2]), (self.conv5, down[1]), (self.conv6, down[0])):
            larger = functional.interpolate(up[-1], scale_factor=2, mode="bilinear", align_corners=False)
            up.append(_leaky(convolution(larger)) + skipped)
        for convolution in (self.conv7, self.conv8):
            up.append(_leaky(convolution(up[-1])))
        return down + up[1:]


def _leaky(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, 0.2)
