"""Reads pickles as data: an interpreter of pickle's instructions that has nothing it could call.

Names of classes and functions become `Inert` objects. The few names that a checkpoint needs (tensors, parameters,
ordered dictionaries) are rebuilt by functions of this module; all others only remember what was stored with them.
Nothing is imported, nothing of the file is executed, on any version of torch. Where the tensors' bytes come from is
the caller's business (`persistent_load`); files are opened in `diptych.upscalers.checkpoints`.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

from diptych.errors import CheckpointError

MAX_INSTRUCTIONS = 2_000_000
"""A tensor takes 39, so a Stable Diffusion checkpoint some 50,000; this many take two seconds and 200 MiB."""

# Nothing in a file can run, whatever it names; these names only earn it a refusal and a warning.
_CODE_MODULES = frozenset(
    "os posix nt subprocess commands sys importlib runpy pty shutil socket ctypes code marshal webbrowser".split()
)
_CODE_BUILTINS = frozenset("eval exec execfile compile __import__ open breakpoint".split())

_STORAGE_TYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
    "Untyped": torch.uint8,
}  # fmt: skip


class Stream(Protocol):
    """What a pickle is read from: a binary file or a memory map."""

    def read(self, n: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


class Inert:
    """A class, a function or an object that is not data: its name and what was stored with it. It does nothing."""

    __slots__ = ("name", "args", "state", "items")

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        self.args = args
        self.state: Any = None
        self.items: list[Any] = []

    def __repr__(self) -> str:
        return f"<inert {self.name}>"


def storage_dtype(storage_type: object) -> torch.dtype:
    """The element type of a pickled storage class such as `torch.FloatStorage`; bytes for an untyped one."""
    name = storage_type.name if isinstance(storage_type, Inert) else ""
    kind = name.rpartition(".")[2]
    if not name.startswith("torch.") or not kind.endswith("Storage") or kind[:-7] not in _STORAGE_TYPES:
        raise CheckpointError(f"it stores numbers of a kind that cannot be read here ({name or type(storage_type)})")
    return _STORAGE_TYPES[kind[:-7]]


def unpickle(stream: Stream, persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """The next pickle of `stream` as dicts, lists, tuples, sets, strings, numbers, tensors and `Inert` objects.

    `persistent_load` turns a persistent identifier into a flat tensor. Ordered and default dictionaries are dicts.
    Raises CheckpointError for what may not be read (code, kinds of tensors that are not plain data), and ValueError,
    LookupError, TypeError or RuntimeError for a damaged pickle.
    """
    stack: list[Any] = []
    outer: list[list[Any]] = []  # the stacks below the open marks
    memo: dict[int, Any] = {}

    instructions: Any = pickletools.genops(cast(Any, stream))
    for number, (opcode, arg, _) in enumerate(instructions):
        if number > MAX_INSTRUCTIONS:
            raise CheckpointError(f"its pickle has over {MAX_INSTRUCTIONS:,} instructions: it holds more than weights")
        match opcode.name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case name if name in _LITERALS:
                stack.append(arg)
            case name if name in _NEW:
                stack.append(_NEW[name]())
            case "MARK":
                outer.append(stack)
                stack = []
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items, stack = stack, outer.pop()
                stack.append(_COLLECT[opcode.name](items))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple([stack.pop() for _ in range(int(opcode.name[-1]))][::-1]))
            case "APPEND" | "SETITEM":
                items = [stack.pop() for _ in range(1 if opcode.name == "APPEND" else 2)][::-1]
                _extend(stack[-1], items, pairs=opcode.name == "SETITEM")
            case "APPENDS" | "SETITEMS" | "ADDITEMS":
                items, stack = stack, outer.pop()
                _extend(stack[-1], items, pairs=opcode.name == "SETITEMS")
            case "GLOBAL":
                stack.append(_name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_name(module, name))
            case "REDUCE" | "NEWOBJ":
                args, callee = stack.pop(), stack.pop()
                stack.append(_construct(callee, args))
            case "NEWOBJ_EX":
                kwargs, args, callee = stack.pop(), stack.pop(), stack.pop()
                stack.append(_construct(callee, (args, kwargs)))
            case "INST":
                args, stack = stack, outer.pop()
                stack.append(_construct(_name(*arg.split(" ", 1)), tuple(args)))
            case "OBJ":
                args, stack = stack, outer.pop()
                stack.append(_construct(args[0], tuple(args[1:])))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Inert):
                    stack[-1].state = state  # attributes of dictionaries and parameters are of no use to anybody
            case "BINPERSID":
                if persistent_load is None:
                    raise ValueError("a reference to data outside the pickle")
                stack.append(persistent_load(stack.pop()))
            case "POP":
                stack = outer.pop() if not stack else stack[:-1]
            case "POP_MARK":
                stack = outer.pop()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case other:
                raise ValueError(f"pickle instruction {other}")
    raise ValueError("the pickle has no end")


def _name(module: object, name: object) -> Inert:
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > 1000:
        raise TypeError("the name of a class is no text")
    builtin = module in ("builtins", "__builtin__", "io", "_io")
    if builtin and name in _CODE_BUILTINS or module.partition(".")[0] in _CODE_MODULES:
        raise CheckpointError(
            f"it holds Python code ({module}.{name}) that other programs would run when they open it; none of it was"
            " run here: do not use this file, get the weights from a source you trust"
        )
    return Inert(f"{module}.{name}")


def _construct(callee: Any, args: Any) -> Any:
    if not isinstance(callee, Inert) or not isinstance(args, tuple):
        raise TypeError("a call of something that is no class")
    if callee.name in _REBUILD:
        return _REBUILD[callee.name](*args)
    if callee.name.startswith("torch._utils._rebuild_"):
        raise CheckpointError(f"it holds a kind of tensor that cannot be read here ({callee.name}): save a dense one")
    return Inert(callee.name, args)


def _extend(target: Any, items: list[Any], *, pairs: bool) -> None:
    if isinstance(target, Inert):
        target.items.extend(items)
    elif isinstance(target, dict) and pairs:
        target.update(_dict(items))
    elif isinstance(target, list) and not pairs:
        target.extend(items)
    elif isinstance(target, set) and not pairs:
        target.update(map(_key, items))
    else:
        raise TypeError(f"items for a {type(target).__name__}")


def _dict(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _key(key: Any) -> Any:
    """Only what hashes quickly may be a key: tuples that share their parts could take for ever."""
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts[:17]:
        if part is not None and not isinstance(part, (str, bytes, int, float, Inert)):
            raise TypeError(f"a {type(part).__name__} as a key")
        if isinstance(part, int) and part.bit_length() > 64:
            raise ValueError("a huge number as a key")
    if len(parts) > 16:
        raise ValueError("a long tuple as a key")
    return key


_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
    " STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_COLLECT: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": _dict,
    "FROZENSET": lambda items: frozenset(map(_key, items)),
}


def _rebuild_dict(*args: Any) -> dict[Any, Any]:
    """`OrderedDict()`, `defaultdict(factory)`; Python 2 wrote `OrderedDict([[key, value], ...])`."""
    pairs = args[0] if args and isinstance(args[0], list) else []
    rebuilt = {_key(key): value for key, value in pairs}
    pairs.clear()  # each list is used once: a file that names one list a million times costs no more than it should
    return rebuilt


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    """A view of a storage. Views that leave it, go backwards or show more elements than it has are damage."""
    if not isinstance(storage, torch.Tensor) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise TypeError("a tensor without a storage or a shape")
    numbers = (offset, *size[:64], *stride[:64])
    if not all(type(n) is int and 0 <= n < 2**40 for n in numbers) or len(size) != len(stride) or len(size) > 64:
        raise ValueError("the shape of a tensor")
    count = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count and (last >= storage.numel() or count > storage.numel()):
        raise CheckpointError("a tensor reaches beyond its data: the file is damaged")
    return (
        torch.as_strided(storage, size, stride, storage.storage_offset() + offset) if count else storage.new_empty(size)
    )


def _rebuild_tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> torch.Tensor:
    """As above, for an element type that has no storage class of its own."""
    name = dtype.name if isinstance(dtype, Inert) else ""
    kind = getattr(torch, name.rpartition(".")[2], None) if name.startswith("torch.") else None
    if not isinstance(kind, torch.dtype) or not isinstance(storage, torch.Tensor):
        raise CheckpointError(f"it holds numbers of a kind that this version of torch does not know ({name})")
    return _rebuild_tensor(storage.view(kind), offset, size, stride)


def _rebuild_parameter(data: Any, *_: Any) -> torch.Tensor:
    if not isinstance(data, torch.Tensor):
        raise TypeError("a parameter without a tensor")
    return data


def _rebuild_from_type(function: Any, kind: Any, args: Any, *_: Any) -> Any:
    """A tensor with attributes: the attributes are left behind."""
    return _construct(function, args)


def _rebuild_size(size: Any) -> tuple[int, ...]:
    if not isinstance(size, tuple):
        raise TypeError("a size that is no tuple")
    return size


_REBUILD: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _rebuild_dict,
    "collections.defaultdict": _rebuild_dict,
    "torch.Size": _rebuild_size,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
}
