"""Degradations and losses beside those of basicsr, where it is installed (the extra `[basicsr]`)."""

import importlib
import math
import sys
import types

import pytest
import torch

from diptych.upscalers import degradations as ours
from diptych.upscalers import losses

pytest.importorskip("torchvision")
if "torchvision.transforms.functional_tensor" not in sys.modules:
    # basicsr 1.4.2 asks for a module that torchvision 0.17 removed; this one name of it is all it needs.
    from torchvision.transforms.functional import rgb_to_grayscale

    shim = types.ModuleType("torchvision.transforms.functional_tensor")
    shim.rgb_to_grayscale = rgb_to_grayscale  # type: ignore[attr-defined]
    sys.modules[shim.__name__] = shim
pytest.importorskip("basicsr")
theirs = importlib.import_module("basicsr.data.degradations")
sharpening = importlib.import_module("basicsr.utils.img_process_util")
diffjpeg = importlib.import_module("basicsr.utils.diffjpeg")
gan_loss = importlib.import_module("basicsr.losses.gan_loss")


def padded(kernel: object, size: int) -> torch.Tensor:
    rim = (21 - size) // 2
    return torch.nn.functional.pad(torch.as_tensor(kernel).float(), (rim,) * 4)


def pictures(number: int = 4) -> torch.Tensor:
    coarse = torch.rand(number, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, (96, 96), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("size", [7, 13, 21])
@pytest.mark.parametrize(("sigma_x", "sigma_y", "rotation"), [(2.0, 2.0, 0.0), (0.7, 2.8, 1.1), (3.0, 0.4, -2.5)])
@pytest.mark.parametrize(
    ("kind", "beta"), [("gaussian", 1.0), ("generalized", 0.6), ("generalized", 3.5), ("plateau", 1.6)]
)
def test_blur_kernels_are_those_of_basicsr(
    size: int, sigma_x: float, sigma_y: float, rotation: float, kind: str, beta: float
) -> None:
    isotropic = sigma_x == sigma_y
    if kind == "gaussian":
        kernel = theirs.bivariate_Gaussian(size, sigma_x, sigma_y, rotation, isotropic=isotropic)
    elif kind == "generalized":
        kernel = theirs.bivariate_generalized_Gaussian(size, sigma_x, sigma_y, rotation, beta, isotropic=isotropic)
    else:
        kernel = theirs.bivariate_plateau(size, sigma_x, sigma_y, rotation, beta, isotropic=isotropic)
    arguments = (torch.tensor([value]) for value in (sigma_x, sigma_y, rotation, beta))
    made = ours.gaussian_kernels(torch.tensor([size]), *arguments, torch.tensor([kind == "plateau"]))[0]
    assert (made - padded(kernel, size)).abs().max() < 1e-5


@pytest.mark.parametrize("size", [7, 13, 21])
@pytest.mark.parametrize("cutoff", [math.pi / 5, math.pi / 3, 2.0, math.pi])
def test_sinc_kernels_are_those_of_basicsr(size: int, cutoff: float) -> None:
    made = ours.sinc_kernels(torch.tensor([size]), torch.tensor([cutoff]))[0]
    assert (made - padded(theirs.circular_lowpass_kernel(cutoff, size), size)).abs().max() < 1e-5


def test_blur_is_that_of_basicsr() -> None:
    kernels = torch.rand(4, 21, 21)
    kernels /= kernels.sum((1, 2), keepdim=True)
    assert (ours.blur(pictures(), kernels) - sharpening.filter2D(pictures(), kernels)).abs().max() < 1e-5


@pytest.mark.parametrize("grey", [False, True])
def test_noise_has_the_strength_of_that_of_basicsr(grey: bool) -> None:
    many = pictures(4).repeat(4, 1, 1, 1)
    chosen, number = torch.full((16,), grey), 16
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(1)
    pairs = [
        (
            ours.add_gaussian_noise(many, torch.full((number,), 12.0), chosen, generator),
            theirs.add_gaussian_noise_pt(many, torch.full((number,), 12.0), chosen.float(), clip=True),
        ),
        (
            ours.add_poisson_noise(many, torch.full((number,), 1.5), chosen, generator),
            theirs.add_poisson_noise_pt(many, torch.full((number,), 1.5), clip=True, gray_noise=chosen.float()),
        ),
    ]
    for made, true in pairs:
        assert (made - many).std().item() == pytest.approx((true - many).std().item(), rel=0.03)
        assert (made - many).mean().item() == pytest.approx((true - many).mean().item(), abs=2e-3)


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_jpeg_loses_as_much_as_that_of_basicsr(quality: int) -> None:
    strength = torch.full((4,), float(quality))
    grey = pictures().mean(1, keepdim=True).expand(-1, 3, -1, -1)  # colour comes back in steps there, smoothly here
    made, true = ours.jpeg(grey, strength), diffjpeg.DiffJPEG(differentiable=False)(grey, strength.clone())
    loss_of_ours, loss_of_theirs = ((x - grey).square().mean().sqrt().item() for x in (made, true))
    assert loss_of_ours == pytest.approx(loss_of_theirs, rel=0.25)  # their table is turned over its diagonal


def test_the_whole_chain_degrades_as_much_as_the_same_chain_of_basicsr() -> None:
    """The mean squared difference to a plain reduction, over many draws of both chains."""
    source = pictures(32)
    plain = torch.nn.functional.interpolate(source, (24, 24), mode="area")
    made = ours.degrade(source, torch.Generator().manual_seed(0))
    true = _their_chain(source)
    ours_rms, theirs_rms = ((x - plain).square().mean().sqrt().item() for x in (made, true))
    assert ours_rms == pytest.approx(theirs_rms, rel=0.2)


def _their_chain(source: torch.Tensor) -> torch.Tensor:
    """basicsr's functions in the order of the paper, one picture at a time."""
    import random

    import numpy as np
    from torch.nn.functional import interpolate

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    compress = diffjpeg.DiffJPEG(differentiable=False)
    recipe = ours.Degradation()
    names = ["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]

    def kernel(order: ours.Order) -> torch.Tensor:
        size = random.choice(range(7, 22, 2))
        if np.random.uniform() < order.sinc_probability:
            made = theirs.circular_lowpass_kernel(np.random.uniform(math.pi / (3 if size < 13 else 5), math.pi), size)
        else:
            made = theirs.random_mixed_kernels(
                names, recipe.kernel_probabilities, size, order.sigma, order.sigma, [-math.pi, math.pi],
                order.beta_gaussian, order.beta_plateau, noise_range=None,
            )  # fmt: skip
        return padded(made, size)[None]

    def factor(order: ours.Order) -> float:
        kind = random.choices(["up", "down", "keep"], order.resize_probabilities)[0]
        low, high = order.resize_range
        return {"up": np.random.uniform(1, high), "down": np.random.uniform(low, 1), "keep": 1.0}[kind]

    def noise(x: torch.Tensor, order: ours.Order) -> torch.Tensor:
        if np.random.uniform() < order.gaussian_probability:
            return theirs.random_add_gaussian_noise_pt(
                x, sigma_range=order.gaussian_sigma, clip=True, gray_prob=order.grey_probability
            )
        return theirs.random_add_poisson_noise_pt(
            x, scale_range=order.poisson_scale, gray_prob=order.grey_probability, clip=True
        )

    def mode() -> str:
        return random.choice(["area", "bilinear", "bicubic"])

    def jpeg(x: torch.Tensor, order: ours.Order) -> torch.Tensor:
        return compress(x.clamp(0, 1), quality=torch.empty(1).uniform_(*order.jpeg_quality))

    results = []
    for x in source[:, None]:
        x = sharpening.filter2D(x, kernel(recipe.first))
        x = noise(interpolate(x, scale_factor=factor(recipe.first), mode=mode()), recipe.first)
        x = jpeg(x, recipe.first)
        if np.random.uniform() < recipe.second.blur_probability:
            x = sharpening.filter2D(x, kernel(recipe.second))
        side = int(24 * factor(recipe.second))
        x = noise(interpolate(x, (side, side), mode=mode()), recipe.second)
        last = torch.zeros(1, 21, 21)
        last[0, 10, 10] = 1
        if np.random.uniform() < recipe.final_sinc_probability:
            size = random.choice(range(7, 22, 2))
            last = padded(theirs.circular_lowpass_kernel(np.random.uniform(math.pi / 3, math.pi), size), size)[None]
        if np.random.uniform() < 0.5:
            x = sharpening.filter2D(interpolate(x, (24, 24), mode=mode()), last)
            x = jpeg(x, recipe.second)
        else:
            x = jpeg(x, recipe.second)
            x = sharpening.filter2D(interpolate(x, (24, 24), mode=mode()), last)
        results.append(x[0])
    return torch.stack(results).clamp(0, 1)


def test_sharpening_is_that_of_basicsr() -> None:
    made, true = losses.unsharp_mask(pictures()), sharpening.USMSharp()(pictures())
    assert (made - true).abs().max() < 1e-4


def test_the_gan_loss_is_that_of_basicsr() -> None:
    logits, others = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    judge = gan_loss.GANLoss("vanilla", loss_weight=0.1)
    assert 0.1 * losses.gan_generator(logits) == pytest.approx(judge(logits, True, is_disc=False).item(), abs=1e-6)
    of_discriminator = judge(others, True, is_disc=True) + judge(logits, False, is_disc=True)
    assert losses.gan_discriminator(others, logits) == pytest.approx(of_discriminator.item(), abs=1e-6)


def test_the_discriminator_is_that_of_basicsr() -> None:
    from basicsr.archs.discriminator_arch import UNetDiscriminatorSN as Theirs

    from diptych.upscalers.discriminator import UNetDiscriminatorSN

    true, made = Theirs(3, num_feat=16), UNetDiscriminatorSN(3, num_feat=16)
    made.load_state_dict(true.state_dict())
    assert torch.allclose(made.eval()(pictures()), true.eval()(pictures()), atol=1e-5)
