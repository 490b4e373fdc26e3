"""What the tabs of the page share: who asks, following a job, pictures handed to the browser, sentences for errors.

Text that comes from a client is escaped here before it becomes HTML. No tab is laid out here.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import html
import io
import logging
import secrets
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import gradio as gr
from PIL import Image

from diptych.errors import DiptychError
from diptych.webui.jobs import Job, JobQueue
from diptych.webui.library import Entry

log = logging.getLogger(__name__)

THUMBNAIL = 384  # pixels of the longer side
_LOOK_EVERY = 0.15  # seconds
IDLE = ""


def client_of(request: gr.Request) -> str:
    """Who a job of the page belongs to: one tab of one browser."""
    return f"page:{owner_of(request)}:{request.session_hash}"


def stop_job(queue: JobQueue, job_id: str, request: gr.Request) -> None:
    """Stops this job, if it is in line and is the asking client's."""
    job = queue.find(job_id)
    if job is not None and job.client == client_of(request):
        queue.cancel(job)


def owner_of(request: gr.Request) -> str:
    """Whose library it is."""
    return str(getattr(request.request.state, "owner", ""))


def sentence(error: BaseException) -> str:
    """What to tell a person about an error; a stack trace is for the log."""
    if isinstance(error, (DiptychError, ValueError, OSError)) and str(error):
        text = " ".join(str(error).split())
        return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    log.error("the page failed", exc_info=error)
    return "Something went wrong on the server; its log says what."


def notice(text: str, kind: str = "note") -> str:
    """A line of text as HTML; `kind` is note, good or error."""
    role = "alert" if kind == "error" else "status"
    return f'<div class="dp-notice dp-{kind}" role="{role}">{html.escape(text)}</div>' if text else IDLE


def invitation(title: str, text: str) -> str:
    """What stands where there is nothing yet."""
    return f'<div class="dp-empty"><strong>{html.escape(title)}</strong><span>{html.escape(text)}</span></div>'


def table_html(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text; nothing for no rows."""
    if not rows:
        return IDLE
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in headers)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="dp-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def progress_html(job: Job, position: int) -> str:
    """A bar with what is being done, time left, and the picture as it is so far."""
    if job.state == "waiting":
        words, percent = f"Waiting: {position} before you" if position > 1 else "Waiting: you are next", 0
    else:
        percent = round(100 * job.fraction)
        words = job.note[:1].upper() + job.note[1:] or "Working"
        words += f" · {percent} %" if job.total else " …"
        if job.seconds_left is not None:
            words += f" · {_duration(job.seconds_left)} left"
    preview = job.preview
    picture = f'<img class="dp-preview" alt="The picture so far" src="{_data_url(preview)}">' if preview else ""
    moving = "" if job.total else " dp-moving"
    return (
        f'<div class="dp-progress" role="status"><div class="dp-words">{html.escape(words)}</div>'
        f'<div class="dp-track{moving}" role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent}"><div class="dp-bar" style="width:{percent}%"></div></div>{picture}</div>'
    )


async def follow(queue: JobQueue, job: Job) -> AsyncIterator[str]:
    """HTML for `job`, again whenever it changed, until it is over. Whoever stops listening cancels the job."""
    shown = None
    try:
        while not job.finished:
            text = progress_html(job, queue.position(job))
            if text != shown:
                shown = text
                yield text
            await asyncio.sleep(_LOOK_EVERY)
    finally:
        if not job.finished:
            queue.cancel(job)


def outcome(job: Job, done: str) -> str:
    """The line that stays when a job is over: `done`, or why there is nothing."""
    if job.state == "failed" and job.error is not None:
        return notice(sentence(job.error), "error")
    if job.state == "cancelled":
        count = len(job.results)
        return notice(
            f"Stopped. {count} of the pictures {'was' if count == 1 else 'were'} finished." if count else "Stopped."
        )
    return notice(done, "good")


class Showcase:
    """Hands pictures to the browser: copies under names that nobody can guess, in the folder that Gradio serves.

    The library's own folder is never served.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._secret = secrets.token_bytes(32)

    def picture(self, entry: Entry) -> str:
        """The path of a copy of the whole picture, metadata and all."""
        copy = self._place(entry) / entry.path.name
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                copy.hardlink_to(entry.path)  # takes no room
            except OSError:  # another file system
                shutil.copyfile(entry.path, copy)
        return str(copy)

    def thumbnail(self, entry: Entry) -> str:
        """The path of a small copy."""
        copy = self._place(entry) / "thumbnail.webp"
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(entry.path) as picture:
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
                picture.save(copy)
        return str(copy)

    def forget(self, entry: Entry) -> None:
        """Removes the copies."""
        shutil.rmtree(self._place(entry), ignore_errors=True)

    def _place(self, entry: Entry) -> Path:
        name = f"{entry.owner}\0{entry.path}\0{entry.created}"
        return self._folder / hmac.new(self._secret, name.encode(), hashlib.sha256).hexdigest()


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _duration(seconds: float) -> str:
    seconds = max(1, round(seconds))
    return f"{seconds} s" if seconds < 90 else f"{seconds // 60} min {seconds % 60} s"
