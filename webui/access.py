"""The guard in front of page and service: who may come in, how much they may send, which of Gradio's routes exist.

Plain ASGI, so that a client's hanging up reaches the handlers. It refuses, in this order: a foreign Host (DNS
rebinding), a wrong password, a foreign Origin, a body that is too large, a route of Gradio's that the page does not
use, and a Gradio file payload that is not a file of this server (Gradio would download addresses on a client's word).
What makes pictures knows nothing of it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.errors import ImageError
from diptych.webui.pictures_in import open_header
from diptych.webui.settings import Settings

API = "/gradio_api/"
# What the page's browser code calls; everything else that Gradio mounts (proxies, code editing, history, direct calls
# of functions, monitoring) does not exist here.
_GRADIO_ROUTES = re.compile(
    r"(?:|config/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(?:/\d+)?|(?:assets|static|svelte)/.+"
    r"|gradio_api/(?:info/?|startup-events|theme\.css|app_id/?|heartbeat/\w+|queue/(?:join|data)|cancel|reset/?"
    r"|upload|upload_progress|component_server/?|file=.+))"
)
_OWN_ROUTES = re.compile(r"(?:sdapi/v1/.*|healthz|docs|openapi\.json)")
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
    "style-src 'self' 'unsafe-inline'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_COOKIE = "diptych_client"


class _BodyTooLarge(Exception):
    pass


class Guard:
    """ASGI middleware. Puts the name of who asks into `scope["state"]["owner"]`; see `Settings.separate_owners`."""

    def __init__(self, app: ASGIApp, settings: Settings, uploads: Path) -> None:
        self.app = app
        self.settings = settings
        self.uploads = uploads.resolve()
        self._accounts = {
            name: hashlib.sha256(f"{name}:{password}".encode()).digest() for name, password in settings.users.items()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websockets here
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        path = scope["path"].lstrip("/")
        limit = self.settings.limits.body_bytes
        if self.settings.local_only and not _is_local(headers.get("host", "")):
            return await self._refuse(scope, receive, send, 403, "this server answers to localhost only")
        user = self._user(headers.get("authorization", ""))
        if user is None and path != "healthz":
            return await self._refuse(
                scope, receive, send, 401, "name and password are needed", {"WWW-Authenticate": 'Basic realm="Diptych"'}
            )
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and not self._same_origin(headers):
            return await self._refuse(scope, receive, send, 403, "requests from other sites are not taken")
        if not _OWN_ROUTES.fullmatch(path) and not (self.settings.page and _GRADIO_ROUTES.fullmatch(path)):
            return await self._refuse(scope, receive, send, 404, f"there is nothing at /{path[:200]}")
        if int(headers.get("content-length") or 0) > limit:
            await _drain(receive)
            return await self._refuse(scope, receive, send, 413, self._too_large)
        if path.startswith("gradio_api/file=") and not self._is_ours(path.removeprefix("gradio_api/file=")):
            return await self._refuse(scope, receive, send, 403, "this file is not for reading")

        cookie = self._cookie(headers) if user == "" and self.settings.separate_owners else ""
        scope.setdefault("state", {})["owner"] = user or cookie or ""
        fresh = bool(cookie) and cookie not in headers.get("cookie", "")
        if path in ("gradio_api/queue/join", "gradio_api/component_server", "gradio_api/component_server/"):
            body = await _read(receive, limit)
            if body is None:
                return await self._refuse(scope, receive, send, 413, self._too_large)
            if trouble := self._trouble_in_payload(body):
                return await self._refuse(scope, receive, send, 400, trouble)
            receive = _replay(body, receive)
        await self._pass_on(scope, receive, send, cookie if fresh else "")

    @property
    def _too_large(self) -> str:
        return f"the request is larger than the limit of {self.settings.limits.body_bytes:,} bytes"

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, new_cookie: str) -> None:
        seen, limit = 0, self.settings.limits.body_bytes
        refused = answered = False

        async def counted() -> Message:
            nonlocal seen, refused
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit:
                refused = True
                raise _BodyTooLarge
            return message

        async def checked(message: Message) -> None:
            nonlocal answered
            if refused and not answered:
                return  # the handlers' own opinion of the broken body
            if message["type"] == "http.response.start":
                answered = True
                _harden(MutableHeaders(scope=message), scope["path"], new_cookie)
            await send(message)

        try:
            await self.app(scope, counted, checked)
        except _BodyTooLarge:
            pass
        if refused and not answered:
            await _drain(receive)
            await self._refuse(scope, receive, send, 413, self._too_large)

    async def _refuse(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        status: int,
        detail: str,
        headers: dict[str, str] | None = None,
    ) -> None:
        body = {"error": "HTTPException", "detail": detail, "body": "", "errors": ""}
        response = JSONResponse(body, status, headers)
        _harden(response.headers, scope["path"], "")
        await response(scope, receive, send)

    def _user(self, authorization: str) -> str | None:
        """The name of the account, "" where nobody is asked, None for wrong or missing credentials.

        Every account is compared in constant time, and all of them, so that the time tells nothing.
        """
        if not self._accounts:
            return ""
        scheme, _, encoded = authorization.partition(" ")
        try:
            given = base64.b64decode(encoded, validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            given = b""
        digest, found = hashlib.sha256(given).digest(), None
        for name, expected in self._accounts.items():
            if secrets.compare_digest(digest, expected):
                found = name
        return found

    def _same_origin(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        if origin is None:  # not a browser, or the page itself
            return headers.get("sec-fetch-site") not in ("cross-site", "same-site")
        return urlsplit(origin).netloc == headers.get("host") or origin in self.settings.cors_origins

    def _cookie(self, headers: Headers) -> str:
        match = re.search(rf"(?:^|;\s*){_COOKIE}=([A-Za-z0-9_-]{{32}})(?:;|$)", headers.get("cookie", ""))
        return match[1] if match else secrets.token_urlsafe(24)

    def _is_ours(self, path: str) -> bool:
        try:
            return (Path("/") / unquote(path)).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):
            return False

    def _trouble_in_payload(self, body: bytes) -> str:
        """What is wrong with the files that a call of the page names; "" if nothing is."""
        try:
            data = json.loads(body)
        except (ValueError, RecursionError):
            return ""  # Gradio says what it thinks of it
        for file in _files(data):
            path, url = str(file.get("path") or ""), str(file.get("url") or "")
            if "://" in path or url.startswith("data:") or not path:
                return "addresses are never fetched: upload the picture itself"
            if not self._is_ours(path):
                return "this file was not uploaded here"
            if file.get("is_stream"):
                return "streams are not taken"
            try:
                open_header(Path("/") / path, self.settings.limits)
            except ImageError as error:
                return str(error)
        return ""


def _files(data: Any) -> Iterator[dict[str, Any]]:
    """All of Gradio's file payloads in a JSON value."""
    todo = [data]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if "path" in value:
                yield value
            todo.extend(value.values())
        elif isinstance(value, list):
            todo.extend(value)


