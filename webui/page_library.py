"""The Library and PNG info tabs: what was made here, and what a picture says of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from diptych.errors import ImageError
from diptych.infotext import parse_infotext
from diptych.webui.backend import Backend
from diptych.webui.page_parts import IDLE, Showcase, notice, owner_of, sentence
from diptych.webui.pictures_in import open_header, read_metadata

PAGE = 24  # pictures at a time


class LibraryTab:
    """Browse, search, reuse, delete. `show` fills it; other tabs read `chosen_path` and `infotext`."""

    def __init__(self, backend: Backend, showcase: Showcase) -> None:
        self.library = backend.library
        self.showcase = showcase
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    self.search = gr.Textbox(
                        label="Search",
                        placeholder="words of the prompt or the settings",
                        elem_id="library-search",
                        scale=4,
                    )
                self.status = gr.HTML(IDLE, padding=False, elem_id="library-status")
                self.pictures = gr.Gallery(
                    label="Made here",
                    columns=[2, 3, 4],
                    object_fit="cover",
                    height="auto",
                    allow_preview=False,
                    elem_id="library-pictures",
                    interactive=False,
                    buttons=[],
                )
                with gr.Row():
                    self.newer = gr.Button("← Newer", size="sm", elem_id="library-newer")
                    self.older = gr.Button("Older →", size="sm", elem_id="library-older")
            with gr.Column(scale=2, min_width=320):
                self.picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    interactive=False,
                    height=420,
                    elem_id="library-picture",
                    buttons=["download", "fullscreen"],
                )
                self.infotext = gr.Textbox(
                    label="Settings", lines=5, interactive=False, buttons=["copy"], elem_id="library-infotext"
                )
                with gr.Row():
                    self.reuse = gr.Button("Use these settings", variant="primary", size="sm", elem_id="library-reuse")
                    self.to_upscale = gr.Button("Send to Upscale", size="sm", elem_id="library-upscale")
                with gr.Row():
                    self.delete = gr.Button("Delete", variant="stop", size="sm", elem_id="library-delete")
                    self.confirm = gr.Button(
                        "Delete for good", variant="stop", size="sm", visible=False, elem_id="library-confirm"
                    )
                    self.keep = gr.Button("Keep it", size="sm", visible=False, elem_id="library-keep")
        self.ids = gr.State([])
        self.offset = gr.State(0)
        self.chosen = gr.State(None)
        self._wire()

    def _wire(self) -> None:
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        asking = [self.delete, self.confirm, self.keep]
        self.listing = [self.pictures, self.ids, self.offset, self.status]
        chosen = [self.chosen, self.picture, self.infotext, *asking]
        self.search.change(self.first, self.search, self.listing, trigger_mode="always_last", **quiet)
        self.newer.click(self._turn(-PAGE), [self.search, self.offset], self.listing, **quiet)
        self.older.click(self._turn(PAGE), [self.search, self.offset], self.listing, **quiet)
        self.pictures.select(self._choose, self.ids, chosen, **quiet)
        self.delete.click(lambda: _asking(True), None, asking, show_progress="hidden")
        self.keep.click(lambda: _asking(False), None, asking, show_progress="hidden")
        self.confirm.click(self._delete, self.chosen, chosen, **quiet).then(
            self.page, [self.search, self.offset], self.listing, **quiet
        )

    def first(self, words: str, request: gr.Request) -> tuple[Any, ...]:
        """The newest page of what the owner made and the words find."""
        return self.page(words, 0, request)

    def page(self, words: str, offset: int, request: gr.Request) -> tuple[Any, ...]:
        """One page of it."""
        entries = self.library.search(owner_of(request), words, PAGE, offset)
        text = "" if entries else "Nothing found." if words else "Nothing here yet: what you create will be kept here."
        pictures = [(self.showcase.thumbnail(entry), entry.prompt[:60]) for entry in entries if entry.path.exists()]
        return pictures, [entry.id for entry in entries if entry.path.exists()], offset, notice(text)

    def _turn(self, step: int) -> Any:
        def turn(words: str, offset: int, request: gr.Request) -> tuple[Any, ...]:
            target = max(0, offset + step)
            if step > 0 and not self.library.search(owner_of(request), words, 1, target):
                return (gr.skip(),) * 4
            return self.page(words, target, request)

        return turn

    def _choose(self, ids: list[int], event: gr.SelectData, request: gr.Request) -> tuple[Any, ...]:
        entry = self.library.get(owner_of(request), ids[event.index]) if event.index < len(ids) else None
        if entry is None or not entry.path.exists():
            return None, None, "This picture is gone.", *_asking(False)
        return entry.id, self.showcase.picture(entry), entry.infotext or "No settings are known.", *_asking(False)

    def _delete(self, chosen: int | None, request: gr.Request) -> tuple[Any, ...]:
        entry = self.library.get(owner_of(request), chosen) if chosen is not None else None
        if entry is not None:
            self.library.delete(entry.owner, entry.id)
            self.showcase.forget(entry)
        return None, None, "", *_asking(False)


class InfoTab:
    """Drop a picture, see its settings."""

    def __init__(self, backend: Backend) -> None:
        self.limits = backend.settings.limits
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320):
                self.picture = gr.Image(
                    label="Picture",
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=420,
                    elem_id="info-picture",
                )
            with gr.Column(scale=3, min_width=320):
                self.status = gr.HTML(IDLE, padding=False, elem_id="info-status")
                self.infotext = gr.Textbox(
                    label="Settings", lines=6, interactive=False, buttons=["copy"], elem_id="info-infotext"
                )
                self.reuse = gr.Button("Use these settings", variant="primary", elem_id="info-reuse")
                self.table = gr.Dataframe(
                    headers=["Setting", "Value"],
                    datatype="str",
                    interactive=False,
                    label="One by one",
                    wrap=True,
                    elem_id="info-table",
                )
        self.picture.change(
            self._read,
            self.picture,
            [self.status, self.infotext, self.table],
            show_progress="hidden",
            concurrency_limit=None,
        )

    def _read(self, path: str | None) -> tuple[str, str, list[list[str]]]:
        if path is None:
            return IDLE, "", []
        try:
            infotext, items = read_metadata(open_header(Path(path), self.limits))
        except ImageError as error:
            return notice(sentence(error), "error"), "", []
        if not infotext:
            return notice("This picture says nothing of how it was made."), "", [list(item) for item in items.items()]
        try:
            info = parse_infotext(infotext)
        except ValueError as error:
            return notice(sentence(error)), infotext, []
        prompts = {"Prompt": info.prompt, "Negative prompt": info.negative_prompt}
        return IDLE, infotext, [list(item) for item in (prompts | info.settings).items()]


def _asking(sure: bool) -> tuple[Any, Any, Any]:
    return gr.update(visible=not sure), gr.update(visible=sure), gr.update(visible=sure)
