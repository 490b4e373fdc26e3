"""Files that cannot be used are refused with a sentence that names the file; no code in them runs."""

import copy
import io
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from diptych.errors import CheckpointError, DiptychError, ModelNotFound, UnknownArchitecture
from diptych.upscalers.checkpoints import blend_denoise, load_network_file, read_checkpoint, read_state_dict
from diptych.upscalers.networks import RRDBNet, SRVGGNetCompact
from diptych.upscalers.unpickle import MAX_INSTRUCTIONS, unpickle


def weights():
    torch.manual_seed(0)
    return SRVGGNetCompact(num_feat=8, num_conv=1).state_dict()


def torch_zip(data_pkl, storages=None, folder="archive", **entries):
    """A file of torch.save's form around a pickle that torch.save would not write."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{folder}/data.pkl", data_pkl)
        for key, data in (storages or {}).items():
            archive.writestr(f"{folder}/data/{key}", data)
        for name, data in entries.items():
            archive.writestr(f"{folder}/{name}", data)
    return file.getvalue()


def torch_legacy(data_pkl, tail=b""):
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    return head + data_pkl + pickle.dumps([], 2) + tail


def saved(tree, **options):
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


def tensor_pickle(offset=0, size=(2,), stride=(1,), count=4, kind="FloatStorage", function="_rebuild_tensor_v2"):
    """{"a": tensor}, with any numbers in it."""
    identifier = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    identifier += pickle.dumps(count, 2)[2:-1] + b"tQ"
    parts = b"".join(pickle.dumps(part, 2)[2:-1] for part in (offset, size, stride, False, {}))
    return b"\x80\x02}X\x01\x00\x00\x00actorch._utils\n" + function.encode() + b"\n(" + identifier + parts + b"tRs."


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def test_the_hand_made_tensor_is_read_when_its_numbers_are_right(tmp_path):
    (tmp_path / "a.pth").write_bytes(torch_zip(tensor_pickle(1, (2,), (2,)), {"0": FOUR}))
    assert read_state_dict(tmp_path / "a.pth")["a"].tolist() == [2.0, 4.0]


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return file.getvalue()


def compressed():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(1 << 20))
    return file.getvalue()


def overlapping():
    """Two entries whose contents are the same bytes of the file, so that it seems to hold more than it does."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", tensor_pickle())
        archive.writestr("archive/data/0", bytes(3000))
        again = copy.copy(archive.getinfo("archive/data/0"))
        again.filename = "archive/data/1"
        archive.filelist.append(again)
    return file.getvalue()


SAFETENSORS_HUGE = struct.pack("<Q", 2**40) + b'{"a":{}}'
MISSHAPEN = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}'

