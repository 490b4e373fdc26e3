"""Stable Diffusion checkpoints in one file, loaded with no network at all.

The conversion of keys is diffusers'; the configurations and the vocabulary lie beside this module, and files are read
as data (`diptych.upscalers.checkpoints`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError, create_diffusers_clip_model_from_ldm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diptych.errors import CheckpointError, DiptychError, UnknownArchitecture
from diptych.pipelines.families import SD2, VAES, Family, StateDict, predicts_v, predicts_v_by_name, recognise
from diptych.pipelines.tokenizer import clip_tokenizer
from diptych.upscalers.checkpoints import read_state_dict


def read_components(
    file: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    torch_dtype: torch.dtype | None = None,
    prediction_type: str | None = None,
    **given: Any,
) -> tuple[dict[str, Any], Family, bool]:
    """The components of a checkpoint file, its family, and whether it is an inpainting model.

    file: `.safetensors` or `.ckpt` in the original key layout.
    config: a diffusers folder whose configurations to use, for a model of unusual shape; None: the family's own.
    torch_dtype: of the weights; None: as they are in the file.
    prediction_type: "epsilon" or "v_prediction"; None: found out.
    given: components by name (vae, scheduler, tokenizer, ...), which are not read from the file then.

    Raises ModelNotFound, UnknownArchitecture for a file of another kind, CheckpointError for one that is damaged or
    lacks a component.
    """
    path = Path(file)
    weights = _tidy(read_state_dict(path))
    with _blaming(path):
        family, inpaints = recognise(weights)
    folder = Path(config) if config is not None else family.config
    made: dict[str, Any] = dict(given)
    settings = {"config": str(folder), "torch_dtype": torch_dtype}
    with _blaming(path):
        if "unet" not in made:
            channels = 9 if inpaints else 4
            made["unet"] = UNet2DConditionModel.from_single_file(
                weights, subfolder="unet", in_channels=channels, **settings
            )
        if "vae" not in made:
            if not any(key.startswith(VAES) for key in weights):
                raise CheckpointError("it has no VAE inside: give one with --vae")
            made["vae"] = AutoencoderKL.from_single_file(weights, subfolder="vae", **settings)
        for name, prefix in family.text_encoders.items():
            if name not in made:
                made[name] = _text_encoder(weights, name, prefix, folder, torch_dtype)
        for name, component in made.items():
            _check_complete(name, component)
    for name in family.text_encoders:
        tokenizer = name.replace("text_encoder", "tokenizer")
        if tokenizer not in made:
            made[tokenizer] = _tokenizer(folder, tokenizer, name, family)
    if "scheduler" not in made:
        by_name = predicts_v_by_name(weights, path)
        if prediction_type is None:
            asked = family is SD2 and not inpaints and by_name is None
            is_v = _asks(made["unet"]) if asked else bool(by_name)
            prediction_type = "v_prediction" if is_v else "epsilon"
        made["scheduler"] = _scheduler(folder, prediction_type, zero_snr="ztsnr" in weights)
        if family is SD2 and prediction_type == "v_prediction" and config is None:
            made["unet"].register_to_config(sample_size=96)  # the v models of this family draw 768 pixels
    return made, family, inpaints


def family_of(file: str | os.PathLike[str]) -> tuple[Family, bool]:
    """The family of a checkpoint file, and whether it is an inpainting model. Raises what `read_components` does."""
    with _blaming(Path(file)):
        return recognise(read_state_dict(file))


def load_vae(file: str | os.PathLike[str], like: Any, torch_dtype: torch.dtype | None = None) -> AutoencoderKL:
    """A VAE from a file (original or diffusers keys) or a diffusers folder.

    like: a VAE or a folder with the configuration to take; a file does not say, for example, how latents are scaled.
    Raises ModelNotFound, UnknownArchitecture or CheckpointError.
    """
    path = Path(file)
    with _blaming(path):
        if path.is_dir():
            folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
            if not (folder / "config.json").is_file():
                raise CheckpointError("there is no config.json of a VAE in this folder")
            return AutoencoderKL.from_pretrained(folder, dtype=torch_dtype, local_files_only=True)
        weights = read_state_dict(path)
        if not any(key.removeprefix(prefix).startswith("decoder.") for key in weights for prefix in ("", *VAES)):
            raise UnknownArchitecture("there is no VAE in this file")
        if isinstance(like, (str, os.PathLike)):
            vae = AutoencoderKL.from_single_file(weights, config=str(like), subfolder="vae", torch_dtype=torch_dtype)
        else:
            vae = _with_config_of(like, weights, torch_dtype)
        _check_complete("vae", vae)
        return vae


def _with_config_of(like: Any, weights: StateDict, torch_dtype: torch.dtype | None) -> AutoencoderKL:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        like.save_config(folder)
        return AutoencoderKL.from_single_file(dict(weights), config=folder, torch_dtype=torch_dtype)


def _tidy(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Some old files leave a level out of the text encoder's names."""
    old, new = "cond_stage_model.transformer.", "cond_stage_model.transformer.text_model."
    if not any(key.startswith(old) for key in weights) or any(key.startswith(new) for key in weights):
        return weights
    return {key.replace(old, new) if key.startswith(old) else key: weight for key, weight in weights.items()}


def _text_encoder(weights: StateDict, name: str, prefix: str, folder: Path, torch_dtype: torch.dtype | None) -> Any:
    if not any(key.startswith(prefix) for key in weights):
        raise CheckpointError(f"it has no {name} inside: give a whole checkpoint, or a diffusers folder")
    cls = CLIPTextModelWithProjection if name == "text_encoder_2" else CLIPTextModel
    return create_diffusers_clip_model_from_ldm(
        cls, dict(weights), subfolder=name, config=str(folder), torch_dtype=torch_dtype, local_files_only=True
    )


def _tokenizer(folder: Path, tokenizer: str, encoder: str, family: Family) -> Any:
    if (folder / tokenizer).is_dir():
        return CLIPTokenizer.from_pretrained(folder, subfolder=tokenizer, local_files_only=True)
    is_open_clip = family is SD2 or encoder == "text_encoder_2"
    return clip_tokenizer("!" if is_open_clip else "<|endoftext|>")


def _asks(unet: Any) -> bool:
    return predicts_v(unet, int(unet.config.cross_attention_dim))


def _scheduler(folder: Path, prediction_type: str, zero_snr: bool) -> Any:
    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    changed: dict[str, Any] = {"prediction_type": prediction_type}
    if zero_snr:
        changed |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        name = "DDIMScheduler" if name == "PNDMScheduler" else name
    return getattr(diffusers, name).from_pretrained(folder, subfolder="scheduler", local_files_only=True, **changed)


def _check_complete(name: str, component: Any) -> None:
    if isinstance(component, torch.nn.Module):
        missing = [key for key, weight in component.named_parameters() if weight.is_meta]
        if missing:
            raise CheckpointError(f"{len(missing)} weights of its {name} are missing, the first is {missing[0]!r}")


class _blaming:
    """Names the file in whatever goes wrong while its weights are fitted into networks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, DiptychError) and str(self._path) not in str(error):
            raise type(error)(f"{self._path} cannot be used: {error}") from error
        if isinstance(error, (ValueError, KeyError, RuntimeError, AttributeError, OSError, SingleFileComponentError)):
            said = " ".join(str(error).split())[:200]
            if "meta tensor" in said:  # what torch says of a weight that nothing was loaded into
                said = "some of its weights are missing"
            raise CheckpointError(f"{self._path} does not have the shape of a model of its kind: {said}") from error
