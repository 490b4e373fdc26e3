"""Automatic1111's fields to our own requests, and our pictures to its answers.

What cannot be honoured is refused with a sentence, not ignored, unless existing programs always send it. How a picture
is made is not decided here.
"""

from __future__ import annotations

import base64
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import ExifTags, Image, ImageChops, ImageFilter, ImageOps, PngImagePlugin

from diptych import __version__
from diptych.errors import ImageError, ModelNotFound
from diptych.infotext import Infotext, parse_infotext
from diptych.pipelines.generation import GenerationRequest
from diptych.pipelines.latents import latent_mode
from diptych.pipelines.masked import MASKED_CONTENT
from diptych.pipelines.schedulers import SAMPLERS, SCHEDULE_TYPES
from diptych.webui import schemas
from diptych.webui.backend import Made, Upscaling
from diptych.webui.pictures_in import decode_base64, decode_many
from diptych.webui.settings import Limits

_NO_SCHEDULE = ("", "automatic", "use same scheduler")
_NONE = ("", "none")
_NOISE_LEVELS = 1000  # that models are trained with: so many steps there are in all


class ScriptNotFound(ValueError):
    """We have no scripts."""


@dataclass(frozen=True)
class Region:
    """Where on a picture what was drawn belongs: all over it, or a part ("only masked")."""

    picture: Image.Image
    mask: Image.Image
    box: tuple[int, int, int, int]

    def paste(self, piece: Image.Image) -> Image.Image:
        """The picture with the piece in it, blended by the mask; where the mask is black it is as it came."""
        left, top, right, bottom = self.box
        whole = self.picture.copy()
        fitted = piece.convert("RGB").resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole.paste(fitted, (left, top), self.mask.crop(self.box))
        return whole


@dataclass(frozen=True)
class Wish:
    """What a txt2img or img2img body comes to: one request for each init image, one in all without."""

    requests: Sequence[GenerationRequest]
    model: str | None = None
    upscaler: str | None = None
    regions: Sequence[Region | None] = ()

    def finish(self, index: int, picture: Image.Image) -> Image.Image:
        """Puts a piece that was drawn for the request number `index` back to where it belongs."""
        region = self.regions[index] if self.regions else None
        return picture if region is None else region.paste(picture)


def wish_from(body: schemas.Txt2ImgBody | schemas.Img2ImgBody, limits: Limits, options: dict[str, Any]) -> Wish:
    """Raises ValueError, ImageError, ModelNotFound, ScriptNotFound."""
    _refuse_what_we_have_not(body)
    settings = _Settings(body)
    overrides = options | (body.override_settings or {})
    seed = settings.get("seed", "Seed", int)
    request = GenerationRequest(
        prompt=settings.get("prompt", None, str),
        negative_prompt=settings.get("negative_prompt", None, str),
        seed=None if seed < 0 else seed,
        count=(body.batch_size or 1) * (body.n_iter or 1),
        batch_size=body.batch_size or 1,
        steps=settings.get("steps", "Steps", int),
        guidance_scale=settings.get("cfg_scale", "CFG scale", float),
        width=body.width or 512,
        height=body.height or 512,
        upscale=1,
        scheduler=settings.scheduler(),
        clip_skip=_clip_skip(overrides),
    )
    model = overrides.get("sd_model_checkpoint") or None
    if model is not None and not isinstance(model, str):
        raise ModelNotFound("sd_model_checkpoint must be the name of a model")
    if isinstance(body, schemas.Img2ImgBody):
        return _img2img(body, request, model, limits)
    return _txt2img(body, request, model)


class _Settings:
    """The fields of a body; where one was not given and `infotext` says it, the infotext counts."""

    def __init__(self, body: schemas.GenerationBody) -> None:
        self._body = body
        self._said = parse_infotext(body.infotext) if body.infotext else Infotext("")

    def get(self, name: str, said: str | None, kind: Any) -> Any:
        given = getattr(self._body, name)
        if self._body.infotext and name not in self._body.model_fields_set:
            text = getattr(self._said, name) if said is None else self._said.settings.get(said)
            if text is not None:
                return kind(text)
        default = type(self._body).model_fields[name].default
        return default if given is None else given

    def scheduler(self) -> str | None:
        """The name for a `GenerationRequest`; None, the model's own, if none is named. Raises ModelNotFound."""
        body = self._body
        named = body.sampler_name or (body.sampler_index if "sampler_index" in body.model_fields_set else None)
        kind = body.scheduler or ""
        if named is None:
            named = self._said.settings.get("Sampler")
            kind = kind or self._said.settings.get("Schedule type", "")
        return None if named is None else scheduler_name(named, kind)


