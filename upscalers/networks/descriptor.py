"""What the rest of Diptych knows about a network (`Network`) and about a family of networks (`Architecture`).

No network is defined here: each architecture has a module of its own beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from diptych.errors import CheckpointError, UnknownArchitecture

StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """A loaded network, and what an engine must know to run it on pieces of a picture."""

    architecture: str
    """Name of its family: "RRDBNet", "SRVGGNetCompact", or what spandrel calls it."""
    module: nn.Module
    """In eval mode, fp32, on the CPU: (N, in_channels, H, W) in 0..1 -> (N, out_channels, H * scale, W * scale)."""
    scale: int
    """Output pixels per input pixel, along one side."""
    in_channels: int
    out_channels: int
    radius: int | None
    """How far, in input pixels, an output pixel can see; exact. None: unknown (a family that spandrel loads)."""
    multiple: int = 1
    """Both input sides must be multiples of this (pixel-unshuffle)."""
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    """`build(**hyperparameters)` of its architecture makes a network of the same shapes."""


@dataclass(frozen=True)
class Layout:
    """One way to name the same weights: the keys that give it away, and how to rename them to the official ones."""

    required: tuple[str, ...]
    rename: Callable[[StateDict], dict[str, torch.Tensor]] = dict

    def fits(self, state_dict: StateDict) -> bool:
        """Whether every required key is there."""
        return all(key in state_dict for key in self.required)


@dataclass(frozen=True)
class Architecture:
    """A family of networks: how to recognise its weights, and how to make one."""

    name: str
    build: Callable[..., nn.Module]
    """Makes an untrained network from its hyperparameters."""
    layouts: tuple[Layout, ...]
    """Key styles, the official one first."""
    infer: Callable[[StateDict], dict[str, Any]]
    """Hyperparameters from the shapes of a state dict with official keys."""
    describe: Callable[[nn.Module, dict[str, Any]], Network]
    """The descriptor of a built network."""
    keys: str
    """What a state dict of this family holds, for people to read."""

    def detect(self, state_dict: StateDict) -> bool:
        """Whether the keys are those of this family, in any of its styles."""
        return any(layout.fits(state_dict) for layout in self.layouts)

    def load(self, state_dict: StateDict, **known: Any) -> Network:
        """The network that `state_dict` describes, with its weights in fp32.

        `known` are hyperparameters from elsewhere (a config.json); the others are read from the shapes.
        Raises UnknownArchitecture when names or shapes do not fit, CheckpointError when a weight is not finite.
        """
        layout = next((layout for layout in self.layouts if layout.fits(state_dict)), None)
        if layout is None:
            raise UnknownArchitecture(f"the weights do not fit {self.name}, which holds {self.keys}")
        weights = layout.rename(state_dict)
        lacking = [key for key in self.layouts[0].required if key not in weights]
        if lacking:
            raise UnknownArchitecture(f"the weights look like {self.name} but lack {lacking[0]!r}")
        _check_size(weights)
        hyperparameters = {**self.infer(weights), **known}
        # On the meta device first: what the shapes promise is compared with what the file holds before memory is spent.
        try:
            with torch.device("meta"), _SkipInit():
                module = self.build(**hyperparameters)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UnknownArchitecture(f"the weights look like {self.name}, but misshapen ({error})") from error
        check_fit(self.name, module, weights)
        check_finite(weights)
        # In memory of their own: the file can be changed or deleted while the network is in use.
        owned = {key: weight.detach().to(torch.float32, copy=True).contiguous() for key, weight in weights.items()}
        module.load_state_dict(owned, assign=True)
        return self.describe(module.eval(), hyperparameters)


class _SkipInit(TorchFunctionMode):
    """Leaves out all in-place work, with which modules start their weights: on the meta device it is slow and void."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        return args[0] if args and name.endswith("_") and not name.endswith("__") else func(*args, **(kwargs or {}))


def check_fit(name: str, module: nn.Module, weights: StateDict) -> None:
    """Raises UnknownArchitecture unless `weights` has exactly the names and shapes of `module`."""
    expected = module.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or unknown:
        what, keys = ("lack", missing) if missing else ("have an unknown", unknown)
        more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
        raise UnknownArchitecture(f"the weights look like {name} but {what} {keys[0]!r}{more}")
    for key, weight in weights.items():
        if weight.shape != expected[key].shape:
            raise UnknownArchitecture(
                f"the weights look like {name} but {key!r} has the shape {tuple(weight.shape)}"
                f" where {tuple(expected[key].shape)} belongs"
            )


def _check_size(weights: StateDict) -> None:
    """Raises CheckpointError when many weights are views of the same few bytes, as no training leaves them."""
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    if sum(weight.numel() * weight.element_size() for weight in weights.values()) > 4 * sum(storages.values()):
        raise CheckpointError("its weights claim several times the memory that the file holds: the file is damaged")


def check_finite(weights: StateDict) -> None:
    """Raises CheckpointError unless every weight is a finite floating point number."""
    for key, weight in weights.items():
        if not weight.is_floating_point():
            raise CheckpointError(f"the weight {key!r} holds {weight.dtype}, not floating point numbers")
        if not np.isfinite(weight.detach().float().numpy()).all():
            raise CheckpointError(f"the weight {key!r} holds NaN or infinity: the training that made it had failed")


def receptive_radius(path: Iterable[nn.Module], scale: int, multiple: int = 1) -> int:
    """How far, in input pixels, an output pixel can see, from the modules on a network's longest path, in order.

    Goes backwards from the output pixels of one input pixel and keeps the interval of positions they depend on.
    Knows odd convolutions of stride 1, pixel shuffles and nearest upsampling; everything else is taken as pointwise.
    The result is exact: the largest distance over all phases of a pixel-unshuffle cell.
    """
    steps = list(path)
    radius = 0
    for phase in range(multiple):
        low, high = phase * scale, (phase + 1) * scale - 1
        for step in reversed(steps):
            if isinstance(step, nn.Conv2d):
                reach = (step.kernel_size[0] - 1) // 2 * step.dilation[0]
                low, high = low - reach, high + reach
            elif isinstance(step, nn.PixelUnshuffle):
                low, high = low * step.downscale_factor, (high + 1) * step.downscale_factor - 1
            elif isinstance(step, (nn.PixelShuffle, nn.Upsample)):
                factor = (
                    step.upscale_factor if isinstance(step, nn.PixelShuffle) else int(cast(float, step.scale_factor))
                )
                low, high = low // factor, high // factor
        radius = max(radius, phase - low, high - phase)
    return radius
