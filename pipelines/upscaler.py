"""The GAN upscaler as a component of a diffusers pipeline.

A thin adapter: the network's own layers are registered under their own names, so that the weights in the folder are
the network's own file, and `.to`, offload hooks and diffusers' loader see an ordinary model. It knows no tiles (the
engine cuts them and calls `forward`) and no picture files. The path of this module is file format: `model_index.json`
names it.
"""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin

from diptych.errors import CheckpointError
from diptych.upscalers.networks import ARCHITECTURES, Network
from diptych.upscalers.upscaler import Upscaler


class DiptychUpscaler(ModelMixin, ConfigMixin):
    """A GAN upscaling network as a diffusers model.

    `architecture` is a name of `diptych.upscalers.networks`, the hyperparameters are those of its `build`.
    Raises CheckpointError for an architecture that is not known.
    """

    config_name = "config.json"

    def __init__(self, architecture: str, **hyperparameters: Any) -> None:
        super().__init__()
        known = {a.name: a for a in ARCHITECTURES}
        if architecture not in known:
            raise CheckpointError(f"no upscaler architecture is called {architecture!r}: use {', '.join(known)}")
        family = known[architecture]
        defaults = {name: p.default for name, p in inspect.signature(family.build).parameters.items()}
        hyperparameters = defaults | hyperparameters
        self.register_to_config(architecture=architecture, **hyperparameters)
        self._adopt(family.describe(family.build(**hyperparameters).eval(), hyperparameters))

    def _adopt(self, network: Network) -> None:
        # Held without being registered: its layers are registered below, under the names they have in the network's
        # own checkpoint. Both see the same layers, so what a loader or an offload hook does to them, forward sees.
        object.__setattr__(self, "_network", network)
        for name, layer in network.module.named_children():
            self.add_module(name, layer)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Every public key of the configuration is an argument: each architecture has hyperparameters of its own."""
        return {k: v for k, v in config_dict.items() if not k.startswith("_")}, kwargs, {}

    @classmethod
    def from_network(cls, network: Network) -> DiptychUpscaler:
        """Wraps a loaded network; the weights are shared, not copied."""
        upscaler = cls.__new__(cls)
        ModelMixin.__init__(upscaler)
        upscaler.register_to_config(architecture=network.architecture, **network.hyperparameters)
        upscaler._adopt(network)
        return upscaler.eval()

    @classmethod
    def from_name(cls, name_or_path: str | os.PathLike[str]) -> DiptychUpscaler:
        """An official upscaler by name, or a file or folder of weights. Raises what `Upscaler.from_pretrained` does."""
        return cls.from_network(Upscaler.from_pretrained(name_or_path, device="cpu", dtype="fp32").network)

    @property
    def network(self) -> Network:
        """The plain network and what the engine must know about it."""
        return self._network

    def widen(self) -> bool:
        """Goes over to fp32. False if that cannot help or be done: it is in fp32, or offload keeps the weights away."""
        if self.dtype is torch.float32 or self.device.type == "meta":
            return False
        torch.nn.Module.to(self, torch.float32)
        return True

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """RGB pictures (N, C, H, W), 0..1, to (N, C, scale * H, scale * W); computed in the network's precision."""
        return self._network.module(pictures.to(self.dtype)).to(pictures.dtype)
