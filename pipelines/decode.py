"""From latents to rows of a picture: the decode that is checked, and that goes through in strips.

Which layers run in which order is in `strips`; the GAN that enlarges the rows, and the files they end in, are others'.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module

from diptych.errors import DiptychError
from diptych.pipelines.strips import decode_strips, encode_strips, runs_in_strips
from diptych.upscalers.passes import Cancel
from diptych.upscalers.sources import Source, StripSource, TensorSource

logger = logging.getLogger(__name__)

T = TypeVar("T")

_BLACK = -1 + 1 / 255  # a decoded picture (-1..1) that nowhere exceeds this is written as 8-bit zeros
_NAN_LATENTS = (
    "the denoising gave NaN instead of a picture: take another scheduler or more steps, or compute in fp32"
    " or bf16 where it was fp16; if nothing helps, the weights of the model are damaged"
)
_NAN_PICTURE = "the VAE gives NaN even in fp32: its weights are damaged; try another one with --vae"


class _Failed(Exception):
    """A decode or encode that went wrong in a way that more precision may mend."""


@torch.no_grad()
def decode_rows(
    vae: Any,
    latents: torch.Tensor,
    use: Callable[[Source], T],
    *,
    notes: list[str],
    fp32: bool = False,
    cancel: Cancel | None = None,
) -> T:
    """Decodes latents (1, C, h, w), as `denormalised` makes them, and returns what `use` makes of the picture's rows.

    `use` gets a Source of one picture, 0..1, whose rows come while they are read, from top to bottom. Where they turn
    out to hold NaN, or to be black to the last one, it is called once more with the picture decoded in fp32; what was
    found is added to `notes`. fp32: decode in it at once.
    Raises DiptychError for latents or pictures that stay NaN, what `strips.decode_strips` does, and what `use` does.
    """
    if not torch.isfinite(latents).all():
        raise DiptychError(_NAN_LATENTS)
    was = vae.dtype
    if not fp32 or was is torch.float32:
        try:
            return _attempt(vae, latents, use, notes if was is torch.float32 else None, cancel)
        except _Failed as failure:
            said = str(failure)
        if was is torch.float32:
            raise DiptychError(_NAN_PICTURE)
        _note(notes, f"the decode in {_name(was)} gave one picture {said}: decoded again in fp32")
    with in_fp32(vae):
        try:
            return _attempt(vae, latents.float(), use, notes, cancel)
        except _Failed as failure:
            raise DiptychError(_NAN_PICTURE) from failure


def encode_rows(vae: Any, source: Source, *, cancel: Cancel | None = None) -> torch.Tensor:
    """The mean (1, C, h, w) of the latents of one picture, 0..1, read by rows; `normalised` makes them the UNet's.

    Within the `use` of `decode_rows` an overflow repeats the whole way in fp32.
    """
    if runs_in_strips(vae):
        moments = encode_strips(vae, source, cancel=cancel)
    else:
        picture = source.rows(0, source.height).to(vae.device, vae.dtype) * 2 - 1
        moments = vae.encode(picture).latent_dist.parameters
    if not torch.isfinite(moments).all():
        raise _Failed("black or NaN")
    return moments.chunk(2, dim=1)[0]


def denormalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as a UNet makes them, for `vae.decode`."""
    mean, std = _statistics(vae, latents)
    return latents * std / vae.config.scaling_factor + mean