FILES = {
    "empty": (b"", "empty: the download failed"),
    "text": (b"These are not the weights you are looking for.\n" * 9, "a text file"),
    "json": (b'{"name": {"a": 1}}', "a text file"),
    "a web page": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page, not weights: the download"),
    "an xml page": (b'<?xml version="1.0"?><Error>NoSuchKey</Error>', "a web page"),
    "a git lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a picture"),
    "a tar archive": (tar(), "a tar archive"),
    "a gguf file": (b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    "binary noise": (bytes(range(1, 200)) * 9, "no checkpoint that can be read here"),
    "a truncated zip": (saved(weights())[:-400], "damaged or cut short"),
    "half a zip": (saved(weights())[:3000], "damaged or cut short"),
    "four bytes of a zip": (b"PK\x03\x04", "damaged or cut short"),
    "a truncated legacy file": (saved(weights(), _use_new_zipfile_serialization=False)[:-9], "damaged or cut short"),
    "half a legacy file": (saved(weights(), _use_new_zipfile_serialization=False)[:800], "damaged or cut short"),
    "a zip of other things": (torch_zip(b"x").replace(b"data.pkl", b"file.txt"), "none that torch.save wrote"),
    "a torchscript program": (torch_zip(pickle.dumps({}, 2), **{"constants.pkl": b""}), "a TorchScript program"),
    "a compressed zip": (compressed(), "packed by another program"),
    "overlapping entries": (overlapping(), "overlap"),
    "a big-endian zip": (torch_zip(pickle.dumps({}, 2), byteorder=b"big"), "big-endian"),
    "a plain pickle": (pickle.dumps({"a": [1]}, 2), "torch.save did not write"),
    "a tensor as the whole file": (saved(torch.ones(3)), "no weights in it"),
    "a list": (saved([torch.ones(3)]), "no weights in it"),
    "no tensors": (saved({"state_dict": {"epoch": 3}}), "no weights in it"),
    "a pickled module": (saved(torch.nn.Linear(2, 2)), r"a whole pickled object \(torch.nn.modules.linear.Linear\)"),
    "a sparse tensor": (saved({"a": torch.ones(2, 2).to_sparse()}), "_rebuild_sparse_tensor"),
    "a quantised tensor": (torch_zip(tensor_pickle(function="_rebuild_qtensor"), {"0": FOUR}), "_rebuild_qtensor"),
    "a quantised storage": (torch_zip(tensor_pickle(kind="QUInt8Storage"), {"0": FOUR}), "QUInt8Storage"),
    "safetensors with a huge header": (SAFETENSORS_HUGE, "damaged or cut short.*[Hh]eader"),
    "safetensors cut short": (struct.pack("<Q", len(MISSHAPEN)) + MISSHAPEN + bytes(3), "damaged or cut short"),
    "safetensors with wrong sizes": (struct.pack("<Q", len(MISSHAPEN)) + MISSHAPEN + bytes(8), "damaged or cut short"),
    "safetensors of nothing": (struct.pack("<Q", 2) + b"{}", "no weights in it"),
    "a view beyond its storage": (torch_zip(tensor_pickle(3, (2,), (1,)), {"0": FOUR}), "reaches beyond its data"),
    "a stride beyond its storage": (torch_zip(tensor_pickle(0, (2,), (4,)), {"0": FOUR}), "reaches beyond its data"),
    "a view that repeats its storage": (torch_zip(tensor_pickle(0, (99, 99), (0, 0)), {"0": FOUR}), "beyond its data"),
    "a negative stride": (torch_zip(tensor_pickle(3, (2,), (-1,)), {"0": FOUR}), "the shape of a tensor"),
    "a negative offset": (torch_zip(tensor_pickle(-1), {"0": FOUR}), "the shape of a tensor"),
    "a negative size": (torch_zip(tensor_pickle(0, (-2,)), {"0": FOUR}), "the shape of a tensor"),
    "a huge empty shape": (torch_zip(tensor_pickle(0, (0, 2**39, 2**39), (1, 1, 1)), {"0": FOUR}), "damaged"),
    "more dimensions than sizes": (torch_zip(tensor_pickle(0, (2, 2), (1,)), {"0": FOUR}), "the shape of a tensor"),
    "a storage larger than its entry": (torch_zip(tensor_pickle(count=5), {"0": FOUR}), "the size of storage"),
    "a storage of negative size": (torch_zip(tensor_pickle(count=-4), {"0": FOUR}), "the size of storage"),
    "a storage that is not there": (torch_zip(tensor_pickle(), {}), "data/0"),
    "a storage of no known kind": (torch_zip(tensor_pickle(kind="WildStorage"), {"0": FOUR}), "WildStorage"),
    "a legacy storage larger than the file": (torch_legacy(tensor_pickle(count=2**40)), "larger than the file"),
    "a legacy storage without data": (torch_legacy(tensor_pickle()), "no data for storage '0'"),
    "a reference outside a pickle": (b"\x80\x02NQ.", "data outside the pickle"),
    "a pickle without an end": (torch_zip(b"\x80\x02}"), "damaged"),
    "an empty stack": (torch_zip(b"\x80\x020."), "damaged"),
    "an unknown memo": (torch_zip(b"\x80\x02h\x07."), "damaged"),
    "an unknown instruction": (torch_zip(b"\x80\x02\xff."), "damaged"),
    "an extension": (torch_zip(b"\x80\x02\x82\x01."), "EXT1"),
    "too many instructions": (torch_zip(b"\x80\x02" + b"N0" * MAX_INSTRUCTIONS), f"over {MAX_INSTRUCTIONS:,} instr"),
    "a container inside itself": (torch_zip(b"\x80\x02}q\x01X\x06\0\0\0paramsh\x01s."), "no weights in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_checkpoint_is_refused_with_a_sentence_that_names_it(tmp_path, name):
    contents, sentence = FILES[name]
    path = tmp_path / "model.pth"
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_network_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(ModelNotFound, match="there is no such file"):
        load_network_file(tmp_path / "nothing.pth")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="a folder"):
        load_network_file(tmp_path)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["model.diffusion_model.input_blocks.0.0.weight"], "a Stable Diffusion checkpoint.*diptych generate --model"),
        (["first_stage_model.encoder.conv_in.weight", "x"], "a Stable Diffusion checkpoint"),
        (["conditioner.embedders.0.transformer.text_model.final_layer_norm.bias"], "a Stable Diffusion checkpoint"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight"], "a LoRA.*--lora"),
        (["encoder.down.0.block.0.conv1.weight"], "autoencoder"),
        (["down_blocks.0.resnets.0.conv1.weight"], "the UNet"),
        (["control_model.input_hint_block.0.weight"], "a ControlNet"),
        (["text_model.embeddings.position_ids"], "a text encoder"),
        (["some.other.weight"], "fit no network known here.*SRVGGNetCompact.*RRDBNet"),
    ],
)
def test_weights_of_something_else_are_named(tmp_path, keys, sentence):
    save_file({key: torch.ones(1) for key in keys}, tmp_path / "model.safetensors")
    with pytest.raises(UnknownArchitecture, match=sentence):
        load_network_file(tmp_path / "model.safetensors")


