"""Networks by name: the official Real-ESRGAN files, what lies in the cache folder, and the embedded model.

Finds and downloads files; it neither opens them nor imports torch. Every download is checked against the table here.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Protocol

from diptych.errors import Cancelled, CheckpointError, DiptychError, ModelNotFound

_RELEASES = "https://github.com/xinntao/Real-ESRGAN/releases/download"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")
_ATTEMPTS = 3
_CHUNK = 1 << 18


class CancelToken(Protocol):
    """A `threading.Event`, or anything else that can say that the work is no longer wanted."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class OfficialFile:
    """One file of weights, and how to know that it is the right one."""

    filename: str
    url: str
    sha256: str
    size: int
    """In bytes."""
    scale: int
    about: str
    wdn: str | None = None
    """Name of the network that keeps noise, with which `denoise` blends this one."""


OFFICIAL: dict[str, OfficialFile] = {
    "x4plus": OfficialFile(
        "RealESRGAN_x4plus.pth",
        f"{_RELEASES}/v0.1.0/RealESRGAN_x4plus.pth",
        "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
        67040989,
        4,
        "photographs, the best and the slowest",
    ),
    "x4plus-anime-6B": OfficialFile(
        "RealESRGAN_x4plus_anime_6B.pth",
        f"{_RELEASES}/v0.2.2.4/RealESRGAN_x4plus_anime_6B.pth",
        "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
        17938799,
        4,
        "drawings",
    ),
    "x2plus": OfficialFile(
        "RealESRGAN_x2plus.pth",
        f"{_RELEASES}/v0.2.1/RealESRGAN_x2plus.pth",
        "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb",
        67061725,
        2,
        "photographs, twice the size",
    ),
    "general-x4v3": OfficialFile(
        "realesr-general-x4v3.pth",
        f"{_RELEASES}/v0.2.5.0/realesr-general-x4v3.pth",
        "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292",
        4885111,
        4,
        "everything, small and fast; takes --denoise",
        wdn="general-wdn-x4v3",
    ),
    "general-wdn-x4v3": OfficialFile(
        "realesr-general-wdn-x4v3.pth",
        f"{_RELEASES}/v0.2.5.0/realesr-general-wdn-x4v3.pth",
        "1641f8c4464b9f097c9fdda5589273713f67cf59f3d909e0bd688f0cee269dca",
        4885111,
        4,
        "everything, small and fast, keeps noise",
    ),
    "animevideov3": OfficialFile(
        "realesr-animevideov3.pth",
        f"{_RELEASES}/v0.2.5.0/realesr-animevideov3.pth",
        "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d",
        2504012,
        4,
        "drawn video, the smallest and the fastest",
    ),
}


def cache_folder() -> Path:
    """Where networks are kept: `upscalers/` in `$DIPTYCH_HOME`, or in `~/.cache/diptych`. It need not exist."""
    return Path(os.environ.get("DIPTYCH_HOME") or Path.home() / ".cache" / "diptych") / "upscalers"


def embedded_model() -> Path:
    """The folder of the model that comes with Diptych. Raises ModelNotFound if it is not part of this copy."""
    folder = Path(__file__).resolve().parent.parent / "models" / "diptych-glyphs"
    if not (folder / "model_index.json").is_file():
        raise ModelNotFound(f"the embedded model is missing from this copy of Diptych: {folder} should hold it")
    return folder


def cached_files() -> dict[str, Path]:
    """The networks in the cache folder that are no official ones, by name (their file names without the suffix)."""
    official = {entry.filename for entry in OFFICIAL.values()}
    folder = cache_folder()
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return {Path(name).stem: folder / name for name in names if name.endswith(_SUFFIXES) and name not in official}


def official_name(name: str) -> str | None:
    """The key in `OFFICIAL` that `name` means: the key itself or the file's name, in any spelling of case."""
    for key, entry in OFFICIAL.items():
        if name.lower() in (key.lower(), entry.filename.lower(), Path(entry.filename).stem.lower()):
            return key
    return None


def resolve(
    name: str | os.PathLike[str],
    *,
    progress: Callable[[int, int], None] | None = None,
    cancel: CancelToken | None = None,
) -> Path:
    """The file or folder that `name` means: an existing path, an official network, or a file in the cache folder.

    An official network that is not in the cache folder is downloaded (see `download`). Raises ModelNotFound with the
    nearest names when there is nothing of this name.
    """
    path = Path(name)
    if path.exists():
        return path
    text = os.fspath(name)
    official = official_name(text)
    if official:
        return download(official, progress, cancel)
    cached = cached_files()
    found = cached.get(text) or next((file for file in cached.values() if file.name == text), None)
    if found:
        return found
    raise ModelNotFound(_not_found(text, [*OFFICIAL, *cached]))


