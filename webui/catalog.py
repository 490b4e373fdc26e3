"""The lists of `/sdapi/v1`: models, upscalers, samplers, options. Truthful: empty where there is nothing.

Paths are given as names; where the files lie is nobody's business.
"""

from __future__ import annotations

import os
from typing import Any

from fastapi import APIRouter

from diptych.errors import ModelNotFound
from diptych.pipelines.latents import LATENT_MODES
from diptych.upscalers.official import OFFICIAL
from diptych.webui import schemas
from diptych.webui.backend import Backend
from diptych.webui.mapping import schedule_id

_FORMATS = ("png", "jpg", "jpeg", "webp")


class Options:
    """What can be set for the whole server: the model, the file format of answers, clip skip."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.file_format = "png"
        self._clip_skip = 1

    def read(self) -> dict[str, Any]:
        """All options with their values."""
        return {
            "sd_model_checkpoint": self._backend.models.current.name,
            "sd_checkpoint_hash": None,
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": self._clip_skip,
            "samples_format": self.file_format,
        }

    def for_jobs(self) -> dict[str, Any]:
        """Those that a job begins with; its `override_settings` come on top."""
        return {"CLIP_stop_at_last_layers": self._clip_skip}

    def write(self, values: dict[str, Any]) -> None:
        """Sets what is known and leaves the rest alone, as Automatic1111 does; all or nothing.

        Raises ModelNotFound or ValueError for a value that is not to be had.
        """
        model, file_format = values.get("sd_model_checkpoint"), values.get("samples_format", self.file_format)
        clip_skip = values.get("CLIP_stop_at_last_layers", self._clip_skip)
        if model is not None and not isinstance(model, str):
            raise ModelNotFound("sd_model_checkpoint must be the name of a model")
        if file_format not in _FORMATS:
            raise ValueError(f"samples_format must be one of {', '.join(_FORMATS)}")
        if isinstance(clip_skip, bool) or not isinstance(clip_skip, int) or not 1 <= clip_skip <= 12:
            raise ValueError("CLIP_stop_at_last_layers must be a whole number from 1 to 12")
        if model is not None:
            self._backend.models.current = self._backend.models.checkpoint(model)
        self.file_format, self._clip_skip = file_format, clip_skip


def add_catalog(router: APIRouter, backend: Backend, options: Options) -> None:
    """Adds the routes of this module."""
    models, settings = backend.models, backend.settings

    @router.get("/options", tags=["options"])
    def get_options() -> dict[str, Any]:
        """The server's options."""
        return options.read()

    @router.post("/options", tags=["options"])
    def set_options(values: dict[str, Any]) -> None:
        """Sets options for everybody; the unknown ones are left alone."""
        options.write(values)

    @router.get("/cmd-flags", tags=["options"])
    def cmd_flags() -> dict[str, Any]:
        """How the server was started; no passwords."""
        return {
            "api": True,
            "nowebui": not settings.page,
            "listen": not settings.local_only,
            "server_name": settings.host,
            "port": settings.port,
            "api_auth": bool(settings.users),
            "cors_allow_origins": ",".join(settings.cors_origins) or None,
            "ckpt": None if settings.model is None else os.path.basename(settings.model.rstrip("/")),
        }

    @router.get("/sd-models", tags=["lists"])
    def sd_models() -> list[schemas.CheckpointItem]:
        """What can be drawn with."""
        return [
            schemas.CheckpointItem(
                title=item.name, model_name=item.name, hash=None, sha256=None, filename=item.name, config=None
            )
            for item in models.checkpoints()
        ]

    @router.post("/refresh-checkpoints", tags=["lists"])
    def refresh_checkpoints() -> None:
        """Nothing to do: the list is always read anew."""

    @router.get("/samplers", tags=["lists"])
    def samplers() -> list[schemas.SamplerItem]:
        """What `sampler_name` takes."""
        from diptych.pipelines.schedulers import SAMPLERS

        return [schemas.SamplerItem(name=item.name, aliases=[item.class_name], options={}) for item in SAMPLERS]

    @router.get("/schedulers", tags=["lists"])
    def schedulers() -> list[schemas.SchedulerItem]:
        """What `scheduler` takes."""
        from diptych.pipelines.schedulers import SCHEDULE_TYPES

        return [
            schemas.SchedulerItem(
                name=schedule_id(name),
                label=name,
                aliases=None,
                default_rho=7.0 if name == "Karras" else -1,
                need_inner_model=False,
            )
            for name in sorted(SCHEDULE_TYPES, key=lambda name: name != "Automatic")
        ]

    @router.get("/upscalers", tags=["lists"])
    def upscalers() -> list[schemas.UpscalerItem]:
        """What `upscaler_1` takes; those that are networks are also what `hr_upscaler` takes."""
        nothing = schemas.UpscalerItem(name="None", model_name=None, model_path=None, model_url=None, scale=1)
        return [nothing] + [
            schemas.UpscalerItem(
                name=item.name,
                model_name=item.name if item.source else None,
                model_path=item.source.name if item.source else None,
                model_url=None,
                scale=item.scale or 4,
            )
            for item in models.upscalers()
        ]

    @router.get("/realesrgan-models", tags=["lists"])
    def realesrgan_models() -> list[schemas.RealesrganItem]:
        """The official Real-ESRGAN networks that are there."""
        absent = models.downloadable()
        return [
            schemas.RealesrganItem(name=name, path=entry.filename, scale=entry.scale)
            for name, entry in OFFICIAL.items()
            if name not in absent
        ]

    @router.get("/loras", tags=["lists"])
    def loras() -> list[schemas.LoraItem]:
        """What `<lora:name:1>` in a prompt takes."""
        from diptych.pipelines.loras import list_loras

        return [
            schemas.LoraItem(name=name, alias=name, path=path.name, metadata={}) for name, path in list_loras().items()
        ]

    @router.get("/latent-upscale-modes", tags=["lists"])
    def latent_upscale_modes() -> list[schemas.NamedItem]:
        """What `hr_upscaler` takes besides networks: these enlarge latents, and leave the rest to the second pass."""
        return [schemas.NamedItem(name=name) for name in LATENT_MODES]

    @router.get("/sd-vae", tags=["lists"])
    def sd_vae() -> list[schemas.VaeItem]:
        """None: each model has its own."""
        return []

    @router.get("/hypernetworks", tags=["lists"])
    def hypernetworks() -> list[schemas.PathItem]:
        """None."""
        return []

    @router.get("/face-restorers", tags=["lists"])
    def face_restorers() -> list[schemas.FaceRestorerItem]:
        """None."""
        return []

    @router.get("/prompt-styles", tags=["lists"])
    def prompt_styles() -> list[schemas.StyleItem]:
        """None."""
        return []

    @router.get("/embeddings", tags=["lists"])
    def embeddings() -> schemas.EmbeddingsAnswer:
        """None."""
        return schemas.EmbeddingsAnswer(loaded={}, skipped={})

    @router.get("/scripts", tags=["lists"])
    def scripts() -> schemas.ScriptsAnswer:
        """None."""
        return schemas.ScriptsAnswer(txt2img=[], img2img=[])

    @router.get("/script-info", tags=["lists"])
    def script_info() -> list[dict[str, Any]]:
        """None."""
        return []

    @router.get("/extensions", tags=["lists"])
    def extensions() -> list[dict[str, Any]]:
        """None."""
        return []

    @router.get("/memory", tags=["lists"])
    def memory() -> schemas.MemoryAnswer:
        """Bytes of memory: the machine's, this process's, the GPU's."""
        return schemas.MemoryAnswer(ram=_ram(), cuda=_cuda())


def _ram() -> dict[str, Any]:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[1]) * page
        return {
            "free": os.sysconf("SC_AVPHYS_PAGES") * page,
            "used": used,
            "total": os.sysconf("SC_PHYS_PAGES") * page,
        }
    except (OSError, ValueError, AttributeError):
        return {"error": "unavailable on this system"}


def _cuda() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"error": "unavailable: there is no GPU"}
    free, total = torch.cuda.mem_get_info()
    allocated = {"current": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    return {"system": {"free": free, "used": total - free, "total": total}, "allocated": allocated}
