"""A quicker start for a process that draws with diffusers and ends: the command line's.

Importing diffusers and transformers also imports a compiler, the parts for many machines and, where it is installed,
much of SciPy: about two of five seconds, for decorators and checks that do nothing while nothing is compiled. Here
those modules get a stand-in, which becomes the module itself as soon as anybody asks it for more. Not for a library: in
a process of somebody else's the modules belong to them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


def start_lean() -> None:
    """To be called before diffusers is imported; afterwards it does nothing."""
    if "diffusers" in sys.modules or "transformers" in sys.modules:
        return
    import torch.distributed

    # What a torch without distributed parts says of itself: the libraries then leave theirs out.
    torch.distributed.is_available = lambda: False
    compiled = type("OptimizedModule", (), {})  # the class of compiled modules: there are none yet
    _later(
        "torch._dynamo",
        allow_in_graph=_unchanged,
        assume_constant_result=_unchanged,
        disable=_unchanged,
        eval_frame=SimpleNamespace(OptimizedModule=compiled),
    )
    _later("scipy.stats")
    _later("scipy.integrate")
    _later("scipy.optimize", linear_sum_assignment=_call_later("scipy.optimize", "linear_sum_assignment"))


class _Later(ModuleType):
    """A module that was found and not yet run."""

    def run(self) -> None:
        """Becomes the module itself."""
        self.__class__ = ModuleType  # type: ignore[assignment]
        spec = self.__spec__
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by Python itself
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.run()
        return getattr(self, name)


def _later(name: str, **known: Any) -> None:
    """Puts a module off until something else than `known` is asked of it; nothing if it is loaded or not installed."""
    parent, _, child = name.rpartition(".")
    if name in sys.modules or importlib.util.find_spec(parent) is None:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = _Later
    module.__dict__.update(known)
    sys.modules[name] = module
    setattr(sys.modules[parent], child, module)


def _unchanged(function: Any = None, *_: Any, **__: Any) -> Any:
    """The compiler's decorators, with and without arguments, while nothing is compiled."""
    return (lambda decorated: decorated) if function is None else function


def _call_later(module: str, function: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        there = sys.modules[module]
        if isinstance(there, _Later):
            there.run()
        return getattr(there, function)(*args, **kwargs)

    return call
