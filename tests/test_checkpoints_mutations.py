"""Whatever happens to the bytes of a checkpoint: it is read, or refused with a DiptychError. Nothing else, ever."""

import gc
import io
import pickle
import pickletools
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from diptych.errors import DiptychError
from diptych.upscalers.checkpoints import load_network_file, read_checkpoint
from diptych.upscalers.networks import Network, RRDBNet, SRVGGNetCompact
from diptych.upscalers.unpickle import Inert

ROUNDS = 1000


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks by the thousand spend their time in waiting for each other's threads otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def saved(tree, **options):
    file = io.BytesIO()
    torch.save(tree, file, **options)
    return file.getvalue()


def seeds():
    torch.manual_seed(0)
    compact = SRVGGNetCompact(num_feat=4, num_conv=1).state_dict()
    residual = RRDBNet(num_feat=4, num_grow_ch=2, num_block=1).state_dict()
    lightning = {"state_dict": compact, "callbacks": {Inert: Inert("x")}, "epoch": 1, "lr": [0.1, (None, True)]}
    return {
        "zip": saved({"params_ema": compact}),
        "zip of an rrdbnet": saved(residual),
        "zip of a trainer's state": saved(lightning, pickle_protocol=4),
        "legacy": saved({"params": compact}, _use_new_zipfile_serialization=False),
        "safetensors": save(compact),
    }


SEEDS = seeds()


def read(path, contents):
    """True if the mutated file still is a network."""
    path.write_bytes(contents)
    try:
        network = load_network_file(path)
    except DiptychError as error:
        assert str(path) in str(error)
        return False
    assert isinstance(network, Network)
    assert all(torch.isfinite(weight).all() for weight in network.module.state_dict().values())
    return True


def structure(contents):
    """The places where a file says what it is: its pickle or header, and the directories of its archive."""
    if contents[:2] == b"PK":
        start = contents.index(b"\x80")  # the pickle is the first entry of an archive
        return [*range(0, start + 1200), *range(contents.index(b"PK\x01\x02"), len(contents))]
    return range(min(len(contents), 1500))


def flip(random, contents):
    mutated = bytearray(contents)
    places = structure(contents) if random.random() < 0.8 else range(len(contents))
    for _ in range(random.choice((1, 1, 2, 8))):
        mutated[random.choice(places)] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    return bytes(mutated)


def cut(random, contents):
    return contents[: random.randrange(len(contents))]


def remove(random, contents):
    start = random.choice(structure(contents))
    return contents[:start] + contents[start + random.choice((1, 2, 8, 100)) :]


def insert(random, contents):
    place = random.choice(structure(contents))
    return contents[:place] + random.randbytes(random.choice((1, 2, 8, 100))) + contents[place:]


def splice(random, contents):
    """The beginning of one file and the end of another."""
    other = random.choice(list(SEEDS.values()))
    return contents[: random.choice(structure(contents))] + other[random.choice(structure(other)) :]


def move(random, contents):
    """A piece of the structure copied over another."""
    start, end, length = random.choice(structure(contents)), random.choice(structure(contents)), random.randrange(1, 64)
    return contents[:end] + contents[start : start + length] + contents[end + length :]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("mutate", [flip, cut, remove, insert, splice, move], ids=lambda f: f.__name__)
def test_a_mutated_checkpoint_is_read_or_refused(tmp_path, seed, mutate):
    generator = random.Random(f"{seed} {mutate.__name__}")
    path = tmp_path / "mutated.pth"
    assert read(path, SEEDS[seed])
    survived = sum(read(path, mutate(generator, SEEDS[seed])) for _ in range(ROUNDS // 6))
    assert survived < ROUNDS // 6  # the mutations do reach what matters
    gc.collect()


OPCODES = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
LITERALS = st.integers() | st.text(max_size=3) | st.tuples(st.integers())
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from([
        b"(", b"t", b"R", b"}", b"]", b"s", b"q\x00", b"h\x00", b"K\x01", b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v3\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch\nfloat32\n",
        b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n", b"ctorch\nSize\n",
        b"ctorch\nLongStorage\n",
        b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000", b"\x85", b"\x86", b"\x87", b"Q", b"N", b"b", b"\x81",
    ]),
    st.builds(lambda value: pickle.dumps(value, 2)[2:-1], LITERALS),
)  # fmt: skip


@settings(
    max_examples=ROUNDS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(st.lists(PIECES, max_size=25))
def test_any_row_of_pickle_instructions_is_read_or_refused(tmp_path, pieces):
    path = tmp_path / "row.pth"
    magic = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    path.write_bytes(magic + b"\x80\x02" + b"".join(pieces) + b"." + pickle.dumps(["0"], 2) + bytes(64))
    try:
        read_checkpoint(path)
    except DiptychError as error:
        assert str(path) in str(error)


@settings(
    max_examples=ROUNDS // 2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(st.binary(max_size=300), st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x08\0\0\0\0\0\0\0{", b"<", b"{"]))
def test_any_bytes_are_read_or_refused(tmp_path, contents, head):
    path = tmp_path / "bytes.safetensors"
    path.write_bytes(head + contents)
    try:
        load_network_file(path)
    except DiptychError as error:
        assert str(path) in str(error)
