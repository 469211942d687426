"""Pickles from strangers: read as data, never run."""

import contextlib
import copyreg
import io
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bayling_delta.checkpoint import open_checkpoint
from bayling_delta.errors import CheckpointError
from bayling_delta.state_pickle import PickleError, TensorSpec, read_state_dict
from tests.strategies import TORCH_DTYPES, Described, pickled, state_dicts, write_archive

PROTO = b"\x80\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def text(value: str) -> bytes:
    """The instruction that makes a string."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def storage(*parts: bytes) -> bytes:
    """The instructions that refer to a storage."""
    return b"(" + b"".join(parts) + b"tQ"


FLOATS = b"ctorch\nFloatStorage\n"
ORDERED = b"ccollections\nOrderedDict\n"
STORAGE = storage(text("storage"), FLOATS, text("0"), text("cpu"), b"K\x18")
TENSOR = REBUILD + b"(" + STORAGE + b"K\x00K\x18\x85K\x01\x85\x89" + ORDERED + b")RtR"
"""The instructions that make a tensor of 24 elements."""


def table(*items: bytes) -> bytes:
    """The instructions that make a table of keys and values in turn."""
    return b"}(" + b"".join(items) + b"u"


def refusal(data: bytes) -> PickleError:
    with pytest.raises(PickleError) as caught:
        read_state_dict(data)
    return caught.value


def data_pickle(state: dict[str, Tensor]) -> bytes:
    """What `torch.save` writes as data.pkl."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return archive.read("archive/data.pkl")


# what is read


@settings(max_examples=150)
@given(state_dicts())
def test_a_state_dict_is_described_as_torch_has_it(state: dict[str, Tensor]) -> None:
    specs = read_state_dict(data_pickle(state))
    assert list(specs) == list(state)
    for name, tensor in state.items():
        spec = specs[name]
        assert TORCH_DTYPES[spec.storage.dtype] == tensor.dtype
        assert spec.storage.elements * tensor.element_size() == tensor.untyped_storage().nbytes()
        assert (spec.shape, spec.strides, spec.offset) == (tensor.shape, tensor.stride(), tensor.storage_offset())


@given(st.lists(st.integers(-(2**71), 2**71 - 1), max_size=4), st.integers(0, 2**71 - 1))
def test_numbers_are_what_python_pickles(sizes: list[int], offset: int) -> None:
    spec = read_state_dict(pickled({"w": Described(tuple(sizes), tuple(sizes), offset)}))["w"]
    assert (spec.shape, spec.strides, spec.offset) == (tuple(sizes), tuple(sizes), offset)


def test_the_hand_made_tensor_is_one() -> None:
    """The hostile pickles below differ from this good one by their lie alone."""
    (spec,) = read_state_dict(PROTO + table(text("w"), TENSOR) + b".").values()
    assert spec == read_state_dict(pickled({"w": Described((24,), (1,))}))["w"]


# nothing runs: each of these makes a directory when Python's own pickle reads it


class Trap:
    """Makes a directory when it is made from a name, or given one."""

    def __new__(cls, name: str = "") -> "Trap":
        if name:
            Path(name).mkdir()
        return super().__new__(cls)

    def __setstate__(self, name: str) -> None:
        Path(name).mkdir()


TRAP = f"c{__name__}\nTrap\n".encode()


def call(name: str) -> bytes:
    """The instructions that call os.mkdir."""
    return b"cos\nmkdir\n" + text(name) + b"\x85R"


