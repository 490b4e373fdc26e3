"""The guard in front of page and service: who may come in, how much they may send, which of Gradio's routes exist.

Plain ASGI, so that a client's hanging up reaches the handlers. It refuses, in this order: a foreign Host (DNS
rebinding), a wrong password, a foreign Origin, a route of Gradio's that the page does not use, a body over the limits,
a Gradio session of somebody else, and a Gradio file payload that is not a file of this server (Gradio would download
addresses on a client's word).
What makes pictures knows nothing of it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diptych.errors import ImageError
from diptych.webui.incoming import Incoming, Refused, drain, replay, too_large
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
_JSON_CALLS = ("queue/join", "cancel", "component_server", "component_server/")  # of Gradio's
_SESSIONS = 10_000  # of Gradio's, whose owners are remembered


class Guard:
    """ASGI middleware. Puts the name of who asks into `scope["state"]["owner"]`; see `Settings.separate_owners`."""

    def __init__(self, app: ASGIApp, settings: Settings, uploads: Path) -> None:
        self.app = app
        self.settings = settings
        self.uploads = uploads.resolve()
        self._accounts = {
            name: hashlib.sha256(f"{name}:{password}".encode()).digest() for name, password in settings.users.items()
        }
        self._sessions: OrderedDict[str, str] = OrderedDict()  # Gradio's, with their owners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no websockets here
            return await send({"type": "websocket.close", "code": 1008})
        headers = Headers(scope=scope)
        path = scope["path"].lstrip("/")
        limits = self.settings.limits
        if self.settings.local_only and not _is_local(headers.get("host", "")):
            return await self._refuse(scope, receive, send, 403, "this server answers to localhost only")
        user = self._user(headers.get("authorization", ""))
        if user is None and path != "healthz" and not self._is_allowed_preflight(scope["method"], headers):
            return await self._refuse(
                scope, receive, send, 401, "name and password are needed", {"WWW-Authenticate": 'Basic realm="Diptych"'}
            )
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and not self._same_origin(headers):
            return await self._refuse(scope, receive, send, 403, "requests from other sites are not taken")
        if not _OWN_ROUTES.fullmatch(path) and not (self.settings.page and _GRADIO_ROUTES.fullmatch(path)):
            return await self._refuse(scope, receive, send, 404, f"there is nothing at /{path[:200]}")
        if int(headers.get("content-length") or 0) > limits.body_bytes:
            await drain(receive)
            return await self._refuse(scope, receive, send, 413, too_large(limits))
        if path.startswith("gradio_api/file=") and not self._is_ours(path.removeprefix("gradio_api/file=")):
            return await self._refuse(scope, receive, send, 403, "this file is not for reading")

        owner, new_cookie = self._owner(user or "", path, scope, headers)
        scope.setdefault("state", {})["owner"] = owner
        session = _session_of(path, scope)
        body = Incoming(receive, limits, is_json="json" in headers.get("content-type", ""))
        if path.removeprefix("gradio_api/") in _JSON_CALLS and "json" in headers.get("content-type", ""):
            try:
                whole = await body.whole()
            except Refused as refused:
                await drain(receive)
                return await self._refuse(scope, receive, send, refused.status, refused.detail)
            payload = _parsed(whole)
            if trouble := self._trouble_in_files(payload):
                return await self._refuse(scope, receive, send, 400, trouble)
            session = str(payload.get("session_hash") or "") if isinstance(payload, dict) else ""
            body = Incoming(replay(whole, receive), limits, is_json=False)
        if session and self._is_foreign(session, owner):
            return await self._refuse(scope, receive, send, 403, "this session is somebody else's: load the page anew")
        await self._pass_on(scope, body, receive, send, new_cookie)

    async def _pass_on(self, scope: Scope, body: Incoming, receive: Receive, send: Send, new_cookie: str) -> None:
        answered = False

        async def checked(message: Message) -> None:
            nonlocal answered
            if body.refused and not answered:
                return  # the handlers' own opinion of the broken body
            if message["type"] == "http.response.start":
                answered = True
                _harden(MutableHeaders(scope=message), scope["path"], new_cookie)
            await send(message)

        try:
            await self.app(scope, body, checked)
        except Refused:
            pass
        if body.refused and not answered:
            if body.refused.status == 413:  # one that was too slow is not waited for any longer
                await drain(receive)
            await self._refuse(scope, receive, send, body.refused.status, body.refused.detail)

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

    def _is_allowed_preflight(self, method: str, headers: Headers) -> bool:
        """Whether a browser asks, without a password as browsers do, if an allowed site may call."""
        asks = method == "OPTIONS" and "access-control-request-method" in headers
        return asks and headers.get("origin") in self.settings.cors_origins

    def _owner(self, user: str, path: str, scope: Scope, headers: Headers) -> tuple[str, str]:
        """Whose pictures and jobs are meant: the account's or, without accounts, a browser's; and a cookie to be set.

        A program that keeps no cookies is known by its address.
        """
        if user or not self.settings.separate_owners:
            return user, ""
        match = re.search(rf"(?:^|;\s*){_COOKIE}=([A-Za-z0-9_-]{{32}})(?:;|$)", headers.get("cookie", ""))
        if match:
            return match[1], ""
        if path.startswith("sdapi/"):
            return f"address {(scope.get('client') or ('unknown',))[0]}", ""
        new = secrets.token_urlsafe(24)
        return new, new

    def _is_foreign(self, session: str, owner: str) -> bool:
        """Whether another owner has used this session of Gradio's; nobody else's may be listened to or ended."""
        known = self._sessions.setdefault(session[:100], owner)
        self._sessions.move_to_end(session[:100])
        while len(self._sessions) > _SESSIONS:
            self._sessions.popitem(last=False)
        return known != owner

    def _is_ours(self, path: str) -> bool:
        try:
            return (Path("/") / unquote(path)).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):
            return False

    def _trouble_in_files(self, payload: Any) -> str:
        """What is wrong with the files that a call of the page names; "" if nothing is."""
        for file in _files(payload):
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


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None  # Gradio says what it thinks of it


def _session_of(path: str, scope: Scope) -> str:
    """The session that a request of the page names in its address, "" if none."""
    if path.startswith("gradio_api/heartbeat/"):
        return path.rsplit("/", 1)[1]
    if path == "gradio_api/queue/data":
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[-1]
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
    if path.startswith("/assets/"):  # their names change with what is in them
        headers["Cache-Control"] = "private, max-age=31536000, immutable"
    if new_cookie:
        headers.append("Set-Cookie", f"{_COOKIE}={new_cookie}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000")
