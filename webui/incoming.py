"""The body of one request as it arrives, within limits of bytes, time and JSON values.

Below HTTP's meaning: which requests there are, and who may send them, is `diptych.webui.access`'s affair.
"""

from __future__ import annotations

import asyncio
import time

from starlette.types import Message, Receive

from diptych.webui.settings import Limits

_MARKS = (b",", b"[", b"{")  # there is one of them for each JSON value, about


class Refused(Exception):
    """A body over a limit; says which."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Incoming:
    """An ASGI `receive`. Raises Refused, and remembers it in `refused`, as soon as the body is over a limit."""

    def __init__(self, receive: Receive, limits: Limits, is_json: bool) -> None:
        self.refused: Refused | None = None
        self._receive = receive
        self._limits = limits
        self._is_json = is_json
        self._complete = False
        self._began: float | None = None
        self._bytes = self._values = 0

    async def __call__(self) -> Message:
        if self._complete:  # what follows is the hanging up, which may take its time
            return await self._receive()
        self._began = self._began or time.monotonic()
        left = self._began + self._limits.upload_seconds - time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except TimeoutError:
            self._refuse(408, f"the request took longer than the limit of {self._limits.upload_seconds:g} seconds")
        piece = message.get("body", b"")
        self._bytes += len(piece)
        if self._is_json:
            # Many small values take a hundred times their bytes once they are parsed.
            self._values += sum(piece.count(mark) for mark in _MARKS)
        if self._bytes > self._limits.body_bytes:
            self._refuse(413, too_large(self._limits))
        if self._values > self._limits.json_values:
            self._refuse(413, f"the request has more values than the limit of {self._limits.json_values:,}")
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body")
        return message

    async def whole(self) -> bytes:
        """The body. What a client that hung up had sent so far counts as all. Raises Refused."""
        parts = []
        while not self._complete:
            parts.append((await self()).get("body", b""))
        return b"".join(parts)

    def _refuse(self, status: int, detail: str) -> None:
        self.refused = Refused(status, detail)
        raise self.refused


def too_large(limits: Limits) -> str:
    """The sentence for a body over the limit."""
    return f"the request is larger than the limit of {limits.body_bytes:,} bytes"


async def drain(receive: Receive, seconds: float = 10, silence: float = 1) -> None:
    """Throws away what is still coming, for a while, so that the client gets to read the answer."""
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            message = await asyncio.wait_for(receive(), min(left, silence))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return
    except TimeoutError:
        return


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what `receive` gives."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
