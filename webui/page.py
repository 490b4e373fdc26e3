"""The page: its tabs, and what goes from one tab to another.

A Gradio `Blocks` over the backend. It knows nothing of the service and of HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from diptych.infotext import parse_infotext
from diptych.webui.backend import Backend
from diptych.webui.page_create import CreateTab, fields_from
from diptych.webui.page_library import InfoTab, LibraryTab
from diptych.webui.page_models import ModelsTab
from diptych.webui.page_parts import Showcase, client_of
from diptych.webui.page_upscale import UpscaleTab

STYLE = Path(__file__).with_name("page.css")
# Ctrl+Enter (Cmd+Enter) draws from anywhere on the Create tab.
SHORTCUT = """<script>
addEventListener("keydown", event => {
  const button = document.querySelector("#generate");
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && button?.offsetParent) {
    event.preventDefault();
    document.activeElement?.blur();
    setTimeout(() => button.click(), 60);
  }
}, true);
</script>"""


def theme() -> gr.themes.Base:
    """The page's look. Fonts are the system's own: nothing is fetched from elsewhere."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Consolas", "monospace"]
    return gr.themes.Base(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", radius_size="md", font=sans, font_mono=mono
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_600",
        button_primary_text_color="white",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
    )


def build_page(backend: Backend, uploads: Path) -> gr.Blocks:
    """The page over `backend`; pictures go to browsers through the folder `uploads`."""
    showcase = Showcase(uploads / "shown")
    with gr.Blocks(title="Diptych", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as page:
        gr.HTML(
            '<header class="dp-header"><h1>Diptych</h1><p>prompt · latents · picture · finished by a GAN</p></header>',
            padding=False,
        )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Create", id="create"):
                create = CreateTab(backend, showcase)
            with gr.Tab("Upscale", id="upscale"):
                upscale = UpscaleTab(backend, showcase)
            with gr.Tab("Library", id="library") as library_tab:
                library = LibraryTab(backend, showcase)
            with gr.Tab("PNG info", id="info"):
                info = InfoTab(backend)
            with gr.Tab("Models", id="models") as models_tab:
                models = ModelsTab(backend)

        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        library_tab.select(library.first, library.search, library.listing, **quiet)
        models_tab.select(models.show, None, models.shown, **quiet)
        models.downloaded.then(lambda: _upscaler_choices(backend), None, upscale.upscaler, **quiet)
        page.load(_words_of(backend), None, [create.words, create.examples], **quiet)
        models.loaded.then(_words_of(backend), None, [create.words, create.examples], **quiet)

        made = [create.made, create.chosen]
        create.to_upscale.click(_picture_to_gallery("upscale"), made, [upscale.pictures, tabs], **quiet)
        create.to_init.click(_picture_to_init, made, [create.init, create.init_image], **quiet)
        create.to_info.click(_picture_to("info"), made, [info.picture, tabs], **quiet)
        library.to_upscale.click(
            lambda path: ([path], gr.Tabs(selected="upscale")) if path else (gr.skip(), gr.skip()),
            library.picture,
            [upscale.pictures, tabs],
            **quiet,
        )
        for button, infotext in ((library.reuse, library.infotext), (info.reuse, info.infotext)):
            button.click(_reuse(len(create.form)), infotext, [*create.form, tabs], **quiet)

        def leave(request: gr.Request) -> None:
            backend.queue.cancel_client(client_of(request))

        page.unload(leave)
    page.queue(max_size=None, default_concurrency_limit=None, api_open=False)
    return page


def _words_of(backend: Backend) -> Any:
    def offer() -> tuple[Any, Any]:
        words = backend.models.words()
        samples = [[text] for text in backend.models.examples()]
        return gr.update(choices=["", *words], visible=bool(words)), gr.update(samples=samples, visible=bool(samples))

    return offer


def _upscaler_choices(backend: Backend) -> Any:
    return gr.update(choices=[item.name for item in backend.models.upscalers()])


def _picture_to(tab: str) -> Any:
    def send(made: list[tuple[str, str, int]], chosen: int) -> tuple[Any, Any]:
        if not made:
            return gr.skip(), gr.skip()
        return made[min(chosen, len(made) - 1)][0], gr.Tabs(selected=tab)

    return send


def _picture_to_init(made: list[tuple[str, str, int]], chosen: int) -> tuple[Any, Any]:
    if not made:
        return gr.skip(), gr.skip()
    return gr.Accordion(open=True), gr.update(value=made[min(chosen, len(made) - 1)][0], visible=True)


def _picture_to_gallery(tab: str) -> Any:
    send_one = _picture_to(tab)

    def send(made: list[tuple[str, str, int]], chosen: int) -> tuple[Any, Any]:
        path, tabs = send_one(made, chosen)
        return ([path] if made else path), tabs

    return send


def _reuse(fields: int) -> Any:
    def reuse(infotext: str) -> list[Any]:
        try:
            return [*fields_from(parse_infotext(infotext)), gr.Tabs(selected="create")]
        except ValueError:
            gr.Warning("There are no settings to use.")
            return [gr.skip()] * (fields + 1)

    return reuse