def _is_local(host: str) -> bool:
    name = urlsplit(f"//{host}").hostname or ""
    return name in ("localhost", "::1") or bool(re.fullmatch(r"127(\.\d{1,3}){3}", name))


def _harden(headers: MutableHeaders, path: str, new_cookie: str) -> None:
    headers["X-Content-Type-Options"] = "nosniff"
    headers["Referrer-Policy"] = "same-origin"
    headers["X-Frame-Options"] = "DENY"
    headers["Content-Security-Policy"] = _POLICY
    if path.startswith((API + "file=", "/sdapi/")):
        headers["Cache-Control"] = "private, no-store" if path.startswith("/sdapi/") else "private, max-age=3600"
    if new_cookie:
        headers.append("Set-Cookie", f"{_COOKIE}={new_cookie}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000")


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if it is longer than `limit`. What a client that hung up had sent so far counts as all."""
    parts, length = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > limit:
            await _drain(receive)
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts)


async def _drain(receive: Receive, seconds: float = 10, silence: float = 1) -> None:
    """Throws away what is still coming, for a while, so that the client gets to read the answer."""
    deadline = time.monotonic() + seconds
    try:
        while (left := deadline - time.monotonic()) > 0:
            message = await asyncio.wait_for(receive(), min(left, silence))
            if message["type"] == "http.disconnect" or not message.get("more_body"):
                return
    except TimeoutError:
        return


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
