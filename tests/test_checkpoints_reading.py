"""Checkpoint files are read as data: every format, every wrapping, every kind of tensor that trainers write."""

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diptych.upscalers.checkpoints import load_network_file, read_checkpoint, read_state_dict
from diptych.upscalers.networks import SRVGGNetCompact
from diptych.upscalers.unpickle import Inert


def save_zip(tree, path):
    torch.save(tree, path)


def save_legacy(tree, path):
    torch.save(tree, path, _use_new_zipfile_serialization=False)


FORMATS = pytest.mark.parametrize("save", [save_zip, save_legacy])


def weights():
    torch.manual_seed(0)
    return SRVGGNetCompact(num_feat=8, num_conv=1).state_dict()


def same(left, right):
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


WRAPPINGS = {
    "nothing": lambda w: w,
    "params": lambda w: {"params": w},
    "params_ema before params": lambda w: {"params": {k: v + 1 for k, v in w.items()}, "params_ema": w},
    "state_dict beside a trainer's state": lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"state": {}}},
    "a data-parallel prefix": lambda w: {"params": {f"module.{key}": value for key, value in w.items()}},
    "a compiled module's prefix": lambda w: {f"_orig_mod.{key}": value for key, value in w.items()},
    "both prefixes": lambda w: {f"module._orig_mod.{key}": value for key, value in w.items()},
    "two wrappings": lambda w: {"state_dict": {"params_ema": w}},
    "parameters instead of tensors": lambda w: {key: torch.nn.Parameter(value) for key, value in w.items()},
    "an ordered dictionary with metadata": lambda w: collections.OrderedDict(w),
}


@FORMATS
@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt"])
def test_weights_are_found_inside_every_wrapping(tmp_path, save, wrapping, suffix):
    path = tmp_path / f"weights{suffix}"
    save(WRAPPINGS[wrapping](weights()), path)
    assert same(read_state_dict(path), weights())


def test_safetensors_are_read(tmp_path):
    save_file(weights(), tmp_path / "weights.safetensors", metadata={"format": "pt"})
    assert same(read_state_dict(tmp_path / "weights.safetensors"), weights())


@FORMATS
def test_the_contents_decide_and_not_the_suffix(tmp_path, save):
    save(weights(), tmp_path / "weights.safetensors")
    save_file(weights(), tmp_path / "weights.pth")
    assert same(read_state_dict(tmp_path / "weights.safetensors"), weights())
    assert same(read_state_dict(tmp_path / "weights.pth"), weights())


DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool, torch.complex64, torch.complex128,
    *([torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32] if hasattr(torch, "uint16") else []),
]  # fmt: skip


@FORMATS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_type_is_read(tmp_path, save, dtype):
    value = torch.arange(12).reshape(3, 4).to(dtype)
    save({"a": value}, tmp_path / "a.pt")
    loaded = read_state_dict(tmp_path / "a.pt")["a"]
    assert loaded.dtype == dtype
    assert loaded.tolist() == value.tolist() if dtype.is_complex else torch.equal(loaded.float(), value.float())


base = torch.arange(60.0)
TENSORS = {
    "transposed": base.reshape(6, 10).t(),
    "a slice with a step": base[3:50:7],
    "a scalar": torch.tensor(2.5),
    "empty": torch.empty(0),
    "empty with a shape": torch.empty(3, 0, 2),
    "channels-last": base.reshape(1, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "one element of many": base[59],
    "six dimensions": base.reshape(1, 2, 3, 1, 2, 5),
    "wanting a gradient": base.clone().requires_grad_(),
    "a buffer of one": torch.zeros(1, dtype=torch.int64),
}


@FORMATS
@pytest.mark.parametrize("name", TENSORS)
def test_views_keep_their_shape_strides_and_values(tmp_path, save, name):
    value = TENSORS[name]
    save({"a": value, "b": [value, (value, None)]}, tmp_path / "a.pth")
    tree = read_checkpoint(tmp_path / "a.pth")
    for loaded in (tree["a"], tree["b"][0], tree["b"][1][0]):
        assert loaded.shape == value.shape and torch.equal(loaded, value)
        assert loaded.stride() == value.stride() or value.numel() == 0


@FORMATS
def test_tensors_that_share_memory_still_do(tmp_path, save):
    save({"whole": base, "half": base[30:]}, tmp_path / "a.pth")
    tree = read_checkpoint(tmp_path / "a.pth")
    tree["whole"][30] = -1
    assert tree["half"][0] == -1


@FORMATS
def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path, save):
    save({"a": base}, tmp_path / "a.pth")
    before = (tmp_path / "a.pth").read_bytes()
    read_checkpoint(tmp_path / "a.pth")["a"].zero_()
    assert (tmp_path / "a.pth").read_bytes() == before


class Callback:
    """Stands for the objects of PyTorch Lightning in the original Stable Diffusion 1.x files."""

    def __init__(self):
        self.best = torch.ones(2)


class Settings(dict):
    pass


