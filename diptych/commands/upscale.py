"""`diptych upscale`: pictures, folders and patterns in, enlarged pictures out; names what failed and goes on."""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import Cancelled, DiptychError

if TYPE_CHECKING:
    from diptych.upscalers.upscaler import Upscaler

_PICTURES = (".png", ".webp", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp", ".gif", ".avif")
_FORMATS = {"png": ".png", "webp": ".webp", "tiff": ".tif", "jpeg": ".jpg"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command; loads nothing."""
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a picture, a folder (with all below it) or a pattern")
    parser.add_argument(
        "-o",
        "--output",
        metavar="PATH",
        help="a folder, where pictures that are there already are skipped (default: outputs/), or, for one picture,"
        " the file to write",
    )
    parser.add_argument("--scale", type=float, metavar="F", help="0.1 to 32 (default: that of the network)")
    parser.add_argument("--upscaler", metavar="NAME|FILE", help="see `diptych models` (default: the embedded one)")
    parser.add_argument("--tile", default="auto", metavar="auto|N", help="side of the tiles in pixels (default: auto)")
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="tiles at once; pays for small tiles on a GPU (default: 1)"
    )
    parser.add_argument(
        "--border",
        default="zero",
        choices=("zero", "reflect", "wrap"),
        help="what lies around the picture; wrap keeps a tileable texture tileable (default: zero)",
    )
    parser.add_argument("--denoise", type=float, metavar="X", help="0 keeps noise, 1 removes it (general-x4v3)")
    parser.add_argument("--format", choices=tuple(_FORMATS), help="of the results (default: as the picture)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--dtype", default="auto", help="auto, fp32, fp16 or bf16 (default: auto)")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: slow to start, then faster; needs a C++ compiler"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON for each picture on stdout")


def run(args: argparse.Namespace) -> int:
    """Enlarges everything; 1 if something failed and the others were done."""
    tile = args.tile if args.tile == "auto" else _positive(args.tile)
    warnings.filterwarnings(
        "ignore", module="PIL"
    )  # what it murmurs over damaged files becomes an error or is harmless
    upscaler, screen = _load(args)
    scale = upscaler.scale if args.scale is None else args.scale
    options = {"scale": scale, "tile": tile, "batch": args.batch, "border": args.border}
    failed = False
    for job in _jobs(args, scale):
        record = _run_job(job, upscaler, options, screen)
        failed |= record["status"] == "failed"
        screen.clear()
        if args.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        elif record["status"] == "done":
            print(record["output"], flush=True)
        else:
            print("diptych:", " ".join(record["reason"].split()), file=sys.stderr)
    return int(failed)


def _positive(tile: str) -> int:
    if not tile.isdecimal() or int(tile) < 1:
        raise ValueError(f"--tile is auto or a number of pixels, not {tile!r}")
    return int(tile)


def _load(args: argparse.Namespace) -> tuple[Upscaler, _Screen]:
    from diptych.upscalers.device import use_allowed_cores
    from diptych.upscalers.engine import output_size
    from diptych.upscalers.official import resolve
    from diptych.upscalers.upscaler import Upscaler

    if args.scale is not None:
        output_size(1, 1, args.scale)  # refuses what is out of range
    use_allowed_cores()
    screen = _Screen()
    path = args.upscaler and resolve(args.upscaler, progress=screen.meter(f"fetching {args.upscaler}", "MB"))
    screen.clear()
    upscaler = Upscaler.from_pretrained(
        path, device=args.device, dtype=args.dtype, denoise=args.denoise, compile=args.compile
    )
    return upscaler, screen


@dataclass(frozen=True)
class _Job:
    src: Path
    dst: Path
    overwrite: bool = False
    problem: str | None = None
    """Why there is nothing to do for `src`."""


def _jobs(args: argparse.Namespace, scale: float) -> list[_Job]:
    """What to do, in order: every picture once, every result with a name of its own."""
    found: dict[Path, Path | _Job] = {}  # the picture -> its place below the folder that was named
    output = Path(args.output or "outputs")
    single = len(args.paths) == 1 and output.suffix.lower() in _PICTURES and not output.is_dir()
    for text in args.paths:
        path = Path(text)
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        if not matches:
            found[path] = _Job(path, path, problem=f"there is no picture {text}")
        for match in matches:
            if not match.is_dir():
                found.setdefault(match, Path(match.name))
                continue
            below = [file for file in _pictures_below(match) if not file.is_relative_to(output)]
            if not below:
                found[match] = _Job(match, match, problem=f"there is no picture in {match}")
            for file in below:
                found.setdefault(file, file.relative_to(match))
    pictures = [src for src, place in found.items() if isinstance(place, Path)]
    if single and len(pictures) > 1:
        raise ValueError(f"--output {output} is one file, and there are {len(pictures)} pictures: name a folder")
    jobs: list[_Job] = []
    taken: set[Path] = set()
    for src, place in found.items():
        if isinstance(place, _Job):
            jobs.append(place)
        elif single:
            jobs.append(_Job(src, output, overwrite=True))
        else:
            suffix = _FORMATS[args.format] if args.format else src.suffix.lower()
            suffix = suffix if suffix in _PICTURES else ".png"
            dst = output / place.with_name(f"{place.stem}-x{scale:g}{suffix}")
            if dst in taken:  # a.jpg and a.png
                dst = output / place.with_name(f"{place.name}-x{scale:g}{suffix}")
            taken.add(dst)
            jobs.append(_Job(src, dst))
    return jobs


def _pictures_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(_PICTURES) and not name.startswith("."):
                yield Path(parent, name)


def _run_job(job: _Job, upscaler: Upscaler, options: dict[str, Any], screen: _Screen) -> dict[str, Any]:
    """Does one job and says, as it goes to JSON, what became of it."""
    record: dict[str, Any] = {"input": str(job.src), "output": str(job.dst)}
    if job.problem:
        return {"input": str(job.src), "status": "failed", "reason": job.problem}
    if job.dst.exists() and not job.overwrite:
        return {**record, "status": "skipped", "reason": f"{job.dst} is there already: {job.src} is skipped"}
    started = time.monotonic()
    try:
        job.dst.parent.mkdir(parents=True, exist_ok=True)
        label = f"{job.src.name} ({str(upscaler.dtype).removeprefix('torch.')})"
        width, height = upscaler.upscale_file(job.src, job.dst, progress=screen.meter(label, "Mpx"), **options)
    except Cancelled:
        raise
    except DiptychError as error:
        return {**record, "status": "failed", "reason": str(error)}
    except OSError as error:
        named = error.filename or job.src
        return {**record, "status": "failed", "reason": f"{named}: {error.strerror or error}"}
    return {
        **record,
        "status": "done",
        "width": width,
        "height": height,
        "scale": options["scale"],
        "seconds": round(time.monotonic() - started, 3),
        "device": str(upscaler.device),
        "dtype": str(upscaler.dtype).removeprefix("torch."),
    }


class _Screen:
    """A line on stderr that is written over and over; nothing where that is no terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def meter(self, label: str, unit: str) -> Callable[[int, int], None] | None:
        """A `progress` that shows how far, how fast in millions of `unit`'s parts a second, and how long yet."""
        if not self._terminal:
            return None
        started = shown = time.monotonic()

        def show(done: int, total: int) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < 0.1 and done < total:
                return
            shown = now
            speed = done / max(now - started, 1e-6)
            left = round((total - done) / max(speed, 1e-6))
            far = f"{100 * done // max(total, 1):3d} %  {speed / 1e6:.2f} {unit}/s  {left // 60}:{left % 60:02d} left"
            print(f"\r\x1b[K{label}  {far}", end="", file=sys.stderr, flush=True)

        return show

    def clear(self) -> None:
        """Takes the line away."""
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
