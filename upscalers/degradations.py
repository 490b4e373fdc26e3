"""The two-order degradation of Real-ESRGAN: small bad pictures of large good ones, in batches, on the device.

Every function takes a batch and one set of parameters per picture, and draws nothing but from the `torch.Generator`
it is given, which lives on the device of the pictures: the same generator state means the same batch. Pictures are
NCHW RGB float32, 0..1. The recipe and its numbers: Wang et al. 2021, "Real-ESRGAN: Training Real-World Blind
Super-Resolution with Pure Synthetic Data", arXiv:2107.10833, section 3 and appendix A; the order of the steps and
the probabilities are those of its released configuration.

In the middle of the chain each picture has a size of its own. They stay one batch by lying at the top left of a
common canvas: `resize` fills what lies right of and below a picture with its reflection, so that a blur near the
edge reads what reflect padding would have given it. Nothing here needs gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_WIDTH = 21  # the largest blur kernel; smaller ones are zero outside their own size
MARGIN = KERNEL_WIDTH // 2
AREA, BILINEAR, BICUBIC = 0, 1, 2  # resize modes


@dataclass(frozen=True)
class Order:
    """One of the two rounds of blur, resize, noise and JPEG. The defaults are the first round of Real-ESRGAN."""

    blur_probability: float = 1.0
    sinc_probability: float = 0.1
    sigma: tuple[float, float] = (0.2, 3.0)  # standard deviation of a blur kernel, in pixels
    beta_gaussian: tuple[float, float] = (0.5, 4.0)  # shape of the generalised Gaussian
    beta_plateau: tuple[float, float] = (1.0, 2.0)  # shape of the plateau kernel
    resize_probabilities: tuple[float, float, float] = (0.2, 0.7, 0.1)  # up, down, keep
    resize_range: tuple[float, float] = (0.15, 1.5)
    gaussian_probability: float = 0.5  # otherwise Poisson noise
    gaussian_sigma: tuple[float, float] = (1.0, 30.0)  # in levels of 8 bits
    poisson_scale: tuple[float, float] = (0.05, 3.0)
    grey_probability: float = 0.4  # the same noise in all three channels
    jpeg_quality: tuple[float, float] = (30.0, 95.0)


@dataclass(frozen=True)
class Degradation:
    """The whole recipe. `kernel_probabilities`: Gaussian, generalised, plateau; each isotropic, then anisotropic."""

    first: Order = field(default_factory=Order)
    second: Order = field(
        default_factory=lambda: Order(
            blur_probability=0.8,
            sigma=(0.2, 1.5),
            resize_probabilities=(0.3, 0.4, 0.3),
            resize_range=(0.3, 1.2),
            gaussian_sigma=(1.0, 25.0),
            poisson_scale=(0.05, 2.5),
        )
    )
    kernel_probabilities: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    final_sinc_probability: float = 0.8


def degrade(pictures: Tensor, generator: torch.Generator, scale: int = 4, recipe: Degradation | None = None) -> Tensor:
    """Degrades `pictures` (N, 3, H, W), 0..1, to (N, 3, H // scale, W // scale), 0..1, in levels of 8 bits.

    The second-order model of arXiv:2107.10833, section 3.5: two rounds of blur, resize, noise and JPEG, a last resize
    to the final size with a sinc filter, which comes before or after the second JPEG with even chances.
    """
    recipe = recipe or Degradation()
    height, width = pictures.shape[2:]
    if height < 2 * scale or width < 2 * scale:
        raise ValueError(f"pictures of {width}x{height} are too small to be degraded by {scale}")
    factors = _random_factors(recipe.first, _Draws(len(pictures), generator))
    # Neighbours in size share a canvas: little of it lies idle, and it stays in the cache of a CPU.
    order = factors.argsort()
    parts = [_degrade(pictures[part], factors[part], generator, scale, recipe) for part in order.split(4)]
    return torch.cat(parts)[order.argsort()]


def _degrade(pictures: Tensor, factors: Tensor, generator: torch.Generator, scale: int, recipe: Degradation) -> Tensor:
    count, _, height, width = pictures.shape
    draw = _Draws(count, generator)
    old = torch.tensor([height, width], device=pictures.device).expand(count, 2)
    final = old // scale

    x = blur(pictures.float(), _random_kernels(recipe, recipe.first, draw))
    new = _scaled(old, factors)
    x = resize(x, old, new, draw.integers(3))
    x = _random_noise(x, recipe.first, draw)
    x = jpeg(x, draw.uniform(*recipe.first.jpeg_quality))

    old = new
    x = blur(x, _random_kernels(recipe, recipe.second, draw))
    new = _scaled(final, _random_factors(recipe.second, draw))
    x = resize(x, old, new, draw.integers(3))
    x = _random_noise(x, recipe.second, draw)

    quality = draw.uniform(*recipe.second.jpeg_quality)
    jpeg_first = draw.chance(0.5)[:, None, None, None]
    x = torch.where(jpeg_first, jpeg(x, quality), x)
    x = resize(x, new, final, draw.integers(3))
    sinc = sinc_kernels(draw.kernel_sizes(), draw.uniform(math.pi / 3, math.pi))
    x = blur(x, torch.where(draw.chance(recipe.final_sinc_probability)[:, None, None], sinc, _pulse(x)))
    x = torch.where(jpeg_first, x, jpeg(x, quality))
    return (x[:, :, : height // scale, : width // scale].clamp(0, 1) * 255).round() / 255


# Blur kernels --------------------------------------------------------------------------------------------------------


def gaussian_kernels(
    size: Tensor, sigma_x: Tensor, sigma_y: Tensor, rotation: Tensor, beta: Tensor, plateau: Tensor
) -> Tensor:
    """Generalised Gaussian and plateau-shaped kernels (N, 21, 21) that sum to 1 (arXiv:2107.10833, section 3.1).

    All arguments are (N,): `size` odd, up to 21; `sigma_x`, `sigma_y` in pixels along axes turned by `rotation` in
    radians; `beta` the shape (1 is the Gaussian). With q the quadratic form of the inverse covariance, a kernel is
    exp(-q^beta / 2), or 1 / (1 + q^beta) where `plateau` is true (Liu et al. 2020, arXiv:2005.12597).
    """
    x, y = _grid(size.device)
    cos, sin = rotation.cos()[:, None, None], rotation.sin()[:, None, None]
    along, across = x * cos + y * sin, y * cos - x * sin
    form = (along / sigma_x[:, None, None]) ** 2 + (across / sigma_y[:, None, None]) ** 2
    power = form ** beta[:, None, None]
    kernels = torch.where(plateau[:, None, None], 1 / (1 + power), torch.exp(-0.5 * power))
    return _normalised(kernels, size)


def sinc_kernels(size: Tensor, cutoff: Tensor) -> Tensor:
    """Circular low-pass kernels (N, 21, 21) that sum to 1: ringing and overshoot (arXiv:2107.10833, equation 6).

    `size` (N,) odd, up to 21; `cutoff` (N,) in radians per pixel. k(r) = cutoff * J1(cutoff * r) / (2 pi r).
    """
    x, y = _grid(size.device)
    radius = torch.sqrt(x**2 + y**2).double()
    omega = cutoff.double()[:, None, None]
    safe = radius.clamp(min=1e-9)
    kernels = omega * torch.special.bessel_j1(omega * safe) / (2 * math.pi * safe)
    kernels = torch.where(radius == 0, omega**2 / (4 * math.pi), kernels)
    return _normalised(kernels, size).float()


def blur(pictures: Tensor, kernels: Tensor) -> Tensor:
    """Filters each picture (N, C, H, W) with its own kernel (N, 21, 21), edges reflected; same shape.

    Through the Fourier transform: a 21 x 21 depthwise convolution costs several times as much on a CPU.
    """
    padded = F.pad(pictures, (MARGIN,) * 4, mode="reflect")
    height, width = padded.shape[-2:]
    spectrum = torch.fft.rfft2(padded) * torch.fft.rfft2(kernels, s=(height, width)).conj()[:, None]
    return torch.fft.irfft2(spectrum, s=(height, width))[..., : -2 * MARGIN, : -2 * MARGIN]


def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    axis = torch.arange(-MARGIN, MARGIN + 1, dtype=torch.float32, device=device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def _normalised(kernels: Tensor, size: Tensor) -> Tensor:
    x, y = _grid(size.device)
    inside = torch.maximum(x.abs(), y.abs()) <= (size[:, None, None] // 2)
    kernels = kernels * inside
    return kernels / kernels.sum((1, 2), keepdim=True)


def _pulse(pictures: Tensor) -> Tensor:
    kernel = pictures.new_zeros(KERNEL_WIDTH, KERNEL_WIDTH)
    kernel[MARGIN, MARGIN] = 1
    return kernel


# Resize --------------------------------------------------------------------------------------------------------------


def resize(pictures: Tensor, old: Tensor, new: Tensor, mode: Tensor) -> Tensor:
    """Resizes the top left `old` (N, 2) rows and columns of each picture of a batch to `new` (N, 2).

    `pictures` (N, C, H, W); `mode` (N,) is AREA, BILINEAR or BICUBIC, each as `torch.nn.functional.interpolate` does
    it. Returns (N, C, H', W') with H' and W' the largest new size plus 10; beyond its own new size a picture goes on
    as its reflection.
    """
    canvas = (new.amax(0) + MARGIN).tolist()
    rows = _resize_matrices(old[:, 0], new[:, 0], pictures.shape[2], canvas[0], mode)
    columns = _resize_matrices(old[:, 1], new[:, 1], pictures.shape[3], canvas[1], mode)
    return rows[:, None] @ pictures @ columns[:, None].transpose(2, 3)


def _resize_matrices(old: Tensor, new: Tensor, old_canvas: int, new_canvas: int, mode: Tensor) -> Tensor:
    """(N, new_canvas, old_canvas): row i holds the weights of the old pixels in the new pixel i."""
    old, new = old[:, None, None], new[:, None, None]
    index = torch.arange(new_canvas, device=old.device)[None, :, None]
    period = (2 * (new - 1)).clamp(min=1)
    index = index % period
    index = torch.where(index >= new, period - index, index)
    column = torch.arange(old_canvas, device=old.device)[None, None, :]

    start, end = index * old // new, ((index + 1) * old + new - 1) // new
    area = ((column >= start) & (column < end)) / (end - start)

    centre = (index + 0.5) * (old / new) - 0.5
    bilinear = (1 - (column - torch.minimum(centre.clamp(min=0), (old - 1).float())).abs()).clamp(min=0)

    tap = torch.floor(centre).long() + torch.arange(-1, 3, device=old.device)
    bicubic = torch.zeros_like(bilinear).scatter_add_(
        2, torch.minimum(tap.clamp(min=0), old - 1), _cubic((tap - centre).abs())
    )
    mode = mode[:, None, None]
    return torch.where(mode == AREA, area, torch.where(mode == BILINEAR, bilinear, bicubic))


def _cubic(distance: Tensor, a: float = -0.75) -> Tensor:
    """Keys' cubic convolution kernel with the slope that torch uses."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return torch.where(distance <= 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))


# Noise ---------------------------------------------------------------------------------------------------------------


def add_gaussian_noise(pictures: Tensor, sigma: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Adds normal noise of standard deviation `sigma` (N,), in levels of 8 bits; clamped to 0..1.

    Where `grey` (N,) is true all channels get the same noise (arXiv:2107.10833, section 3.2).
    """
    noise = torch.randn(pictures.shape, generator=generator, device=pictures.device)
    noise = torch.where(grey[:, None, None, None], noise[:, :1], noise)
    return (pictures + noise * sigma[:, None, None, None] / 255).clamp(0, 1)


def add_poisson_noise(pictures: Tensor, scale: Tensor, grey: Tensor, generator: torch.Generator) -> Tensor:
    """Adds shot noise of strength `scale` (N,); clamped to 0..1.

    The photon count of white is the number of different levels in the picture, up to the next power of two. Where
    `grey` (N,) is true the noise is that of the picture's luma, the same in all channels (arXiv:2107.10833,
    section 3.2).
    """
    grey = grey[:, None, None, None]
    luma = (pictures * pictures.new_tensor([0.2989, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    clean = (torch.where(grey, luma, pictures).clamp(0, 1) * 255).round()
    levels = clean.new_zeros(len(clean), 256).scatter_(1, clean.flatten(1).long(), 1).sum(1)
    photons = torch.exp2(torch.ceil(torch.log2(levels)))[:, None, None, None]
    clean = clean / 255
    noise = torch.poisson(clean * photons, generator=generator) / photons - clean
    noise = torch.where(grey, noise[:, :1], noise)
    return (pictures + noise * scale[:, None, None, None]).clamp(0, 1)


# JPEG ----------------------------------------------------------------------------------------------------------------

# ITU-T T.81, Annex K.
_LUMA_TABLE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
_CHROMA_TABLE = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8] * 4,
]
_TO_YCC = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
_TO_RGB = [[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]]


def jpeg(pictures: Tensor, quality: Tensor) -> Tensor:
    """What is left of pictures (N, 3, H, W) after JPEG at `quality` (N,), 1..100, with 4:2:0 chroma; 0..1.

    The lossy steps of ITU-T T.81 (JFIF colours, Annex K tables scaled as libjpeg scales them, triangle filter for
    the chroma on the way back); the lossless coding after them is left out. Sides that are no multiple of 16 are
    filled with their last pixels.
    """
    height, width = pictures.shape[-2:]
    x = (pictures.clamp(0, 1) * 255).round()
    x = F.pad(x, (0, -width % 16, 0, -height % 16), mode="replicate")
    ycc = _recoloured(x, _TO_YCC).round()

    percent = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality)[:, None]
    luma_table, chroma_table = (
        ((x.new_tensor(table).flatten() * percent + 50) / 100).floor().clamp(1, 255)
        for table in (_LUMA_TABLE, _CHROMA_TABLE)
    )
    luma = _quantised(ycc[:, :1] - 128, luma_table) + 128
    # The mean of four levels is rounded as libjpeg does it: down and up by turns.
    turns = torch.arange(1, 3, device=x.device).repeat(x.shape[3] // 4) / 4
    chroma = _quantised((F.avg_pool2d(ycc[:, 1:], 2) + turns).floor(), chroma_table)
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False).round()

    rgb = _recoloured(torch.cat([luma, chroma], 1), _TO_RGB).round().clamp(0, 255)
    return rgb[..., :height, :width] / 255


def _recoloured(pictures: Tensor, matrix: list[list[float]]) -> Tensor:
    return (pictures.new_tensor(matrix) @ pictures.flatten(2)).view_as(pictures)


def _quantised(planes: Tensor, table: Tensor) -> Tensor:
    """Planes (N, C, H, W) of levels around 0, through the 8 x 8 cosine transform quantised by `table` (N, 64)."""
    count, channels, height, width = planes.shape
    k = torch.arange(8, device=planes.device)
    basis = torch.cos((2 * k + 1) * k[:, None] * math.pi / 16) / 2
    basis[0] /= math.sqrt(2)
    transform = torch.kron(basis, basis)  # rows and columns at once: one product with 64 x 64 for all blocks
    blocks = planes.reshape(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4).reshape(count, -1, 64)
    table = table[:, None]
    coefficients = (blocks @ transform.T / table).round() * table
    blocks = (coefficients @ transform).round().clamp(-128, 127)
    return blocks.view(count, channels, height // 8, width // 8, 8, 8).transpose(3, 4).reshape(planes.shape)


# Draws ---------------------------------------------------------------------------------------------------------------


class _Draws:
    """One number per picture of the batch, from the generator, on its device."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.count, generator=self.generator, device=self.generator.device) * (high - low) + low

    def chance(self, probability: float) -> Tensor:
        return self.uniform(0, 1) < probability

    def integers(self, high: int) -> Tensor:
        return torch.randint(high, (self.count,), generator=self.generator, device=self.generator.device)

    def choice(self, probabilities: tuple[float, ...]) -> Tensor:
        weights = torch.tensor(probabilities, dtype=torch.float32, device=self.generator.device)
        return torch.multinomial(weights, self.count, replacement=True, generator=self.generator)

    def kernel_sizes(self) -> Tensor:
        return 7 + 2 * self.integers(8)

    def shape(self, low: float, high: float) -> Tensor:
        """Half of the draws below 1, half above: flatter and sharper than a Gaussian equally often."""
        return torch.where(self.chance(0.5), self.uniform(low, 1), self.uniform(1, high))


def _random_kernels(recipe: Degradation, order: Order, draw: _Draws) -> Tensor:
    size = draw.kernel_sizes()
    kind = draw.choice(recipe.kernel_probabilities)
    sigma_x, sigma_y = draw.uniform(*order.sigma), draw.uniform(*order.sigma)
    isotropic = kind % 2 == 0
    plateau = kind >= 4
    beta = torch.where(plateau, draw.shape(*order.beta_plateau), draw.shape(*order.beta_gaussian))
    kernels = gaussian_kernels(
        size,
        sigma_x,
        torch.where(isotropic, sigma_x, sigma_y),
        draw.uniform(-math.pi, math.pi),
        torch.where(kind < 2, 1.0, beta),
        plateau,
    )
    # A small kernel has no room for the long waves of a low cut-off.
    lowest = torch.where(size < 13, math.pi / 3, math.pi / 5)
    sinc = sinc_kernels(size, lowest + draw.uniform(0, 1) * (math.pi - lowest))
    kernels = torch.where(draw.chance(order.sinc_probability)[:, None, None], sinc, kernels)
    return torch.where(draw.chance(order.blur_probability)[:, None, None], kernels, _pulse(kernels))


def _random_factors(order: Order, draw: _Draws) -> Tensor:
    low, high = order.resize_range
    kind = draw.choice(order.resize_probabilities)
    up, down = draw.uniform(1, high), draw.uniform(low, 1)
    return torch.where(kind == 0, up, torch.where(kind == 1, down, torch.ones_like(up)))


def _scaled(size: Tensor, factor: Tensor) -> Tensor:
    return (size * factor[:, None]).floor().long().clamp(min=1)


def _random_noise(pictures: Tensor, order: Order, draw: _Draws) -> Tensor:
    gaussian = draw.chance(order.gaussian_probability)
    grey = draw.chance(order.grey_probability)
    sigma, scale = draw.uniform(*order.gaussian_sigma), draw.uniform(*order.poisson_scale)
    noisy = pictures.clone()
    # Each kind on its own pictures only: Poisson draws are the dearest step of the chain on a CPU.
    if gaussian.any():
        noisy[gaussian] = add_gaussian_noise(pictures[gaussian], sigma[gaussian], grey[gaussian], draw.generator)
    if not gaussian.all():
        shot = ~gaussian
        noisy[shot] = add_poisson_noise(pictures[shot], scale[shot], grey[shot], draw.generator)
    return noisy
