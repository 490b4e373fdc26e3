"""The Models tab: what is there, what is loaded, and downloads of the official upscalers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from diptych.errors import DiptychError
from diptych.webui.backend import Backend
from diptych.webui.page_parts import IDLE, client_of, follow, notice, outcome, sentence, stop_job, table_html


class ModelsTab:
    """Lays the tab out and wires it. `loaded` fires after another model was chosen."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        with gr.Row(equal_height=False):
            with gr.Column(min_width=320):
                self.model = gr.Dropdown([], label="Model", elem_id="model")
                self.load = gr.Button("Load", variant="primary", elem_id="model-load")
                self.status = gr.HTML(IDLE, padding=False, elem_id="model-status")
                self.table = gr.HTML(IDLE, padding=False, elem_id="models-loaded")
            with gr.Column(min_width=320):
                self.official = gr.Dropdown([], label="Official upscalers", elem_id="official")
                with gr.Row(elem_classes="dp-go"):
                    self.download = gr.Button(
                        "Download", variant="primary", elem_id="official-download", scale=3, min_width=120
                    )
                    self.stop = gr.Button("Stop", variant="stop", elem_id="official-stop", scale=1, min_width=80)
                self.download_status = gr.HTML(IDLE, padding=False, elem_id="official-status")
                self.upscalers = gr.HTML(IDLE, padding=False, elem_id="upscalers-there")
        self.job_id = gr.State("")
        self.shown = [self.model, self.table, self.official, self.upscalers]
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        self.loaded = self.load.click(self._load, self.model, self.status, **quiet)
        self.loaded.then(self.show, None, self.shown, **quiet)
        self.downloaded = self.download.click(
            self._download, self.official, [self.download_status, self.job_id], **quiet
        )
        self.downloaded.then(self.show, None, self.shown, **quiet)
        self.stop.click(self._stop, self.job_id, show_progress="hidden")

    def _stop(self, job_id: str, request: gr.Request) -> None:
        stop_job(self.backend.downloads, job_id, request)

    def show(self) -> tuple[Any, ...]:
        """What is there now."""
        models = self.backend.models
        names = [item.name for item in models.checkpoints()]
        loaded = [(name, f"{size / 2**20:,.0f} MiB") for name, size in models.loaded().items()]
        absent = models.downloadable()
        rows = [(item.name, "ready") for item in models.upscalers()] + [(name, "to download") for name in absent]
        return (
            gr.update(choices=names, value=models.current.name),
            table_html(("In memory", "Size"), loaded) or notice("Nothing is in memory yet."),
            gr.update(choices=absent, value=absent[0] if absent else None),
            table_html(("Upscaler", ""), rows),
        )

    async def _load(self, name: str, request: gr.Request) -> AsyncIterator[str]:
        try:
            job = self.backend.load(client_of(request), name)
        except (DiptychError, ValueError) as error:
            yield notice(sentence(error), "error")
            return
        async for text in follow(self.backend.queue, job):
            yield text
        yield outcome(job, f"{name} is loaded and will be used from now on.")

    async def _download(self, name: str | None, request: gr.Request) -> AsyncIterator[tuple[str, str]]:
        if not name:
            yield notice("All official upscalers are there."), ""
            return
        try:
            job = self.backend.download(client_of(request), name)
        except (DiptychError, ValueError) as error:
            yield notice(sentence(error), "error"), ""
            return
        async for text in follow(self.backend.downloads, job):
            yield text, job.id
        yield outcome(job, f"{name} is there."), ""
