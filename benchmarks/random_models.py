"""Stable Diffusion models of the published shapes with random weights: the same numbers in every precision.

For benchmarks: their times and their memory are those of trained models, their pictures are noise. This is no program.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diptych.pipelines.families import SD1, SDXL
from diptych.pipelines.tokenizer import clip_tokenizer

FAMILIES = {"sd15": SD1, "sdxl": SDXL}
SIZES = {"sd15": 512, "sdxl": 1024}

# For trying a program out in seconds: what makes the networks small.
_TINY: dict[str, dict[str, Any]] = {
    "vae": {"block_out_channels": [32, 32, 64, 64], "layers_per_block": 1},
    "text_encoder": {"num_hidden_layers": 2},
    "text_encoder_2": {"num_hidden_layers": 2},
}
_TINY_UNET: dict[str, dict[str, Any]] = {
    "sd15": {"block_out_channels": [32, 64, 64, 64], "layers_per_block": 1},
    "sdxl": {
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1, 1],
        "attention_head_dim": [2, 4, 4],
    },
}


def components(family: str, dtype: torch.dtype, tiny: bool = False) -> dict[str, Any]:
    """The components of "sd15" or "sdxl" on the CPU; tiny: of the same form with hardly any weights."""
    folder = FAMILIES[family].config
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    parts: dict[str, Any] = {"scheduler": DDIMScheduler.from_config(scheduler)}  # one call of the UNet for each step
    for name in ("unet", "vae", *FAMILIES[family].text_encoders):
        changed = (_TINY | {"unet": _TINY_UNET[family]})[name] if tiny else {}
        parts[name] = _fill(_empty(name, folder, changed).to(dtype).to_empty(device="cpu").eval())
        if name.startswith("text"):
            pad = "!" if name == "text_encoder_2" else "<|endoftext|>"
            parts[name.replace("text_encoder", "tokenizer")] = clip_tokenizer(pad)
    _level(parts)
    return parts


def _empty(name: str, folder: Path, changed: dict[str, Any]) -> torch.nn.Module:
    config = json.loads((folder / name / "config.json").read_text(encoding="utf-8")) | changed
    with torch.device("meta"):
        if name.startswith("text"):
            cls: Any = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
            return cls(CLIPTextConfig(**config))
        cls = UNet2DConditionModel if name == "unet" else AutoencoderKL
        return cls.from_config(config)


@torch.no_grad()
def _fill(module: torch.nn.Module) -> torch.nn.Module:
    """torch's own initialisation in its spread, drawn in fp32 whatever the precision."""
    generator = torch.Generator().manual_seed(0)
    for key, weight in module.named_parameters():
        if weight.ndim > 1:
            bound = 1 / math.sqrt(weight[0].numel())
            weight.copy_(torch.empty(weight.shape).uniform_(-bound, bound, generator=generator))
        else:
            weight.fill_(float(key.endswith("weight")))  # of normalisations; biases are zero
    for key, buffer in module.named_buffers():
        if not key.endswith("position_ids"):
            raise ValueError(f"nothing is known of the buffer {key}")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    return module


@torch.no_grad()
def _level(parts: dict[str, Any]) -> None:
    """Gives UNet and VAE outputs as large as trained ones have, without which every comparison would flatter.

    By powers of two, found on small latents, so that every precision comes to the same weights.
    """
    unet, vae = parts["unet"], parts["vae"]
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))

    def scale(layer: Any, output: torch.Tensor, spread: float) -> None:
        layer.weight.mul_(2.0 ** torch.log2(spread / output.float().std()).round().item())

    more: dict[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        pooled, times = torch.zeros(1, width, dtype=unet.dtype), torch.zeros(1, 6, dtype=unet.dtype)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": times}}
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    noise = unet(latents.to(unet.dtype), 500, encoder_hidden_states=text.to(unet.dtype), return_dict=False, **more)[0]
    scale(unet.conv_out, noise, 1.0)
    scale(vae.decoder.conv_out, vae.decode(latents.to(vae.dtype), return_dict=False)[0], 0.5)
