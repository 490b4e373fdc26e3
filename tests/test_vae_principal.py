"""An autoencoder's encoder starts as the principal components of the pictures' patches."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from diptych.vae.principal import start_as_principal_components


def autoencoder(channels: tuple[int, ...], latent_channels: int, groups: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=groups,
    )


def smooth_pictures(number: int) -> torch.Tensor:
    noise = torch.randn(number, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    return functional.interpolate(noise, size=32, mode="bicubic").clamp(-1, 1)


def unexplained(targets: torch.Tensor, given: torch.Tensor) -> float:
    """Variance of `targets` (N, T) that no affine function of `given` (N, G) explains."""
    given = torch.cat([given, torch.ones(len(given), 1)], 1)
    return float((targets - given @ torch.linalg.lstsq(given, targets).solution).square().mean())


@pytest.mark.parametrize(("channels", "latents"), [((8, 16), 4), ((8, 32), 8), ((32, 32, 64), 4), ((32, 64, 128), 16)])
def test_the_first_latents_hold_as_much_of_the_picture_as_its_principal_components(channels, latents):
    vae, pictures = autoencoder(channels, latents), smooth_pictures(96)
    start_as_principal_components(vae, pictures[:64])
    factor = 2 ** (len(channels) - 1)
    patches = functional.unfold(pictures[64:], factor, stride=factor).transpose(1, 2).flatten(0, 1)
    with torch.no_grad():
        found = vae.encode(pictures[64:]).latent_dist
    best = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0))[:-latents].sum() / patches.shape[1]
    assert unexplained(patches, found.mean.permute(0, 2, 3, 1).flatten(0, 2)) < 1.1 * best
    assert found.mean.std() == pytest.approx(1, abs=0.2)
    assert found.std.max() < 0.05


def test_the_first_latents_keep_the_level_of_a_flat_picture():
    vae = autoencoder((32, 64, 128), 16)
    start_as_principal_components(vae, smooth_pictures(64))
    with torch.no_grad():
        dark, light = (vae.encode(torch.full((1, 3, 32, 32), level)).latent_dist.mean[0] for level in (-0.3, 0.3))
    assert (light - dark).norm(dim=0).min() > 0.5


@pytest.mark.parametrize(("channels", "latents", "groups"), [((16, 16), 4, 4), ((8, 16), 5, 4), ((8, 24), 4, 8)])
def test_an_encoder_that_is_too_narrow_is_refused(channels, latents, groups):
    with pytest.raises(ValueError, match="principal_components needs"):
        start_as_principal_components(autoencoder(channels, latents, groups), smooth_pictures(4))
