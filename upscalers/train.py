"""Trains a GAN upscaler: `diptych train upscaler CONFIG`.

The recipe is Real-ESRGAN's (Wang et al. 2021, arXiv:2107.10833): pictures are degraded twice over and restored, in
stage 1 for the smallest L1 distance, in stage 2 against a discriminator as well. Both stages are one run: stage 2
begins at step `gan_from`, from the averaged weights of stage 1. Where no VGG weights are at hand, the perceptual term
is made of the discriminator's own features and of Laplacian pyramids, which need no download.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diptych import metrics
from diptych.data import folders, glyphs, photos
from diptych.data.sources import GlyphSource
from diptych.training import Run, RunConfig, ema_of, read_config
from diptych.upscalers.degradations import degrade
from diptych.upscalers.discriminator import UNetDiscriminatorSN
from diptych.upscalers.losses import (
    VGGPerceptual,
    feature_matching,
    gan_discriminator,
    gan_generator,
    laplacian,
    unsharp_mask,
)
from diptych.upscalers.networks import RRDBNet, SRVGGNetCompact, load_network
from diptych.upscalers.upscaler import Upscaler

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class DataConfig:
    """The TOML table `[data]`: either `folder`, or `photos` and `subjects`, the built-in data.

    folder: pictures, cropped at their own resolution; the last twentieth of them is held out.
    photos: where the Debian packages of `diptych.data.photos` are installed ("/") or unpacked.
    subjects: a list of glyph names (`glyphs.read_subjects`); glyphs: their share of a batch.
    vae: folder of an AutoencoderKL; decodes: share of glyph pictures that come small out of that VAE, not degraded.
    """

    folder: str | None = None
    photos: str | None = None
    subjects: str | None = None
    glyphs: float = 0.5
    vae: str | None = None
    decodes: float = 0.0

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.photos is None or self.subjects is None):
            raise ValueError("data needs either `folder`, or `photos` and `subjects`.")
        if min(self.glyphs, self.decodes) < 0 or self.glyphs + self.decodes > 1:
            raise ValueError("the shares `glyphs` and `decodes` must be positive and not exceed 1 together.")
        if (self.vae is None) != (self.decodes == 0):
            raise ValueError("`vae` and `decodes` belong together.")


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
        # torch's own initialisation shrinks the signal at each of the layers: thousands of steps are lost waking it.
        for layer in network.body:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.25)  # the slope that PReLU begins with
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.zeros_(network.body[-1].weight)  # type: ignore[arg-type]
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

    start_from: weights to begin with, whatever `Upscaler.from_pretrained` takes. gan_learning_rate: both networks' in
    stage 2.
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

    def __post_init__(self) -> None:
        if self.patch < 32 or self.patch % 8:
            raise ValueError(f"patch must be a multiple of 8 and at least 32, not {self.patch}.")
        for name in ("batch", "validation_pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}.")


def train(config_file: str, resume: bool = False) -> Path:
    """Trains as `config_file` says and returns the folder of the finished network, in the format of `Upscaler`.

    Raises ValueError, CheckpointError, ImageError or ModelNotFound before any work where something does not fit.
    """
    config = read_config(config_file, Config)
    pairs = Pairs(config)
    run = Run(config, resume)
    run.keep_config(config_file)
    torch.manual_seed(config.run.seed)
    network = config.model.build()
    if config.start_from is not None:
        _start_from(network, config.start_from)
    network = network.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    critic = UNetDiscriminatorSN(num_feat=config.model.discriminator_feat)
    critic = critic.to(run.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    vgg = VGGPerceptual(config.loss.vgg).to(run.device) if config.loss.vgg is not None else None
    average = ema_of(network, config.ema)
    adam = torch.optim.Adam(network.parameters(), config.learning_rate, betas=(0.9, 0.99))
    adam_d = torch.optim.Adam(critic.parameters(), config.gan_learning_rate, betas=(0.9, 0.99))
    run.attach(network=network, critic=critic, average=average, adam=adam, adam_d=adam_d)
    model, model_d, optimizer, optimizer_d = run.accelerator.prepare(network, critic, adam, adam_d)
    validation = pairs.validation(run.device)

    for step in run.steps():
        stage_2 = step >= config.loss.gan_from
        if step == config.loss.gan_from:
            network.load_state_dict(average.module.state_dict())
            adam.state.clear()
        rate = config.gan_learning_rate if stage_2 else config.learning_rate
        begun = step - config.loss.gan_from if stage_2 else step
        for group in (*adam.param_groups, *adam_d.param_groups):
            group["lr"] = rate * min(1, (begun + 1) / config.warmup)

        lq, target, hr = pairs.batch(run.rng(step), run.device)
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


class Pairs:
    """Where the trainer's pictures come from: large ones, small ones made of them, and what the losses aim at."""

    def __init__(self, config: Config) -> None:
        """Raises ImageError, ModelNotFound, CheckpointError or ValueError where there is nothing to read."""
        data = config.data
        self.config = config
        self.glyphs: GlyphSource | None = None
        self.vae: AutoencoderKL | None = None
        if data.folder is not None:
            paths = [picture.path for picture in folders.find_pictures(data.folder)]
            large = photos.large_enough(paths, config.patch)
            kept = max(1, len(large) - max(1, len(large) // 20))
            self.pictures = photos.CropSource(large[:kept])
            self.held_out = photos.CropSource(large[kept:] or large)
        else:
            assert data.photos is not None and data.subjects is not None
            found = photos.find_photos(data.photos)
            self.pictures, self.held_out = (
                photos.CropSource(
                    photos.large_enough(
                        [path for photo, path in found.items() if photo.held_out is held], config.patch
                    ),
                    longest=1440,
                )
                for held in (False, True)
            )
            self.glyphs = GlyphSource(glyphs.read_subjects(data.subjects))
        if data.vae is not None:
            self.vae = _load_vae(data.vae)

    def batch(self, rng: np.random.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Small pictures, targets and true pictures of one step, all drawn from `rng`; (N, 3, h, w), 0..1."""
        share = self.config.data if self.glyphs is not None else DataConfig(folder="", glyphs=0)
        of_glyphs, of_decodes = (round(self.config.batch * part) for part in (share.glyphs, share.decodes))
        plain = self.pictures.batch(rng, self.config.batch - of_glyphs - of_decodes, self.config.patch)
        if of_glyphs:
            assert self.glyphs is not None
            plain = np.concatenate([plain, self._glyph_crops(self.glyphs, rng, of_glyphs)])
        hr = _tensor(plain, device)
        target = unsharp_mask(hr) if self.config.loss.sharpen else hr
        lq = self._degrade(target, rng)
        if of_decodes:
            assert self.glyphs is not None
            small, large = self._decodes(self.glyphs, rng, of_decodes, device)
            sharp = unsharp_mask(large) if self.config.loss.sharpen else large
            lq, target, hr = torch.cat([lq, small]), torch.cat([target, sharp]), torch.cat([hr, large])
        return lq, target, hr

    def validation(self, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Held-out pictures by kind: small and true ones, the same in every run of this configuration."""
        rng = np.random.default_rng([self.config.run.seed, 2**31])
        number, patch = self.config.validation_pictures, self.config.patch
        found = {}
        hr = _tensor(self.held_out.batch(rng, number, patch), device)
        found["photos" if self.glyphs is not None else "folder"] = (self._degrade(hr, rng), hr)
        if self.glyphs is not None:
            hr = _tensor(self._glyph_crops(self.glyphs.held_out(), rng, number), device)
            found["glyphs"] = (self._degrade(hr, rng), hr)
            if self.vae is not None:
                found["decodes"] = self._decodes(self.glyphs.held_out(), rng, number, device)
        return found

    def _degrade(self, pictures: Tensor, rng: np.random.Generator) -> Tensor:
        generator = torch.Generator(pictures.device).manual_seed(int(rng.integers(2**63)))
        return degrade(pictures, generator, self.config.model.scale)

    def _glyph_crops(self, source: GlyphSource, rng: np.random.Generator, number: int) -> np.ndarray:
        """Crops of compositions drawn at one to two times the size of a patch: whole glyphs and details of them."""
        patch = self.config.patch
        whole, _ = source.batch(rng, number, int(rng.integers(patch, 2 * patch + 1)))
        corners = rng.integers(whole.shape[1] - patch + 1, size=(number, 2))
        return np.stack([w[y : y + patch, x : x + patch] for w, (y, x) in zip(whole, corners, strict=True)])

    @torch.no_grad()
    def _decodes(
        self, source: GlyphSource, rng: np.random.Generator, number: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Compositions that went small through the VAE, and the same drawn large; the same crop of both."""
        assert self.vae is not None
        scale, patch = self.config.model.scale, self.config.patch
        whole, _ = source.batch(rng, number, 2 * patch)
        small_side = 2 * patch // scale
        reduced = [np.asarray(Image.fromarray(w).resize((small_side,) * 2, Image.Resampling.LANCZOS)) for w in whole]
        vae = self.vae.to(device)  # type: ignore[arg-type]
        latents = vae.encode(_tensor(np.stack(reduced), device) * 2 - 1).latent_dist.mode()
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        large = _tensor(whole, device)
        corners = rng.integers((small_side - patch // scale) + 1, size=(number, 2)).tolist()
        cut, size = patch // scale, patch
        return (
            torch.stack([d[:, y : y + cut, x : x + cut] for d, (y, x) in zip(decoded, corners, strict=True)]),
            torch.stack(
                [
                    w[:, y * scale : y * scale + size, x * scale : x * scale + size]
                    for w, (y, x) in zip(large, corners, strict=True)
                ]
            ),
        )


def _tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float().div(255).contiguous()


def _load_vae(folder: str) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ValueError(f"vae = {folder!r} is no folder of an AutoencoderKL: {error}") from None


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
