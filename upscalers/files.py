"""Files that are either whole or not there: everything is written beside its name and renamed into place.

Whether there is room for one is asked here too.

This module knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diptych.errors import ImageError


@contextmanager
def atomic_path(dst: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path that does not exist yet, in the folder of `dst` (which must exist) and with its suffix.

    What the caller writes there replaces `dst` when the block ends, readable for whom a new file is (umask); if it
    raises, even by Ctrl-C, what was written is removed and `dst` stays as it was. OSError from the file system passes
    through.
    """
    dst = Path(dst)
    temporary = dst.with_name(f".{dst.stem[:40]}.{secrets.token_hex(4)}.part{dst.suffix}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        temporary.unlink()
        yield temporary
        temporary.chmod(mode)  # safetensors makes files for their owner alone
        os.replace(temporary, dst)
    except BaseException:
        with suppress(OSError):  # the reason that is already on its way out is the one to report
            temporary.unlink()
        raise


def check_space(dst: str | os.PathLike[str], needed: float) -> None:
    """Raises ImageError if `needed` bytes do not fit on the disk of `dst`. Says nothing where its size is not known."""
    try:
        disk = shutil.disk_usage(Path(dst).absolute().parent)
    except OSError:  # such as a folder that is not there: whoever writes into it learns that
        return
    if disk.total and needed > disk.free:
        raise ImageError(
            f"{dst} may take {_gigabytes(needed)}, and its disk has {_gigabytes(disk.free)} free: make room there, name"
            " another disk, or make a smaller picture"
        )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
