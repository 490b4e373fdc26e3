"""The Upscale tab: one or many pictures, enlarged, compared, downloaded."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr

from diptych.errors import DiptychError
from diptych.webui.backend import Backend, Upscaling
from diptych.webui.page_parts import (
    Showcase,
    client_of,
    follow,
    invitation,
    notice,
    outcome,
    owner_of,
    sentence,
    stop_job,
)
from diptych.webui.pictures_in import open_picture


class UpscaleTab:
    """Lays the tab out and wires it. `pictures` takes what other tabs send."""

    def __init__(self, backend: Backend, showcase: Showcase) -> None:
        self.backend = backend
        self.showcase = showcase
        names = [item.name for item in backend.models.upscalers()]
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.pictures = gr.Gallery(
                    label="Pictures",
                    interactive=True,
                    type="filepath",
                    file_types=["image"],
                    columns=3,
                    height=260,
                    object_fit="contain",
                    elem_id="upscale-pictures",
                )
                with gr.Row(elem_classes="dp-go"):
                    self.run = gr.Button("Upscale", variant="primary", elem_id="upscale-run", scale=3, min_width=120)
                    self.stop = gr.Button("Stop", variant="stop", elem_id="upscale-stop", scale=1, min_width=80)
                self.upscaler = gr.Dropdown(names, value=names[0], label="Upscaler", elem_id="upscale-upscaler")
                self.scale = gr.Slider(1, 8, 4, step=0.5, label="Scale", elem_id="upscale-scale")
                with gr.Accordion("More", open=False):
                    self.tile = gr.Number(
                        0, label="Tile", info="pixels; 0: by the memory there is", precision=0, minimum=0
                    )
                    self.border = gr.Radio(
                        ["zero", "reflect", "wrap"], value="zero", label="Border", info="wrap: for textures that tile"
                    )
                    self.denoise = gr.Slider(
                        0,
                        1,
                        1,
                        step=0.05,
                        label="Denoise",
                        info="only realesr-general-x4v3 listens to it; 0 keeps the noise",
                    )
            with gr.Column(scale=3, min_width=320, elem_classes="dp-results"):
                self.status = gr.HTML(
                    invitation(
                        "Before and after", "Put in one picture or many and press Upscale to compare them here."
                    ),
                    padding=False,
                    elem_id="upscale-status",
                )
                self.slider = gr.ImageSlider(
                    label="Before and after",
                    type="filepath",
                    interactive=False,
                    max_height=640,
                    elem_id="upscale-slider",
                )
                self.results = gr.Gallery(
                    label="Results",
                    visible=False,
                    columns=4,
                    height=200,
                    object_fit="contain",
                    elem_id="upscale-results",
                    allow_preview=False,
                )
                self.files = gr.Files(label="Download", visible=False, interactive=False, elem_id="upscale-files")
        self.pairs = gr.State([])
        settings = [self.pictures, self.upscaler, self.scale, self.tile, self.border, self.denoise]
        self.job_id = gr.State("")
        shown = [self.status, self.slider, self.results, self.files, self.pairs, self.job_id]
        self.run.click(self._upscale, settings, shown, show_progress="hidden", concurrency_limit=None)
        self.stop.click(self._stop, self.job_id, show_progress="hidden")
        self.results.select(self._compare, self.pairs, self.slider, show_progress="hidden")

    async def _upscale(
        self,
        pictures: list[Any] | None,
        upscaler: str,
        scale: float,
        tile: int,
        border: str,
        denoise: float,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        same = (gr.skip(),) * 4
        if not pictures:
            yield notice("Put in a picture first: drop one above, or send one from another tab.", "error"), *same, ""
            return
        try:
            paths = [Path(item[0] if isinstance(item, (tuple, list)) else item) for item in pictures]
            sources = [(path.name, open_picture(path, self.backend.settings.limits, path.name)) for path in paths]
            how = Upscaling(
                upscaler, float(scale), tile=int(tile) or None, border=border, denoise=None if denoise == 1 else denoise
            )
            job = self.backend.upscale(client_of(request), sources, how, keep_for=owner_of(request))
        except (DiptychError, ValueError, OSError) as error:
            yield notice(sentence(error), "error"), *same, ""
            return
        async for text in follow(self.backend.queue, job):
            yield text, *same, job.id
        after = [self.showcase.picture(made.entry) for made in job.results if made.entry]
        pairs = [(str(path), made) for path, made in zip(paths, after, strict=False)]
        many = len(pairs) > 1
        size = f"{job.results[0].image.width} x {job.results[0].image.height} pixels" if pairs else ""
        text = outcome(job, f"{len(pairs)} pictures are done." if many else f"Done: {size}.")
        yield (
            text,
            pairs[0] if pairs else gr.skip(),
            gr.update(value=after, visible=many),
            gr.update(value=after, visible=bool(after)),
            pairs,
            "",
        )

    def _stop(self, job_id: str, request: gr.Request) -> None:
        stop_job(self.backend.queue, job_id, request)

    @staticmethod
    def _compare(pairs: list[tuple[str, str]], event: gr.SelectData) -> tuple[str, str]:
        return pairs[event.index]
