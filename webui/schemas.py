"""The shapes of `/sdapi/v1` requests and answers: Automatic1111's field names and defaults.

Only shapes. Fields that say nothing here (styles that do not exist, scripts we have none of) are taken, so that
existing programs need no change; what cannot be honoured is refused in `diptych.webui.mapping`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Seed = Annotated[int, Field(ge=-1, le=2**32 - 1, description="-1: a new one")]
Side = Annotated[int, Field(ge=8, description="pixels")]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Model(BaseModel):
    model_config = ConfigDict(protected_namespaces=(), allow_inf_nan=False)


class GenerationBody(Model):
    """What txt2img and img2img share."""

    prompt: str = ""
    negative_prompt: str = ""
    styles: list[str] | None = None
    seed: Seed | None = -1
    subseed: int | None = -1
    subseed_strength: Fraction | None = 0
    seed_resize_from_h: int | None = -1
    seed_resize_from_w: int | None = -1
    sampler_name: str | None = None
    scheduler: str | None = None
    batch_size: Count | None = 1
    n_iter: Count | None = 1
    steps: Count | None = 50
    cfg_scale: Annotated[float, Field(ge=0, le=100)] | None = 7.0
    width: Side | None = 512
    height: Side | None = 512
    restore_faces: bool | None = None
    tiling: bool | None = None
    do_not_save_samples: bool | None = False
    do_not_save_grid: bool | None = False
    eta: float | None = None
    s_min_uncond: float | None = None
    s_churn: float | None = None
    s_tmax: float | None = None
    s_tmin: float | None = None
    s_noise: float | None = None
    override_settings: dict[str, Any] | None = None
    override_settings_restore_afterwards: bool | None = True
    refiner_checkpoint: str | None = None
    refiner_switch_at: float | None = None
    disable_extra_networks: bool | None = False
    firstpass_image: str | None = None
    comments: dict[str, Any] | None = None
    sampler_index: str = Field("Euler", description="deprecated: sampler_name")
    script_name: str | None = None
    script_args: list[Any] | None = None
    send_images: bool = True
    save_images: bool = Field(False, description="keep the pictures in the library")
    alwayson_scripts: dict[str, Any] | None = None
    force_task_id: Annotated[str, Field(max_length=100)] | None = Field(
        None, description="an id of your choice, for progress?id_task= and interrupt?id_task="
    )
    infotext: str | None = Field(None, description="settings as text; fields that are given win over it")


class Txt2ImgBody(GenerationBody):
    """POST txt2img."""

    enable_hr: bool = False
    denoising_strength: Fraction | None = 0.75
    firstphase_width: Annotated[int, Field(ge=0)] | None = 0
    firstphase_height: Annotated[int, Field(ge=0)] | None = 0
    hr_scale: Annotated[float, Field(gt=0, le=16)] | None = 2.0
    hr_upscaler: str | None = None
    hr_second_pass_steps: Annotated[int, Field(ge=0)] | None = 0
    hr_resize_x: Annotated[int, Field(ge=0)] | None = 0
    hr_resize_y: Annotated[int, Field(ge=0)] | None = 0
    hr_checkpoint_name: str | None = None
    hr_sampler_name: str | None = None
    hr_scheduler: str | None = None
    hr_prompt: str | None = ""
    hr_negative_prompt: str | None = ""


class Img2ImgBody(GenerationBody):
    """POST img2img."""

    init_images: list[str] | None = Field(None, description="base64")
    resize_mode: Annotated[int, Field(ge=0, le=3)] = Field(
        0, description="0 stretch, 1 crop and resize, 2 resize and fill, 3 latent (stretched)"
    )
    denoising_strength: Fraction | None = 0.75
    image_cfg_scale: float | None = None
    mask: str | None = Field(None, description="base64; white is painted anew")
    mask_blur_x: Annotated[int, Field(ge=0, le=64)] | None = 4
    mask_blur_y: Annotated[int, Field(ge=0, le=64)] | None = 4
    mask_blur: Annotated[int, Field(ge=0, le=64)] | None = None
    mask_round: bool | None = True
    inpainting_fill: Annotated[int, Field(ge=0, le=3)] | None = Field(
        0, description="what the white part begins from: 0 fill, 1 original, 2 latent noise, 3 latent nothing"
    )
    inpaint_full_res: bool | None = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=2048)] | None = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1)] | None = 0
    initial_noise_multiplier: float | None = None
    latent_mask: str | None = None
    include_init_images: bool = False


class PicturesAnswer(Model):
    images: list[str] | None = Field(description="base64")
    parameters: dict[str, Any]
    info: str = Field(description="JSON in a string")


class ExtrasBody(Model):
    """What extra-single-image and extra-batch-images share."""

    resize_mode: Literal[0, 1] = Field(0, description="0 by upscaling_resize, 1 to upscaling_resize_w x _h")
    show_extras_results: bool = True
    gfpgan_visibility: Fraction = 0
    codeformer_visibility: Fraction = 0
    codeformer_weight: Fraction = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=16)] = 2
    upscaling_resize_w: Count = 512
    upscaling_resize_h: Count = 512
    upscaling_crop: bool = True
    upscaler_1: str = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: Fraction = 0
    upscale_first: bool = False


class ExtraSingleBody(ExtrasBody):
    image: str = Field("", description="base64")


class ExtraSingleAnswer(Model):
    html_info: str
    image: str | None = None


class NamedPicture(Model):
    data: str = Field(description="base64")
    name: str


class ExtraBatchBody(ExtrasBody):
    imageList: list[NamedPicture]


class ExtraBatchAnswer(Model):
    html_info: str
    images: list[str]


class PngInfoBody(Model):
    image: str = Field(description="base64")


class PngInfoAnswer(Model):
    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


class ProgressAnswer(Model):
    progress: float
    eta_relative: float
    state: dict[str, Any]
    current_image: str | None = None
    textinfo: str | None = None


class SamplerItem(Model):
    name: str
    aliases: list[str]
    options: dict[str, Any]


class SchedulerItem(Model):
    name: str
    label: str
    aliases: list[str] | None
    default_rho: float | None
    need_inner_model: bool | None


class UpscalerItem(Model):
    name: str
    model_name: str | None
    model_path: str | None
    model_url: str | None
    scale: float | None


class CheckpointItem(Model):
    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None


class VaeItem(Model):
    model_name: str
    filename: str


class NamedItem(Model):
    name: str


class PathItem(Model):
    name: str
    path: str | None


class RealesrganItem(PathItem):
    scale: int | None


class LoraItem(PathItem):
    alias: str
    metadata: dict[str, Any]


class FaceRestorerItem(Model):
    name: str
    cmd_dir: str | None


class StyleItem(Model):
    name: str
    prompt: str | None
    negative_prompt: str | None


class EmbeddingsAnswer(Model):
    loaded: dict[str, Any]
    skipped: dict[str, Any]


class ScriptsAnswer(Model):
    txt2img: list[str]
    img2img: list[str]


class MemoryAnswer(Model):
    ram: dict[str, Any]
    cuda: dict[str, Any]


class InvalidField(Model):
    type: str
    loc: list[str]
    msg: str


class InvalidAnswer(Model):
    """A body that is malformed: what is wrong, and where."""

    detail: list[InvalidField]


class ErrorAnswer(Model):
    """How every refusal looks, except that of a malformed body."""

    error: str
    detail: str
    body: str
    errors: str
