"""Enlarging latents without decoding them, in Automatic1111's latent upscale modes.

What they lack in sharpness a denoising pass afterwards makes up; without one they decode to a blur.
"""

from __future__ import annotations

import torch
from torch.nn import functional

LATENT_MODES: dict[str, tuple[str, bool]] = {
    "Latent": ("bilinear", False),
    "Latent (antialiased)": ("bilinear", True),
    "Latent (bicubic)": ("bicubic", False),
    "Latent (bicubic antialiased)": ("bicubic", True),
    "Latent (nearest)": ("nearest", False),
    "Latent (nearest-exact)": ("nearest-exact", False),
}
"""Automatic1111's names; the mode of `torch.nn.functional.interpolate`, and whether it is antialiased."""


def latent_mode(name: str | None) -> str | None:
    """The mode's own name, in whatever case it is given; None if there is none with this name."""
    return next((mode for mode in LATENT_MODES if name is not None and mode.lower() == name.strip().lower()), None)


def enlarge_latents(latents: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Latents (N, C, h, w) to `size` (width, height), in latent pixels. Raises ValueError for an unknown mode."""
    if mode not in LATENT_MODES:
        raise ValueError(f"there is no latent upscale mode called {mode!r}: choose one of {', '.join(LATENT_MODES)}")
    kind, antialias = LATENT_MODES[mode]
    # In fp32: torch has no antialiased kernel for the half types on a CPU.
    return functional.interpolate(latents.float(), size=(size[1], size[0]), mode=kind, antialias=antialias).to(latents)
