"""The Extras operation "Diptych finish"; also for generated pictures, where the user enables it there."""

from __future__ import annotations

from typing import Any

from modules import scripts_postprocessing, shared

from diptych.errors import Cancelled

from . import extras_cache, finish


class DiptychFinish(scripts_postprocessing.ScriptPostprocessing):
    """Finishes the picture with a network, after the host's own upscaling."""

    name = "Diptych finish"
    order = 1500

    def ui(self) -> dict[str, Any]:
        """The controls, by the names of `process`'s arguments."""
        return finish.controls("Diptych finish", "extras_diptych")

    def process_firstpass(self, pp: Any, **values: Any) -> None:
        """Runs before the host's own upscaling looks into its memory of results."""
        extras_cache.forget_stale()

    def process(self, pp: Any, enabled: Any = None, network: Any = None, **values: Any) -> None:
        """Replaces `pp.image`. An interrupted picture stays as it was, without the parameters of a finished one."""
        order = finish.Finish.from_values(enabled, network, **values)
        if order is None or shared.state.interrupted:
            return
        try:
            pp.image = order.apply(pp.image)
        except Cancelled:
            return
        pp.info.update({f"Postprocess {label}": value for label, value in order.infotext().items()})
