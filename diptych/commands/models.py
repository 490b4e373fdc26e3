"""`diptych models`: which models and networks are at hand, and fetching the official ones. Loads no torch."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import suppress
from typing import Any

from diptych.errors import CheckpointError, ModelNotFound


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`models`, `models list [--json]`, `models download NAME ...`."""
    actions = parser.add_subparsers(dest="action", metavar="list|download")
    listing = actions.add_parser("list", help="all names, and where their files are (the default)")
    fetching = actions.add_parser("download", help="fetch official networks by name")
    fetching.add_argument("names", nargs="+", metavar="NAME", help="a name from the list")
    for action in (parser, listing, fetching):
        # SUPPRESS: an option given before the action is not undone by the action's own default
        action.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="one line of JSON each")


def run(args: argparse.Namespace) -> int:
    """Prints the list, or downloads; 1 if a download failed and the others were done."""
    as_json = getattr(args, "json", False)
    if args.action == "download":
        return _download(args.names, as_json)
    for record in _records():
        print(json.dumps(record) if as_json else _line(record))
    return 0


def _records() -> list[dict[str, Any]]:
    from diptych.upscalers.official import OFFICIAL, cache_folder, cached_files, embedded_model

    records: list[dict[str, Any]] = []
    with suppress(ModelNotFound):  # a copy of Diptych without its models
        about = "comes with Diptych: generates and upscales"
        records.append({"name": "embedded", "kind": "model", "about": about, "path": str(embedded_model())})
    for name, entry in OFFICIAL.items():
        path = cache_folder() / entry.filename
        records.append(
            {
                "name": name,
                "kind": "upscaler",
                "scale": entry.scale,
                "about": entry.about,
                "bytes": entry.size,
                "path": str(path) if path.is_file() else None,
                "url": entry.url,
                "sha256": entry.sha256,
            }
        )
    for name, path in cached_files().items():
        records.append({"name": name, "kind": "upscaler", "about": "your own file", "path": str(path)})
    return records


def _line(record: dict[str, Any]) -> str:
    place = record["path"] or f"not downloaded ({record['bytes'] / 1e6:.0f} MB)"
    scale = f"x{record['scale']}" if "scale" in record else ""
    return f"{record['name']:<18} {scale:<3} {record['about']:<44} {place}"


def _download(names: list[str], as_json: bool) -> int:
    from diptych.upscalers.official import download

    failed = False
    for name in names:
        try:
            path = download(name, _show_progress(name) if sys.stderr.isatty() else None)
        except (ModelNotFound, CheckpointError) as error:
            failed = True
            print(f"diptych: {error}", file=sys.stderr)
            continue
        print(json.dumps({"name": name, "path": str(path)}) if as_json else path)
    return int(failed)


def _show_progress(name: str) -> Any:
    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB", end=end, file=sys.stderr, flush=True)

    return show
