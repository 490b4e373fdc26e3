"""The adversarial losses and the measures do what their papers say."""

import numpy as np
import pytest
import torch
from scipy.stats import gennorm
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import nn

from diptych import metrics
from diptych.vae.discriminator import PatchDiscriminator
from diptych.vae.losses import adaptive_weight, gradient_difference, hinge_d, perceptual_term


@pytest.mark.parametrize(("layers", "patch"), [(2, 34), (3, 70)])
def test_a_logit_of_the_discriminator_sees_one_patch(layers: int, patch: int) -> None:
    critic = PatchDiscriminator(8, layers)
    for module in critic.modules():
        if isinstance(module, nn.GroupNorm):  # its statistics span the picture; the patch is of the convolutions
            module.forward = lambda x: x  # type: ignore[method-assign]
    picture = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = critic(picture)
    assert logits.shape[1] == 1
    (gradient,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], picture)
    rows = gradient[0].abs().sum((0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == patch


def test_a_pictures_logits_do_not_depend_on_its_batch() -> None:
    critic, pictures = PatchDiscriminator(8, 2), torch.randn(3, 3, 64, 64)
    assert torch.allclose(critic(pictures)[:1], critic(pictures[:1]), atol=1e-5)


def test_the_hinge_loss_is_zero_only_beyond_the_margin() -> None:
    one = torch.ones(4)
    assert hinge_d(one, -one) == 0
    assert hinge_d(2 * one, -3 * one) == 0
    assert hinge_d(0 * one, 0 * one) == 1
    assert hinge_d(-one, one) == 2


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0])
def test_the_adaptive_weight_makes_both_terms_pull_alike(scale: float) -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1)
    out = layer(torch.randn(2, 3, 8, 8))
    nll, adversarial = out.abs().sum(), -(out * scale).square().mean()
    weight = adaptive_weight(nll, adversarial, layer.weight)
    terms = (nll, weight * adversarial)
    pulls = [torch.autograd.grad(term, layer.weight, retain_graph=True)[0].norm() for term in terms]
    assert pulls[1] == pytest.approx(float(pulls[0]), rel=0.01)


def test_the_perceptual_term_sees_edges_and_not_brightness() -> None:
    a = torch.rand(2, 3, 32, 32)
    assert gradient_difference(a, a).abs().max() == 0
    assert gradient_difference(a, a + 0.3).abs().max() < 1e-6
    blurred = nn.functional.avg_pool2d(a, 3, 1, 1)
    assert (gradient_difference(a, blurred) > 0.01).all()


def test_lpips_without_its_weights_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lpips", None)
    with pytest.raises(ValueError, match="needs the package lpips"):
        perceptual_term("lpips", torch.device("cpu"))


def test_psnr_and_ssim_agree_with_scikit_image() -> None:
    rng = np.random.default_rng(0)
    a = rng.random((40, 48, 3), dtype=np.float32)
    for amount in (0.01, 0.1, 0.5):
        b = np.clip(a + rng.normal(0, amount, a.shape), 0, 1).astype(np.float32)
        tensors = [torch.from_numpy(x).permute(2, 0, 1)[None] for x in (a, b)]
        assert metrics.psnr(*tensors).item() == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
        theirs = structural_similarity(
            a, b, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert metrics.ssim(*tensors).item() == pytest.approx(theirs, abs=2e-3)


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    torch.manual_seed(0)
    a = torch.randn(50_000, 4).double()
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet_distance(a, a + 3) == pytest.approx(4 * 9, rel=1e-3)
    assert metrics.frechet_distance(a, a * 2) == pytest.approx(4 * (2 - 1) ** 2, rel=0.03)


def test_random_features_are_the_same_every_time_and_tell_blur_from_sharp() -> None:
    sharp = torch.rand(64, 3, 32, 32)
    blurred = nn.functional.avg_pool2d(sharp, 3, 1, 1)
    again = torch.rand(64, 3, 32, 32)
    assert torch.equal(metrics.random_features(sharp), metrics.random_features(sharp))
    near, far = (
        metrics.frechet_distance(metrics.random_features(sharp), metrics.random_features(x)) for x in (again, blurred)
    )
    assert near < far / 2


def test_naturalness_puts_photographs_before_blurred_and_noisy_ones() -> None:
    def crops(left: bool) -> torch.Tensor:
        """A column of 192 pixels at the left or at the right of each photograph."""
        found = []
        for photograph in (data.astronaut(), data.coffee(), data.cat()):
            picture = torch.from_numpy(photograph).permute(2, 0, 1).float() / 255
            column = picture[..., :192] if left else picture[..., -192:]
            found += [column[:, :192], column[:, -192:]]
        return torch.stack(found)

    niqe, unseen = metrics.Naturalness(crops(left=True)), crops(left=False)
    small = nn.functional.interpolate(unseen, scale_factor=0.25, mode="area")
    blurred = nn.functional.interpolate(small, size=192, mode="bicubic").clamp(0, 1)
    noisy = (unseen + 0.1 * torch.randn(unseen.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    natural = niqe.distance(unseen)
    assert natural < niqe.distance(blurred)
    assert natural < niqe.distance(noisy)


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0, 4.0])
def test_the_fit_behind_naturalness_finds_the_shape_of_a_distribution(shape: float) -> None:
    drawn = gennorm.rvs(shape, scale=1.7, size=(1, 40_000), random_state=1)
    found, left, right = metrics.generalised_gaussian(torch.from_numpy(drawn))
    assert found.item() == pytest.approx(shape, rel=0.05)
    assert left.item() == pytest.approx(1.7, rel=0.05)
    assert right.item() == pytest.approx(1.7, rel=0.05)
