"""Families of networks that are not our own: the optional package spandrel knows some forty of them.

It needs torchvision, so it is imported only when a state dict fits nothing of ours.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from diptych.errors import CheckpointError

from .descriptor import Network, StateDict, check_finite

_log = logging.getLogger(__name__)


class _Described(nn.Module):
    """Calls a network as spandrel does: it pads to the least size and unpacks what some networks return."""

    def __init__(self, descriptor: Any) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.model = descriptor.model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.descriptor(x)


def load_with_spandrel(state_dict: StateDict) -> Network | None:
    """What spandrel makes of `state_dict`; None if it is not installed or knows no network that fits.

    Its receptive radius is unknown. Raises CheckpointError for networks with another task and for NaN weights.
    """
    try:
        import spandrel
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not match torch
        _log.info("spandrel was not asked: %s", error)
        return None
    try:
        model = spandrel.ModelLoader(device="cpu").load_from_state_dict(dict(state_dict))
    except Exception as error:  # whatever forty loaders raise for weights that are not theirs, or not whole
        _log.info("spandrel cannot load this network: %s", error)
        return None
    if not isinstance(model, spandrel.ImageModelDescriptor):
        raise CheckpointError(f"a network for another task ({model.architecture.name}), not an upscaler")
    weights = model.model.state_dict()
    check_finite({key: weight for key, weight in weights.items() if weight.is_floating_point()})
    return Network(
        architecture=model.architecture.name,
        module=_Described(model).eval(),
        scale=model.scale,
        in_channels=model.input_channels,
        out_channels=model.output_channels,
        radius=None,
        multiple=model.size_requirements.multiple_of,
    )
