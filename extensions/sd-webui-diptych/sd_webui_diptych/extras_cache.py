"""Keeps the Extras tab from serving a picture that was interrupted, or made with other settings, as a result.

The hosts remember the last results of an upscaler by picture, name and size. They remember an interrupted one in the
same way, and know nothing of our settings. So results carry a mark here, and `forget_stale` takes out of the host's
memory what carries another mark than a result would carry now. It must run before the host looks there.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

from . import settings

_MARK = "_diptych_made_with"
_INTERRUPTED = "interrupted"


def mark(result: Image.Image, interrupted: bool) -> Image.Image:
    """Notes on `result` how it was made, and returns it."""
    setattr(result, _MARK, _INTERRUPTED if interrupted else settings.read())
    return result


def forget_stale() -> None:
    """Removes our interrupted results, and those made with other settings, from the host's memory."""
    from modules import scripts

    now = settings.read()
    for data in scripts.postprocessing_scripts_data:
        cache: Any = getattr(data.module, "upscale_cache", None)
        if isinstance(cache, dict):
            for key, picture in list(cache.items()):
                if getattr(picture, _MARK, now) != now:
                    del cache[key]
