"""The library: the pictures that were made here, in a folder, and an index of them in SQLite beside them.

The pictures are the truth, the index a convenience: `sync` makes it anew from the files and their own metadata. Every
question names an owner and is answered from that owner's pictures alone; "" owns what lies in the folder itself.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

from diptych.errors import DiptychError
from diptych.infotext import parse_infotext
from diptych.upscalers.files import atomic_path

log = logging.getLogger(__name__)

INDEX = "library.sqlite"
_WORDS = 50  # of a search; the index refuses endless ones
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_TABLE = """
CREATE TABLE IF NOT EXISTS pictures (
    id INTEGER PRIMARY KEY, owner TEXT NOT NULL, path TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    infotext TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_time ON pictures (owner, created DESC, id DESC);
"""


@dataclass(frozen=True)
class Entry:
    """One picture of the library; `infotext` is what its `parameters` text says, "" if it has none."""

    id: int
    owner: str
    path: Path
    created: float  # seconds since 1970
    infotext: str
    width: int
    height: int

    @property
    def prompt(self) -> str:
        """The prompt that the infotext names, "" if it names none."""
        try:
            return parse_infotext(self.infotext).prompt
        except ValueError:
            return ""


class Library:
    """Pictures under `folder`, which is made if it is not there. May be used from any thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self._lock = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._index = self._open()
        except (OSError, sqlite3.Error) as error:
            raise DiptychError(f"{folder} cannot hold pictures ({error}): choose another folder") from error
        self.sync()

    def save(self, picture: Image.Image, infotext: str, owner: str, name: str = "") -> Entry:
        """Writes a picture as PNG, its infotext inside, under a name that is not taken; `name` goes into it."""
        folder = self._folder_of(owner)
        folder.mkdir(parents=True, exist_ok=True)
        created = time.time()
        stem = time.strftime("%Y%m%d-%H%M%S", time.localtime(created))
        tail = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40]
        with self._lock:
            number = 0
            while (path := folder / ("-".join(filter(None, (stem, str(number or ""), tail))) + ".png")).exists():
                number += 1
            text = PngImagePlugin.PngInfo()
            if infotext:
                (text.add_text if infotext.isascii() else text.add_itxt)("parameters", infotext)
            with atomic_path(path) as temporary:
                picture.save(temporary, pnginfo=text, icc_profile=picture.info.get("icc_profile"))
            return self._insert(owner, path, created, infotext, picture.size)

    def search(self, owner: str, words: str = "", limit: int = 60, offset: int = 0) -> list[Entry]:
        """The newest pictures whose infotext has all the words, in any order and either case."""
        where, values = ["owner = ?"], [owner]
        for word in words.split()[:_WORDS]:
            where.append("infotext LIKE ? ESCAPE '\\'")
            values.append("%" + re.sub(r"([\\%_])", r"\\\1", word) + "%")
        query = f"SELECT * FROM pictures WHERE {' AND '.join(where)} ORDER BY created DESC, id DESC LIMIT ? OFFSET ?"
        with self._lock:
            rows = self._index.execute(query, [*values, limit, offset]).fetchall()
        return [self._entry(row) for row in rows]

    def get(self, owner: str, picture_id: int) -> Entry | None:
        """The picture with this number, if it is there and is this owner's."""
        with self._lock:
            query = "SELECT * FROM pictures WHERE owner = ? AND id = ?"
            row = self._index.execute(query, (owner, picture_id)).fetchone()
        return self._entry(row) if row else None

    def delete(self, owner: str, picture_id: int) -> bool:
        """Removes the picture and its file; False if this owner has none with this number."""
        entry = self.get(owner, picture_id)
        if entry is None:
            return False
        entry.path.unlink(missing_ok=True)
        with self._lock, self._index:
            self._index.execute("DELETE FROM pictures WHERE id = ?", (entry.id,))
        return True

    def sync(self) -> None:
        """Brings the index in line with the files: forgets those that are gone, reads those that are new."""
        with self._lock:
            known = {row[0] for row in self._index.execute("SELECT path FROM pictures")}
            there = {self._relative(path): (owner, path) for owner, path in self._files()}
            with self._index:
                gone = [(path,) for path in known - there.keys()]
                self._index.executemany("DELETE FROM pictures WHERE path = ?", gone)
            for relative in sorted(there.keys() - known):
                owner, path = there[relative]
                try:
                    with Image.open(path) as picture:
                        infotext, size = str(picture.info.get("parameters", "")), picture.size
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                    log.warning("%s is not in the library: %s", path, error)
                    continue
                self._insert(owner, path, path.stat().st_mtime, infotext, size)

    def close(self) -> None:
        """Closes the index."""
        with self._lock:
            self._index.close()

    def _open(self) -> sqlite3.Connection:
        path = self.folder / INDEX
        try:
            return self._connect(path)
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged (%s): it is made anew from the pictures", path, error)
            path.unlink(missing_ok=True)
            return self._connect(path)

    @staticmethod
    def _connect(path: Path) -> sqlite3.Connection:
        index = sqlite3.connect(path, check_same_thread=False)
        index.row_factory = sqlite3.Row
        try:
            index.executescript(_TABLE)
            index.execute("SELECT id, owner, path, created, infotext, width, height FROM pictures LIMIT 1").fetchone()
        except sqlite3.Error:
            index.close()
            raise
        return index

    def _files(self) -> Iterator[tuple[str, Path]]:
        owners = {path.name: path for path in (self.folder / "users").glob("*") if path.is_dir()}
        for folder, owner in [(self.folder, ""), *((path, self._owner_in(path)) for path in owners.values())]:
            for path in folder.iterdir():
                if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file():
                    if not path.is_symlink():
                        yield owner, path

    def _folder_of(self, owner: str) -> Path:
        """Where an owner's pictures lie. The name of the folder is safe and, with the digest, never another's."""
        if not owner:
            return self.folder
        safe = re.sub(r"[^A-Za-z0-9]+", "-", owner).strip("-")[:40]
        folder = self.folder / "users" / f"{safe}-{hashlib.sha256(owner.encode()).hexdigest()[:12]}"
        if not (folder / "owner.txt").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "owner.txt").write_text(owner, encoding="utf-8")
        return folder

    @staticmethod
    def _owner_in(folder: Path) -> str:
        try:
            return (folder / "owner.txt").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return folder.name  # nobody's; not shown to anyone until the file is mended

    def _relative(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _insert(self, owner: str, path: Path, created: float, infotext: str, size: tuple[int, int]) -> Entry:
        values = (owner, self._relative(path), created, infotext, *size)
        with self._index:
            cursor = self._index.execute(
                "INSERT INTO pictures (owner, path, created, infotext, width, height) VALUES (?, ?, ?, ?, ?, ?)", values
            )
        return Entry(int(cursor.lastrowid or 0), owner, path, created, infotext, *size)

    def _entry(self, row: sqlite3.Row) -> Entry:
        values = {key: row[key] for key in ("id", "owner", "created", "infotext", "width", "height")}
        return Entry(path=self.folder / row["path"], **values)
