"""Starts an autoencoder's encoder as the principal components of the pictures' patches.

A random encoder loses the picture's colours and levels to its normalisation layers and needs tens of thousands of
pictures to find them again. Here every level takes the principal components of its 2x2 blocks, the last one keeps as
many as there are latent channels, and the residual branches begin at zero, so that training begins with latents that
hold the picture and only has to improve on them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional, init

CONSTANT = 8.0  # channels of this size, in standard deviations, keep GroupNorm from rescaling the others
LOG_VARIANCE = -7.0  # of the posterior at the start


@torch.no_grad()
def start_as_principal_components(vae: Any, pictures: Tensor) -> None:
    """Sets the encoder of `vae`, an untrained `AutoencoderKL`, by `pictures` (N, 3, H, W) in -1..1.

    The latents have unit variance together; a component's standard deviation in them is proportional to the square
    root of the one in the picture, so that details are not drowned. Raises ValueError where the encoder is too narrow.
    """
    encoder, latents = vae.encoder, vae.config.latent_channels
    narrow, wide = encoder.conv_norm_out.num_channels // encoder.conv_norm_out.num_groups, encoder.conv_out.in_channels
    shortcut = encoder.down_blocks[-1].resnets[0].conv_shortcut
    if narrow % 4 or wide < 4 * latents or shortcut is None:
        raise ValueError(
            f"principal_components needs a last level that is wider than the one before, of at least four channels for "
            f"each of the {latents} latent ones, in groups of a multiple of four; here {wide} in groups of {narrow}."
        )
    blocks = [*encoder.down_blocks, encoder.mid_block]
    silent = [resnet.conv2 for block in blocks for resnet in block.resnets]
    silent += [attention.to_out[0] for attention in encoder.mid_block.attentions if attention is not None]
    for layer in (*silent, encoder.conv_out, vae.quant_conv):
        init.zeros_(layer.weight)
        init.zeros_(layer.bias)

    features, count = pictures, pictures.shape[1]
    _set_rows(encoder.conv_in, torch.eye(count)[:, :, None, None], 1)
    for level, block in enumerate(encoder.down_blocks[:-1]):
        if block.resnets[0].conv_shortcut is not None:
            _set_rows(block.resnets[0].conv_shortcut, torch.eye(count)[:, :, None, None])
        last = level == len(encoder.down_blocks) - 2
        room = block.resnets[0].out_channels
        keep = min(4 * count, room, latents) if last else min(4 * count, room // 2)
        kernels, mean, spread = _components(features, keep)
        if last:
            kernels = kernels / spread.sqrt()[:, None, None, None] / spread.mean().sqrt()
        bias = -(kernels * mean).sum((1, 2, 3))
        features, count = functional.conv2d(features, kernels, bias, stride=2), keep
        _set_rows(block.downsamplers[0].conv, kernels, bias=bias)

    # Four channels a component z: z, -z and two constants; then silu(z) - silu(-z) = z undoes the activation.
    signs = torch.tensor([1.0, -1.0, 0.0, 0.0]).repeat(count)
    rows = torch.eye(count).repeat_interleave(4, 0) * signs[:, None]
    levels = torch.tensor([0.0, 0.0, CONSTANT, -CONSTANT]).repeat(count)
    _set_rows(shortcut, rows[:, :, None, None], bias=levels)
    power = features.square().mean((0, 2, 3)).repeat_interleave(4) * signs.square() + levels.square()
    variance = torch.ones(wide).index_copy(0, torch.arange(len(power)), power)
    variance = variance.unflatten(0, (-1, narrow)).mean(1).repeat_interleave(narrow)
    encoder.conv_norm_out.weight[: len(power)] = variance[: len(power)].sqrt()
    _set_rows(encoder.conv_out, rows.T[:, :, None, None], 1)
    _set_rows(vae.quant_conv, torch.eye(2 * latents)[:, :, None, None])
    init.constant_(vae.quant_conv.bias[latents:], LOG_VARIANCE)


def _components(features: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first components of 2x2 blocks: kernels (keep, C, 2, 2), mean (C, 2, 2), standard deviations (keep,)."""
    channels = features.shape[1]
    blocks = functional.unfold(features, 2, stride=2).transpose(0, 1).flatten(1)
    values, vectors = torch.linalg.eigh(torch.cov(blocks))
    kernels = vectors.flip(1).T[:keep].reshape(keep, channels, 2, 2)
    return kernels, blocks.mean(1).reshape(channels, 2, 2), values.flip(0)[:keep].clamp(min=1e-8).sqrt()


def _set_rows(convolution: torch.nn.Conv2d, kernels: Tensor, at: int = 0, bias: Tensor | None = None) -> None:
    """Makes the first outputs of `convolution` read its first inputs through `kernels`, placed `at` its taps."""
    rows, columns, height, width = kernels.shape
    convolution.weight[:rows] = 0
    convolution.weight[:rows, :columns, at : at + height, at : at + width] = kernels
    if convolution.bias is not None:
        convolution.bias[:rows] = 0 if bias is None else bias
