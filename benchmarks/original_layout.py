"""Writes pipelines as the single checkpoint files of Stable Diffusion's original code: diffusers' keys, renamed.

The way back is diffusers' own conversion; tests and benchmarks make the files here that it reads. This is no program.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

Weights = dict[str, torch.Tensor]


def renamed(weights: Weights, *rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Weights:
    made = {}
    for key, weight in weights.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        made[key] = weight
    return made


def original_unet(unet: Any) -> Weights:
    per_block = unet.config.layers_per_block + 1
    attended = {m[1] for key in unet.state_dict() if (m := re.match(r"up_blocks\.(\d+)\.attentions", key))}

    def at(kind: str, first: int, part: str) -> Callable[[re.Match[str]], str]:
        return lambda m: f"{kind}.{first + int(m[1]) * per_block + int(m[2])}.{part}."

    resnet = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("norm2", "out_layers.0"), ("conv2", "out_layers.3")]
    resnet += [("time_emb_proj", "emb_layers.1"), ("conv_shortcut", "skip_connection")]
    weights = renamed(
        unet.state_dict(),
        *[(rf"(resnets\.\d+\.){old}\.", rf"\g<1>{new}.") for old, new in resnet],
        (r"^down_blocks\.(\d+)\.resnets\.(\d+)\.", at("input_blocks", 1, "0")),
        (r"^down_blocks\.(\d+)\.attentions\.(\d+)\.", at("input_blocks", 1, "1")),
        (
            r"^down_blocks\.(\d+)\.downsamplers\.0\.conv\.",
            lambda m: f"input_blocks.{(int(m[1]) + 1) * per_block}.0.op.",
        ),
        (r"^mid_block\.resnets\.0\.", "middle_block.0."),
        (r"^mid_block\.attentions\.0\.", "middle_block.1."),
        (r"^mid_block\.resnets\.1\.", "middle_block.2."),
        (r"^up_blocks\.(\d+)\.resnets\.(\d+)\.", at("output_blocks", 0, "0")),
        (r"^up_blocks\.(\d+)\.attentions\.(\d+)\.", at("output_blocks", 0, "1")),
        (
            r"^up_blocks\.(\d+)\.upsamplers\.0\.",
            lambda m: f"output_blocks.{(int(m[1]) + 1) * per_block - 1}.{2 if m[1] in attended else 1}.",
        ),
        (r"^conv_in\.", "input_blocks.0.0."),
        (r"^conv_norm_out\.", "out.0."),
        (r"^conv_out\.", "out.2."),
        (r"^time_embedding\.linear_(\d)\.", lambda m: f"time_embed.{2 * int(m[1]) - 2}."),
        (r"^add_embedding\.linear_(\d)\.", lambda m: f"label_emb.0.{2 * int(m[1]) - 2}."),
    )
    return {"model.diffusion_model." + key: weight for key, weight in weights.items()}


def original_vae(vae: Any) -> Weights:
    last = len(vae.config.block_out_channels) - 1
    weights = renamed(
        vae.state_dict(),
        (r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block."),
        (r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
        (r"decoder\.up_blocks\.(\d+)\.resnets\.", lambda m: f"decoder.up.{last - int(m[1])}.block."),
        (r"decoder\.up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"decoder.up.{last - int(m[1])}.upsample."),
        (r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}."),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    )
    projections = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {key: w[:, :, None, None] if projections.search(key) else w for key, w in weights.items()}


def original_clip(encoder: Any, prefix: str) -> Weights:
    plain = {key.removeprefix("text_model."): weight for key, weight in encoder.state_dict().items()}
    return {f"{prefix}text_model.{key}": weight for key, weight in plain.items()}


def original_open_clip(encoder: Any, prefix: str) -> Weights:
    plain = {key.removeprefix("text_model."): weight for key, weight in encoder.state_dict().items()}
    weights = renamed(
        plain,
        (r"^encoder\.layers\.", "transformer.resblocks."),
        (r"layer_norm(\d)", r"ln_\1"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"self_attn\.", "attn."),
        (r"^final_layer_norm", "ln_final"),
        (r"^embeddings\.token_embedding", "token_embedding"),
        (r"^embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"^text_projection\.weight", "text_projection"),
    )
    for key in [key for key in weights if ".q_proj." in key]:
        parts = [weights.pop(key.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        weights[key.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    if "text_projection" in weights:
        weights["text_projection"] = weights["text_projection"].T
    return {prefix + key: weight.contiguous() for key, weight in weights.items()}


def original(pipeline: Any, family: str) -> Weights:
    """The weights of a pipeline of "sd1", "sd2" or "sdxl" under their original names; they are shared, not copied."""
    weights = original_unet(pipeline.unet)
    weights |= {"first_stage_model." + key: weight for key, weight in original_vae(pipeline.vae).items()}
    if family == "sd1":
        return weights | original_clip(pipeline.text_encoder, "cond_stage_model.transformer.")
    if family == "sd2":
        return weights | original_open_clip(pipeline.text_encoder, "cond_stage_model.model.")
    weights |= original_clip(pipeline.text_encoder, "conditioner.embedders.0.transformer.")
    return weights | original_open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
