"""`diptych generate`: prompts to picture files, through `diptych.pipelines.generation`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diptych.errors import DiptychError, ImageError

if TYPE_CHECKING:
    from diptych.pipelines.generation import GeneratedPicture, GenerationRequest

# Flags whose value goes into the request under the same name. None means: not given.
_FIELDS = (
    "count",
    "batch_size",
    "seed",
    "steps",
    "guidance_scale",
    "negative_prompt",
    "upscale",
    "scheduler",
    "clip_skip",
    "strength",
    "refine",
    "refine_steps",
    "noise_device",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `diptych generate`."""
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="what to draw; several prompts draw one after the other")
    add("-o", "--output", metavar="PATH", help="a .png file, or a folder (default: outputs/)")
    add("-n", "--count", type=int, metavar="N", help="pictures for each prompt (default: 1)")
    add("--batch-size", type=int, metavar="N", help="how many of them to draw together (default: 1)")
    add("--seed", type=int, metavar="S", help="the first picture's seed, the next has S + 1 (default: random)")
    add("--steps", type=int, metavar="K", help="denoising steps (default: 25)")
    add("--guidance", "--guidance-scale", dest="guidance_scale", type=float, metavar="G", help="(default: 7)")
    add("--negative", "--negative-prompt", dest="negative_prompt", metavar="TEXT", help="what not to draw")
    add("--size", type=_size, metavar="WxH", help="size before upscaling (default: what the model was made for)")
    grow = parser.add_mutually_exclusive_group()
    grow.add_argument(
        "--upscale",
        type=float,
        metavar="F",
        help="enlarge F times with the GAN (default: its own scale if no --size is given)",
    )
    grow.add_argument("--no-upscale", dest="upscale", action="store_const", const=1.0, help="do not enlarge")
    add("--refine", type=float, metavar="X", help="draw the enlarged picture anew to this extent, 0 to 1 (hires. fix)")
    add("--refine-steps", type=int, metavar="K", help="denoising steps of that (default: X times --steps)")
    add("--model", metavar="DIR|FILE|HUB-ID", help="(default: the embedded model)")
    add("--upscaler", metavar="NAME|FILE", help="in place of the model's own (see `diptych models list`)")
    add("--init", metavar="IMAGE", help="begin from this picture")
    add("--strength", type=float, metavar="X", help="how much of --init to draw anew, 0 to 1 (default: 0.75)")
    add("--mask", metavar="IMAGE", help="what of --init to draw anew: white; what to keep: black")
    add("--lora", action="append", type=_lora, metavar="FILE[:WEIGHT]", help="may be given several times")
    add("--vae", metavar="FILE|DIR", help="in place of the model's own")
    add("--scheduler", metavar="NAME", help="Automatic1111's or diffusers' name (default: the model's own)")
    add("--clip-skip", type=int, metavar="N", help="1: the text encoder's last layer, 2: the one before (default: 1)")
    add("--from-png", metavar="PNG", help="draw this picture again, from the parameters inside it; other flags win")
    add("--attention", default="sdpa", metavar="KIND", help="sdpa, xformers or sliced (default: sdpa)")
    add("--compile", action="store_true", help="compile the UNet first: a minute or more, for many pictures of a size")
    add("--device", metavar="D", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add("--dtype", metavar="T", help="auto, fp32, bf16 or fp16 (default: auto)")
    add("--noise-device", choices=("cpu", "device"), help="cpu: the same noise on every machine (default)")
    add("--json", action="store_true", help="print one line of JSON for each picture")


def run(args: argparse.Namespace) -> int:
    """Draws all prompts and writes the pictures. Returns 0, or 1 if some of several prompts failed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it tells at its import what it does not find
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    if args.owns_process and not args.compile:
        from diptych.pipelines.lean import start_lean

        start_lean()
    if args.compile:
        warnings.filterwarnings("ignore", module="torch._dynamo")  # what the compiler murmurs over diffusers' code
    fields, notes = _fields(args)
    prompts = args.prompt or [fields.pop("prompt", "")]
    fields.pop("prompt", None)
    target = _Target(args.output, len(prompts) * fields.get("count", 1))
    from diptych.pipelines.generation import GenerationRequest, generate
    from diptych.pipelines.loading import load_pipeline

    requests = [GenerationRequest(prompt=prompt, **fields) for prompt in prompts]
    for note in notes:
        _say(note)
    pipeline = load_pipeline(
        args.model,
        device=args.device,
        dtype=args.dtype,
        vae=args.vae,
        upscaler=args.upscaler,
        attention=args.attention,
        compile=args.compile,
    )
    failed = 0
    told: set[str] = set()
    for request in requests:
        try:
            with _ProgressLine(request.prompt) as line:
                name = partial(target.file_for, request.prompt)
                for picture in generate(pipeline, request, progress=line, file_for=name):
                    line.clear()
                    for note in picture.notes:
                        if note not in told:
                            _say(note)
                            told.add(note)
                    _report(request, picture, args.json)
        except DiptychError as error:
            if len(requests) == 1:
                raise
            _say(f"{request.prompt!r} failed: {error}")
            failed += 1
    return 1 if failed else 0


def _fields(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The fields of the requests that flags and --from-png give, and notes on the latter."""
    from diptych.pipelines.recall import read_infotext, request_fields

    fields: dict[str, Any] = {}
    notes: list[str] = []
    if args.from_png:
        try:
            fields, notes = request_fields(read_infotext(args.from_png))
        except ValueError as error:
            raise ImageError(f"{args.from_png}: {error}") from error
    elif not args.prompt:
        raise ValueError("there is no prompt: say what to draw, or give --from-png")
    if not all(prompt.strip() for prompt in args.prompt):
        raise ValueError("the prompt is empty: say what to draw")
    fields |= {name: getattr(args, name) for name in _FIELDS if getattr(args, name) is not None}
    if args.size:
        fields["width"], fields["height"] = args.size
    if args.lora:
        fields["loras"] = args.lora
    if args.init:
        fields["init_image"] = _picture(args.init)
    if args.mask:
        fields["mask"] = _picture(args.mask)
    return fields, notes


def _picture(path: str) -> Any:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ImageError(f"there is no picture {path}") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} is no picture that can be read: {error}") from error


