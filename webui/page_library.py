"""The Library and PNG info tabs: what was made here, and what a picture says of how it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from diptych.errors import ImageError
from diptych.infotext import parse_infotext
from diptych.webui.backend import Backend
from diptych.webui.page_parts import IDLE, Showcase, invitation, notice, owner_of, sentence, table_html
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
                    self.newer = gr.Button("← Newer", size="sm", visible=False, elem_id="library-newer", min_width=120)
                    self.older = gr.Button("Older →", size="sm", visible=False, elem_id="library-older", min_width=120)
            with gr.Column(scale=2, min_width=320, elem_classes="dp-detail"):
                self.hint = gr.HTML(
                    invitation("No picture is chosen", "Choose one to see how it was made, use it again or delete it."),
                    padding=False,
                    elem_id="library-hint",
                )
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
                with gr.Row(elem_classes="dp-actions"):
                    self.reuse = gr.Button(
                        "Use these settings", variant="primary", size="sm", elem_id="library-reuse", min_width=140
                    )
                    self.to_upscale = gr.Button("Send to Upscale", size="sm", elem_id="library-upscale", min_width=140)
                    self.delete = gr.Button(
                        "Delete", variant="stop", size="sm", elem_id="library-delete", min_width=100
                    )
                with gr.Row(elem_classes="dp-actions"):
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
        self.listing = [self.pictures, self.ids, self.offset, self.status, self.newer, self.older]
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
        entries = self.library.search(owner_of(request), words, PAGE + 1, offset)  # one more: is there another page?
        there = [entry for entry in entries[:PAGE] if entry.path.exists()]
        if entries:
            status = IDLE
        elif words:
            status = notice(f"Nothing found that has all of these words: {words[:100]}")
        else:
            status = invitation("Nothing here yet", "What you create or upscale is kept here.")
        return (
            [(self.showcase.thumbnail(entry), entry.prompt[:60]) for entry in there],
            [entry.id for entry in there],
            offset,
            status,
            gr.update(visible=offset > 0),
            gr.update(visible=len(entries) > PAGE),
        )

    def _turn(self, step: int) -> Any:
        def turn(words: str, offset: int, request: gr.Request) -> tuple[Any, ...]:
            return self.page(words, max(0, offset + step), request)

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


_NO_PICTURE = invitation("No picture yet", "Drop a picture to see how it was made, and use its settings.")


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
                self.status = gr.HTML(
                    _NO_PICTURE,
                    padding=False,
                    elem_id="info-status",
                )
                self.infotext = gr.Textbox(
                    label="Settings",
                    lines=4,
                    interactive=False,
                    buttons=["copy"],
                    visible=False,
                    elem_id="info-infotext",
                )
                self.reuse = gr.Button("Use these settings", variant="primary", visible=False, elem_id="info-reuse")
                self.table = gr.HTML(IDLE, padding=False, elem_id="info-table")
        self.picture.change(
            self._read,
            self.picture,
            [self.status, self.infotext, self.reuse, self.table],
            show_progress="hidden",
            concurrency_limit=None,
        )

    def _read(self, path: str | None) -> tuple[Any, ...]:
        if path is None:
            return self._show(_NO_PICTURE)
        try:
            infotext, items = read_metadata(open_header(Path(path), self.limits))
        except ImageError as error:
            return self._show(notice(sentence(error), "error"))
        if not infotext:
            said = table_html(("In the file", "Value"), list(items.items()))
            return self._show(notice("This picture says nothing of how it was made."), table=said)
        try:
            info = parse_infotext(infotext)
        except ValueError as error:
            return self._show(notice(sentence(error)), infotext)
        prompts = {"Prompt": info.prompt, "Negative prompt": info.negative_prompt}
        table = table_html(("Setting", "Value"), list((prompts | info.settings).items()))
        return self._show(IDLE, infotext, table)

    @staticmethod
    def _show(status: str, infotext: str = "", table: str = IDLE) -> tuple[Any, ...]:
        there = bool(infotext)
        return status, gr.update(value=infotext, visible=there), gr.update(visible=there and bool(table)), table


def _asking(sure: bool) -> tuple[Any, Any, Any]:
    return gr.update(visible=not sure), gr.update(visible=sure), gr.update(visible=sure)