def test_nan_weights_are_refused(tmp_path):
    torch.save({**weights(), "body.0.bias": torch.full((8,), float("nan"))}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth: the weight 'body\.0\.bias' holds NaN"):
        load_network_file(tmp_path / "a.pth")


def test_wrong_shapes_are_refused(tmp_path):
    torch.save({**weights(), "body.0.bias": torch.ones(9)}, tmp_path / "a.pth")
    with pytest.raises(UnknownArchitecture, match=r"'body\.0\.bias' has the shape \(9,\) where \(8,\) belongs"):
        load_network_file(tmp_path / "a.pth")


def test_a_few_bytes_cannot_stand_for_many_layers(tmp_path):
    block = RRDBNet(num_feat=8, num_grow_ch=8, num_block=1).state_dict()
    layer = {key: value for key, value in block.items() if key.startswith("body.0.")}
    bomb = block | {key.replace("body.0.", f"body.{n}."): value for key, value in layer.items() for n in range(50)}
    torch.save(bomb, tmp_path / "a.pth")
    assert len(read_state_dict(tmp_path / "a.pth")) == len(bomb)
    with pytest.raises(CheckpointError, match="several times the memory"):
        load_network_file(tmp_path / "a.pth")


# Code. Every payload writes a marker file when it is opened the usual way, which is proven first.

CALLS = {
    "os.system": "import os\nclass Payload:\n    def __reduce__(self): return os.system, (f'echo x > {marker}',)",
    "subprocess": "import subprocess\nclass Payload:\n"
    "    def __reduce__(self): return subprocess.check_call, (['cp', '/dev/null', marker],)",
    "eval": "class Payload:\n    def __reduce__(self): return eval, (f'open({marker!r}, \"w\").close()',)",
    "exec": "class Payload:\n    def __reduce__(self): return exec, (f'open({marker!r}, \"w\").close()',)",
    "open": "class Payload:\n    def __reduce__(self): return open, (marker, 'w')",
    "runpy": "import runpy\nopen(script, 'w').write(f'open({marker!r}, \"w\")')\nclass Payload:\n"
    "    def __reduce__(self): return runpy.run_path, (script,)",
}
HIDDEN = {
    "a path's own method": "import pathlib\nclass Payload:\n"
    "    def __reduce__(self): return pathlib.Path.touch, (pathlib.Path(marker),)",
    "a bound method": "import pathlib\nclass Payload:\n    def __reduce__(self): return pathlib.Path(marker).touch, ()",
    "numpy": "import numpy\nclass Payload:\n    def __reduce__(self): return numpy.save, (marker, 1)",
}


def pickled_payload(source, protocol, marker, script):
    space = {"marker": str(marker), "script": str(script)}
    exec(source, space)
    space["Payload"].__module__ = "__main__"
    return pickle.dumps({"a": [space["Payload"]()], "params": {}}, protocol)


def opened_by_others(data, marker):
    """Whether pickle itself, in a process of its own, runs the payload."""
    marker.unlink(missing_ok=True)
    program = "import pickle, sys; pickle.loads(sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=False)
    ran = any(marker.parent.glob(marker.name + "*"))
    for file in marker.parent.glob(marker.name + "*"):
        file.unlink()
    return ran


@pytest.mark.parametrize("name", CALLS)
def test_a_pickle_with_code_is_refused_by_name_and_nothing_runs(tmp_path, name):
    marker, script = tmp_path / "marker", tmp_path / "script.py"
    assert opened_by_others(pickled_payload(CALLS[name], 2, marker, script), marker)
    for protocol in (0, 2, 4, 5):
        data = pickled_payload(CALLS[name], protocol, marker, script)
        for contents in (torch_zip(data), torch_legacy(data), *([data] if protocol else [])):
            path = tmp_path / "model.pth"
            path.write_bytes(contents)
            with pytest.raises(CheckpointError, match=r"holds Python code \([\w.]+\).*none of it was run"):
                read_checkpoint(path)
            assert not any(tmp_path.glob("marker*"))


@pytest.mark.parametrize("name", HIDDEN)
def test_code_that_nobody_would_know_by_name_does_not_run_either(tmp_path, name):
    marker, script = tmp_path / "marker", tmp_path / "script.py"
    assert opened_by_others(pickled_payload(HIDDEN[name], 2, marker, script), marker)
    for protocol in (0, 2, 4, 5):
        data = pickled_payload(HIDDEN[name], protocol, marker, script)
        for contents in (torch_zip(data), torch_legacy(data)):
            path = tmp_path / "model.pth"
            path.write_bytes(contents)
            with pytest.raises(DiptychError):
                load_network_file(path)
            assert not any(tmp_path.glob("marker*"))


def test_reading_imports_nothing_that_a_file_names(tmp_path):
    (tmp_path / "a.pth").write_bytes(torch_zip(b"\x80\x02cantigravity\nfly\n)R}b."))
    before = set(sys.modules)
    assert repr(read_checkpoint(tmp_path / "a.pth")) == "<inert antigravity.fly>"
    assert "antigravity" not in set(sys.modules) - before


EXPENSIVE = {
    "hashing tuples that share their parts": b"\x80\x02}" + b")" + b"2\x86" * 200 + b"Ns.",
    "a long tuple as a key": b"\x80\x02}(" + b"K\x01" * 100 + b"tNs.",
    "a huge number as a key": b"\x80\x02}\x8b" + (100_000).to_bytes(4, "little") + b"\x01" * 100_000 + b"Ns.",
    "a tensor as a key": b"\x80\x02}]Ns.",
    "a name of megabytes": b"\x80\x04X\x00\x00\x10\x00" + b"x" * (1 << 20) + b"X\x01\0\0\0a\x93.",
    "a string that claims exabytes": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x0fabc.",
    "a memo index of billions": b"\x80\x02Nr\xff\xff\xff\x7fj\x00\x00\x00\x01.",
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_pickles_made_to_use_up_time_or_memory_are_refused(name):
    with pytest.raises((ValueError, TypeError, LookupError)):
        unpickle(io.BytesIO(EXPENSIVE[name]))


def test_deeply_nested_objects_are_read_without_recursion():
    depth = 300_000
    tree = unpickle(io.BytesIO(b"\x80\x02N" + b"\x85" * depth + b"."))
    for _ in range(depth):
        (tree,) = tree
    assert tree is None


def test_one_list_cannot_be_turned_into_many_dictionaries():
    pairs = b"](" + b"".join(b"K" + bytes([n]) + b"K\x00\x86" for n in range(100)) + b"eq\x01"
    data = b"\x80\x02ccollections\nOrderedDict\nq\x00" + pairs + b"\x85q\x02R" + b"h\x00h\x02R" * 3 + b"\x87."
    first, *others = [data for data in unpickle(io.BytesIO(data))]
    assert sum(map(len, others)) + len(first) <= 100


# Blending.


def test_denoise_blends_the_weights_linearly():
    general = {"a": torch.tensor([1.0, 2.0])}
    wdn = {"a": torch.tensor([3.0, 6.0])}
    assert blend_denoise(general, wdn, 1)["a"].tolist() == [1.0, 2.0]
    assert blend_denoise(general, wdn, 0)["a"].tolist() == [3.0, 6.0]
    assert blend_denoise(general, wdn, 0.25)["a"].tolist() == [2.5, 5.0]


@pytest.mark.parametrize("denoise", [-0.1, 1.1, float("nan")])
def test_denoise_outside_its_range_is_a_value_error(denoise):
    with pytest.raises(ValueError, match="denoise is"):
        blend_denoise(weights(), weights(), denoise)


def test_networks_of_different_shapes_are_not_blended():
    other = SRVGGNetCompact(num_feat=8, num_conv=2).state_dict()
    with pytest.raises(CheckpointError, match="not of the same network"):
        blend_denoise(weights(), other, 0.5)
    with pytest.raises(CheckpointError, match="not of the same network"):
        blend_denoise(weights(), {**weights(), "body.0.bias": torch.ones(1)}, 0.5)