class _Target:
    """Where the pictures go: one named file, or names of their own in a folder, which never replace anything."""

    def __init__(self, output: str | None, pictures: int) -> None:
        path = Path(output or "outputs")
        self._file = path if path.suffix and not path.is_dir() else None
        if self._file and self._file.suffix.lower() != ".png":
            raise ValueError(f"{path} cannot be written: pictures are written as .png, or into a folder")
        if self._file and pictures > 1:
            raise ValueError(f"{path} is one file for {pictures} pictures: name a folder")
        self._folder = path.parent if self._file else path
        # Before any second is spent on a picture that cannot be kept.
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiptychError(f"the folder {self._folder} cannot be made: {error.strerror}") from error
        if not os.access(self._folder, os.W_OK):
            raise DiptychError(f"the folder {self._folder} cannot be written to")

    def file_for(self, prompt: str, seed: int) -> Path:
        """The file for a picture of `prompt`."""
        return self._file or next(path for path in self._names(prompt, seed) if not path.exists())

    def _names(self, prompt: str, seed: int) -> Iterator[Path]:
        words = re.sub(r"[^a-z0-9]+", "-", re.sub(r"<[^>]*>", "", prompt.lower())).strip("-")[:48].rstrip("-")
        stem = f"{words or 'picture'}-{seed}"
        yield self._folder / f"{stem}.png"
        number = 2
        while True:
            yield self._folder / f"{stem}-{number}.png"
            number += 1


class _ProgressLine:
    """One line on stderr, where that is a terminal."""

    def __init__(self, label: str) -> None:
        self._label = " ".join(label.split())[:40]
        self._shown = sys.stderr.isatty()

    def __enter__(self) -> _ProgressLine:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def __call__(self, done: int, total: int) -> None:
        if self._shown:
            filled = 24 * done // total
            print(f"\r{self._label} [{'#' * filled}{'.' * (24 - filled)}] {done}/{total}", end="", file=sys.stderr)
            sys.stderr.flush()

    def clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=sys.stderr)


def _report(request: GenerationRequest, picture: GeneratedPicture, as_json: bool) -> None:
    if not as_json:
        print(picture.path, flush=True)
        return
    line = {
        "path": str(picture.path),
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": picture.seed,
        "width": picture.image.width,
        "height": picture.image.height,
        "seconds": round(picture.seconds, 3),
        "infotext": picture.infotext,
        "notes": list(picture.notes),
    }
    print(json.dumps(line, ensure_ascii=False), flush=True)


def _say(sentence: str) -> None:
    print(f"diptych: {sentence}", file=sys.stderr)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[xX×](\d+)", text.strip())
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write it as 512x768")
    return int(match[1]), int(match[2])


def _lora(text: str) -> tuple[str, float]:
    file, colon, weight = text.rpartition(":")
    try:
        return (file, float(weight)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0  # the colon belongs to the file's name
