"""Files that are either whole or not there: everything is written beside its name and renamed into place.

This module knows nothing of what is in the files.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
