"""Trains the adversarial KL autoencoder: `diptych train vae CONFIG`.

The recipe is latent-diffusion's (Rombach et al. 2022, appendix G) with three differences, all for small budgets: the
perceptual term may be one that needs no download, the discriminator is trained for a while before the decoder hears of
it, and the kept weights are an exponential moving average.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diptych import metrics
from diptych.data.sources import DataConfig, Source
from diptych.errors import CheckpointError
from diptych.training import Run, RunConfig, ema_of, read_config
from diptych.vae.discriminator import PatchDiscriminator
from diptych.vae.losses import adaptive_weight, hinge_d, perceptual_term
from diptych.vae.principal import start_as_principal_components

# Latent-diffusion has (0.5, 0.9), with which the autoencoder forgets colours before the discriminator even speaks:
# 160 steps of 8 glyphs end 2.6 dB lower than with these.
BETAS = (0.9, 0.99)
PRINCIPAL_PICTURES = 512


@dataclass
class ModelConfig:
    """The autoencoder: `channels` has one entry a level, each level after the first halves the picture.

    principal_components: start the encoder as those of the pictures' patches (see vae/principal.py).
    start_from: a folder to take the weights from; train_encoder = false keeps its latents, so that a diffusion model
    that was trained in them stays valid while the decoder gets better.
    """

    side: int = 64
    channels: tuple[int, ...] = (32, 64, 128)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_groups: int = 16
    mid_attention: bool = True
    principal_components: bool = True
    start_from: str | None = None
    train_encoder: bool = True

    def __post_init__(self) -> None:
        if not self.train_encoder and self.start_from is None:
            raise ValueError("train_encoder = false needs start_from, an autoencoder whose encoder is kept.")


@dataclass
class LossConfig:
    """Weights, and the steps from which the discriminator learns and from which the decoder listens to it."""

    kl: float = 1e-6
    perceptual: Literal["gradients", "lpips"] = "gradients"
    perceptual_weight: float = 1.0
    adversarial: float = 0.5
    discriminator_learns_from: int = 0
    adversarial_from: int = 50_000
    discriminator_width: int = 64
    discriminator_layers: int = 3


@dataclass
class Config:
    """A whole configuration file. batch: pictures a step and process."""

    run: RunConfig
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    batch: int = 16
    learning_rate: float = 2e-4
    warmup: int = 100
    ema: float = 0.999
    validation_pictures: int = 128


def train(config_file: str, resume: bool = False) -> Path:
    """Trains as `config_file` says and returns the folder of the finished `AutoencoderKL`, readable by diffusers.

    Raises ValueError, CheckpointError, ImageError or ModelNotFound before any work where something does not fit.
    """
    config = read_config(config_file, Config)
    source = config.data.open()
    run = Run(config, resume)
    run.keep_config(config_file)
    torch.manual_seed(config.run.seed)
    vae = _build(config.model)
    if config.model.start_from is None and config.model.principal_components and not resume:
        rng = np.random.default_rng(config.run.seed)
        start_as_principal_components(vae, as_tensor(source.batch(rng, PRINCIPAL_PICTURES, config.model.side)[0]))
    vae.to(run.device)
    critic = PatchDiscriminator(config.loss.discriminator_width, config.loss.discriminator_layers).to(run.device)
    latent_side = config.model.side // 2 ** (len(config.model.channels) - 1)
    latents_shape = (config.batch, config.model.latent_channels, latent_side, latent_side)
    run.lay_out(vae, critic)
    average = ema_of(vae, config.ema)
    perceptual = perceptual_term(config.loss.perceptual, run.device)
    trained = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, config.learning_rate, betas=BETAS)
    optimizer_d = torch.optim.Adam(critic.parameters(), config.learning_rate, betas=BETAS)
    run.attach(vae=vae, critic=critic, average=average, optimizer=optimizer, optimizer_d=optimizer_d)
    model, model_d, optimizer, optimizer_d = run.accelerator.prepare(Autoencode(vae), critic, optimizer, optimizer_d)
    validation = _validation(source, config)

    drawn = run.ahead(
        partial(source.batch, number=config.batch, side=config.model.side), range(run.start, config.run.steps)
    )
    for step, (levels, _) in zip(run.steps(), drawn, strict=True):
        run.set_learning_rate(step, config.learning_rate, config.warmup, optimizer, optimizer_d)
        pictures = as_tensor(levels.to(run.device))
        noise = torch.randn(latents_shape, generator=run.generator(step)).to(run.device)
        with run.accelerator.autocast():
            rebuilt, kl = model(pictures, noise)
        adversarial_on = step >= config.loss.adversarial_from

        # nll = sum over values of (|x - x'| + perceptual) / N;  loss = nll + kl_w sum KL / N + w * (-mean D(x'))
        distance = (pictures - rebuilt).abs() + config.loss.perceptual_weight * perceptual(pictures, rebuilt)
        nll = distance.sum() / len(pictures)
        loss = nll + config.loss.kl * kl.mean()
        if adversarial_on:
            critic.requires_grad_(False)
            with run.accelerator.autocast():
                adversarial = -model_d(rebuilt).float().mean()
            weight = config.loss.adversarial * adaptive_weight(nll, adversarial, vae.decoder.conv_out.weight)
            loss = loss + weight * adversarial
            critic.requires_grad_(True)
            run.log(adversarial=adversarial, adversarial_weight=weight)
        optimizer.zero_grad()
        run.accelerator.backward(loss)
        run.accelerator.clip_grad_norm_(trained, 1e4)
        optimizer.step()
        average.update_parameters(vae)

        if step >= config.loss.discriminator_learns_from:
            with run.accelerator.autocast():
                real, fake = model_d(pictures).float(), model_d(rebuilt.detach()).float()
            loss_d = hinge_d(real, fake)
            optimizer_d.zero_grad()
            run.accelerator.backward(loss_d)
            optimizer_d.step()
            run.log(discriminator=loss_d, real=real.mean(), fake=fake.mean())

        if run.due(step, config.run.sample_every):
            run.log(**_validate(average.module, validation, run, step))
        run.log(nll=nll, kl=kl.mean(), l1=(pictures - rebuilt).abs().mean())

    finished: Any = average.module
    if config.model.train_encoder:
        finished.register_to_config(scaling_factor=float(1 / _encode_all(finished, validation).std()))
    if run.is_main:
        finished.save_pretrained(run.folder / "vae")
    return run.folder / "vae"


def as_tensor(pictures: np.ndarray | Tensor) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in -1..1."""
    return torch.as_tensor(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def load_autoencoder(folder: str, key: str) -> Any:
    """The `AutoencoderKL` in `folder`. Raises CheckpointError naming the configuration's `key` if there is none."""
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{key} = {folder!r} is no folder of an AutoencoderKL: {reason}") from None


def _build(model: ModelConfig) -> Any:
    from diffusers import AutoencoderKL

    if model.start_from is None:
        levels = len(model.channels)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=model.channels,
            layers_per_block=model.layers_per_block,
            latent_channels=model.latent_channels,
            norm_num_groups=model.norm_groups,
            mid_block_add_attention=model.mid_attention,
            sample_size=model.side,
        )
    vae = load_autoencoder(model.start_from, "start_from")
    theirs = (tuple(vae.config.block_out_channels), vae.config.latent_channels)
    if theirs != (model.channels, model.latent_channels):
        ours = (model.channels, model.latent_channels)
        raise CheckpointError(
            f"{model.start_from} has channels and latent_channels {theirs}, the configuration {ours}."
        )
    if not model.train_encoder:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    return vae


