"""Which networks there are: embedded, official, and files in folders. Knows no host, and loads no weights.

Everything here happens while a host starts: a file that is no network costs a warning, never the start.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diptych.errors import DiptychError, ModelNotFound
from diptych.upscalers.checkpoints import load_network_file, read_state_dict
from diptych.upscalers.networks import ARCHITECTURES
from diptych.upscalers.official import OFFICIAL, embedded_model

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt")


@dataclass(frozen=True)
class Entry:
    """One network that can be chosen."""

    name: str
    """Unique; without the prefix of the lists."""
    scale: int
    file: Path | None
    """Its weights; None: not here yet, and `official` says which to download."""
    official: str | None = None


def find(folders: Iterable[Path]) -> list[Entry]:
    """The embedded network, the official ones, and every network file in `folders` and below, by unique names."""
    entries: dict[str, Entry] = {}
    unusable: list[str] = []

    def add(name: str, scale: int, file: Path | None, official: str | None = None) -> None:
        unique, number = name, 2
        while unique.casefold() in entries:
            unique, number = f"{name} ({number})", number + 1
        entries[unique.casefold()] = Entry(unique, scale, file, official)

    with suppress(ModelNotFound):  # a copy of Diptych without it still has all the others
        embedded = embedded_model() / "upscaler"
        scale = _folder_scale(embedded)
        add(f"glyphs x{scale}", scale, embedded)
    files = list(_files(folders))
    at_hand = {file.name.casefold(): file for file in reversed(files)}
    for name, official in OFFICIAL.items():
        file_name = official.filename
        add(Path(file_name).stem, official.scale, at_hand.get(file_name.casefold()), name)
    taken = {official.filename.casefold() for official in OFFICIAL.values()}
    for file in files:
        if file.name.casefold() in taken:
            continue
        try:
            add(file.stem, file_scale(file), file)
        except (DiptychError, OSError) as error:
            unusable.append(str(error))
    if unusable:
        logger.warning(
            "Diptych cannot use %d of the files in the model folders: %s", len(unusable), "; ".join(unusable)
        )
    return list(entries.values())


def choose(entries: Iterable[Entry], name: str, prefix: str = "") -> Entry:
    """The entry called `name`, with or without the prefix of the lists. Raises ModelNotFound with what there is."""
    entries = list(entries)
    for wanted in (name, name.removeprefix(prefix)):
        for entry in entries:
            if entry.name == wanted:
                return entry
    there = ", ".join(prefix + entry.name for entry in entries) or "none at all"
    raise ModelNotFound(f"there is no network called {name!r} here: choose one of {there}")


def file_scale(file: Path) -> int:
    """How much the network in `file` enlarges, from the shapes of its weights.

    The weights themselves are not looked at, except in files of families that only spandrel knows. Raises
    CheckpointError or UnknownArchitecture for what is no network.
    """
    weights = read_state_dict(file)
    for architecture in ARCHITECTURES:
        for layout in architecture.layouts:
            if layout.fits(weights):
                shape = architecture.infer(layout.rename(weights))
                return int(shape["scale"] if "scale" in shape else shape["upscale"])
    return load_network_file(file).scale


def _folder_scale(folder: Path) -> int:
    """The scale in a folder's config.json; 4 if it is damaged, which the user learns when the network is used."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return int(config.get("scale") or config["upscale"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("Diptych: %s cannot be read (%s): the embedded network will not work", folder, error)
        return 4


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    """Every file in `folders` and below that could be a network, each once, in a stable order."""
    seen: set[Path] = set()
    for folder in folders:
        try:
            found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        except OSError as error:
            logger.warning("Diptych cannot look into %s (%s)", folder, error)
            continue
        for file in found:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file
