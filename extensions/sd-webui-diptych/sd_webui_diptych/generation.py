"""The section "Diptych" of txt2img and img2img: finishes every picture after composition, before it is saved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from modules import scripts, shared

from diptych.errors import Cancelled, ImageError

from . import extras_cache, finish, settings, work

_FAILED = "Diptych error"
_AXES = "_diptych_axes"


class DiptychSection(scripts.Script):
    """Always visible, off until the user switches it on."""

    def title(self) -> str:
        """Also its name in the API's `alwayson_scripts`."""
        return "Diptych"

    def show(self, is_img2img: bool) -> Any:
        """In both tabs."""
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        """The controls, in the order of the hooks' last arguments."""
        made = finish.controls("Diptych", "img2img_diptych" if is_img2img else "txt2img_diptych")
        self.infotext_fields = [
            (made["enabled"], lambda params: "Diptych network" in params),
            (made["network"], "Diptych network"),
            (made["scale"], "Diptych scale"),
            (made["denoise"], lambda params: params.get("Diptych denoise", 1.0)),
            (made["border"], lambda params: params.get("Diptych border", finish.AS_SET)),
            (made["tileable"], lambda params: params.get("Diptych tileable") == "True"),
            (made["keep_alpha"], lambda params: params.get("Diptych keep alpha") != "False"),
        ]
        self.paste_field_names = [
            "Diptych network", "Diptych scale", "Diptych denoise", "Diptych border", "Diptych tileable",
            "Diptych keep alpha",
        ]  # fmt: skip
        return list(made.values())

    def before_process(self, p: Any, *values: Any) -> None:
        """The Extras memory also serves generated pictures, where the user enabled the host's upscaling for them."""
        extras_cache.forget_stale()

    def postprocess_image_after_composite(
        self, p: Any, pp: Any, enabled: Any = None, network: Any = None, scale: Any = None, denoise: Any = None,
        border: Any = None, tileable: Any = None, keep_alpha: Any = None, *_: Any,
    ) -> None:  # fmt: skip
        """Replaces `pp.image`. When that fails the picture keeps what it has, and says so in its parameters."""
        axes = getattr(p, _AXES, {})
        order = finish.Finish.from_values(
            enabled or axes, axes.get("network", network), scale=scale, denoise=denoise, border=border,
            tileable=tileable, keep_alpha=keep_alpha,
        )  # fmt: skip
        params = p.extra_generation_params
        for name in [name for name in params if name.startswith("Diptych ")]:  # the picture before this one had them
            del params[name]
        if order is None or shared.state.interrupted:
            return
        order = replace(order, **axes)
        try:
            _check_composites(p)
            pp.image = order.apply(pp.image)
        except Cancelled:
            return
        except Exception as error:
            message = " ".join(str(error).split())
            params[_FAILED] = message
            p.comment(f"Diptych did not finish the picture: {message}")
            raise
        params.update(order.infotext())


def _check_composites(p: Any) -> None:
    """Raises ImageError where the host would fail: it lays a mask of the old size over the picture of the new one."""
    if getattr(p, "image_mask", None) is not None:
        for option in ("return_mask_composite", "save_mask_composite"):
            if getattr(shared.opts, option, False):
                raise ImageError(f"with the setting {option} the host cannot take an inpainted picture of another size")


def add_axes() -> None:
    """Adds our axes to the X/Y/Z plot, where the host has it."""
    for data in scripts.scripts_data:
        options = getattr(data.module, "axis_options", None)
        if options is None or any(option.label.startswith("[Diptych]") for option in options):
            continue
        make = data.module.AxisOption
        options += [
            make("[Diptych] Network", str, _axis("network"), choices=work.names),
            make("[Diptych] Scale", float, _axis("scale")),
            make("[Diptych] Denoise", float, _axis("denoise")),
            make("[Diptych] Border", str, _axis("border"), choices=lambda: list(settings.BORDERS)),
        ]


def _axis(name: str) -> Any:
    def apply(p: Any, value: Any, values: Any) -> None:
        setattr(p, _AXES, {**getattr(p, _AXES, {}), name: value})

    return apply