def _not_found(text: str, names: list[str]) -> str:
    if text.endswith(_SUFFIXES) or os.sep in text:
        return f"there is no file {text}"
    folded = {name.lower(): name for name in names}
    near = [folded[match] for match in difflib.get_close_matches(text.lower(), folded, cutoff=0.5)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"the names are {', '.join(names)}"
    return f"there is no network {text!r}; {hint} (`diptych models list` shows all)"


def download(
    name: str,
    progress: Callable[[int, int], None] | None = None,
    cancel: CancelToken | None = None,
    folder: Path | None = None,
) -> Path:
    """The file of an official network in `folder` (None: the cache folder); downloads it unless it is there.

    Goes on where an interrupted download stopped, and puts the file in place only when its SHA-256 is right.
    `progress(done, total)` counts bytes. Raises ModelNotFound when it cannot be had, CheckpointError when its contents
    are wrong, both naming the file to fetch by hand; Cancelled when `cancel` is set.
    """
    key = official_name(name)
    if key is None:
        raise ModelNotFound(_not_found(name, list(OFFICIAL)))
    entry = OFFICIAL[key]
    target = (folder or cache_folder()) / entry.filename
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        hint = "choose another folder" if folder else "set DIPTYCH_HOME to a folder"
        raise DiptychError(f"{target.parent} cannot be made ({error.strerror}): {hint}") from error
    # Two processes may fetch the same file at once: both write the same bytes at the same places, and the one that is
    # second to finish finds the part gone, or a new one just begun, and the file in place.
    part = target.with_name(target.name + ".part")
    try:
        _fetch_stubbornly(entry, part, progress, cancel)
        digest = _sha256(part, cancel)
        if digest == entry.sha256:
            os.replace(part, target)
            return target
        part.unlink()
    except FileNotFoundError:
        if not target.is_file():
            raise
    if target.is_file():
        return target
    raise CheckpointError(_by_hand(entry, target.parent, f"was downloaded with the wrong contents (SHA-256 {digest})"))


def _fetch_stubbornly(
    entry: OfficialFile, part: Path, progress: Callable[[int, int], None] | None, cancel: CancelToken | None
) -> None:
    """`_fetch`, going on where a connection ended; ModelNotFound when it is no use."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return _fetch(entry, part, progress, cancel)
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or attempt == _ATTEMPTS:
                reason = f"could not be downloaded ({_reason(error)})"
                raise ModelNotFound(_by_hand(entry, part.parent, reason)) from error


def _fetch(
    entry: OfficialFile, part: Path, progress: Callable[[int, int], None] | None, cancel: CancelToken | None
) -> None:
    """Brings `part` to its full size; URLError, HTTPException or OSError when the connection does not last."""
    done = part.stat().st_size if part.exists() else 0
    if done > entry.size:
        part.unlink()
        done = 0
    if progress:
        progress(done, entry.size)
    if done == entry.size:
        return
    request = urllib.request.Request(entry.url, headers={"User-Agent": "diptych"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    # Made if it is new and never emptied: another process may be further with it.
    flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | (0 if done else os.O_CREAT)
    with (
        urllib.request.urlopen(request, timeout=30) as response,
        open(os.open(part, flags, 0o644), "r+b") as file,
    ):
        if response.status != 206:  # the server sends the whole file, whatever was asked for
            done = 0
        file.seek(done)
        while done < entry.size:
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"the download of {entry.filename} was stopped; it goes on from here the next time")
            chunk = response.read(min(_CHUNK, entry.size - done))
            if not chunk:
                raise ConnectionError(f"the connection ended after {done:,} of {entry.size:,} bytes")
            file.write(chunk)
            done += len(chunk)
            if progress:
                progress(done, entry.size)


def _sha256(path: Path, cancel: CancelToken | None) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"the check of {path.name} was stopped")
            digest.update(chunk)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", "") or error or type(error).__name__)


def _by_hand(entry: OfficialFile, folder: Path, what: str) -> str:
    return (
        f"{entry.filename} {what}; fetch {entry.url} on a machine that can, put it into {folder}"
        f" and keep its name (SHA-256 {entry.sha256})"
    )
