"""Loads a pipeline for the command line, the page and the service: any kind of model, ready to run on the device.

Here, and not in `from_pretrained`, the precision is chosen by what the machine is fast at.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from diptych.errors import CheckpointError, DiptychError, ModelNotFound
from diptych.pipelines.diptych import (
    DiptychInpaintPipeline,
    DiptychPipeline,
    DiptychXLInpaintPipeline,
    DiptychXLPipeline,
)
from diptych.pipelines.single_file import family_of, load_vae
from diptych.pipelines.upscaler import DiptychUpscaler
from diptych.upscalers.device import pick_device, pick_dtype
from diptych.upscalers.official import embedded_model

ATTENTION = ("sdpa", "xformers", "sliced")
_FILES = (".safetensors", ".ckpt", ".pt", ".pth")


def load_pipeline(
    model: str | os.PathLike[str] | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    vae: str | os.PathLike[str] | None = None,
    upscaler: str | os.PathLike[str] | None = None,
    attention: str = "sdpa",
    compile: bool = False,
) -> Any:
    """The pipeline of a model, on its device, ready for `generate`.

    model: a diffusers folder, a checkpoint file, or a repository of the Hugging Face hub; None: the embedded model.
    device, dtype: names, or None for what this machine is best at.
    vae: a file or folder with another VAE. upscaler: a name or a file, in place of the model's own.
    attention, compile: see `prepare`.

    Raises ModelNotFound, UnknownArchitecture, CheckpointError; ValueError for a device, dtype, attention or compiler
    that this machine does not have.
    """
    torch_device = pick_device(device)
    torch_dtype = pick_dtype(dtype, torch_device)
    _check_means(torch_device, attention, compile)
    # A wrong name should be told before seconds are spent on the model.
    network = DiptychUpscaler.from_name(upscaler) if upscaler is not None else None
    path = Path(model) if model is not None else embedded_model()
    if path.is_file():
        pipeline = _from_file(path, torch_dtype, vae)
    elif path.is_dir():
        pipeline = _from_folder(path, torch_dtype)
    else:
        pipeline = _from_hub(str(model), torch_dtype)
    if vae is not None and not path.is_file():
        pipeline.register_modules(vae=load_vae(vae, pipeline.vae, torch_dtype))
    if network is not None:
        pipeline.register_modules(upscaler=torch.nn.Module.to(network, torch_dtype))
    _check_weights(pipeline, path)
    return prepare(pipeline, torch_device, attention=attention, compile=compile)


def prepare(pipeline: Any, device: torch.device, *, attention: str = "sdpa", compile: bool = False) -> Any:
    """Puts a pipeline on its device, in the layout that convolutions are fastest in, and returns it.

    attention: "sdpa" (torch's own), "xformers" (CUDA), or "sliced" (slow, little memory).
    compile: the UNet is compiled when it first runs: a minute or more, once for each size of picture.
    Raises ValueError for an attention or a compiler that this machine does not have.
    """
    _check_means(device, attention, compile)
    pipeline.to(device)
    for name in ("unet", "vae", "upscaler"):
        component = getattr(pipeline, name, None)
        if component is not None:
            component.to(memory_format=torch.channels_last)
    if attention == "sliced":
        pipeline.enable_attention_slicing()
    elif attention == "xformers":
        try:
            pipeline.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError, RuntimeError) as error:
            raise ValueError(f"this xformers has no operator for {device}: leave --attention out") from error
    if compile:
        pipeline.unet.compile()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def model_name(pipeline: Any) -> str:
    """What to call the model of a pipeline: the name of its folder or file."""
    return Path(str(pipeline.config.get("_name_or_path") or "model")).stem


def _from_file(path: Path, torch_dtype: torch.dtype, vae: str | os.PathLike[str] | None) -> Any:
    if path.suffix.lower() not in _FILES:
        raise CheckpointError(f"{path} is no model: a model is a diffusers folder, a .safetensors or a .ckpt file")
    family, inpaints = family_of(path)
    cls: Any = DiptychXLPipeline if family.is_xl else DiptychPipeline
    if inpaints:
        cls = DiptychXLInpaintPipeline if family.is_xl else DiptychInpaintPipeline
    given = {} if vae is None else {"vae": load_vae(vae, family.config, torch_dtype)}
    return cls.from_single_file(path, torch_dtype=torch_dtype, **given)


def _from_folder(path: Path, torch_dtype: torch.dtype) -> Any:
    index = path / "model_index.json"
    if not index.is_file():
        raise ModelNotFound(f"{path} is no model: there is no model_index.json in this folder")
    try:
        named = dict(json.loads(index.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: it is no JSON object") from error
    cls = _class_for(str(named.get("_class_name")), path)
    for name, made_by in named.items():
        if isinstance(made_by, list) and None not in made_by and not (path / name).is_dir():
            raise CheckpointError(f"the model {path} lacks its {name}: there is no folder {path / name}")
    return _from_pretrained(cls, path, torch_dtype, local_files_only=True)


def _class_for(named: str, where: str | Path) -> Any:
    plain = named.removeprefix("StableDiffusionXL").removeprefix("StableDiffusion").removeprefix("Diptych")
    plain = plain.removeprefix("XL")
    if plain not in ("Pipeline", "Img2ImgPipeline", "InpaintPipeline") or not named.startswith(("StableD", "Diptych")):
        raise CheckpointError(f"{where} holds a {named}, which is not supported: use Stable Diffusion 1.x, 2.x or SDXL")
    is_xl = "XL" in named
    if plain == "InpaintPipeline":
        return DiptychXLInpaintPipeline if is_xl else DiptychInpaintPipeline
    return DiptychXLPipeline if is_xl else DiptychPipeline


def _from_hub(name: str, torch_dtype: torch.dtype) -> Any:
    """A repository of the hub: taken from the local cache, downloaded if it is not there."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(_FILES):
        raise ModelNotFound(f"there is no file or folder {name}: give a model, or a repository as in owner/name")
    try:
        config = DiptychPipeline.load_config(name)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"there is no folder {name}, and the hub could not give a model of this name") from error
    return _from_pretrained(_class_for(str(config.get("_class_name")), name), name, torch_dtype)