@FORMATS
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_foreign_objects_become_inert_and_the_weights_beside_them_are_read(tmp_path, save, protocol):
    tree = {
        "state_dict": {"model.weight": base},
        "callbacks": {Callback: Callback(), "settings": Settings(a=1)},
        "hyper": collections.defaultdict(list, {"a": [1]}),
        "path": Path("somewhere"),
        "numbers": (1, -1, 2**70, 1.5, True, None, "text", [[]], {}, ()),
        "dtype": torch.float32,
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
    }
    torch.save(tree, tmp_path / "a.ckpt", pickle_protocol=protocol, _use_new_zipfile_serialization=save is save_zip)
    loaded = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(loaded["state_dict"]["model.weight"], base)
    [(kind, callback), (_, settings)] = loaded["callbacks"].items()
    assert isinstance(kind, Inert) and kind.name == callback.name == f"{Callback.__module__}.Callback"
    assert torch.equal(callback.state["best"], torch.ones(2))
    assert settings.items == ["a", 1]
    assert loaded["hyper"] == {"a": [1]} and loaded["size"] == (2, 3)
    assert loaded["numbers"] == tree["numbers"]
    assert loaded["path"].args == ("somewhere",) and isinstance(loaded["dtype"], Inert)
    assert list(read_state_dict(tmp_path / "a.ckpt")) == ["model.weight"]


@FORMATS
def test_the_state_of_a_training_run_is_read(tmp_path, save):
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save({"optimizer": optimizer.state_dict(), "params": module.state_dict()}, tmp_path / "a.pth")
    loaded = read_checkpoint(tmp_path / "a.pth")
    expected = optimizer.state_dict()
    assert loaded["optimizer"]["param_groups"] == expected["param_groups"]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], expected["state"][0]["exp_avg"])


def test_a_parameter_with_attributes_is_read(tmp_path):
    parameter = torch.nn.Parameter(base.clone())
    parameter.note = "kept by torch.save since 2.0"
    torch.save({"a": parameter}, tmp_path / "a.pth")
    assert torch.equal(read_state_dict(tmp_path / "a.pth")["a"], base)


def test_files_of_other_torch_versions_are_read(tmp_path):
    """torch 2.12 adds `.format_version` and `.storage_alignment`; 1.6 had no `byteorder`; folder names differ."""
    torch.save({"a": base}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as old, zipfile.ZipFile(tmp_path / "b.pth", "w") as new:
        for name in old.namelist():
            if name.endswith("data.pkl") or "/data/" in name:
                new.writestr("archive/" + name.split("/", 1)[1], old.read(name))
        new.writestr("archive/.format_version", "1")
        new.writestr("archive/.storage_alignment", "64")
    assert torch.equal(read_state_dict(tmp_path / "b.pth")["a"], base)


def legacy(tree_pickle, keys, *storages):
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    data = b"".join(parts) + tree_pickle + pickle.dumps(keys, 2)
    return data + b"".join(len(s).to_bytes(8, "little") + torch.tensor(s).numpy().tobytes() for s in storages)


def test_python_2_dictionaries_and_views_of_torch_0_4_are_read(tmp_path):
    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            view = ("view", 2, 3)
            return ("storage", torch.FloatStorage, "key", "cpu", 6, view) if isinstance(obj, Storage) else None

        def reducer_override(self, obj):
            if isinstance(obj, torch.Tensor):
                return torch._utils._rebuild_tensor, (Storage(), 0, (3,), (1,))
            if isinstance(obj, collections.OrderedDict):
                return collections.OrderedDict, ([list(item) for item in obj.items()],)
            return NotImplemented

    file = io.BytesIO()
    Pickler(file, 2).dump(collections.OrderedDict(a=torch.zeros(3), b=1))
    path = tmp_path / "old.pth"
    path.write_bytes(legacy(file.getvalue(), ["key"], [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    tree = read_checkpoint(path)
    assert tree["a"].tolist() == [2.0, 3.0, 4.0] and tree["b"] == 1


@FORMATS
def test_a_network_is_loaded_into_memory_of_its_own(tmp_path, save):
    path = tmp_path / "net.pth"
    save({"params_ema": weights()}, path)
    network = load_network_file(path)
    path.write_bytes(b"")  # nobody looks at the file any more
    assert same(network.module.state_dict(), weights())
    assert not network.module.training


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from Linux' /proc")
def test_a_large_checkpoint_is_not_copied_into_memory(tmp_path):
    path = tmp_path / "large.ckpt"
    torch.save({"state_dict": {str(n): torch.zeros(1 << 22) for n in range(8)}}, path)
    program = (
        "import sys; from diptych.upscalers.checkpoints import read_state_dict\n"
        "own = lambda: int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) * 1024\n"
        "before = own(); w = read_state_dict(sys.argv[1]); print(own() - before, sum(t.nbytes for t in w.values()))"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=root, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    grown, held = map(int, run.stdout.split())
    assert held == path.stat().st_size // (1 << 24) * (1 << 24) == 8 << 24
    assert grown < held / 10
