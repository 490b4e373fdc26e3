"""The picture editor of the Create tab: Gradio's, with bounds on what a browser may leave in the server's memory.

Left alone, Gradio keeps the layers that a browser sends, as many and for as long as it likes, and opens them unseen.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import gradio as gr
from fastapi import HTTPException
from gradio.components.base import server

from diptych.errors import ImageError
from diptych.webui.pictures_in import open_header
from diptych.webui.settings import Limits

_KEPT = 16  # pictures that were sent and not used yet; the oldest go first
_LAYERS = 8


def bound_editor(editor: gr.ImageEditor, limits: Limits) -> None:
    """Lets `editor` take only pictures within `limits`, and few of them.

    Not a subclass: Gradio writes a file beside the source of every subclass of its components.
    """
    editor.blob_storage = OrderedDict()
    take = editor.accept_blobs

    @server
    def accept_blobs(data: Any) -> None:
        try:
            index = int(data.data["index"] or 0) if data.data["index"] != "null" else 0
            content, key = data.files[0][1], data.data["id"]
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise HTTPException(422, "this is no layer of a picture") from error
        if not 0 <= index < _LAYERS:
            raise HTTPException(422, f"the number of layers is over the limit of {_LAYERS}")
        try:
            open_header(io.BytesIO(content), limits, "the layer")
        except ImageError as error:
            raise HTTPException(422, str(error)) from error
        take(data)
        editor.blob_storage.move_to_end(key)
        while len(editor.blob_storage) > _KEPT:
            editor.blob_storage.popitem(last=False)

    editor.accept_blobs = accept_blobs
