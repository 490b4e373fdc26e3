"""What page and service both stand on: settings, models, library, queue, and the jobs that make pictures.

It maps a wish to a job and checks it against the limits. How a picture is made is `diptych.pipelines.generation`'s
and `diptych.upscalers`' affair; who asks, and in which words, is the page's and the service's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from diptych.errors import Cancelled, ImageError, ModelNotFound
from diptych.upscalers import official
from diptych.upscalers.official import OFFICIAL
from diptych.webui.jobs import Job, JobQueue
from diptych.webui.library import Entry, Library
from diptych.webui.models import ModelStore
from diptych.webui.settings import Limits, Settings

if TYPE_CHECKING:
    from diptych.pipelines.generation import GeneratedPicture, GenerationRequest


_UNITS = 1000  # in which the progress of a job is counted


@dataclass(frozen=True)
class Made:
    """One finished picture of a job."""

    image: Image.Image
    infotext: str = ""
    seed: int | None = None
    name: str = ""  # of the file that was sent in
    notes: tuple[str, ...] = ()
    entry: Entry | None = None  # its place in the library, if it was kept


@dataclass(frozen=True)
class Upscaling:
    """How to enlarge pictures: by `scale`, or to fit `size` (cut to it where `crop`)."""

    upscaler: str
    scale: float = 2.0
    size: tuple[int, int] | None = None
    crop: bool = True
    second: str | None = None  # blended over the first's result, as far as `second_visibility` says
    second_visibility: float = 0.0
    tile: int | None = None  # None: by the memory there is
    border: str = "zero"
    denoise: float | None = None

    def scale_for(self, size: tuple[int, int]) -> float:
        """How many times a picture of `size` is enlarged."""
        if self.size is None:
            return self.scale
        ratios = (self.size[0] / size[0], self.size[1] / size[1])
        return max(ratios) if self.crop else min(ratios)


class Backend:
    """One server's parts. `close` ends it."""

    def __init__(self, settings: Settings) -> None:
        limits = settings.limits
        self.settings = settings
        self.library = Library(settings.outputs)
        self.models = ModelStore(settings)
        self.queue = JobQueue(limits.waiting_jobs, limits.waiting_jobs_per_client)
        self.downloads = JobQueue(limits.waiting_jobs, limits.waiting_jobs_per_client)

    def close(self) -> None:
        """Stops the jobs and closes the library."""
        self.queue.close()
        self.downloads.close()
        self.library.close()

    def load(self, client: str, model: str) -> Job:
        """A job that loads a model, which is then the one that is used where none is named. Raises ModelNotFound."""
        checkpoint = self.models.checkpoint(model)

        def work(job: Job) -> Iterator[str]:
            job.note = f"loading {checkpoint.name}"
            self.models.pipeline(checkpoint)
            self.models.current = checkpoint
            yield checkpoint.name

        return self.queue.submit(client, f"load {checkpoint.name}", work)

    def download(self, client: str, upscaler: str) -> Job:
        """A job that fetches an official upscaler; it does not hold up those that draw. Raises ModelNotFound."""
        if upscaler not in OFFICIAL:
            raise ModelNotFound(
                f"no official upscaler is called {upscaler[:100]!r}: choose one of {', '.join(OFFICIAL)}"
            )

        def work(job: Job) -> Iterator[str]:
            job.note = f"downloading {upscaler}"
            yield str(official.download(upscaler, job.progress, job.cancelling))

        return self.downloads.submit(client, f"download {upscaler}", work)

    def generate(
        self,
        client: str,
        requests: Sequence[GenerationRequest],
        *,
        model: str | None = None,
        upscaler: str | None = None,
        finish: Callable[[int, Image.Image], Image.Image] | None = None,
        keep_for: str | None = None,
        job_id: str | None = None,
    ) -> Job:
        """A job that draws the pictures of all `requests`; its results are `Made`.

        `finish(index, picture)` may work on each picture of the request number `index` before it counts as made.
        `keep_for` names the owner in whose library they are kept. Raises ValueError over a limit, ModelNotFound,
        QueueFull.
        """
        check_limits(requests, self.settings.limits)
        checkpoint = self.models.checkpoint(model)
        if upscaler is not None and self.models.check_upscaler(upscaler).source is None:
            raise ValueError(f"{upscaler} is no network: choose one of the others to enlarge what is drawn")
        total = sum(request.count for request in requests)

        def work(job: Job) -> Iterator[Made]:
            from diptych.pipelines.generation import plan_sizes

            job.note = "preparing" if self.models.is_loaded(checkpoint) else f"loading {checkpoint.name}"
            pipeline = self.models.pipeline(checkpoint, upscaler)
            before = 0
            for request in requests:  # the model decides on a size that was not given
                _check_result(plan_sizes(pipeline, request).final, request.refine, self.settings.limits)
            for index, request in enumerate(requests):
                for picture in _draw(pipeline, request, job, before, total):
                    if finish is not None:
                        picture = replace(picture, image=finish(index, picture.image))
                    made = Made(picture.image, picture.infotext, picture.seed, notes=tuple(picture.notes))
                    yield self._kept(made, keep_for)
                before += request.count

        return self.queue.submit(client, requests[0].prompt[:100], work, job_id)

    def upscale(
        self,
        client: str,
        pictures: Sequence[tuple[str, Image.Image]],
        how: Upscaling,
        *,
        keep_for: str | None = None,
    ) -> Job:
        """A job that enlarges named pictures; its results are `Made`, in the same order.

        Raises ImageError for a result over the limit, ModelNotFound, QueueFull.
        """
        names = [name for name in (how.upscaler, how.second if how.second_visibility else None) if name]
        for name in names:
            self.models.check_upscaler(name)
        for name, picture in pictures:
            scale, limit = how.scale_for(picture.size), self.settings.limits.output_pixels
            if picture.width * picture.height * scale**2 > limit:
                raise ImageError(
                    f"{name or 'the picture'}, {picture.width} x {picture.height}, enlarged {scale:g} times is over "
                    f"the limit of {limit:,} pixels: choose a smaller scale"
                )

        def work(job: Job) -> Iterator[Made]:
            passes = len(pictures) * len(names)
            for index, (name, picture) in enumerate(pictures):
                job.note = f"enlarging {index + 1} of {len(pictures)}" if len(pictures) > 1 else "enlarging"
                layers = []
                for turn, upscaler in enumerate(names):
                    before = index * len(names) + turn

                    def progress(done: int, total: int, before: int = before) -> None:
                        job.progress(round(_UNITS * (before + done / max(total, 1)) / passes), _UNITS)

                    layers.append(self.models.enlarge(upscaler, picture, how, progress, job.skip_token))
                result = layers[0] if len(layers) == 1 else _blend(layers, how.second_visibility)
                infotext = str(picture.info.get("parameters", ""))
                yield self._kept(Made(_cut(result, how), infotext, name=name), keep_for)

        return self.queue.submit(client, "enlarge", work)

    def _kept(self, made: Made, keep_for: str | None) -> Made:
        if keep_for is None:
            return made
        name = made.name.rsplit(".", 1)[0] or str(made.seed)
        return replace(made, entry=self.library.save(made.image, made.infotext, keep_for, name))