def scheduler_name(sampler: str, kind: str) -> str:
    """A sampler and a schedule type as one name. Raises ModelNotFound with the list for either."""
    kinds = {name.lower(): name for name in SCHEDULE_TYPES} | {schedule_id(name): name for name in SCHEDULE_TYPES}
    known = {name.lower(): name for item in SAMPLERS for name in (item.name, item.class_name)}
    words = sampler.lower()
    if words not in known and " " in words and words.rsplit(" ", 1)[1] in kinds:  # "DPM++ 2M Karras"
        words, kind = words.rsplit(" ", 1)
    if words not in known:
        names = ", ".join(item.name for item in SAMPLERS)
        raise ModelNotFound(f"there is no sampler called {sampler[:100]!r}: choose one of {names}")
    if kind.lower() in _NO_SCHEDULE:
        return known[words]
    if kind.lower() not in kinds:
        raise ModelNotFound(f"there is no scheduler called {kind[:100]!r}: choose one of {', '.join(SCHEDULE_TYPES)}")
    return f"{known[words]} {kinds[kind.lower()]}"


def schedule_id(name: str) -> str:
    """Automatic1111's short name of a schedule type."""
    return name.lower().replace(" ", "_")


def upscaling_from(body: schemas.ExtrasBody) -> Upscaling | None:
    """None if the body names no upscaler, which Automatic1111 answers with the picture as it came."""
    for name, value in (
        ("gfpgan_visibility", body.gfpgan_visibility),
        ("codeformer_visibility", body.codeformer_visibility),
    ):
        if value:
            raise ValueError(f"{name} is {value:g}, and there is no face restoration here: leave it 0")
    if body.upscaler_1.lower() in _NONE:
        return None
    to_size = body.resize_mode == 1
    return Upscaling(
        body.upscaler_1,
        scale=body.upscaling_resize,
        size=(body.upscaling_resize_w, body.upscaling_resize_h) if to_size else None,
        crop=body.upscaling_crop,
        second=None if body.upscaler_2.lower() in _NONE else body.upscaler_2,
        second_visibility=body.extras_upscaler_2_visibility,
    )


def encode(picture: Image.Image, infotext: str, file_format: str) -> str:
    """A picture as base64 of a PNG, JPEG or WebP file with its infotext inside."""
    buffer = io.BytesIO()
    if file_format == "png":
        text = PngImagePlugin.PngInfo()
        if infotext:
            (text.add_text if infotext.isascii() else text.add_itxt)("parameters", infotext)
        picture.save(buffer, "PNG", pnginfo=text, icc_profile=picture.info.get("icc_profile"))
    else:
        exif = Image.Exif()
        comment = b"UNICODE\0" + infotext.encode("utf-16-be", "replace")
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = comment
        picture.convert("RGB").save(buffer, "JPEG" if file_format in ("jpg", "jpeg") else "WEBP", exif=exif, quality=90)
    return base64.b64encode(buffer.getvalue()).decode()


def info_from(wish: Wish, results: Sequence[Made], model: str) -> str:
    """The `info` of an answer: JSON in a string, with Automatic1111's keys."""
    request, count = wish.requests[0], len(results)
    seeds = [made.seed for made in results]
    said = _settings_of(results[0].infotext) if results else {}
    info = {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * count,
        "negative_prompt": request.negative_prompt,
        "all_negative_prompts": [request.negative_prompt] * count,
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "width": results[0].image.width if results else request.width,
        "height": results[0].image.height if results else request.height,
        "sampler_name": said.get("Sampler", request.scheduler),
        "cfg_scale": request.guidance_scale,
        "steps": request.steps,
        "batch_size": request.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": said.get("Model", model),
        "sd_model_hash": said.get("Model hash"),
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": request.strength if request.init_image else request.refine,
        "extra_generation_params": {key: value for key, value in said.items() if key not in _USUAL},
        "index_of_first_image": 0,
        "infotexts": [made.infotext for made in results],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": request.clip_skip,
        "is_using_inpainting_conditioning": False,
        "version": f"diptych {__version__}",
    }
    return json.dumps(info)


