"""Trains a GAN upscaler: `diptych train upscaler CONFIG`.

The recipe is Real-ESRGAN's (Wang et al. 2021, arXiv:2107.10833): pictures are degraded twice over and restored, in
stage 1 for the smallest L1 distance, in stage 2 against a discriminator as well. Both stages are one run: stage 2
begins at step `gan_from`, from the averaged weights of stage 1. Where no VGG weights are at hand, the perceptual term
is made of the discriminator's own features and of Laplacian pyramids, which need no download.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diptych import metrics
from diptych.training import Run, RunConfig, ema_of, read_config
from diptych.upscalers.discriminator import UNetDiscriminatorSN
from diptych.upscalers.losses import (
    VGGPerceptual,
    feature_matching,
    gan_discriminator,
    gan_generator,
    laplacian,
)
from diptych.upscalers.networks import RRDBNet, SRVGGNetCompact, load_network
from diptych.upscalers.pairs import DataConfig, Pairs
from diptych.upscalers.upscaler import Upscaler
from diptych.upscalers.warmstart import fit_last_layer, near_identity


@dataclass(frozen=True)
class ModelConfig:
    """The network: SRVGGNetCompact has `num_conv` layers, RRDBNet `num_block` blocks that grow by `num_grow_ch`."""

    architecture: Literal["SRVGGNetCompact", "RRDBNet"] = "SRVGGNetCompact"
    scale: Literal[2, 4] = 4
    num_feat: int = 64
    num_conv: int = 16
    num_block: int = 23
    num_grow_ch: int = 32
    discriminator_feat: int = 64

    def build(self) -> nn.Module:
        if self.architecture == "RRDBNet":
            return RRDBNet(
                scale=self.scale, num_feat=self.num_feat, num_block=self.num_block, num_grow_ch=self.num_grow_ch
            )
        network = SRVGGNetCompact(num_feat=self.num_feat, num_conv=self.num_conv, upscale=self.scale)
        near_identity(network)
        return network


@dataclass(frozen=True)
class LossConfig:
    """gan_from: the step where stage 2 begins. sharpen: L1 and perceptual targets are unsharp-masked, the GAN's never.

    vgg: file of torchvision's vgg19 weights for the perceptual term; without it the term needs no download.
    """

    gan_from: int
    l1: float = 1.0
    perceptual: float = 1.0
    gan: float = 0.1
    sharpen: bool = True
    vgg: str | None = None


@dataclass(frozen=True)
class Config:
    """A whole configuration file. batch: pictures a step and process; patch: side of a target, in pixels.

    start_from: weights to begin with, whatever `Upscaler.from_pretrained` takes. Without it the last layer of
    SRVGGNetCompact is fitted to `fitted` pairs. gan_learning_rate: both networks' in stage 2.
    """

    run: RunConfig
    data: DataConfig
    loss: LossConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: int = 12
    patch: int = 256
    learning_rate: float = 2e-4
    gan_learning_rate: float = 1e-4
    warmup: int = 100
    ema: float = 0.999
    start_from: str | None = None
    validation_pictures: int = 32
    fitted: int = 256

    def __post_init__(self) -> None:
        if self.patch < 32 or self.patch % 8:
            raise ValueError(f"patch must be a multiple of 8 and at least 32, not {self.patch}.")
        for name in ("batch", "validation_pictures", "fitted"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


def train(config_file: str, resume: bool = False) -> Path:
    """Trains as `config_file` says and returns the folder of the finished network, in the format of `Upscaler`.

    Raises ValueError, CheckpointError, ImageError or ModelNotFound before any work where something does not fit.
    """
    config = read_config(config_file, Config)
    pairs = Pairs(config.data, config.patch, config.model.scale, config.loss.sharpen)
    run = Run(config, resume)
    run.keep_config(config_file)
    torch.manual_seed(config.run.seed)
    network = config.model.build()
    if config.start_from is not None:
        _start_from(network, config.start_from)
    elif isinstance(network, SRVGGNetCompact) and not resume:
        small, target, _ = pairs.batch(np.random.default_rng([config.run.seed, 2**32]), config.fitted, run.device)
        fit_last_layer(network.to(run.device), small, target)
    network = network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    critic = UNetDiscriminatorSN(num_feat=config.model.discriminator_feat)
    critic = critic.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    vgg = VGGPerceptual(config.loss.vgg).to(run.device) if config.loss.vgg is not None else None
    average = ema_of(network, config.ema)
    adam = torch.optim.Adam(network.parameters(), config.learning_rate, betas=(0.9, 0.99))
    adam_d = torch.optim.Adam(critic.parameters(), config.gan_learning_rate, betas=(0.9, 0.99))
    run.attach(network=network, critic=critic, average=average, adam=adam, adam_d=adam_d)
    model, model_d, optimizer, optimizer_d = run.accelerator.prepare(network, critic, adam, adam_d)
    unseen = np.random.default_rng([config.run.seed, 2**31])  # the same in every process and every resumed run
    validation = pairs.validation(unseen, config.validation_pictures, run.device)

    for step in run.steps():
        stage_2 = step >= config.loss.gan_from
        if step == config.loss.gan_from:
            network.load_state_dict(average.module.state_dict())
            adam.state.clear()
        rate = config.gan_learning_rate if stage_2 else config.learning_rate
        begun = step - config.loss.gan_from if stage_2 else step
        for group in (*adam.param_groups, *adam_d.param_groups):
            group["lr"] = rate * min(1, (begun + 1) / config.warmup)

        lq, target, hr = pairs.batch(run.rng(step), config.batch, run.device)
        with run.accelerator.autocast():
            sr = model(lq)
        sr = sr.float()
        # stage 1: loss = |target - sr|;  stage 2: loss = l1 |target - sr| + perceptual + gan softplus(-D(sr))
        l1 = (target - sr).abs().mean()
        loss = l1
        if stage_2:
            critic.requires_grad_(False)
            with run.accelerator.autocast():
                made = critic.features(sr)
                adversarial = gan_generator(critic.conv9(made[-1]).float())
                if vgg is not None:
                    perceptual = vgg(sr, target)
                else:
                    with torch.no_grad():
                        true = critic.features(target)
                    perceptual = feature_matching(made, true) + laplacian(sr, target)
            critic.requires_grad_(True)
            weights = config.loss
            loss = weights.l1 * l1 + weights.perceptual * perceptual + weights.gan * adversarial
            run.log(perceptual=perceptual, adversarial=adversarial)
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        optimizer.step()
        average.update_parameters(network)

        if stage_2:
            with run.accelerator.autocast():
                real, fake = model_d(torch.cat([hr, sr.detach()])).float().chunk(2)
            loss_d = gan_discriminator(real, fake)
            optimizer_d.zero_grad()
            run.accelerator.backward(loss_d)
            optimizer_d.step()
            run.log(discriminator=loss_d, real=real.mean(), fake=fake.mean())

        if run.due(step, config.run.sample_every):
            run.log(**_validate(average.module, validation, run, step))
        run.log(l1=l1)

    if run.is_main:
        finished = load_network(average.module.state_dict())
        Upscaler(finished, device="cpu", dtype="fp32").save_pretrained(run.folder / "upscaler")
    return run.folder / "upscaler"


def _start_from(network: nn.Module, name: str) -> None:
    known = Upscaler.from_pretrained(name, device="cpu", dtype="fp32").network
    try:
        network.load_state_dict(known.module.state_dict())
    except RuntimeError:
        raise ValueError(
            f"start_from: {name} holds a {known.architecture} of {known.hyperparameters}, not the network of [model]."
        ) from None


@torch.no_grad()
def _validate(
    network: nn.Module, validation: dict[str, tuple[Tensor, Tensor]], run: Run, step: int
) -> dict[str, float]:
    """PSNR of the network and of Lanczos on held-out pictures; a sheet of LQ, Lanczos, ours and HR."""
    values: dict[str, float] = {}
    rows: list[list[Tensor]] = []
    for kind, (lq, hr) in validation.items():
        made = torch.cat([network(part) for part in lq.split(8)]).clamp(0, 1)
        size = (hr.shape[3], hr.shape[2])
        lanczos = torch.stack([_resized(picture, size, Image.Resampling.LANCZOS) for picture in lq]).to(hr.device)
        values[f"psnr_{kind}"] = metrics.psnr(made, hr).mean().item()
        values[f"psnr_{kind}_lanczos"] = metrics.psnr(lanczos, hr).mean().item()
        for i in range(min(8, len(lq))):
            rows.append([_resized(lq[i], size, Image.Resampling.NEAREST), lanczos[i], made[i], hr[i]])
    run.sheet(step, rows)
    return values


def _resized(picture: Tensor, size: tuple[int, int], filter: Image.Resampling) -> Tensor:
    """A picture (3, H, W), 0..1, resized by Pillow to (width, height)."""
    levels = (picture.cpu() * 255).round().byte().permute(1, 2, 0).numpy()
    return torch.from_numpy(np.array(Image.fromarray(levels).resize(size, filter))).permute(2, 0, 1).float() / 255
