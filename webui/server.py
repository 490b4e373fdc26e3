"""Joins queue, service and page into one server: `WebServer(settings)`, `start`, `stop`.

The socket is bound before anything is loaded, so that a port in use is an error at once.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from functools import lru_cache
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from diptych.errors import DiptychError
from diptych.webui.access import Guard
from diptych.webui.backend import Backend
from diptych.webui.service import build_service
from diptych.webui.settings import Settings


class WebServer:
    """The page and the service on one port. Raises DiptychError when it cannot listen or has no model."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._socket = _listen(settings.host, settings.port)
        self.port = int(self._socket.getsockname()[1])
        try:
            self.backend = Backend(settings)
        except BaseException:
            self._socket.close()
            raise
        config = uvicorn.Config(
            build_app(self.backend),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=3,
            ws="none",
        )
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.settings.host, self.settings.host)
        return f"http://{f'[{host}]' if ':' in host and '[' not in host else host}:{self.port}"

    def warm_up(self) -> None:
        """Loads the model, so that one that cannot be loaded is an error at the start. Raises what loading raises."""
        job = self.backend.load("server", self.backend.models.current.name)
        job.wait()
        if job.error is not None:
            self.backend.close()
            raise job.error

    def serve(self) -> None:
        """Serves until Ctrl+C or SIGTERM."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.backend.close()

    def start(self, timeout: float = 60) -> None:
        """Serves from a thread of its own; returns when requests are answered."""
        self._thread = threading.Thread(target=self.serve, name="diptych-server", daemon=True)
        self._thread.start()
        for _ in range(int(timeout * 100)):
            if self._server.started:
                return
            self._thread.join(0.01)
            if not self._thread.is_alive():
                break
        raise DiptychError("the server did not start; its log says why")

    def stop(self) -> None:
        """Ends what `start` began."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(30)


def build_app(backend: Backend) -> Guard:
    """The whole ASGI application, guarded."""
    settings, uploads = backend.settings, _gradio_folder()
    app: FastAPI = build_service(backend)
    # Present even when it allows nobody: Gradio then adds no headers of its own.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "X-Client-Id"],
    )
    if settings.page:
        _add_page(app, backend, uploads)
    return Guard(app, settings, uploads)


def _add_page(app: FastAPI, backend: Backend, uploads: Path) -> None:
    import gradio as gr

    from diptych.webui.page import SHORTCUT, STYLE, build_page, theme

    page = build_page(backend, uploads)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        theme=theme(),
        css_paths=STYLE,
        head=SHORTCUT,
        footer_links=[],
        run_history=False,
        max_file_size=backend.settings.limits.body_bytes,
        show_error=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
    )
    page.has_launched = True  # a mounted page counts as not launched, and Gradio then checks no path at all


@lru_cache(maxsize=1)
def _gradio_folder() -> Path:
    """The one folder that Gradio writes to and serves from, gone when the process ends. Sets its environment."""
    folder = tempfile.TemporaryDirectory(prefix="diptych-")
    _kept.append(folder)
    os.environ |= {
        "GRADIO_TEMP_DIR": folder.name,
        "GRADIO_EXAMPLES_CACHE": str(Path(folder.name) / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_RUN_HISTORY": "False",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return Path(folder.name).resolve()


_kept: list[tempfile.TemporaryDirectory[str]] = []


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(128)
    except OSError as error:
        raise DiptychError(f"cannot listen on {host} port {port} ({error}): choose another with --port") from error
    return listening
