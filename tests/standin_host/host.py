"""A small stand-in for Automatic1111, Forge and Forge-classic: it loads real extensions as those hosts load them.

Written from observed behaviour: module names, signatures, call order, and the odd parts: what `sys.path` holds, who is
kept alive, which arguments arrive as None, what is remembered, how often an upscaler is called. It makes no pictures
worth looking at and has no page; `gradio` is a stand-in too.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).resolve().parent
FLAVOURS = ("a1111", "forge", "classic")
_OWN = ("modules", "gradio", "diptych", "sd_webui_diptych")


@contextmanager
def fresh_modules(*paths: str) -> Any:
    """While it lasts, `paths` come first on sys.path, and stand-ins and Diptych are loaded anew."""
    path, modules = sys.path, dict(sys.modules)
    _forget(*_OWN)
    sys.path = [*paths, *path]
    try:
        yield
    finally:
        _forget(*_OWN)
        sys.modules.update({name: module for name, module in modules.items() if name.partition(".")[0] in _OWN})
        sys.path = path


def _forget(*packages: str) -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in packages:
            del sys.modules[name]


class ApiError(Exception):
    """What a request gets instead of a picture: status 500 with this message."""


class Host:
    """One host in the folder `webui`; use inside `fresh_modules(str(HERE))`."""

    def __init__(self, webui: Path, flavour: str = "a1111", options: dict[str, Any] | None = None) -> None:
        _forget("diptych", "sd_webui_diptych")  # a host is a process of its own
        self.webui = webui
        for folder in ("models/ESRGAN", "models/RealESRGAN", "extensions"):
            (webui / folder).mkdir(parents=True, exist_ok=True)
        self.module("flavour").name = flavour
        self.module("shared").start(webui / "models", webui)
        self.shared.opts.data.update(options or {})

    def module(self, name: str) -> ModuleType:
        """The stand-in's `modules.NAME`."""
        return importlib.import_module(f"modules.{name}")

    @property
    def shared(self) -> Any:
        return self.module("shared")

    @property
    def reports(self) -> list[str]:
        """What the host printed about errors."""
        return self.module("errors").reports

    def start(self, page: bool = True) -> Host:
        """Start-up; `page` False is `--nowebui`."""
        import gc

        self.shared.script_path = str(HERE)
        extensions = sorted(str(path) for path in (self.webui / "extensions").iterdir() if path.is_dir())
        disabled = self.shared.opts.data.get("disabled_extensions", [])
        scripts, callbacks = self.module("scripts"), self.module("script_callbacks")
        scripts.load_scripts(str(HERE), [path for path in extensions if Path(path).name not in disabled])
        gc.collect()  # what the host keeps no reference to is gone now
        self.module("modelloader").load_upscalers()
        if page:
            callbacks.call("before_ui")
            callbacks.call("ui_settings")
        scripts.create_ui()
        callbacks.call("app_started", None, None)
        return self

    def reload_ui(self) -> Host:
        """The button "Reload UI"."""
        callbacks = self.module("script_callbacks")
        callbacks.call("before_reload")
        callbacks.call("script_unloaded")
        return self.start()

    def upscalers(self) -> list[dict[str, Any]]:
        """GET /sdapi/v1/upscalers."""
        listed = []
        for data in self.shared.sd_upscalers:
            assert isinstance(data.name, str)
            assert data.data_path is None or isinstance(data.data_path, str)
            listed.append({"name": data.name, "model_path": data.data_path, "scale": float(data.scale)})
        return listed

    def names(self) -> list[str]:
        return [upscaler["name"] for upscaler in self.upscalers()]

    def extras(self, image: Any, scripts: dict[str, dict[str, Any]]) -> Any:
        """Runs the Extras operations on a picture with arguments by script name, as the API and the tab do."""
        from modules.scripts_postprocessing import PostprocessedImage

        state, runner = self.shared.state, self.module("scripts").scripts_postproc
        state.begin("extras")
        if image.mode not in (("RGB",) if self.module("flavour").name == "classic" else ("RGB", "RGBA")):
            image = image.convert("RGB")
        pp = PostprocessedImage(image)
        try:
            runner.run(pp, runner.create_args_for_run(scripts))
        except Exception as error:
            raise ApiError(str(error)) from error
        finally:
            state.end()
        return pp

    def extra_single_image(self, image: Any, upscaler: str, resize: float = 4.0, **more: Any) -> Any:
        """POST /sdapi/v1/extra-single-image."""
        arguments = {"upscale_mode": 0, "upscale_by": resize, "upscaler_1_name": upscaler, **more}
        return self.extras(image, {"Upscale": arguments}).image

    def generate(self, is_img2img: bool = False, scripts: dict[str, list[Any]] | None = None, **request: Any) -> Any:
        """POST /sdapi/v1/txt2img or img2img; `scripts`: arguments of always-on scripts by title."""
        from modules import processing

        p = processing.Processing(**request)
        module = self.module("scripts")
        runner = module.scripts_img2img if is_img2img else module.scripts_txt2img
        p.script_args = [getattr(component, "value", 0) for component in runner.inputs]
        for script in runner.scripts:
            given = (scripts or {}).get(script.title(), [])
            p.script_args[script.args_from : script.args_from + len(given)] = given
        self.shared.state.begin("txt2img")
        try:
            return processing.process_images(p, runner)
        except Exception as error:
            raise ApiError(str(error)) from error
        finally:
            self.shared.state.end()