class Autoencode(torch.nn.Module):
    """Encode, sample, decode in one forward, which is what several processes can share gradients of."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures in -1..1, noise of the latents' shape -> rebuilt pictures, and the KL to N(0, 1) of each (N,)."""
        posterior = self.vae.encode(pictures).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample.float(), posterior.kl().float()


def _validation(source: Source, config: Config) -> Tensor:
    """Pictures that are not trained on: (N, 3, side, side) in -1..1."""
    rng = np.random.default_rng([config.run.seed, 2**31])
    return as_tensor(source.held_out().batch(rng, config.validation_pictures, config.model.side)[0])


@torch.no_grad()
def _encode_all(vae: Any, pictures: Tensor) -> Tensor:
    device = next(vae.parameters()).device
    return torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in pictures.split(32)])


@torch.no_grad()
def _validate(vae: Any, pictures: Tensor, run: Run, step: int) -> dict[str, float]:
    latents = _encode_all(vae, pictures)
    rebuilt = torch.cat([vae.decode(part).sample for part in latents.split(32)]).cpu().add(1).div(2).clamp(0, 1)
    true = pictures.add(1).div(2)
    run.sheet(step, [[a, b] for a, b in zip(true[:8], rebuilt[:8], strict=True)])
    return {
        "psnr": metrics.psnr(true, rebuilt).mean().item(),
        "ssim": metrics.ssim(true, rebuilt).mean().item(),
        "fd_random": metrics.frechet_distance(metrics.random_features(true), metrics.random_features(rebuilt)),
    }
