"""The PatchGAN discriminator of the autoencoder."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """PatchGAN (Isola et al. 2017): one logit for each overlapping patch; no logit is bounded.

    Input (N, 3, H, W) in -1..1, output (N, 1, h, w). With `layers` stride-2 convolutions the patch has 70 pixels for
    3 layers, 34 for 2. Group normalisation instead of batch normalisation: a picture's logit must not
    depend on the batch.
    """

    def __init__(self, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        channels = width
        for index in range(1, layers + 1):
            out = width * min(2**index, 8)
            stride = 2 if index < layers else 1
            blocks += [
                nn.Conv2d(channels, out, 4, stride, 1, bias=False),
                nn.GroupNorm(min(32, out), out),
                nn.LeakyReLU(0.2),
            ]
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(channels, 1, 4, 1, 1)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.blocks(pictures))

    def features(self, pictures: Tensor) -> list[Tensor]:
        """The activations after every non-linearity, first layer first."""
        found = []
        for block in self.blocks:
            pictures = block(pictures)
            if isinstance(block, nn.LeakyReLU):
                found.append(pictures)
        return found