def _from_pretrained(cls: Any, where: str | Path, torch_dtype: torch.dtype, **kwargs: Any) -> Any:
    try:
        with quiet_libraries():
            return cls.from_pretrained(where, dtype=torch_dtype, **kwargs)
    except DiptychError:
        raise
    except Exception as error:  # diffusers, transformers, safetensors and json each have their own for a damaged file
        said = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the model {where} cannot be loaded: {said}") from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """diffusers and transformers show no progress bars of their own, and diffusers warns of nothing."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        for library in (diffusers_logging, transformers_logging):
            library.enable_progress_bar()


def _check_weights(pipeline: Any, path: Path) -> None:
    """Raises CheckpointError for a weight that is NaN or infinite, and names it: the picture would be black."""
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module):
            for key, weight in component.named_parameters():
                if not torch.isfinite(weight.sum(dtype=torch.float32)):
                    raise CheckpointError(
                        f"the model {path} is damaged: the weight {key!r} of its {name} holds NaN or infinity"
                    )


def _check_means(device: torch.device, attention: str, compile: bool) -> None:
    """Before seconds are spent on a model."""
    if attention not in ATTENTION:
        raise ValueError(f"there is no attention called {attention!r}: use {', '.join(ATTENTION)}")
    if attention == "xformers" and device.type != "cuda":
        raise ValueError(f"xformers has no operator for {device.type}: leave --attention out")
    if attention == "xformers" and importlib.util.find_spec("xformers") is None:
        raise ValueError("xformers is not installed: pip install 'diptych[xformers]'")
    if not compile:
        return
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ValueError("compiling for a GPU needs triton, which is not installed: leave --compile out")
    compilers = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    if device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        raise ValueError("compiling needs a C++ compiler, and there is none on this machine: leave --compile out")