def plain(value: Any) -> Any:
    """A JSON value that any client can read: no NaN, no lone surrogates."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


_USUAL = {
    "Steps",
    "Sampler",
    "Schedule type",
    "CFG scale",
    "Seed",
    "Size",
    "Model",
    "Model hash",
    "Clip skip",
    "Version",
}


def _settings_of(infotext: str) -> dict[str, str]:
    try:
        return parse_infotext(infotext).settings
    except ValueError:
        return {}


def _refuse_what_we_have_not(body: schemas.GenerationBody) -> None:
    if body.script_name:
        raise ScriptNotFound(f"Script {body.script_name[:100]!r} not found: there are none")
    for name in body.alwayson_scripts or {}:
        raise ScriptNotFound(f"always on script {name[:100]} not found: there are none")
    refused = [
        ("styles", bool(body.styles), "there are no styles"),
        ("restore_faces", bool(body.restore_faces), "there is no face restoration"),
        ("tiling", bool(body.tiling), "seamless pictures cannot be drawn"),
        ("refiner_checkpoint", (body.refiner_checkpoint or "").lower() not in _NONE, "there are no refiners"),
        ("subseed_strength", bool(body.subseed_strength), "there are no variation seeds"),
        (
            "seed_resize_from_w",
            max(body.seed_resize_from_w or 0, body.seed_resize_from_h or 0) > 0,
            "seeds are not resized",
        ),
        ("firstpass_image", bool(body.firstpass_image), "the first pass is always drawn"),
    ]
    for name, given, why in refused:
        if given:
            raise ValueError(f"{name} is given, and {why} here: leave it out")


def _clip_skip(overrides: dict[str, Any]) -> int:
    value = overrides.get("CLIP_stop_at_last_layers", 1)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("CLIP_stop_at_last_layers must be a whole number")
    return value


def _txt2img(body: schemas.Txt2ImgBody, request: GenerationRequest, model: str | None) -> Wish:
    if not body.enable_hr:
        return Wish([request], model)
    for name, value in (
        ("hr_checkpoint_name", body.hr_checkpoint_name),
        ("hr_sampler_name", body.hr_sampler_name),
        ("hr_scheduler", body.hr_scheduler),
        ("hr_prompt", body.hr_prompt),
        ("hr_negative_prompt", body.hr_negative_prompt),
    ):
        if value and not value.lower().startswith("use same"):
            raise ValueError(f"{name} is given, and the second pass here has the same as the first: leave it out")
    assert request.width and request.height
    width, height = request.width, request.height
    scale = body.hr_scale or 2.0
    if body.firstphase_width or body.firstphase_height:
        first = body.firstphase_width or width
        request = replace(request, width=first, height=body.firstphase_height or height)
        scale = width / first
    elif body.hr_resize_x or body.hr_resize_y:
        scale = max((body.hr_resize_x or 0) / width, (body.hr_resize_y or 0) / height)
    if not 0 < scale <= 16:
        raise ValueError(f"the second pass would enlarge {scale:g} times, and 16 is the most")
    named, strength = body.hr_upscaler, body.denoising_strength
    strength = strength if strength and strength >= 1 / _NOISE_LEVELS else None
    mode = latent_mode(named)
    if mode is not None and strength is None:
        raise ValueError(f"hr_upscaler {mode} only blurs without a second pass: give a denoising_strength above 0")
    steps = min(body.hr_second_pass_steps or request.steps, max(1, int(_NOISE_LEVELS * (strength or 0))))
    upscaler = None if mode is not None or named is None or named.lower() in _NONE else named
    drawn = replace(request, upscale=scale, latent_mode=mode, refine=strength, refine_steps=steps if strength else None)
    return Wish([drawn], model, upscaler)


def _img2img(body: schemas.Img2ImgBody, request: GenerationRequest, model: str | None, limits: Limits) -> Wish:
    if not body.init_images:
        raise ModelNotFound("Init image not found: send it in init_images")
    assert request.width and request.height
    if max(request.width, request.height) > limits.size:  # before anything of that size is made
        raise ValueError(f"a side is {max(request.width, request.height):,}, and the limit is {limits.size:,}")
    if len(body.init_images) > limits.pictures:
        raise ValueError(f"there are {len(body.init_images)} init images, and the limit is {limits.pictures}")
    size = (request.width, request.height)
    strength = 0.75 if body.denoising_strength is None else body.denoising_strength
    mask = decode_base64(body.mask, limits, "the mask") if body.mask else None
    requests: list[GenerationRequest] = []
    regions: list[Region | None] = []
    per_image = request.count if len(body.init_images) == 1 else body.n_iter or 1
    named = [(f"init image {number + 1}", text) for number, text in enumerate(body.init_images)]
    for number, sent in enumerate(decode_many(named, limits)):
        picture = ImageOps.exif_transpose(sent).convert("RGB")
        one = replace(request, count=per_image, batch_size=min(request.batch_size, per_image), strength=strength)
        if one.seed is not None:
            one = replace(one, seed=one.seed + number * per_image)
        if mask is None:
            requests.append(replace(one, init_image=_fit(picture, size, body.resize_mode)))
            regions.append(None)
            continue
        painted = _prepare_mask(mask, picture.size, body)
        if body.inpaint_full_res:
            box = _box_around(painted, size, body.inpaint_full_res_padding or 0)
        else:
            picture, painted = _fit(picture, size, body.resize_mode), _fit(painted, size, body.resize_mode)
            box = (0, 0, *size)
        fitted = [part.crop(box).resize(size, Image.Resampling.LANCZOS) for part in (picture, painted)]
        regions.append(Region(picture, painted, box))
        content = MASKED_CONTENT[body.inpainting_fill or 0]
        requests.append(replace(one, init_image=fitted[0], mask=fitted[1], masked_content=content))
    return Wish(requests, model, regions=regions)


def _fit(picture: Image.Image, size: tuple[int, int], resize_mode: int) -> Image.Image:
    """0 and 3 stretch, 1 crops, 2 fills what stays empty with the edge's rows and columns."""
    if resize_mode == 1:
        return ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    if resize_mode == 2:
        inside = ImageOps.contain(picture, size, Image.Resampling.LANCZOS)
        whole = _edges(inside, size)
        whole.paste(inside, ((size[0] - inside.width) // 2, (size[1] - inside.height) // 2))
        return whole
    return picture.resize(size, Image.Resampling.LANCZOS)


def _edges(inside: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture of `size` whose borders continue the outermost rows or columns of `inside`."""
    whole = Image.new(inside.mode, size)
    width, height = inside.size
    if width < size[0]:
        half = (size[0] - width + 1) // 2
        whole.paste(inside.crop((0, 0, 1, height)).resize((half, size[1])), (0, 0))
        whole.paste(inside.crop((width - 1, 0, width, height)).resize((half, size[1])), (size[0] - half, 0))
    else:
        half = (size[1] - height + 1) // 2
        whole.paste(inside.crop((0, 0, width, 1)).resize((size[0], half)), (0, 0))
        whole.paste(inside.crop((0, height - 1, width, height)).resize((size[0], half)), (0, size[1] - half))
    return whole


def _prepare_mask(mask: Image.Image, size: tuple[int, int], body: schemas.Img2ImgBody) -> Image.Image:
    """White where it is to be drawn anew, of the picture's size, inverted and blurred as asked."""
    transparent = mask.mode == "RGBA" and mask.getchannel("A").getextrema() != (255, 255)
    grey = mask.getchannel("A") if transparent else mask.convert("L")
    grey = grey.resize(size, Image.Resampling.LANCZOS)
    if body.inpainting_mask_invert:
        grey = ImageChops.invert(grey)
    if grey.getbbox() is None:
        raise ImageError("the mask is all black: paint white where the picture is to be drawn anew")
    blur = (body.mask_blur_x or 0, body.mask_blur_y or 0) if body.mask_blur is None else (body.mask_blur,) * 2
    return grey.filter(ImageFilter.GaussianBlur(blur)) if any(blur) else grey


def _box_around(mask: Image.Image, size: tuple[int, int], padding: int) -> tuple[int, int, int, int]:
    """The part that is drawn anew: around the white, of the proportions of `size`, inside the picture."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(0, left - padding), max(0, top - padding)
    right, bottom = min(mask.width, right + padding), min(mask.height, bottom + padding)
    ratio = size[0] / size[1]
    width = min(mask.width, max(right - left, math.ceil((bottom - top) * ratio)))
    height = min(mask.height, max(bottom - top, math.ceil((right - left) / ratio)))
    left = min(max(0, (left + right - width) // 2), mask.width - width)
    top = min(max(0, (top + bottom - height) // 2), mask.height - height)
    return left, top, left + width, top + height
