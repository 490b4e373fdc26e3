"""Which family a single-file checkpoint belongs to, told by its keys, and what to say of those that do not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from diptych.errors import UnknownArchitecture

StateDict = Mapping[str, torch.Tensor]
UNET = "model.diffusion_model."
VAES = ("first_stage_model.", "vae.")


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint that can be loaded."""

    name: str
    folder: str
    """Its configurations, in `configs/` beside this module."""
    text_encoders: Mapping[str, str]
    """Component to the prefix of its keys in the checkpoint."""

    @property
    def is_xl(self) -> bool:
        return "text_encoder_2" in self.text_encoders

    @property
    def config(self) -> Path:
        """The folder with the configurations of the components."""
        return Path(str(files(__package__).joinpath("configs", self.folder)))


SD1 = Family("Stable Diffusion 1.x", "sd1", {"text_encoder": "cond_stage_model.transformer."})
SD2 = Family("Stable Diffusion 2.x", "sd2", {"text_encoder": "cond_stage_model.model."})
SDXL = Family(
    "SDXL",
    "sdxl",
    {"text_encoder": "conditioner.embedders.0.transformer.", "text_encoder_2": "conditioner.embedders.1.model."},
)
_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL}

# A pattern that some key matches, and what the file is then. The first that fits is said.
_OTHERS = (
    (r"lora_(unet|te)|\.lora_[AB]\.|lora_(down|up)\.", "a LoRA: give it with --lora, beside a model"),
    (r"^(string_to_param|emb_params)", "a textual inversion: load it with load_textual_inversion"),
    (r"^control_model\.|controlnet_cond_embedding", "a ControlNet: load it with diffusers' ControlNetModel"),
    (r"motion_modules", "an AnimateDiff motion module, which is not supported"),
    (r"joint_blocks\.", "Stable Diffusion 3, which is not supported"),
    (r"distilled_guidance_layer", "Chroma, which is not supported"),
    (r"(early|single)_stream_modulation", "a newer Flux, which is not supported"),
    (r"double_blocks\.|single_transformer_blocks\.", "Flux or a relative of it, which is not supported"),
    (r"cap_embedder\.", "Lumina or Z-Image, which is not supported"),
    (r"double_layers\.", "AuraFlow, which is not supported"),
    (r"double_stream_blocks\.", "HiDream, which is not supported"),
    (r"clip_txt_mapper|channelwise\.", "Stable Cascade, which is not supported"),
    (r"adaln_single|patchify_proj", "PixArt or LTX, which is not supported"),
    (r"head\.modulation|txt_in\.", "a video or Qwen model, which is not supported"),
    (r"^model\.(visual|language_model)|^transformer\.h\.", "a language model"),
    (r"^(body\.0|conv_first|model\.0|RRDB_trunk)", "an upscaler: give it with --upscaler, beside a model"),
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|down_blocks|mid)", "a VAE: give it with --vae"),
    (r"^(down_blocks|up_blocks|mid_block|time_embedding)\.", "one part of a diffusers folder: give the whole folder"),
)
_CHANNELS = {8: "InstructPix2Pix", 7: "Stable Diffusion x4 upscaler", 5: "a depth-to-image model"}


def recognise(weights: StateDict) -> tuple[Family, bool]:
    """The family of a checkpoint in the original key layout, and whether it is an inpainting model (9 channels in).

    Raises UnknownArchitecture, which says what the file is instead.
    """
    conv_in = weights.get(UNET + "input_blocks.0.0.weight")
    if conv_in is None:
        for pattern, what in _OTHERS:
            if any(re.search(pattern, key) for key in weights):
                raise UnknownArchitecture(f"this is {what}")
        raise UnknownArchitecture("no known model has such keys: Stable Diffusion 1.x, 2.x and SDXL are supported")
    channels = int(conv_in.shape[1])
    if channels not in (4, 9):
        what = _CHANNELS.get(channels, f"a model that reads {channels} channels")
        raise UnknownArchitecture(f"this is {what}, which is not supported")
    return _family(weights), channels == 9


def _family(weights: StateDict) -> Family:
    if any(key.startswith("conditioner.embedders.0.model.") for key in weights):
        raise UnknownArchitecture("this is the SDXL refiner, which is not supported: use the base model alone")
    for family in (SDXL, SD2, SD1):
        if any(key.startswith(prefix) for key in weights for prefix in family.text_encoders.values()):
            return family
    # No text encoder inside: the UNet says for which one it was made.
    attention = re.compile(re.escape(UNET) + r"input_blocks\..*\.attn2\.to_k\.weight")
    width = next((int(w.shape[1]) for key, w in weights.items() if attention.fullmatch(key)), 0)
    if width not in _WIDTHS:
        raise UnknownArchitecture(f"no known model has text embeddings of {width} numbers")
    return _WIDTHS[width]


def predicts_v_by_name(weights: StateDict, path: Path) -> bool | None:
    """What marks beside the weights say: a key `v_pred`, or a yaml file of the same name as Automatic1111 reads it."""
    if "v_pred" in weights:
        return True
    yaml = path.with_suffix(".yaml")
    if yaml.is_file():
        return bool(re.search(r"parameterization:\s*[\"']?v\b", yaml.read_text(encoding="utf-8", errors="replace")))
    return None


@torch.no_grad()
def predicts_v(unet: torch.nn.Module, width: int) -> bool:
    """Whether a UNet predicts v rather than noise, found by asking it.

    At the last timestep its input is noise almost alone. What predicts the noise then gives its input back; what
    predicts v = alpha * noise - sigma * picture (Salimans & Ho 2022, with alpha near 0) gives something else.
    """
    weight = next(unet.parameters())
    noise = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    text = torch.zeros(1, 77, width, device=weight.device, dtype=weight.dtype)
    out = unet(noise, torch.tensor(999, device=weight.device), encoder_hidden_states=text, return_dict=False)[0]
    likeness = torch.nn.functional.cosine_similarity(out.flatten().float(), noise.flatten().float(), dim=0)
    return bool(likeness < 0.5)
