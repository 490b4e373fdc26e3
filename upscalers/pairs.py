"""Training pairs for the upscaler: large pictures, and small ones made of them.

Large ones come from a folder, or from the built-in data: photographs and glyph compositions. Small ones are degraded,
or, of glyphs, what a VAE makes of them: what the upscaler of a pipeline will meet. Nothing here trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diptych.data import folders, glyphs, photos
from diptych.data.sources import GlyphSource
from diptych.upscalers.degradations import degrade
from diptych.upscalers.losses import unsharp_mask

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class DataConfig:
    """The TOML table `[data]`: either `folder`, or `photos` and `subjects`, the built-in data.

    folder: pictures, cropped at their own resolution; the last twentieth of them is held out.
    photos: where the Debian packages of `diptych.data.photos` are installed ("/") or unpacked.
    subjects: a list of glyph names (`glyphs.read_subjects`); glyphs: their share of a batch.
    vae: folder of an AutoencoderKL; decodes: share of a batch that are glyphs as that VAE decodes them, not degraded.
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
        if (self.vae is None) != (self.decodes == 0) or (self.vae is not None and self.subjects is None):
            raise ValueError("`vae` and `decodes` belong together, and to `subjects`.")


class Pairs:
    """Draws pairs: large ones of `patch` pixels a side, small ones of `patch // scale`.

    sharpen: what the losses aim at is unsharp-masked, and the small ones are made of that. The data of a folder is one
    kind of picture, `folder`; the built-in data are `photos`, `glyphs` and `decodes`.
    Raises ImageError, ModelNotFound, CheckpointError or ValueError where there is nothing to read.
    """

    def __init__(self, data: DataConfig, patch: int, scale: int, sharpen: bool) -> None:
        self.data, self.patch, self.scale, self.sharpen = data, patch, scale, sharpen
        self.glyphs: GlyphSource | None = None
        self.vae: AutoencoderKL | None = None
        if data.folder is not None:
            paths = [picture.path for picture in folders.find_pictures(data.folder)]
            large = photos.large_enough(paths, patch)
            kept = max(1, len(large) - max(1, len(large) // 20))
            self.pictures = photos.CropSource(large[:kept])
            self.held_out = photos.CropSource(large[kept:] or large)
            return
        assert data.photos is not None and data.subjects is not None
        found = photos.find_photos(data.photos)
        training, held_out = (
            photos.large_enough([path for photo, path in found.items() if photo.held_out is held], patch)
            for held in (False, True)
        )
        self.pictures, self.held_out = photos.CropSource(training, 1440), photos.CropSource(held_out, 1440)
        self.glyphs = GlyphSource(glyphs.read_subjects(data.subjects))
        if data.vae is not None:
            self.vae = _load_vae(data.vae)

    def batch(self, rng: np.random.Generator, number: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Small pictures (N, 3, h, w), targets and true pictures (N, 3, H, W) in 0..1, all drawn from `rng`."""
        of_glyphs, of_decodes = 0, 0
        if self.glyphs is not None:
            of_glyphs, of_decodes = round(number * self.data.glyphs), round(number * self.data.decodes)
        crops = []
        if of_pictures := number - of_glyphs - of_decodes:
            crops.append(self.pictures.batch(rng, of_pictures, self.patch))
        if self.glyphs is not None and of_glyphs:
            crops.append(self._glyph_crops(self.glyphs, rng, of_glyphs))
        small, large = torch.empty(0, device=device), torch.empty(0, device=device)
        if crops:
            large = _tensor(np.concatenate(crops), device)
            small = self._degrade(self._target(large), rng)
        if self.glyphs is not None and of_decodes:
            decoded, drawn = self._decodes(self.glyphs, rng, of_decodes, device)
            small, large = torch.cat([small, decoded]), torch.cat([large, drawn])
        return small, self._target(large), large

    def validation(
        self, rng: np.random.Generator, number: int, device: torch.device
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """`number` held-out pictures of each kind: small ones and true ones, not sharpened."""
        pictures = _tensor(self.held_out.batch(rng, number, self.patch), device)
        if self.glyphs is None:
            return {"folder": (self._degrade(pictures, rng), pictures)}
        found = {"photos": (self._degrade(pictures, rng), pictures)}
        unseen = self.glyphs.held_out()
        drawn = _tensor(self._glyph_crops(unseen, rng, number), device)
        found["glyphs"] = (self._degrade(drawn, rng), drawn)
        if self.vae is not None:
            found["decodes"] = self._decodes(unseen, rng, number, device)
        return found

    def _target(self, pictures: Tensor) -> Tensor:
        return unsharp_mask(pictures) if self.sharpen else pictures

    def _degrade(self, pictures: Tensor, rng: np.random.Generator) -> Tensor:
        generator = torch.Generator(pictures.device).manual_seed(int(rng.integers(2**63)))
        return degrade(pictures, generator, self.scale)

    def _glyph_crops(self, source: GlyphSource, rng: np.random.Generator, number: int) -> np.ndarray:
        """Crops of compositions drawn at one to two times the size of a patch: whole glyphs and details of them."""
        whole, _ = source.batch(rng, number, int(rng.integers(self.patch, 2 * self.patch + 1)))
        corners = rng.integers(whole.shape[1] - self.patch + 1, size=(number, 2))
        return np.stack([w[y : y + self.patch, x : x + self.patch] for w, (y, x) in zip(whole, corners, strict=True)])

    @torch.no_grad()
    def _decodes(
        self, source: GlyphSource, rng: np.random.Generator, number: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Compositions that went small through the VAE, and the same drawn large: the same crop of both."""
        assert self.vae is not None
        whole, _ = source.batch(rng, number, 2 * self.patch)
        cut, side = self.patch // self.scale, 2 * self.patch // self.scale
        resized = (Image.fromarray(w).resize((side, side), Image.Resampling.LANCZOS) for w in whole)
        reduced = np.stack([np.asarray(picture) for picture in resized])
        vae = self.vae.to(device)  # type: ignore[arg-type]
        latents = vae.encode(_tensor(reduced, device) * 2 - 1).latent_dist.mode()
        decoded = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        small, large = [], []
        for low, high, (y, x) in zip(
            decoded, _tensor(whole, device), rng.integers(cut + 1, size=(number, 2)), strict=True
        ):
            small.append(low[:, y : y + cut, x : x + cut])
            top, left = y * self.scale, x * self.scale
            large.append(high[:, top : top + self.patch, left : left + self.patch])
        return torch.stack(small), torch.stack(large)


def _tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (N, H, W, 3) to float (N, 3, H, W) in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float().div(255).contiguous()


def _load_vae(folder: str) -> AutoencoderKL:
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    except (OSError, ValueError) as error:
        raise ValueError(f"vae = {folder!r} is no folder of an AutoencoderKL: {error}") from None