ATTACKS: dict[str, tuple[Callable[[str], bytes], str]] = {
    "GLOBAL": (lambda name: call(name), "os.mkdir"),
    "GLOBAL of eval": (
        lambda name: b"cbuiltins\neval\n" + text(f"__import__('os').mkdir({name!r})") + b"\x85R",
        "builtins.eval",
    ),
    "GLOBAL of exec by its old name": (
        lambda name: b"c__builtin__\nexec\n" + text(f"import os; os.mkdir({name!r})") + b"\x85R",
        "__builtin__.exec",
    ),
    "STACK_GLOBAL": (lambda name: text("os") + text("mkdir") + b"\x93" + text(name) + b"\x85R", "STACK_GLOBAL"),
    "INST": (lambda name: b"(" + text(name) + b"ios\nmkdir\n", "INST"),
    "OBJ": (lambda name: b"(cos\nmkdir\n" + text(name) + b"o", "os.mkdir"),
    "OBJ of a stacked name": (lambda name: b"(" + text("os") + text("mkdir") + b"\x93" + text(name) + b"o", "STACK"),
    "NEWOBJ": (lambda name: TRAP + text(name) + b"\x85\x81", f"{__name__}.Trap"),
    "NEWOBJ_EX": (lambda name: TRAP + text(name) + b"\x85}\x92", f"{__name__}.Trap"),
    "BUILD": (lambda name: TRAP + b")\x81" + text(name) + b"b", f"{__name__}.Trap"),
    "EXT1": (lambda name: b"\x82\xf0" + text(name) + b"\x85R", "EXT1"),
    "EXT2": (lambda name: b"\x83\xf0\x00" + text(name) + b"\x85R", "EXT2"),
    "EXT4": (lambda name: b"\x84\xf0\x00\x00\x00" + text(name) + b"\x85R", "EXT4"),
    "behind a tensor": (lambda name: table(text("w"), b"N", text("v"), call(name)), "os.mkdir"),
    "as a name in the table": (lambda name: table(call(name), b"N"), "os.mkdir"),
    "in a tuple that is dropped": (lambda name: b"}" + call(name) + b"0", "os.mkdir"),
    "in a persistent id": (lambda name: b"(" + text("storage") + call(name) + b"tQ", "os.mkdir"),
    "in the metadata": (
        lambda name: ORDERED + b")R}" + text("_metadata") + call(name) + b"sb",
        "os.mkdir",
    ),
    "among a rebuilding's arguments": (lambda name: REBUILD + b"(" + call(name) + b"tR", "os.mkdir"),
    "under a remembered name": (lambda name: b"cos\nmkdir\nq\x00" + text(name) + b"\x85q\x01h\x00h\x01R", "os.mkdir"),
}


