"""The `/sdapi/v1` service: Automatic1111's routes over the queue, with its field names and error bodies.

A client is the account that asks, or the address it asks from; a header `X-Client-Id` tells several programs on one
machine apart. What a client may see and stop is its own. The lists are in `diptych.webui.catalog`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi import APIRouter, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from diptych import __version__
from diptych.errors import DiptychError, ImageError, ModelNotFound
from diptych.infotext import parse_infotext
from diptych.webui import mapping, schemas
from diptych.webui.api_docs import docs_page
from diptych.webui.backend import Backend
from diptych.webui.catalog import Options, add_catalog
from diptych.webui.jobs import Job, QueueFull
from diptych.webui.pictures_in import decode_base64, decode_many, read_metadata

log = logging.getLogger(__name__)

_GONE = 499  # the client hung up: nobody reads the answer
_STATUS: list[tuple[type[BaseException], int]] = [
    (mapping.ScriptNotFound, 422),
    (ModelNotFound, 404),
    (ImageError, 422),
    (QueueFull, 429),
    (ValueError, 422),
    (DiptychError, 500),
]
ClientId = Annotated[str | None, Header(alias="X-Client-Id", max_length=100, description="tells your programs apart")]
TaskId = Annotated[str | None, Query(alias="id_task", max_length=100, description="the force_task_id of a job")]


def build_service(backend: Backend) -> FastAPI:
    """The service as an application; the page may be mounted on it."""
    app = FastAPI(
        title="Diptych", version=__version__, docs_url=None, redoc_url=None, description=__doc__.split("\n\n")[1]
    )
    options = Options(backend)
    refusals: dict[int | str, dict[str, Any]] = {
        code: {"model": schemas.ErrorAnswer} for code in (400, 401, 403, 404, 413, 429, 500)
    }
    refusals[422] = {"model": schemas.ErrorAnswer | schemas.InvalidAnswer}
    router = APIRouter(prefix="/sdapi/v1", responses=refusals)
    _add_work(router, backend, options)
    _add_progress(router, backend)
    add_catalog(router, backend, options)
    app.include_router(router)
    _add_errors(app)

    @app.get("/healthz", tags=["server"])
    def healthz() -> dict[str, str]:
        """Says that the server answers. Needs no password."""
        return {"status": "ok"}

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    return app


def _client_of(request: Request, client_id: str | None) -> str:
    owner = getattr(request.state, "owner", "")
    address = request.client.host if request.client else "?"
    return f"api:{owner or address}:{client_id or ''}"


async def _result(backend: Backend, job: Job, request: Request) -> bool:
    """Waits for the job; False if the client hung up, whose job then gives up its place."""
    over, gone = asyncio.create_task(job.wait_async()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({over, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        over.cancel()
        gone.cancel()
        if not job.finished:
            backend.queue.cancel(job)
    if job.error is not None:
        raise job.error if isinstance(job.error, Exception) else RuntimeError(str(job.error))
    return job.finished and not gone.done()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_work(router: APIRouter, backend: Backend, options: Options) -> None:
    decoding = CapacityLimiter(2)  # pictures take ten times their bytes once they are decoded: two requests at a time

    async def draw(body: schemas.Txt2ImgBody | schemas.Img2ImgBody, request: Request, client_id: str | None) -> Any:
        limits = backend.settings.limits
        wish = await run_sync(mapping.wish_from, body, limits, options.for_jobs(), limiter=decoding)
        model = backend.models.checkpoint(wish.model)
        job = backend.generate(
            _client_of(request, client_id),
            wish.requests,
            model=model.name,
            upscaler=wish.upscaler,
            finish=wish.finish,
            keep_for=getattr(request.state, "owner", "") if body.save_images else None,
            job_id=body.force_task_id,
        )
        if not await _result(backend, job, request):
            return Response(status_code=_GONE)
        file_format = options.file_format

        def answer() -> dict[str, Any]:
            images = [mapping.encode(made.image, made.infotext, file_format) for made in job.results]
            parameters = body.model_dump()
            if isinstance(body, schemas.Img2ImgBody) and not body.include_init_images:
                parameters |= {"init_images": None, "mask": None}
            return {
                "images": images if body.send_images else [],
                "parameters": mapping.plain(parameters),
                "info": mapping.info_from(wish, job.results, model.name),
            }

        return JSONResponse(await run_in_threadpool(answer))

    @router.post("/txt2img", response_model=schemas.PicturesAnswer, tags=["draw"])
    async def txt2img(body: schemas.Txt2ImgBody, request: Request, client_id: ClientId = None) -> Any:
        """Draws pictures from a prompt."""
        return await draw(body, request, client_id)

    @router.post("/img2img", response_model=schemas.PicturesAnswer, tags=["draw"])
    async def img2img(body: schemas.Img2ImgBody, request: Request, client_id: ClientId = None) -> Any:
        """Draws pictures from pictures and a prompt; with a mask, only what is white in it."""
        return await draw(body, request, client_id)

    async def enlarge(
        body: schemas.ExtrasBody, named: list[tuple[str, str]], request: Request, client_id: str | None
    ) -> tuple[list[str], str] | None:
        limits = backend.settings.limits
        if len(named) > limits.pictures:
            raise ValueError(f"there are {len(named)} pictures, and the limit is {limits.pictures}")
        how = mapping.upscaling_from(body)
        decode = partial(decode_many, [(name or "the picture", text) for name, text in named], limits)
        decoded = await run_sync(decode, limiter=decoding)
        pictures = [(name, picture) for (name, _), picture in zip(named, decoded, strict=True)]
        if how is None:
            results, about = [picture for _, picture in pictures], "no upscaler was named: the picture is as it came"
        else:
            job = backend.upscale(_client_of(request, client_id), pictures, how)
            if not await _result(backend, job, request):
                return None
            results, about = [made.image for made in job.results], f"Upscaler: {how.upscaler}"
        file_format = options.file_format
        if not body.show_extras_results:
            return [], f"<p>{about}</p>"
        texts = [str(picture.info.get("parameters", "")) for _, picture in pictures]
        encoded = await run_in_threadpool(
            lambda: [mapping.encode(*pair, file_format) for pair in zip(results, texts, strict=False)]
        )
        return encoded, f"<p>{about}</p>"

    @router.post("/extra-single-image", response_model=schemas.ExtraSingleAnswer, tags=["enlarge"])
    async def extra_single_image(body: schemas.ExtraSingleBody, request: Request, client_id: ClientId = None) -> Any:
        """Enlarges a picture."""
        done = await enlarge(body, [("", body.image)], request, client_id)
        if done is None:
            return Response(status_code=_GONE)
        return JSONResponse({"html_info": done[1], "image": done[0][0] if done[0] else None})

    @router.post("/extra-batch-images", response_model=schemas.ExtraBatchAnswer, tags=["enlarge"])
    async def extra_batch_images(body: schemas.ExtraBatchBody, request: Request, client_id: ClientId = None) -> Any:
        """Enlarges several pictures alike."""
        done = await enlarge(body, [(item.name[:100], item.data) for item in body.imageList], request, client_id)
        return Response(status_code=_GONE) if done is None else JSONResponse({"html_info": done[1], "images": done[0]})

    @router.post("/png-info", tags=["read"])
    async def png_info(body: schemas.PngInfoBody) -> schemas.PngInfoAnswer:
        """What a picture says of how it was made."""
        picture = await run_sync(decode_base64, body.image, backend.settings.limits, limiter=decoding)
        infotext, items = read_metadata(picture)
        return schemas.PngInfoAnswer(info=infotext, items=items, parameters=_parameters(infotext))


def _parameters(infotext: str) -> dict[str, Any]:
    try:
        info = parse_infotext(infotext)
    except ValueError:
        return {}
    width, _, height = info.settings.get("Size", "").partition("x")
    sides = {"Size-1": width, "Size-2": height} if height else {}
    return {"Prompt": info.prompt, "Negative prompt": info.negative_prompt, **info.settings, **sides}


def _add_progress(router: APIRouter, backend: Backend) -> None:
    def own_jobs(request: Request, client_id: str | None, task: str | None) -> list[Job]:
        jobs = backend.queue.jobs(_client_of(request, client_id))
        return [job for job in jobs if task in (None, job.id)]

    @router.get("/progress", tags=["progress"])
    def progress(
        request: Request,
        skip_current_image: bool = False,
        client_id: ClientId = None,
        task: TaskId = None,
    ) -> schemas.ProgressAnswer:
        """How far your own oldest job is, or the one with this id."""
        jobs = own_jobs(request, client_id, task)
        job = jobs[0] if jobs else None
        running = job is not None and job.state == "running"
        state = {
            "skipped": bool(job and job.skipping.is_set()),
            "interrupted": bool(job and job.cancelling.is_set()),
            "stopping_generation": False,
            "job": job.id if job else "",
            "job_count": len(jobs),
            "job_timestamp": "0" if job is None else str(int(job.created)),
            "job_no": 0,
            "sampling_step": job.done if job else 0,
            "sampling_steps": job.total if job else 0,
        }
        preview = job.preview if job and not skip_current_image else None
        waiting = f"waiting: {backend.queue.position(job)} jobs before it" if job and not running else None
        return schemas.ProgressAnswer(
            progress=max(0.01, job.fraction) if job and running else 0.0,
            eta_relative=(job.seconds_left if job else None) or 0.0,
            state=state,
            current_image=mapping.encode(preview, "", "png") if preview is not None else None,
            textinfo=waiting or (job.note if job else None),
        )

    @router.post("/interrupt", tags=["progress"])
    def interrupt(request: Request, client_id: ClientId = None, task: TaskId = None) -> dict[str, Any]:
        """Stops your own oldest job, or the one with this id; what it had finished is its answer."""
        for job in own_jobs(request, client_id, task)[:1]:
            backend.queue.cancel(job)
        return {}

    @router.post("/skip", tags=["progress"])
    def skip(request: Request, client_id: ClientId = None, task: TaskId = None) -> None:
        """Leaves the picture at hand and goes on with the next."""
        for job in own_jobs(request, client_id, task)[:1]:
            job.skip()


def _add_errors(app: FastAPI) -> None:
    def refusal(status: int, error: BaseException, detail: str) -> JSONResponse:
        body = {"error": type(error).__name__, "detail": detail, "body": "", "errors": detail}
        return JSONResponse(body, status, {"Retry-After": "5"} if status == 429 else None)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [
            {"type": item["type"], "loc": [str(part)[:100] for part in item["loc"]], "msg": item["msg"][:500]}
            for item in error.errors()[:20]
        ]
        return JSONResponse({"detail": found}, 422)

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, StarletteHTTPException)
        answer = refusal(error.status_code, HTTPException(error.status_code), str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    async def failed(request: Request, error: Exception) -> JSONResponse:
        status = next((code for kind, code in _STATUS if isinstance(error, kind)), 500)
        known = isinstance(error, (DiptychError, ValueError)) and str(error)
        if status == 500 and not known:
            log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return refusal(status, error, str(error) if known else "something went wrong on the server; its log says what")

    handlers: list[tuple[Any, Callable[[Request, Exception], Awaitable[JSONResponse]]]] = [
        (RequestValidationError, invalid),
        (StarletteHTTPException, http_error),
        (DiptychError, failed),
        (ValueError, failed),
        (Exception, failed),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)
