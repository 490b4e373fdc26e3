"""LoRAs for a request: finds the files, refuses those of another architecture, and loads them with diffusers."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diptych.errors import CheckpointError, ModelNotFound
from diptych.pipelines.loading import quiet_libraries
from diptych.upscalers.checkpoints import read_state_dict
from diptych.upscalers.official import cache_folder

_OURS = "diptych_"  # adapters with this prefix were loaded here, and may be removed here
_SUFFIXES = (".safetensors", ".pt", ".ckpt")
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "SDXL"}
_OTHERS = (
    ("double_blocks", "Flux"),
    ("joint_blocks", "Stable Diffusion 3"),
    ("single_transformer_blocks", "Flux"),
    ("transformer_blocks_0_attn_add", "Stable Diffusion 3"),
    ("lora_transformer", "a transformer"),
)


def lora_folder() -> Path:
    """Where `<lora:name:1>` looks for files: `loras/` in `$DIPTYCH_HOME`, or in `~/.cache/diptych`."""
    return cache_folder().parent / "loras"


def list_loras() -> dict[str, Path]:
    """The files in the LoRA folder by name."""
    folder = lora_folder()
    return {p.stem: p for p in sorted(folder.rglob("*")) if p.suffix in _SUFFIXES} if folder.is_dir() else {}


def find_lora(name: str) -> Path:
    """The file in the LoRA folder that is called `name`, without its suffix. Never one outside of the folder.

    Raises ModelNotFound with the nearest names.
    """
    found = list_loras()
    if name in found:
        return found[name]
    near = difflib.get_close_matches(name, found, 3, 0.5)
    elsewhere = f"put the file into {lora_folder()}, or name a file with --lora"
    hint = f"did you mean {' or '.join(near)}?" if near else elsewhere
    raise ModelNotFound(f"there is no LoRA called {name!r}: {hint}")


def apply_loras(pipeline: Any, wanted: Sequence[tuple[str | os.PathLike[str], float]]) -> None:
    """Makes the LoRA files of `wanted` the active ones, each with its weight; others that came from here are dropped.

    Adapters that somebody else loaded into the pipeline stay as they are while `wanted` is empty.
    Raises ModelNotFound, or CheckpointError for a file that is damaged or was made for another architecture.
    """
    names = {_adapter_name(Path(file)): (Path(file), weight) for file, weight in wanted}
    there = {name for names in pipeline.get_list_adapters().values() for name in names}
    stale = [name for name in there if name.startswith(_OURS) and name not in names]
    if stale:
        pipeline.delete_adapters(stale)
    for name in names.keys() - there:
        _load(pipeline, names[name][0], name)
    if names:
        pipeline.set_adapters(list(names), [weight for _, weight in names.values()])


def _adapter_name(file: Path) -> str:
    try:
        stat = file.stat()
    except OSError as error:
        raise ModelNotFound(f"there is no LoRA file {file}") from error
    told = f"{file.resolve()} {stat.st_mtime_ns} {stat.st_size}"
    return _OURS + hashlib.sha256(told.encode()).hexdigest()[:16]


def _load(pipeline: Any, file: Path, name: str) -> None:
    weights = read_state_dict(file)
    _check(pipeline, weights, file)
    try:
        with quiet_libraries():
            pipeline.load_lora_weights(weights, adapter_name=name)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError) as error:
        if name in {n for names in pipeline.get_list_adapters().values() for n in names}:
            pipeline.delete_adapters(name)
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the LoRA {file} does not fit this model: {said}") from error


def _check(pipeline: Any, weights: Mapping[str, torch.Tensor], file: Path) -> None:
    """Refuses what is no LoRA, and a LoRA whose attention is as wide as that of another family."""
    for part, family in _OTHERS:
        if any(part in key for key in weights):
            raise CheckpointError(f"the LoRA {file} is for {family}, and this model is {_family(pipeline)}")
    if not any("lora" in key for key in weights):
        kind = "a LyCORIS file (LoHa or LoKr)" if any("hada_" in k or "lokr_" in k for k in weights) else "no LoRA"
        raise CheckpointError(f"{file} is {kind}: Diptych reads LoRAs in the form of kohya and of diffusers")
    broken = next((key for key, weight in weights.items() if not torch.isfinite(weight.float()).all()), None)
    if broken:
        raise CheckpointError(f"the LoRA {file} is damaged: {broken!r} holds NaN or infinity")
    made_for = _cross_attention(weights)
    if made_for is not None and made_for != pipeline.unet.config.cross_attention_dim:
        family = _FAMILIES.get(made_for, f"a model whose text embeddings have {made_for} numbers")
        raise CheckpointError(f"the LoRA {file} is for {family}, and this model is {_family(pipeline)}")


def _cross_attention(weights: Mapping[str, torch.Tensor]) -> int | None:
    """The width of the text embeddings that the LoRA was trained with; None if it does not touch them."""
    for key, weight in weights.items():
        if "attn2" in key and "to_k" in key and ("down" in key or "lora_A" in key) and weight.ndim >= 2:
            if "processor" not in key:
                return int(weight.shape[1])
    return None


def _family(pipeline: Any) -> str:
    width = pipeline.unet.config.cross_attention_dim
    return _FAMILIES.get(width, f"one whose text embeddings have {width} numbers")