def _draw(pipeline: Any, request: GenerationRequest, job: Job, before: int, total: int) -> Iterator[GeneratedPicture]:
    """All pictures of a request, `before` of `total` being made. One that is skipped is left out, with its batch."""
    from diptych.pipelines.generation import generate

    def preview(pictures: list[Image.Image]) -> None:
        job.preview = pictures[0]

    seed = random.randrange(2**32 - request.count) if request.seed is None else request.seed
    done = 0
    while done < request.count:
        batch, first = min(request.batch_size, request.count - done), before + done
        job.note = f"drawing picture {first + 1} of {total}" if total > 1 else "drawing"

        def progress(step: int, steps: int, first: int = first, batch: int = batch) -> None:
            job.progress(round(_UNITS * (first + batch * step / max(steps, 1)) / total), _UNITS)

        wish = replace(request, seed=seed + done, count=batch)
        try:
            yield from generate(
                pipeline, wish, progress=progress, cancel=job.skip_token, preview=preview, preview_every=1
            )
        except Cancelled:
            if job.cancelling.is_set():
                raise
            job.skipping.clear()
        done += batch


def check_limits(requests: Sequence[GenerationRequest], limits: Limits) -> None:
    """Raises ValueError, stating the limit, if the requests ask for more than one may."""
    for name, value, limit in (
        ("steps", max(request.steps for request in requests), limits.steps),
        ("refine steps", max(request.refine_steps or 0 for request in requests), limits.steps),
        ("the number of pictures", sum(request.count for request in requests), limits.pictures),
        ("width", max(request.width or 0 for request in requests), limits.size),
        ("height", max(request.height or 0 for request in requests), limits.size),
        ("the length of the prompt", max(len(request.prompt) for request in requests), limits.prompt_characters),
        (
            "the length of the negative prompt",
            max(len(request.negative_prompt) for request in requests),
            limits.prompt_characters,
        ),
    ):
        if value > limit:
            raise ValueError(f"{name} is {value:,}, and the limit is {limit:,}: ask for less")
    for request in requests:
        if any("\ud800" <= letter <= "\udfff" for letter in request.prompt + request.negative_prompt):
            raise ValueError("the prompt has halves of characters in it (lone surrogates): send whole ones")
        if request.width and request.height:
            upscale = request.upscale or 1
            _check_result((round(request.width * upscale), round(request.height * upscale)), request.refine, limits)


def _check_result(size: tuple[int, int], refine: float | None, limits: Limits) -> None:
    if size[0] * size[1] > limits.output_pixels:
        sides = f"{size[0]} x {size[1]}"
        raise ValueError(f"the picture would have {sides} pixels, and the limit is {limits.output_pixels:,}")
    if refine and max(size) > limits.size:
        raise ValueError(
            f"the second pass would draw a side of {max(size):,} pixels, and the limit is {limits.size:,}: "
            "enlarge less, or leave the second pass out"
        )


def _blend(layers: list[Image.Image], visibility: float) -> Image.Image:
    first, second = layers
    return Image.blend(first, second.convert(first.mode).resize(first.size, Image.Resampling.LANCZOS), visibility)


def _cut(picture: Image.Image, how: Upscaling) -> Image.Image:
    if how.size is None or not how.crop or picture.size == how.size:
        return picture
    left, top = (max(0, (have - want) // 2) for have, want in zip(picture.size, how.size, strict=True))
    return picture.crop((left, top, left + how.size[0], top + how.size[1]))
