"""The Create tab: prompt to pictures, with everything that a `GenerationRequest` has.

The form's fields carry the names of the command line and the service.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from PIL import Image

from diptych.errors import DiptychError
from diptych.infotext import Infotext
from diptych.pipelines.masked import MASKED_CONTENT
from diptych.webui.backend import Backend
from diptych.webui.page_editor import bound_editor
from diptych.webui.page_parts import (
    IDLE,
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

OWN = "Model's own"
_SIZES = [OWN, "64x64", "256x256", "512x512", "512x768", "768x512", "1024x1024"]


class CreateTab:
    """Lays the tab out and wires it. `form` are the fields that an infotext sets, in the order of `fields_from`."""

    def __init__(self, backend: Backend, showcase: Showcase) -> None:
        self.backend = backend
        self.showcase = showcase
        limits = backend.settings.limits
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=320, elem_classes="dp-form"):
                with gr.Column(elem_classes="dp-prompt"):
                    self._lay_out_prompt()
                with gr.Column(elem_classes="dp-settings"):
                    self._lay_out_words()
                    self._lay_out_settings(limits.steps, limits.pictures)
                    self._lay_out_init_image()
            with gr.Column(scale=3, min_width=320, elem_classes="dp-results"):
                self._lay_out_results()
        self._wire()

    def _lay_out_prompt(self) -> None:
        self.prompt = gr.Textbox(
            label="Prompt", lines=2, max_lines=8, placeholder="What to draw", elem_id="prompt", autofocus=True
        )
        self.unknown = gr.HTML(IDLE, padding=False, elem_id="unknown-words")
        with gr.Row(elem_classes="dp-go"):
            self.run = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
            self.stop = gr.Button("Stop", variant="stop", elem_id="stop", scale=1, min_width=80)
        self.examples = gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[text] for text in self.backend.models.examples()],
            label="Try one of these",
            elem_id="examples",
        )

    def _lay_out_words(self) -> None:
        self.words = gr.Dropdown(
            [""], value="", label="Words this model knows", info="pick one to add it to the prompt", elem_id="words"
        )
        self.negative_prompt = gr.Textbox(
            label="Negative prompt", lines=1, max_lines=4, placeholder="What to keep out", elem_id="negative-prompt"
        )

    def _lay_out_settings(self, most_steps: int, most_pictures: int) -> None:
        with gr.Row(equal_height=True, elem_classes="dp-seed"):
            self.seed = gr.Number(
                -1, label="Seed", info="-1: a new one each time", precision=0, minimum=-1, elem_id="seed", min_width=140
            )
            with gr.Column(min_width=140):
                self.dice = gr.Button("🎲 New seed", elem_id="dice", size="sm")
                self.reuse_seed = gr.Button("♻ Reuse last", elem_id="reuse-seed", size="sm")
        with gr.Row():
            self.steps = gr.Slider(1, most_steps, 25, step=1, label="Steps", elem_id="steps", min_width=150)
            self.guidance_scale = gr.Slider(
                0, 20, 7, step=0.5, label="Guidance", elem_id="guidance-scale", min_width=150
            )
        with gr.Row():
            self.size = gr.Dropdown(
                _SIZES,
                value=OWN,
                label="Size",
                info="before upscaling",
                allow_custom_value=True,
                elem_id="size",
                min_width=150,
            )
            self.scheduler = gr.Dropdown(
                [OWN, *self.backend.models.samplers()],
                value=OWN,
                label="Scheduler",
                info="how the noise is removed",
                elem_id="scheduler",
                min_width=150,
            )
        with gr.Row():
            self.upscale = gr.Slider(
                1, 8, 4, step=0.5, label="Upscale", info="1: leave it", elem_id="upscale", min_width=150
            )
            self.refine = gr.Slider(
                0, 1, 0, step=0.05, label="Refine", info="0: leave it", elem_id="refine", min_width=150
            )
        with gr.Row():
            self.count = gr.Slider(1, most_pictures, 1, step=1, label="Count", elem_id="count", min_width=150)

    def _lay_out_init_image(self) -> None:
        with gr.Accordion("Start from a picture", open=False, elem_id="init") as self.init:
            self.init_image = gr.ImageEditor(
                label="Picture",
                type="pil",
                sources=["upload", "clipboard"],
                layers=False,
                transforms=[],
                brush=gr.Brush(colors=["#ffffff"], color_mode="fixed", default_size=24),
                height=380,
                visible=False,  # its code is large, and the browser fetches it when it is first needed
                elem_id="init-image",
            )
            bound_editor(self.init_image, self.backend.settings.limits)
            gr.HTML(
                '<p class="dp-hint">Paint over what is to be drawn anew; paint nothing to change the whole. Strength '
                "says how much changes, masked content what the painted part begins from.</p>",
                padding=False,
            )
            with gr.Row():
                self.strength = gr.Slider(
                    0,
                    1,
                    0.75,
                    step=0.05,
                    label="Strength",
                    elem_id="strength",
                    min_width=150,
                )
                self.masked_content = gr.Dropdown(
                    MASKED_CONTENT,
                    value="original",
                    label="Masked content",
                    elem_id="masked-content",
                    min_width=150,
                )

    def _lay_out_results(self) -> None:
        self.status = gr.HTML(
            invitation(
                "Your pictures will appear here",
                "Write what to draw, or pick an example, and press Generate. Ctrl+Enter does it from anywhere.",
            ),
            padding=False,
            elem_id="create-status",
        )
        self.results = gr.Gallery(
            label="Pictures",
            columns=2,
            object_fit="contain",
            height="auto",
            elem_id="create-results",
            interactive=False,
            buttons=["download", "fullscreen"],
        )
        self.infotext = gr.Textbox(
            label="Settings of this picture", lines=3, interactive=False, buttons=["copy"], elem_id="create-infotext"
        )
        with gr.Row(elem_classes="dp-send"):
            self.to_upscale = gr.Button("Send to Upscale", size="sm", elem_id="send-upscale", min_width=140)
            self.to_init = gr.Button("Send to init image", size="sm", elem_id="send-init", min_width=140)
            self.to_info = gr.Button("Send to PNG info", size="sm", elem_id="send-info", min_width=140)
        self.made = gr.State([])  # (path, infotext, seed) of each picture in the gallery
        self.chosen = gr.State(0)
        self.job_id = gr.State("")

    @property
    def form(self) -> list[Any]:
        return [
            self.prompt,
            self.negative_prompt,
            self.seed,
            self.steps,
            self.guidance_scale,
            self.size,
            self.upscale,
            self.refine,
            self.scheduler,
            self.strength,
        ]

    def _wire(self) -> None:
        inputs = [*self.form, self.count, self.init_image, self.masked_content]
        shown = [self.status, self.results, self.infotext, self.made, self.chosen, self.job_id]
        gr.on(
            [self.run.click, self.prompt.submit, self.negative_prompt.submit],
            self._generate,
            inputs,
            shown,
            show_progress="hidden",
            concurrency_limit=None,
            trigger_mode="once",
        )
        self.stop.click(self._stop, self.job_id, show_progress="hidden")
        self.init.expand(lambda: gr.update(visible=True), None, self.init_image, show_progress="hidden")
        self.dice.click(lambda: -1, None, self.seed, show_progress="hidden")
        self.reuse_seed.click(self._last_seed, [self.made, self.chosen], self.seed, show_progress="hidden")
        self.results.select(self._choose, self.made, [self.infotext, self.chosen], show_progress="hidden")
        self.examples.click(lambda sample: sample[0], self.examples, self.prompt, show_progress="hidden")
        self.words.input(self._add_word, [self.prompt, self.words], [self.prompt, self.words], show_progress="hidden")
        gr.on(
            [self.prompt.change, self.negative_prompt.change],
            self._unknown_words,
            [self.prompt, self.negative_prompt],
            self.unknown,
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=None,
        )

    async def _generate(
        self,
        prompt: str,
        negative_prompt: str,
        seed: float | None,
        steps: int,
        guidance_scale: float,
        size: str,
        upscale: float,
        refine: float,
        scheduler: str,
        strength: float,
        count: int,
        init_image: dict[str, Any] | None,
        masked_content: str,
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, ...]]:
        from diptych.pipelines.generation import GenerationRequest

        same = (gr.skip(),) * 4
        try:
            if not prompt.strip():
                raise ValueError("the prompt is empty: say what to draw")
            if refine and upscale == 1:
                raise ValueError("refine draws the enlarged picture anew: set upscale above 1, or refine to 0")
            picture, mask = _picture_and_mask(init_image)
            width, height = _sides(size)
            wish = GenerationRequest(
                prompt=prompt,
                negative_prompt=negative_prompt,
                seed=None if seed is None or seed < 0 else int(seed),
                count=int(count),
                steps=int(steps),
                guidance_scale=float(guidance_scale),
                width=width,
                height=height,
                upscale=float(upscale),
                refine=float(refine) or None,
                scheduler=None if scheduler == OWN else scheduler,
                init_image=picture,
                mask=mask,
                masked_content=masked_content,
                strength=float(strength),
            )
            job = self.backend.generate(client_of(request), [wish], keep_for=owner_of(request))
        except (DiptychError, ValueError) as error:
            yield notice(sentence(error), "error"), *same, ""
            return
        shown = 0
        async for text in follow(self.backend.queue, job):
            yield (
                (text, self._gallery(job.results), *same[1:], job.id)
                if len(job.results) > shown
                else (text, *same, job.id)
            )
            shown = len(job.results)
        made = [(self.showcase.picture(item.entry), item.infotext, item.seed) for item in job.results if item.entry]
        notes = " ".join(dict.fromkeys(note for item in job.results for note in item.notes))
        seconds = round(job.seconds or 0, 1)
        status = outcome(job, f"Done in {seconds} s.") + notice(notes)
        if made:
            yield status, self._gallery(job.results), made[0][1], made, 0, ""
        else:
            yield status, *same, ""

    def _gallery(self, results: list[Any]) -> list[tuple[str, str]]:
        return [(self.showcase.picture(item.entry), f"Seed {item.seed}") for item in results if item.entry]

    def _stop(self, job_id: str, request: gr.Request) -> None:
        stop_job(self.backend.queue, job_id, request)

    @staticmethod
    def _choose(made: list[tuple[str, str, int]], event: gr.SelectData) -> tuple[str, int]:
        return (made[event.index][1], event.index) if event.index < len(made) else ("", 0)

    @staticmethod
    def _last_seed(made: list[tuple[str, str, int]], chosen: int) -> Any:
        return made[min(chosen, len(made) - 1)][2] if made else gr.skip()

    @staticmethod
    def _add_word(prompt: str, word: str | None) -> tuple[str, str]:
        joined = f"{prompt.rstrip()} {word}".strip() if word else prompt
        return joined, ""

    def _unknown_words(self, prompt: str, negative_prompt: str) -> str:
        said = self.backend.models.unknown_words(f"{prompt}\n{negative_prompt}"[:1000])
        return notice(sentence(ValueError(" ".join(said)))) if said else IDLE


def fields_from(info: Infotext) -> list[Any]:
    """New values for `CreateTab.form` from an infotext; what it does not say stays as it is."""
    said = info.settings

    def number(name: str, kind: type = float) -> Any:
        try:
            return kind(float(said[name]))
        except (KeyError, ValueError, OverflowError):
            return gr.skip()

    hires = "Hires upscale" in said
    upscale = number("Hires upscale" if hires else "Postprocess upscale by")
    strength = number("Denoising strength")
    kind = said.get("Schedule type", "Automatic")
    sampler = said.get("Sampler")
    return [
        info.prompt,
        info.negative_prompt,
        number("Seed", int),
        number("Steps", int),
        number("CFG scale"),
        said.get("Size", OWN),
        upscale if isinstance(upscale, float) else 1,
        (strength if isinstance(strength, float) else gr.skip()) if hires else 0,
        gr.skip() if sampler is None else sampler if kind == "Automatic" else f"{sampler} {kind}",
        gr.skip() if hires else strength,
    ]


def _sides(size: str | None) -> tuple[int | None, int | None]:
    if not size or size == OWN:
        return None, None
    match = re.fullmatch(r"\s*(\d{1,5})\s*[xX×]\s*(\d{1,5})\s*", size)
    if match is None:
        raise ValueError(f"the size {size!r} is not understood: write it as WIDTHxHEIGHT, for example 512x768")
    return int(match[1]), int(match[2])


def _picture_and_mask(editor: dict[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture under the strokes, and the strokes in white on black if there are any."""
    picture = (editor or {}).get("background")
    if editor is None or picture is None:
        return None, None
    picture = picture.convert("RGB")
    strokes = [layer.getchannel("A").resize(picture.size) for layer in editor["layers"] if "A" in layer.getbands()]
    painted = [layer for layer in strokes if layer.getbbox()]
    if not painted:
        return picture, None
    mask = Image.new("L", picture.size)
    for layer in painted:
        mask.paste(255, mask=layer.point(lambda alpha: 255 if alpha > 127 else 0))
    return picture, mask
