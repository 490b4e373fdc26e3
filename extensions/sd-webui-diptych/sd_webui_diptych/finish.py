"""What the Extras operation and the generation step share: their controls, and what to do with the values.

Values may be None (the hosts' API leaves out what it does not know): None means the default, and "off" for the switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from PIL import Image

from . import settings, work

AS_SET = "as in Settings"


@dataclass(frozen=True)
class Finish:
    """One order to finish a picture with a GAN."""

    network: str
    scale: float = 2.0
    denoise: float = 1.0
    """1: as the network is; less: blended with its noise-keeping twin, for networks that have one."""
    border: str = AS_SET
    tileable: bool = False
    keep_alpha: bool = True

    @classmethod
    def from_values(cls, enabled: Any, network: Any, **values: Any) -> Finish | None:
        """The order in the values of the controls; None when they are off or name no network."""
        if not enabled or network in (None, "", "None"):
            return None
        return cls(str(network), **{name: value for name, value in values.items() if value is not None})

    def apply(self, image: Image.Image) -> Image.Image:
        """The finished picture. Raises what `work.upscale` raises."""
        border = "wrap" if self.tileable else None if self.border == AS_SET else self.border
        return work.upscale(
            image,
            work.choose(self.network),
            float(self.scale),
            denoise=None if self.denoise == 1 else float(self.denoise),
            border=border,
            keep_alpha=self.keep_alpha,
        )

    def infotext(self) -> dict[str, Any]:
        """The order as generation parameters; what is at its default is left out."""
        params: dict[str, Any] = {"Diptych network": self.network, "Diptych scale": self.scale}
        if self.denoise != 1:
            params["Diptych denoise"] = self.denoise
        if self.border != AS_SET:
            params["Diptych border"] = self.border
        if self.tileable:
            params["Diptych tileable"] = True
        if not self.keep_alpha:
            params["Diptych keep alpha"] = False
        return params


def controls(label: str, elem_id: str) -> dict[str, Any]:
    """Builds the controls; name of the argument -> component. The first is the switch."""
    import gradio as gr
    from modules.ui_components import InputAccordion

    names = work.names()
    with InputAccordion(False, label=label, elem_id=elem_id) as enabled:
        with gr.Row():
            network = gr.Dropdown(
                label="Network", choices=names, value=names[0] if names else None, elem_id=f"{elem_id}_network"
            )
            scale = gr.Slider(label="Scale", minimum=1.0, maximum=8.0, step=0.05, value=2.0, elem_id=f"{elem_id}_scale")
        with gr.Row():
            denoise = gr.Slider(
                label="Denoise (general-x4v3 only)", minimum=0.0, maximum=1.0, step=0.05, value=1.0,
                elem_id=f"{elem_id}_denoise",
            )  # fmt: skip
            border = gr.Dropdown(
                label="Border", choices=[AS_SET, *settings.BORDERS], value=AS_SET, elem_id=f"{elem_id}_border"
            )
        with gr.Row():
            tileable = gr.Checkbox(
                label="Tileable (a texture that repeats)", value=False, elem_id=f"{elem_id}_tileable"
            )
            keep_alpha = gr.Checkbox(label="Keep alpha", value=True, elem_id=f"{elem_id}_keep_alpha")
    return {
        "enabled": enabled,
        "network": network,
        "scale": scale,
        "denoise": denoise,
        "border": border,
        "tileable": tileable,
        "keep_alpha": keep_alpha,
    }