def normalised(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Latents as `vae.encode` makes them, for a UNet."""
    mean, std = _statistics(vae, latents)
    return (latents - mean) * vae.config.scaling_factor / std


@contextmanager
def checked_decode(vae: Any, notes: list[str]) -> Iterator[None]:
    """While it is open, `vae.decode` looks at what it made: NaN and black pictures are decoded once more in fp32.

    After `vae.enable_tiling()` it decodes in exact strips where diffusers would in tiles. What was found is added to
    `notes` and logged. Raises DiptychError for latents or pictures that stay NaN.
    """
    if vae is None:
        yield
        return
    whole = vae.decode

    def plain(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (vae.use_tiling and runs_in_strips(vae)):
            return whole(latents, *args, **kwargs)
        with _ready(vae):
            return (torch.cat([torch.cat(list(decode_strips(vae, one[None])), 2) for one in latents.to(vae.device)]),)

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.isfinite(latents).all():
            raise DiptychError(_NAN_LATENTS)
        output = plain(latents, *args, **kwargs)
        pictures = output[0]
        bad = _broken(pictures)
        if bad and vae.dtype is not torch.float32:
            was = _name(vae.dtype)
            with in_fp32(vae):
                again = plain(latents.float(), *args, **kwargs)[0]
            pictures[bad] = again[bad].to(pictures.dtype)
            _note(notes, f"the decode in {was} gave {_count(bad)} black or NaN: decoded again in fp32")
            bad = _broken(pictures)
        if not torch.isfinite(pictures).all():
            raise DiptychError(_NAN_PICTURE)
        if bad:
            _note(notes, f"{_count(bad)} all black, in fp32 too")
        return output

    vae.decode = decode
    try:
        yield
    finally:
        del vae.decode


def _attempt(
    vae: Any, latents: torch.Tensor, use: Callable[[Source], T], notes: list[str] | None, cancel: Cancel | None
) -> T:
    """`use` of one decode. notes: where to say that the picture is black; without them, that is a failure."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = latents.shape[2] * factor, latents.shape[3] * factor
    with _ready(vae):
        latents = latents.to(vae.device, vae.dtype)
        if runs_in_strips(vae):
            strips = decode_strips(vae, latents, cancel=cancel)
        else:
            strips = iter([vae.decode(latents, return_dict=False)[0]])
        rows = _checked(strips, height, notes)
        if hasattr(vae, "_hf_hook"):  # with offload, the next model that runs sends this one away
            return use(TensorSource(torch.cat(list(rows), 2)))
        return use(StripSource(rows, 1, height, width))


def _checked(strips: Iterator[torch.Tensor], height: int, notes: list[str] | None) -> Iterator[torch.Tensor]:
    """The strips in 0..1. Raises _Failed for one that holds NaN, and before the last one if all of them are black."""
    black, done = True, 0
    for strip in strips:
        if not torch.isfinite(strip).all():
            raise _Failed("black or NaN")
        black = black and bool((strip <= _BLACK).all())
        done += strip.shape[2]
        if black and done == height:
            if notes is None:
                raise _Failed("black or NaN")
            _note(notes, "one picture all black, in fp32 too")
        yield (strip.float() / 2 + 0.5).clamp(0, 1)


@contextmanager
def _ready(vae: Any) -> Iterator[None]:
    """The VAE where it can be run layer by layer, though offload keeps it elsewhere."""
    with _without_sequential_offload(vae):
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(vae)
        yield


def _statistics(vae: Any, latents: torch.Tensor) -> tuple[Any, Any]:
    """The mean and the standard deviation by which some SDXL models normalise their latents."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    if mean is None or std is None:
        return 0.0, 1.0
    made = (torch.tensor(value).view(1, -1, 1, 1).to(latents) for value in (mean, std))
    return next(made), next(made)


def _broken(pictures: torch.Tensor) -> list[int]:
    """Indices of pictures (N, C, H, W), -1..1, that hold NaN or infinity or are black."""
    flat = pictures.flatten(1)
    bad = ~torch.isfinite(flat).all(1) | (flat <= _BLACK).all(1)
    return [i for i, is_bad in enumerate(bad.tolist()) if is_bad]


def _count(bad: list[int]) -> str:
    return "one picture" if len(bad) == 1 else f"{len(bad)} pictures"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _note(notes: list[str], sentence: str) -> None:
    notes.append(sentence)
    logger.warning(sentence)


@contextmanager
def in_fp32(vae: Any) -> Iterator[None]:
    """Holds the VAE in fp32; weights that sequential offload keeps elsewhere are fetched and given back."""
    dtype = vae.dtype
    with _without_sequential_offload(vae):
        torch.nn.Module.to(vae, torch.float32)  # diffusers' own `to` warns of what does not matter here
        try:
            yield
        finally:
            torch.nn.Module.to(vae, dtype)


def _without_sequential_offload(vae: Any) -> AbstractContextManager[None]:
    hooks = [m._hf_hook for m in vae.modules() if isinstance(getattr(m, "_hf_hook", None), AlignDevicesHook)]
    if not any(hook.offload for hook in hooks):
        return nullcontext()
    return _fetched(vae, next(hook.execution_device for hook in hooks if hook.offload))


@contextmanager
def _fetched(vae: Any, device: torch.device) -> Iterator[None]:
    remove_hook_from_module(vae, recurse=True)
    vae.to(device)
    try:
        yield
    finally:
        vae.to("cpu")
        cpu_offload(vae, device, offload_buffers=len(vae._parameters) > 0)
