"""The networks that upscale, and how to find the one that a state dict belongs to.

An architecture is a declaration in its own module; adding one means writing it and naming it in `ARCHITECTURES`.
Files are read elsewhere (`diptych.upscalers.checkpoints`).
"""

from __future__ import annotations

from typing import Any

from diptych.errors import UnknownArchitecture

from .descriptor import Architecture, Network, StateDict, receptive_radius
from .other import load_with_spandrel
from .rrdb import RRDB_ARCHITECTURE, RRDBNet
from .srvgg import SRVGG, SRVGGNetCompact

__all__ = ["ARCHITECTURES", "Architecture", "Network", "RRDBNet", "SRVGGNetCompact", "load_network", "receptive_radius"]

ARCHITECTURES: tuple[Architecture, ...] = (SRVGG, RRDB_ARCHITECTURE)


def load_network(state_dict: StateDict, **known: Any) -> Network:
    """The network that `state_dict` belongs to, with its weights.

    `known`: hyperparameters that shapes cannot tell, such as the `act_type` of a config.json. Where none of
    `ARCHITECTURES` fits, spandrel is asked if it is installed.
    Raises UnknownArchitecture when nothing fits, CheckpointError when the weights cannot be used.
    """
    fitting = "; ".join(f"{architecture.name} ({architecture.keys})" for architecture in ARCHITECTURES)
    refusal = UnknownArchitecture(f"the weights fit no network known here, which are: {fitting}")
    for architecture in ARCHITECTURES:
        if architecture.detect(state_dict):
            try:
                return architecture.load(state_dict, **known)
            except UnknownArchitecture as error:  # a relative of this family, perhaps known to spandrel
                refusal = error
    network = load_with_spandrel(state_dict)
    if network is None:
        raise refusal
    return network
