"""The two-order degradation that makes training pairs for the upscaler."""

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional

from diptych.upscalers import degradations as d


def a_textured_picture(height: int = 96, width: int = 128) -> torch.Tensor:
    """Waves of rising frequency, in colours, (3, height, width)."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    waves = torch.stack([torch.sin(30 * x * x + 8 * y), torch.cos(25 * y * y - 9 * x), torch.sin(12 * (x + y) ** 2)])
    return 0.5 + 0.3 * waves


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)


sigmas = st.floats(0.2, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 10), sigmas, sigmas, st.floats(-math.pi, math.pi), st.floats(0.5, 4), st.booleans())
def test_a_gaussian_kernel_sums_to_one_is_even_and_stays_within_its_size(
    half: int, sigma_x: float, sigma_y: float, rotation: float, beta: float, plateau: bool
) -> None:
    size = torch.tensor([2 * half + 1])
    arguments = (column(v) for v in (sigma_x, sigma_y, rotation, beta))
    kernel = d.gaussian_kernels(size, *arguments, torch.tensor([plateau]))[0]
    assert kernel.sum().item() == pytest.approx(1, abs=1e-5)
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-6)
    middle = kernel[10 - half : 11 + half, 10 - half : 11 + half]
    assert middle.sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("sigma", [1.0, 1.7, 2.5])
def test_the_variance_of_a_gaussian_kernel_is_sigma_squared(sigma: float) -> None:
    one = column(1.0)
    kernel = d.gaussian_kernels(torch.tensor([21]), column(sigma), column(sigma), 0 * one, one, one < 0)[0]
    axis = torch.arange(-10, 11).float()
    assert (kernel.sum(0) * axis**2).sum().item() == pytest.approx(sigma**2, rel=0.01)


def test_rotation_turns_the_long_axis_of_a_kernel() -> None:
    two = torch.ones(2)
    kernels = d.gaussian_kernels(
        torch.tensor([21, 21]), 3 * two, two, torch.tensor([0, math.pi / 2]), two, two.bool() & False
    )
    assert kernels[0].sum(0).std() < kernels[0].sum(1).std()  # the first lies along x
    assert torch.allclose(kernels[0], kernels[1].T, atol=1e-6)


@pytest.mark.parametrize("cutoff", [math.pi / 3, math.pi / 2, 2.0])
def test_a_sinc_kernel_passes_what_is_below_its_cutoff_and_stops_what_is_above(cutoff: float) -> None:
    kernel = d.sinc_kernels(torch.tensor([21]), column(cutoff))[0]
    axis = torch.arange(-10, 11).float()

    def gain(frequency: float) -> float:
        return (kernel.sum(0) * torch.cos(frequency * axis)).sum().item()

    assert kernel.min() < 0  # it rings
    assert gain(0) == pytest.approx(1, abs=1e-5)
    assert gain(0.5 * cutoff) == pytest.approx(1, abs=0.2)  # 21 pixels are few: the passband is wavy
    assert abs(gain(1.4 * cutoff)) < 0.2


def test_blur_is_a_convolution_with_reflected_edges_and_each_picture_has_its_own_kernel() -> None:
    pictures = torch.stack([a_textured_picture(), a_textured_picture().flip(1)])
    kernels = torch.rand(2, 21, 21, generator=torch.Generator().manual_seed(0))
    kernels /= kernels.sum((1, 2), keepdim=True)
    blurred = d.blur(pictures, kernels)
    for picture, kernel, result in zip(pictures, kernels, blurred, strict=True):
        padded = functional.pad(picture[None], (10,) * 4, mode="reflect")
        true = functional.conv2d(padded, kernel.expand(3, 1, 21, 21), groups=3)[0]
        assert (result - true).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_resize_does_what_interpolate_does_for_each_picture_of_a_batch(mode: str) -> None:
    sizes = torch.tensor([[96, 128], [14, 19], [61, 97], [144, 192], [95, 130]])
    pictures = a_textured_picture().expand(5, -1, -1, -1)
    old = torch.tensor([96, 128]).expand(5, 2)
    code = {"area": d.AREA, "bilinear": d.BILINEAR, "bicubic": d.BICUBIC}[mode]
    resized = d.resize(pictures, old, sizes, torch.full((5,), code))
    for picture, (height, width), result in zip(pictures, sizes.tolist(), resized, strict=True):
        true = functional.interpolate(picture[None], (height, width), mode=mode)[0]
        assert (result[:, :height, :width] - true).abs().max() < 1e-4


def test_beyond_its_size_a_resized_picture_goes_on_as_its_reflection() -> None:
    old, new = torch.tensor([[96, 128], [96, 128]]), torch.tensor([[30, 40], [50, 60]])
    resized = d.resize(a_textured_picture().expand(2, -1, -1, -1), old, new, torch.tensor([1, 2]))
    assert resized.shape == (2, 3, 60, 70)
    assert torch.allclose(resized[0, :, 30:50], resized[0, :, 9:29].flip(1), atol=1e-6)
    assert torch.allclose(resized[1, :, :, 60:70], resized[1, :, :, 49:59].flip(2), atol=1e-6)


def test_gaussian_noise_has_the_sigma_that_was_asked_for_in_levels_of_8_bits() -> None:
    flat = torch.full((3, 3, 128, 128), 0.5)
    sigma, grey = torch.tensor([2.0, 10.0, 10.0]), torch.tensor([False, False, True])
    noise = d.add_gaussian_noise(flat, sigma, grey, torch.Generator().manual_seed(0)) - flat
    assert (noise.std((1, 2, 3)) * 255).tolist() == pytest.approx([2, 10, 10], rel=0.03)
    assert torch.equal(noise[2, 0], noise[2, 2])
    assert not torch.equal(noise[1, 0], noise[1, 2])


def test_poisson_noise_grows_with_the_light_and_with_its_scale() -> None:
    ramp = (torch.arange(256.0) / 255).repeat_interleave(64).expand(3, 3, 64, -1)
    scale, grey = torch.tensor([1.0, 0.5, 0.5]), torch.tensor([False, False, True])
    noise = d.add_poisson_noise(ramp, scale, grey, torch.Generator().manual_seed(0)) - ramp
    at = slice(128 * 64, 129 * 64)  # 256 levels, so white is 256 photons and half the light 128.5 of them
    expected = math.sqrt(128 / 255 / 256)
    assert noise[:2, :, :, at].std((1, 2, 3)).tolist() == pytest.approx([expected, expected / 2], rel=0.05)
    dark = slice(8 * 64, 9 * 64)
    assert noise[0, :, :, dark].std().item() < 0.5 * expected
    assert torch.equal(noise[2, 0], noise[2, 1])


@pytest.mark.parametrize("quality", [5, 10, 30, 50, 75, 95, 100])
@pytest.mark.parametrize("size", [(96, 128), (75, 101)])
def test_jpeg_gives_what_pillow_reads_back_from_a_file_of_that_quality(quality: int, size: tuple[int, int]) -> None:
    levels = (a_textured_picture(*size) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "JPEG", quality=quality)
    true = torch.from_numpy(np.array(Image.open(buffer))).float().permute(2, 0, 1) / 255
    source = torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 255
    ours = d.jpeg(source, column(float(quality)))[0]

    def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
        return -10 * math.log10((a - b).square().mean().item())

    # Where a coefficient lies between two steps of a coarse table, libjpeg's integers may fall to the other side.
    assert psnr(ours, true) > 36
    assert (ours - true).abs().median() * 255 <= 1.01
    assert psnr(ours, true) > psnr(source[0], true) + 6  # far nearer to the file than the file is to its source


def test_each_picture_of_a_batch_gets_its_own_jpeg_quality() -> None:
    pictures = a_textured_picture().expand(2, -1, -1, -1)
    both = d.jpeg(pictures, column(20, 90))
    assert torch.equal(both[0], d.jpeg(pictures[:1], column(20))[0])
    assert torch.equal(both[1], d.jpeg(pictures[1:], column(90))[0])


@pytest.mark.parametrize("scale", [1, 2, 4])
@pytest.mark.parametrize("size", [(64, 64), (72, 101)])
def test_degraded_pictures_are_smaller_by_the_scale_and_have_levels_of_8_bits(
    scale: int, size: tuple[int, int]
) -> None:
    small = d.degrade(torch.rand(5, 3, *size), torch.Generator().manual_seed(1), scale)
    assert small.shape == (5, 3, size[0] // scale, size[1] // scale)
    assert small.min() >= 0 and small.max() <= 1
    assert torch.allclose(small * 255, (small * 255).round(), atol=1e-4)


def test_the_generator_alone_decides_what_becomes_of_a_batch() -> None:
    pictures = a_textured_picture().expand(6, -1, -1, -1)
    torch.manual_seed(0)
    first = d.degrade(pictures, torch.Generator().manual_seed(5))
    torch.manual_seed(1)
    assert torch.equal(first, d.degrade(pictures, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, d.degrade(pictures, torch.Generator().manual_seed(6)))


def test_equal_pictures_of_a_batch_are_degraded_differently() -> None:
    small = d.degrade(a_textured_picture().expand(6, -1, -1, -1), torch.Generator().manual_seed(5))
    assert all(not torch.equal(small[i], small[j]) for i in range(6) for j in range(i))


def test_a_degraded_picture_is_still_that_picture_at_its_place_in_the_batch() -> None:
    colours = torch.tensor([[r, g, b] for r in (0.1, 0.9) for g in (0.1, 0.9) for b in (0.1, 0.9)])
    small = d.degrade(colours[:, :, None, None].expand(-1, -1, 64, 64), torch.Generator().manual_seed(7))
    assert torch.cdist(small.mean((2, 3)), colours).argmin(1).tolist() == list(range(8))


def test_without_blur_noise_and_resizing_only_two_jpegs_remain() -> None:
    still = d.Order(
        blur_probability=0,
        resize_probabilities=(0, 0, 1),
        gaussian_probability=1,
        gaussian_sigma=(0, 0),
        jpeg_quality=(100, 100),
    )
    recipe = d.Degradation(first=still, second=still, final_sinc_probability=0)
    picture = a_textured_picture()[None].mean(1, keepdim=True).expand(-1, 3, -1, -1)  # grey: chroma would be halved
    small = d.degrade(picture, torch.Generator().manual_seed(0), 1, recipe)
    assert (small - picture).abs().max() * 255 < 3


def test_pictures_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="7x64 are too small"):
        d.degrade(torch.rand(1, 3, 64, 7), torch.Generator(), 4)
