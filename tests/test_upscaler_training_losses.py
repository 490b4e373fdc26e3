"""The losses, the discriminator and the starting weights that the GAN upscaler is trained with."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diptych.errors import CheckpointError
from diptych.upscalers import losses
from diptych.upscalers.discriminator import UNetDiscriminatorSN
from diptych.upscalers.networks import SRVGGNetCompact
from diptych.upscalers.warmstart import fit_last_layer, near_identity


def an_edge() -> torch.Tensor:
    """Dark left half, bright right half: (1, 3, 64, 128)."""
    picture = torch.full((1, 3, 64, 128), 0.3)
    picture[..., 64:] = 0.7
    return picture


def test_an_unsharp_mask_overshoots_at_an_edge_and_leaves_flat_parts_alone() -> None:
    sharp = losses.unsharp_mask(an_edge())
    assert sharp[..., 63].max() < 0.28 and sharp[..., 64].min() > 0.72
    assert torch.allclose(sharp[..., :8], an_edge()[..., :8], atol=1e-3)
    assert torch.allclose(sharp[..., -8:], an_edge()[..., -8:], atol=1e-3)


def test_an_unsharp_mask_leaves_faint_grain_alone() -> None:
    grain = 0.5 + 0.01 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(losses.unsharp_mask(grain), grain, atol=1e-4)


def test_the_laplacian_loss_sees_detail_and_not_a_shift_of_all_colours() -> None:
    picture = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert losses.laplacian(picture + 0.1, picture).item() == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1)
    assert losses.laplacian(blurred, picture) > 0.05


def test_feature_matching_counts_layers_alike_whatever_their_size() -> None:
    true = [torch.rand(1, 4, 8, 8), torch.rand(1, 4, 4, 4)]
    made = [1.5 * t for t in true]
    assert losses.feature_matching(true, true).item() == 0
    assert losses.feature_matching(made, true).item() == pytest.approx(0.5, rel=1e-4)
    loud = losses.feature_matching([made[0] * 100, made[1]], [true[0] * 100, true[1]])
    assert loud.item() == pytest.approx(0.5, rel=1e-4)


def test_the_gan_losses_fall_when_the_logits_say_what_they_should() -> None:
    yes, no = torch.full((1, 1, 4, 4), 4.0), torch.full((1, 1, 4, 4), -4.0)
    assert losses.gan_discriminator(yes, no) < 0.1 < losses.gan_discriminator(no, yes)
    assert losses.gan_generator(yes) < 0.1 < losses.gan_generator(no)


@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_the_discriminator_gives_a_logit_for_each_pixel(size: tuple[int, int]) -> None:
    critic = UNetDiscriminatorSN(num_feat=8)
    pictures = torch.rand(2, 3, *size)
    features = critic.eval().features(pictures)
    assert critic(pictures).shape == (2, 1, *size)
    assert torch.equal(critic.conv9(features[-1]), critic(pictures))


def test_the_discriminators_inner_layers_have_spectral_norm_one() -> None:
    critic = UNetDiscriminatorSN(num_feat=8)
    for _ in range(30):  # power iterations, one a call
        critic(torch.rand(1, 3, 16, 16))
    for index in range(1, 9):
        weight = getattr(critic, f"conv{index}").weight.detach().flatten(1)
        assert torch.linalg.matrix_norm(weight, 2).item() == pytest.approx(1, abs=0.05)


@pytest.fixture(scope="module")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights with the names and shapes of torchvision's vgg19, random ones."""
    channels = (3, 64, 64, 128, 128, *(256,) * 4, *(512,) * 8)
    places = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34)
    generator = torch.Generator().manual_seed(0)
    weights = {"classifier.0.bias": torch.zeros(4)}
    for place, (of, to) in zip(places, zip(channels, channels[1:], strict=False), strict=True):
        scale = (2 / (9 * of)) ** 0.5
        weights[f"features.{place}.weight"] = torch.randn(to, of, 3, 3, generator=generator) * scale
        weights[f"features.{place}.bias"] = torch.zeros(to)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.safetensors"
    save_file(weights, path)
    return path


def test_the_perceptual_loss_is_nothing_for_equal_pictures_and_moves_only_the_made_one(vgg_file: Path) -> None:
    vgg = losses.VGGPerceptual(vgg_file)
    made, true = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32, requires_grad=True)
    assert vgg(true, true).item() == 0
    vgg(made, true).backward()
    assert made.grad is not None and made.grad.abs().max() > 0
    assert true.grad is None
    assert all(parameter.grad is None for parameter in vgg.parameters())


def test_weights_that_are_not_vgg19_are_refused(tmp_path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="other.safetensors does not hold the weights of torchvision's vgg19"):
        losses.VGGPerceptual(tmp_path / "other.safetensors")


def test_a_fitted_last_layer_restores_unseen_noisy_pictures_better_than_bicubic() -> None:
    torch.manual_seed(0)
    coarse = torch.rand(40, 3, 9, 9)
    large = torch.nn.functional.interpolate(coarse, (64, 64), mode="bicubic").clamp(0, 1)
    small = torch.nn.functional.avg_pool2d(large, 4) + 0.12 * torch.randn(40, 3, 16, 16)
    network = SRVGGNetCompact(num_feat=48, num_conv=6)
    near_identity(network)

    def error(made: torch.Tensor) -> float:
        return (made - large[32:]).square().mean().item()

    with torch.no_grad():
        repetition = error(network(small[32:]))
        fit_last_layer(network, small[:32], large[:32])
        bicubic = torch.nn.functional.interpolate(small[32:], (64, 64), mode="bicubic")
        assert error(network(small[32:])) < 0.8 * error(bicubic)
        assert error(network(small[32:])) < 0.5 * repetition
