"""`diptych ui`: the page and the /sdapi/v1 service."""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `diptych ui`."""
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument("--model", metavar="DIR|FILE|HUB-ID", help="model to draw with (default: the embedded one)")
    parser.add_argument(
        "--auth", metavar="USER:PASS", action="append", default=[], help="ask for this; may be repeated"
    )
    parser.add_argument("--no-auth", action="store_true", help="let everybody in, although --host opens to the network")
    parser.add_argument("--api-only", action="store_true", help="the service without the page")
    parser.add_argument("--output", "-o", default="outputs", metavar="DIR", help="where pictures go (default: outputs)")
    parser.add_argument(
        "--cors", metavar="ORIGIN", action="append", default=[], help="web site that may call the service"
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="memory for loaded models (default: half of it all)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--dtype", help="auto, fp32, fp16 or bf16")


def run(args: argparse.Namespace) -> int:
    """Serves until Ctrl+C."""
    from pathlib import Path

    from diptych.webui.settings import Settings

    users = dict(_account(text) for text in args.auth)
    settings = Settings(
        host=args.host,
        port=args.port,
        users=users,
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        outputs=Path(args.output),
        page=not args.api_only,
        memory_bytes=None if args.memory is None else int(args.memory * 2**30),
        cors_origins=tuple(args.cors),
    )
    if not 0 <= args.port <= 65535:
        raise ValueError(f"port {args.port} is no port: choose one from 1 to 65535, or 0 for any that is free")
    if args.memory is not None and not args.memory > 0:
        raise ValueError(f"--memory is {args.memory:g} GiB, and must be more than 0")
    if not settings.local_only and not users and not args.no_auth:
        raise ValueError(
            f"--host {args.host} opens the server to the network: give --auth USER:PASS, or --no-auth for no password"
        )
    from diptych.webui.server import WebServer

    server = WebServer(settings)
    server.warm_up()
    what = "service" if args.api_only else "page and service"
    print(f"Diptych {what} at {server.url} (Ctrl+C ends it)", file=sys.stderr, flush=True)
    server.serve()
    return 0


def _account(text: str) -> tuple[str, str]:
    name, colon, password = text.partition(":")
    if not (name and colon and password):
        raise ValueError(f"--auth {name}...: write it as USER:PASS")
    return name, password