@pytest.fixture
def extension() -> Iterator[None]:
    """A number for os.mkdir in the table of pickle's extensions."""
    module = os.mkdir.__module__
    copyreg.add_extension(module, "mkdir", 0xF0)
    yield
    copyreg.remove_extension(module, "mkdir", 0xF0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(("attack", "words"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_does_nothing_and_is_named(tmp_path: Path, attack: Callable[[str], bytes], words: str) -> None:
    mark = tmp_path / "it ran"
    hostile = PROTO + attack(str(mark)) + b"."
    with contextlib.suppress(pickle.UnpicklingError, TypeError):  # some go wrong once the harm is done
        pickle.loads(hostile)
    mark.rmdir()  # which shows that the attack is one
    path = write_archive(tmp_path / "pytorch_model.bin", hostile, {"0": bytes(96)})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == ("unsafe_pickle", str(path))
    assert words in problem.message
    assert not mark.exists()


class Reduced:
    """Is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


REDUCED: dict[str, tuple[Callable[[str], Reduced], str]] = {
    "os.system": (lambda name: Reduced(os.system, f'mkdir "{name}"'), f"{os.name}.system"),
    "os.mkdir": (lambda name: Reduced(os.mkdir, name), f"{os.name}.mkdir"),
    "os.makedirs": (lambda name: Reduced(os.makedirs, name), "os.makedirs"),
    "exec": (lambda name: Reduced(exec, f"import os; os.mkdir({name!r})"), "__builtin__.exec"),
    "getattr": (lambda name: Reduced(getattr, Reduced(Trap, name), "x", None), "__builtin__.getattr"),
    "a pickle in the pickle": (
        lambda name: Reduced(pickle.loads, pickle.dumps(Reduced(os.mkdir, name), 2)),
        "pickle.loads",
    ),
    "torch's own way to load a storage": (
        lambda name: Reduced(
            torch.storage._load_from_bytes,
            pickle.dumps(0x1950A86A20F9469CFC6C, 2)
            + pickle.dumps(1001, 2)
            + pickle.dumps({"protocol_version": 1001, "little_endian": True, "type_sizes": {}}, 2)
            + pickle.dumps(Reduced(os.mkdir, name), 2)
            + pickle.dumps([], 2),
        ),
        "torch.storage._load_from_bytes",
    ),
}


@pytest.mark.parametrize(("attack", "words"), REDUCED.values(), ids=REDUCED)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_reduce_asks_for_is_not_done(
    tmp_path: Path, attack: Callable[[str], Reduced], words: str, protocol: int
) -> None:
    mark = tmp_path / "it ran"
    hostile = pickle.dumps({"w": attack(str(mark))}, protocol)
    pickle.loads(hostile)
    mark.rmdir()
    path = write_archive(tmp_path / "pytorch_model.bin", hostile, {})
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    (problem,) = caught.value.problems
    if protocol == 2:
        assert problem.kind == "unsafe_pickle"
        assert words in problem.message
    else:
        assert problem.kind == "unsupported"
        assert "not of protocol 2" in problem.message
    assert not mark.exists()


# names that look harmless, or that scanners have let through

NAMES = """
__builtin__ compile
__builtin__ getattr
asyncio.unix_events _UnixSubprocessTransport._start
bdb Bdb
builtins __import__
cProfile run
code InteractiveInterpreter
collections Counter
collections OrderedDict.__init__
collections OrderedDict\x20
collections namedtuple
Collections OrderedDict
collections\t OrderedDict
cProfile runctx
ctypes CDLL
distutils.file_util write_file
doctest debug_script
functools partial
idlelib.pyshell ModifiedInterpreter
imaplib IMAP4_stream
importlib import_module
io open
lib2to3.pgen2.grammar Grammar.loads
marshal loads
nt system
numpy.core.multiarray _reconstruct
numpy.testing._private.utils runstring
operator attrgetter
operator methodcaller
pathlib Path
pickle loads
pip main
pkgutil resolve_name
posix system
profile run
pty spawn
pydoc locate
runpy run_path
shutil rmtree
site main
socket socket
ssl get_server_certificate
sys setrecursionlimit
test.support.script_helper assert_python_ok
timeit timeit
torch FloatStorage.__init__.__globals__
torch Size
torch Tensor
torch Unknown
torch __builtins__
torch _utils._rebuild_tensor_v2
torch halfstorage
torch load
torch\x00 HalfStorage
torch._C _nn
torch._dynamo.guards GuardBuilder.get
torch._inductor.codecache compile_file
torch._tensor _rebuild_from_type_v2
torch._utils _rebuild_device_tensor_from_numpy
torch._utils _rebuild_sparse_tensor
torch._utils _rebuild_tensor_v2.__globals__
torch._utils\r _rebuild_tensor_v2
torch.FloatStorage __init__
torch.cuda HalfStorage
torch.hub load
torch.jit load
torch.jit._script unpackage_script_module
torch.nn.modules.linear Linear
torch.serialization load
torch.storage TypedStorage
torch.storage _load_from_bytes
torch.utils._config_module ConfigModule.load_config
torch.utils.bottleneck.__main__ run_cprofile
torch.utils.collect_env run
torch.utils.data.datapipes.utils.decoder basichandlers
trace Trace
types CodeType
types FunctionType
venv create
webbrowser open
zoneinfo ZoneInfo
tor\u0441h HalfStorage
\uff54orch HalfStorage
 HalfStorage
torch.HalfStorage\x20
""".strip("\n").split("\n")  # fmt: skip


@pytest.mark.parametrize("line", NAMES)
def test_no_name_is_known_but_those_that_a_state_dict_needs(line: str) -> None:
    module, name = line.split(" ", 1)
    error = refusal(PROTO + f"c{module}\n{name}\n".encode() + b".")
    assert error.unsafe
    assert str(error).startswith(f"{module}.{name} is not something that a plain state dict needs; nothing was run. ")


# harmless names used in other ways than PyTorch does

MISUSE = {
    "a class called": FLOATS + b")R",
    "a table called": b"})R",
    "a string called": text("os.mkdir") + b")R",
    "a tensor called": TENSOR + b")R",
    "OrderedDict of something": ORDERED + b"]\x85R",
    "a tensor of nothing": REBUILD + b")R",
    "a tensor of a class": REBUILD + b"(" + FLOATS + b"K\x00)))tR",
    "a tensor of a string": REBUILD + b"(" + text("0") + b"K\x00)))tR",
    "a tensor with a list for its shape": REBUILD + b"(" + STORAGE + b"K\x00]])tR",
    "a parameter of a number": b"ctorch._utils\n_rebuild_parameter\nK\x01\x89)\x87R",
    "a parameter of nothing": b"ctorch._utils\n_rebuild_parameter\n)R",
    "attributes of a class": ORDERED + b"}" + text("__reduce__") + b"Nsb",
    "attributes of a function": REBUILD + b"}" + text("__code__") + b"Nsb",
    "attributes of a tensor": TENSOR + b"}" + text("__class__") + b"Nsb",
    "other attributes of a table": b"}}" + text("__class__") + b"Nsb",
    "metadata and another attribute": b"}" + table(text("_metadata"), b"}", text("__setstate__"), b"N") + b"b",
    "state that is a tuple of two": b"}N}\x86b",
    "state that is a string": b"}" + text("_metadata") + b"b",
    "a storage of a list": b"]Q",
    "a storage of a string": text("storage") + b"Q",
    "a storage by another word": storage(text("module"), FLOATS, text("0"), text("cpu"), b"K\x18"),
    "a storage of another class": storage(text("storage"), ORDERED, text("0"), text("cpu"), b"K\x18"),
    "a storage of a string for a class": storage(text("storage"), text("F32"), text("0"), text("cpu"), b"K\x18"),
    "a storage with a number for a key": storage(text("storage"), FLOATS, b"K\x00", text("cpu"), b"K\x18"),
    "a storage with a number for a place": storage(text("storage"), FLOATS, text("0"), b"N", b"K\x18"),
    "a storage without elements": storage(text("storage"), FLOATS, text("0"), text("cpu")),
    "a storage of a string of elements": storage(text("storage"), FLOATS, text("0"), text("cpu"), text("24")),
    "a storage with a view, as before 1.6": storage(text("storage"), FLOATS, text("0"), text("cpu"), b"K\x18N"),
    "a persistent id in text": b"P0\n",
    "another protocol in the middle": b"\x80\x04}",
    "a frame": b"\x95\x01\x00\x00\x00\x00\x00\x00\x00}",
    "a copy": b"}2",
    "bytes": b"C\x01a",
    "out-of-band buffers": b"\x97",
    "a set": b"\x8f",
    "no instruction at all": b"\xff",
}  # fmt: skip


@pytest.mark.parametrize("body", MISUSE.values(), ids=MISUSE)
def test_what_no_state_dict_asks_for_is_unsafe(body: bytes) -> None:
    assert refusal(PROTO + body + b".").unsafe


# nonsense

NONSENSE = {
    "nothing": b"",
    "no protocol": b"}.",
    "a protocol alone": PROTO,
    "protocol 3": b"\x80\x03}.",
    "no end": PROTO + b"}",
    "no object": PROTO + b".",
    "two objects": PROTO + b"}}.",
    "a mark alone": PROTO + b"(.",
    "a mark below": PROTO + b"(}.",
    "more after the end": PROTO + b"}.N",
    "a second pickle after the end": PROTO + b"}." + PROTO + b"}.",
    "a tuple of too little": PROTO + b"N\x86.",
    "a tuple across a mark": PROTO + b"}(N\x86.",
    "a tuple without a mark": PROTO + b"Nt.",
    "a call on nothing": PROTO + b"R.",
    "a call across a mark": PROTO + ORDERED + b"()R.",
    "an item for a list": PROTO + b"]NNs.",
    "an item for nothing": PROTO + b"NNs.",
    "items for a tuple": PROTO + b")(NNu.",
    "items for nothing": PROTO + b"(NNu.",
    "a name without a value": PROTO + b"}(" + text("w") + b"u.",
    "a name twice": PROTO + table(text("w"), TENSOR, text("w"), TENSOR) + b".",
    "a name twice, the second time alone": PROTO + table(text("w"), TENSOR) + text("w") + TENSOR + b"s.",
    "a number that equals a flag": PROTO + table(b"K\x01", TENSOR, b"\x88", TENSOR) + b".",
    "a tuple for a name": PROTO + table(b")", TENSOR) + b".",
    "a list for a name": PROTO + table(b"]", TENSOR) + b".",
    "a tensor for a name": PROTO + table(TENSOR, TENSOR) + b".",
    "nothing for a name": PROTO + table(b"N", TENSOR) + b".",
    "a table appended to": PROTO + b"}Na.",
    "a tuple appended to": PROTO + b")(Ne.",
    "nothing appended to": PROTO + b"(Ne.",
    "a memo of nothing": PROTO + b"q\x00.",
    "a memo of a mark": PROTO + b"(q\x00t.",
    "a memo never made": PROTO + b"h\x00.",
    "a large memo never made": PROTO + b"j\xff\xff\xff\xff.",
    "a string of four gigabytes": PROTO + b"X\xff\xff\xff\xffabc.",
    "a string longer than the rest": PROTO + b"X\x05\x00\x00\x00abc.",
    "a string that is not UTF-8": PROTO + b"X\x01\x00\x00\x00\xff.",
    "a string with half a surrogate pair": PROTO + b"X\x03\x00\x00\x00\xed\xa0\x80.",
    "a name that is not UTF-8": PROTO + b"c\xff\n\xff\n.",
    "a name without an end": PROTO + b"ctorch",
    "a name of one line": PROTO + b"ctorch\n",
    "a name of a megabyte": PROTO + b"c" + b"a" * (1 << 20) + b"\nb\n.",
    "a number of 80 bits": PROTO + b"\x8a\x0a" + b"\x01" * 10 + b".",
    "a number of 2040 bits": PROTO + b"\x8a\xff" + b"\x01" * 255 + b".",
    "a number of two gigabytes": PROTO + b"\x8b\xff\xff\xff\x7f.",
    "a number of a negative length": PROTO + b"\x8b\xff\xff\xff\xff.",
    "a number cut short": PROTO + b"J\x00\x00",
    "a shape of strings": PROTO + table(text("w"), REBUILD + b"(" + STORAGE + b"K\x00" + text("a") + b"\x85)tR") + b".",
    "a shape of flags": PROTO + table(text("w"), REBUILD + b"(" + STORAGE + b"K\x00\x88\x85\x88\x85tR") + b".",
    "a name for a tensor": PROTO + table(text("w"), FLOATS) + b".",
    "a storage for a tensor": PROTO + table(text("w"), STORAGE) + b".",
    "a table that holds itself": PROTO + b"}q\x00" + text("w") + b"h\x00s.",
    "a list that holds itself": PROTO + table(text("w"), b"]q\x00h\x00a") + b".",
}


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_refused(data: bytes) -> None:
    assert str(refusal(data))


# bombs

DEEP = 100_000
DOUBLED = b")q\x00" + b"".join(b"(h%bh%btq%b" % (bytes([n]), bytes([n]), bytes([n + 1])) for n in range(60))
"""A tuple of two tuples of two tuples ..., 60 deep: whoever walks through it never comes back."""

BOMBS = {
    "tuples in tuples": table(text("w"), b")" + b"\x85" * DEEP),
    "tuples in tuples for a name": table(b")" + b"\x85" * DEEP, TENSOR),
    "tuples in tuples for a shape": table(text("w"), REBUILD + b"(" + STORAGE + b"K\x00)" + b"\x85" * DEEP + b")tR"),
    "tuples in tuples for an argument": REBUILD + b")" + b"\x85" * DEEP + b"R",
    "lists in lists": table(text("w"), b"]" * DEEP + b"a" * (DEEP - 1)),
    "tables in tables": (b"}" + text("w")) * DEEP + TENSOR + b"s" * DEEP,
    "marks in marks": b"(" * DEEP + b"t" * DEEP,
    "marks that nothing ends": b"(" * DEEP,
    "doubled": table(text("w"), DOUBLED),
    "doubled for a name": table(DOUBLED, TENSOR),
    "doubled for a shape": table(text("w"), REBUILD + b"(" + STORAGE + b"K\x00" + DOUBLED + b")tR"),
    "doubled for a storage": DOUBLED + b"Q",
    "doubled for a state": b"}" + DOUBLED + b"b",
    "doubled for a function": DOUBLED + b")R",
}


@pytest.mark.parametrize("body", BOMBS.values(), ids=BOMBS)
def test_a_bomb_does_not_go_off(body: bytes) -> None:
    assert len(str(refusal(PROTO + body + b"."))) < 500


LONG_SHAPE = REBUILD + b"q\x00(" + STORAGE + b"K\x00(" + b"K\x01" * 2000 + b"tq\x01h\x01tq\x02"
WIDE = REBUILD + b"q\x00(" + STORAGE + b"K\x00(" + b"K\x01" * 32 + b"tq\x01h\x01\x89Ntq\x02"

HEAVY = {
    "many tables": b"}" * 50_000,
    "many lists": b"]" * 50_000,
    "many tuples": b")" + b"\x85" * 50_000,
    "much in the memo": b")" + b"".join(b"r" + n.to_bytes(4, "little") for n in range(10_000)),
    "one long shape for many tensors": LONG_SHAPE + b"h\x00h\x02R" * 1000,
    "many tensors of one shape": WIDE + b"]" + b"h\x00h\x02Ra" * 10_000,
    "one long string many times": text("a" * 10_000) + b"q\x00" + b"h\x00" * 10_000,
    "one long list many times": b"](" + b"N" * 10_000 + b"eq\x00" + b"]h\x00a" * 10_000,
}


@pytest.mark.parametrize("body", HEAVY.values(), ids=HEAVY)
def test_memory_is_in_proportion_to_the_pickle(body: bytes) -> None:
    """One object an instruction, whatever the instruction names: no product of two of them."""
    hostile = PROTO + body + b"."
    tracemalloc.start()
    try:
        refusal(hostile)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 90 * len(hostile)


# damage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A pickle with every instruction that a state dict needs."""
    whole = torch.arange(24.0).reshape(4, 6)
    state = OrderedDict(
        {
            "whole": whole,
            "transposed": whole.t(),
            "parameter": torch.nn.Parameter(torch.zeros(2, 300, 1, 70_000 // 35)),
            "half": torch.arange(5).half()[2:],
            "empty": torch.zeros(0),
            "scalar": torch.tensor(1),
            "far": torch.empty(1 << 32, dtype=torch.uint8)[(1 << 32) - 1 :],
        }
    )
    vars(state)["_metadata"] = OrderedDict({"": {"version": 1}})
    path = tmp_path_factory.mktemp("state_pickle") / "archive.bin"
    with torch.serialization.skip_data():  # which leaves the four gigabytes out
        torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        data = archive.read("archive/data.pkl")
    path.unlink()
    return data


def assert_is_a_state_dict(specs: dict[str, TensorSpec]) -> None:
    for name, spec in specs.items():
        assert isinstance(name, str)
        assert spec.storage.dtype in TORCH_DTYPES
        assert all(isinstance(number, int) for number in (spec.offset, *spec.shape, *spec.strides))


def test_a_pickle_cut_short_anywhere_is_refused(good: bytes) -> None:
    assert_is_a_state_dict(read_state_dict(good))
    for size in range(len(good)):
        refusal(good[:size])


@settings(max_examples=400)
@given(data=st.data())
def test_a_damaged_pickle_is_refused_or_still_a_state_dict(good: bytes, data: st.DataObject) -> None:
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        specs = read_state_dict(bytes(damaged))
    except PickleError:
        return
    assert_is_a_state_dict(specs)


PIECES = [
    TENSOR, STORAGE, REBUILD, FLOATS, ORDERED, b"ctorch._utils\n_rebuild_parameter\n",
    text("w"), text("_metadata"), text("storage"), b"N", b"\x88", b"K\x01", b"J\xff\xff\xff\xff", b"\x8a\x01\x05",
    b"q\x00", b"r\x00\x00\x00\x00", b"h\x00", b"j\x00\x00\x00\x00",
    b"(", b")", b"]", b"}", b"t", b"\x85", b"\x86", b"\x87", b"a", b"e", b"s", b"u", b"Q", b"R", b"b", b".",
]  # fmt: skip


@settings(max_examples=400)
@given(st.lists(st.sampled_from(PIECES), max_size=25))
def test_any_sequence_of_instructions_ends(pieces: list[bytes]) -> None:
    try:
        specs = read_state_dict(PROTO + b"".join(pieces))
    except PickleError:
        return
    assert_is_a_state_dict(specs)


@settings(max_examples=300)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_a_state_dict(data: bytes) -> None:
    try:
        specs = read_state_dict(PROTO + data)
    except PickleError:
        return
    assert_is_a_state_dict(specs)


@pytest.mark.parametrize(
    ("body", "words"),
    [(b"}" * 200_000, "piles up"), (b"]q\x00" + b"]a" * 11_000_000, "makes more objects")],
    ids=["a high stack", "a long list"],
)
def test_objects_are_counted(body: bytes, words: str) -> None:
    """Long before the pickle's size would be a burden: each byte could make an object of a hundred."""
    assert words in str(refusal(PROTO + body + b"."))


@pytest.mark.parametrize("index", [1 << 20, (1 << 32) - 1])
def test_what_is_remembered_is_numbered_as_a_pickler_does(index: int) -> None:
    """Numbers of one's choice could be made to collide in a table of Python's."""
    assert "remembers more objects" in str(refusal(PROTO + b"}r" + index.to_bytes(4, "little") + b"."))


@pytest.mark.parametrize("key", [-1, 1 << 20, -(1 << 31)])
def test_a_number_that_is_a_key_is_a_count(key: int) -> None:
    assert "no count is" in str(refusal(PROTO + b"}J" + key.to_bytes(4, "little", signed=True) + b"Ns."))
