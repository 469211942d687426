"""Ways past scanners and restricted loaders that were published: none leads anywhere here.

Scanners look for what is known to be bad, and were got past by names that were not on a list, by archives that they
could not open and a loader could, and by instructions that they did not follow. The bytes are our own; what they
show is the trick. Each stands by the advisory that tells of it.
"""

import io
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bayling_delta.checkpoint import open_checkpoint
from bayling_delta.errors import CheckpointError, IntegrityError
from tests.strategies import Described, Storage, pickled
from tests.test_state_pickle import FLOATS, ORDERED, PROTO, REBUILD, TENSOR, call, storage, table, text
from tests.test_zip_records import DESCRIBED, ENCRYPTED, Entry, archive
from tests.wrong_input import entry, safe


@dataclass(frozen=True)
class Bypass:
    """One published trick."""

    advisory: str
    """Where it is told of, and what it is."""
    data: Callable[[str], bytes]
    """A file that makes a directory of this name, or asks for what would harm."""
    kind: str
    words: str
    """What the refusal must name."""
    name: str = "pytorch_model.bin"


def zipped(pickle: bytes, *more: Entry) -> bytes:
    """A checkpoint with this pickle."""
    return archive(Entry("archive/data.pkl", pickle), Entry("archive/data/0", bytes(96)), *more)


def asks(advisory: str, module: str, name: str, *arguments: bytes) -> Bypass:
    """A pickle that calls something that a list of bad names did not have."""
    body = f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments or (text("x"),)) + b"tR"
    whole = zipped(PROTO + table(text("w"), TENSOR, text("v"), body) + b".")
    return Bypass(f"{advisory}: {module}.{name}", lambda _: whole, "unsafe_pickle", f"{module}.{name} is not something")


def runs(advisory: str, pickle: Callable[[str], bytes], words: str, kind: str = "unsafe_pickle") -> Bypass:
    """A pickle of instructions in an order that a scanner did not follow."""
    return Bypass(advisory, lambda mark: zipped(pickle(mark)), kind, words)


def lies(advisory: str, data: Callable[[bytes], bytes], kind: str, words: str) -> Bypass:
    """An archive, of a pickle that makes a directory, that scanners cannot open and loaders can."""
    return Bypass(advisory, lambda mark: data(PROTO + table(text("w"), call(mark)) + b"."), kind, words)


def short_text(value: str) -> bytes:
    """SHORT_BINUNICODE, of protocol 4."""
    return b"\x8c" + bytes([len(value)]) + value.encode()


def rolled(data: bytes) -> bytes:
    """A tar archive with a pickle in it, as torch saved before 0.1.10."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def legacy(data: bytes) -> bytes:
    """A file as torch saved before 1.6, with another pickle for the state dict."""
    buffer = io.BytesIO()
    torch.save({}, buffer, _use_new_zipfile_serialization=False)
    whole = buffer.getvalue()
    place = whole.rindex(b"\x80\x02}")
    return whole[:place] + data + whole[place:]


def compressed(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", data)
    return buffer.getvalue()


def pickle_in_pickle(mark: str) -> bytes:
    inner = PROTO + call(mark) + b"."
    # Bytes have no instruction in protocol 2: pickle writes them as a string that is encoded again.
    encoded = b"c_codecs\nencode\n" + text(inner.decode("latin-1")) + text("latin1") + b"\x86R"
    return PROTO + table(text("w"), b"cpickle\nloads\n" + encoded + b"\x85R") + b"."


def described(mark: str, tensor: Described) -> bytes:
    del mark
    return zipped(pickled({"w": tensor}))


SAFE = safe({"w": entry(0, 96, [48])}, bytes(96))
CODE = Entry("archive/code/__torch__.py", b"def forward(self): pass")
EXTENSION = "pytorch_model.txt"

PUBLIC_BYPASSES = [
    # picklescan: names that were not on its list
    asks("CVE-2025-1716, GHSA-655q-fx9r-782v", "pip", "main", b"]" + text("install") + b"a"),
    asks("GHSA-vqmv-47xg-9wpr", "pip._internal.cli.main", "main"),
    asks("GHSA-vqmv-47xg-9wpr", "venv", "create"),
    asks("GHSA-xp4f-hrf8-rxw7", "ensurepip", "_run_pip"),
    asks("CVE-2025-10157", "asyncio.unix_events", "_UnixSubprocessTransport._start"),
    asks("CVE-2025-10157, a part of a listed module", "os.path", "os.system"),
    asks("CVE-2025-10157, a listed class by its child", "torch.hub", "os.system"),
    asks("GHSA-m273-6v24-x4m4", "operator", "attrgetter", text("system")),
    asks("GHSA-955r-x9j8-7rhh", "_operator", "methodcaller", text("system")),
    asks("GHSA-46h3-79wf-xr6c", "profile", "Profile.run"),
    asks("GHSA-4675-36f9-wf6r", "pdb", "Pdb.run"),
    asks("GHSA-9w88-8rmg-7g2p", "cProfile", "runctx"),
    asks("GHSA-fqq6-7vqf-w3fg", "doctest", "debug_script"),
    asks("GHSA-hgrh-qx5j-jfwx", "aiohttp.client", "ClientSession"),
    asks("GHSA-r8g5-cgf2-4m4m", "idlelib.debugobj", "ObjectTreeItem.SetText"),
    asks("GHSA-m869-42cg-3xwr", "idlelib.run", "Executive.runcode"),
    asks("GHSA-j343-8v2j-ff7w", "idlelib.pyshell", "ModifiedInterpreter.runcommand"),
    asks("GHSA-p9w7-82w4-7q8m", "lib2to3.pgen2.pgen", "ParserGenerator.make_label"),
    asks("GHSA-4whj-rm5r-c2v8", "torch.utils.bottleneck.__main__", "run_autograd_prof"),
    asks("fickling pull request 210", "numpy.f2py.crackfortran", "getlincoef"),
    asks("fickling pull request 210", "functools", "partial"),
    asks("GHSA-vvpj-8cmc-gx39, a name that finds any other", "pkgutil", "resolve_name", text("os:system")),
    asks("picklescan issue 66", "importlib", "import_module", text("os")),
    asks("CVE-2026-56304, makes files", "logging", "FileHandler"),
    asks("CVE-2026-56315", "uuid", "_get_command_stdout"),
    asks("CVE-2026-56315", "imaplib", "IMAP4_stream"),
    asks("CVE-2026-56315", "_pyrepl.pager", "pipe_pager"),
    asks("CVE-2026-56315", "_osx_support", "_read_output"),
    asks("CVE-2026-56315", "_aix_support", "_read_cmd_output"),
    # fickling
    asks("CVE-2026-22608", "ctypes", "CDLL"),
    asks("CVE-2026-22608, a name that finds any other", "pydoc", "locate", text("ctypes.windll.kernel32")),
    runs("GHSA-mhc9-48gj-9gp3, BUILD hides a call", lambda mark: PROTO + call(mark) + b"}b0}.", "os.mkdir"),
    runs(
        "GHSA-mhc9-48gj-9gp3, BUILD sets what a harmless object is",
        lambda _: PROTO + ORDERED + b")R}" + text("__class__") + text("x") + b"sb.",
        "sets attributes",
    ),
    # lazy readers that let some names through to Python's own machine
    asks("mergekit's list of allowed names", "_codecs", "encode", text("x"), text("latin1")),
    asks("mergekit's list of allowed names", "numpy.core.multiarray", "scalar"),
    asks("numpy's own way", "numpy.core.multiarray", "_reconstruct"),
    asks("numpy's own way, renamed", "numpy._core.multiarray", "_reconstruct"),
    asks("a chain of attributes", "builtins", "getattr", FLOATS, text("__init__")),
    asks("rebuilding that calls what it is given", "torch._tensor", "_rebuild_from_type_v2", FLOATS),
    asks("rebuilding that calls what it is given", "torch._utils", "_rebuild_wrapper_subclass", FLOATS),
    asks("rebuilding from an array", "torch._utils", "_rebuild_device_tensor_from_numpy"),
    asks("rebuilding of another kind", "torch._utils", "_rebuild_parameter_with_state", TENSOR),
    asks("a storage that is itself a file", "torch.storage", "_load_from_bytes"),
    # instructions
    runs(
        "GHSA-9gvj-pp9x-gcfr, a name from the memo",
        lambda mark: (
            PROTO
            + short_text("os")
            + b"\x94"
            + short_text("mkdir")
            + b"\x940"
            + b"0h\0h\x01\x93"
            + text(mark)
            + b"\x85R."
        ),
        "SHORT_BINUNICODE",
    ),
    runs(
        "GHSA-9gvj-pp9x-gcfr, a name of two strings",
        lambda mark: PROTO + text("os") + b"q\0" + text("mkdir") + b"q\x01\x93" + text(mark) + b"\x85R.",
        "STACK_GLOBAL",
    ),
    runs("the same in protocol 4", lambda mark: b"\x80\x04" + call(mark) + b".", "protocol 2", "unsupported"),
    runs("GHSA-84r2-jw7c-4r5q, a pickle in the pickle", pickle_in_pickle, "pickle.loads"),
    runs("nullifAI, broken after the harm is done", lambda mark: PROTO + call(mark) + b"\xff\xff", "os.mkdir"),
    runs(
        "a storage by a call",
        lambda mark: PROTO + storage(text("storage"), FLOATS, call(mark), text("cpu"), b"K\x18") + b".",
        "os.mkdir",
    ),
    runs(
        "a storage as one of another file",
        lambda _: PROTO + storage(text("module"), FLOATS, text("/etc/passwd"), text("x")) + b".",
        "refers to a storage",
    ),
    # archives
    lies(
        "CVE-2025-1944, GHSA-7q5r-7gvp-wc82, two names of one record",
        lambda data: archive(Entry("archive/data.pkl", data, local={"name": b"archive/data.pk_"})),
        "damaged",
        "another name in its local header",
    ),
    lies(
        "CVE-2025-1945, GHSA-w8jq-xcqf-f792, a flag that is not so",
        lambda data: archive(Entry("archive/data.pkl", data, central={"flags": ENCRYPTED})),
        "damaged",
        "is encrypted",
    ),
    lies(
        "CVE-2025-1945, in the local header",
        lambda data: archive(Entry("archive/data.pkl", data, local={"flags": ENCRYPTED})),
        "damaged",
        "encrypted, its local header says",
    ),
    lies(
        "CVE-2025-10156, a wrong checksum",
        lambda data: archive(Entry("archive/data.pkl", data, local={"crc": 1}, central={"crc": 1})),
        "crc",
        "record archive/data.pkl is damaged",
    ),
    lies(
        "CVE-2025-10156, no checksum",
        lambda data: archive(Entry("archive/data.pkl", data, local=DESCRIBED, central={"crc": 0})),
        "unsafe_pickle",
        "os.mkdir",
    ),
    Bypass(
        "CVE-2025-1889, GHSA-769v-p64c-89pr, and CVE-2025-10155: another extension",
        lambda mark: zipped(PROTO + call(mark) + b"."),
        "unsafe_pickle",
        "os.mkdir",
        EXTENSION,
    ),
    Bypass(
        "CVE-2025-10155, a pickle by itself under an archive's extension",
        lambda mark: PROTO + call(mark) + b".",
        "unsupported",
        "bare pickle",
    ),
    Bypass(
        "CVE-2025-10155, a pickle under the extension of what has no code",
        lambda mark: zipped(PROTO + call(mark) + b"."),
        "unsafe_pickle",
        "os.mkdir",
        "model.safetensors",
    ),
    lies(
        "two records of one name, of which each reader takes its own",
        lambda data: archive(Entry("archive/data.pkl", PROTO + b"}."), Entry("archive/data.pkl", data)),
        "damaged",
        "'archive/data.pkl' twice",
    ),
    lies(
        "two roots, of which each reader takes its own",
        lambda data: archive(Entry("a/data.pkl", PROTO + b"}."), Entry("b/data.pkl", data)),
        "unsupported",
        "no single ROOT/data.pkl",
    ),
    lies("a pickle that is compressed", compressed, "damaged", "is compressed"),
    lies("nullifAI, a 7z archive", lambda data: b"7z\xbc\xaf\x27\x1c\0\x04" + data, "unsupported", "is an archive"),
    # torch.load(weights_only=True)
    lies("CVE-2025-32434, a tar of before 0.1.10", rolled, "unsupported", "is an archive"),
    lies("CVE-2025-32434, before 1.6", legacy, "unsupported", "before 1.6"),
    lies("CVE-2025-32434, TorchScript", lambda data: zipped(data, CODE), "unsupported", "TorchScript"),
    runs("CVE-2026-24747, SETITEM of a tensor", lambda _: PROTO + TENSOR + b"K\0K\0s.", "not a table", "damaged"),
    runs("CVE-2026-24747, SETITEMS of a tensor", lambda _: PROTO + TENSOR + b"(K\0K\0u.", "not a table", "damaged"),
    runs("CVE-2026-24747, APPENDS to a tensor", lambda _: PROTO + TENSOR + b"(K\0e.", "not a list", "damaged"),
    runs("CVE-2026-24747, a call of a tensor", lambda _: PROTO + TENSOR + b")R.", "calls a tensor"),
    Bypass(
        "CVE-2026-24747, a storage of more elements than its record",
        lambda mark: described(mark, Described((1 << 20,), (1,), 0, Storage(elements=1 << 20))),
        "damaged",
        "but its record has 96 bytes",
    ),
    Bypass(
        "CVE-2026-24747, a storage of wider elements than its record",
        lambda mark: described(mark, Described((24,), (1,), 0, Storage(kind=torch.DoubleStorage))),
        "damaged",
        "but its record has 96 bytes",
    ),
    Bypass(
        "CVE-2026-24747, a view past its storage",
        lambda mark: described(mark, Described((2, 12), (1 << 40, 1))),
        "damaged",
        "reaches to element",
    ),
    Bypass(
        "CVE-2026-24747, a view before its storage",
        lambda mark: described(mark, Described((24,), (-1,), 23)),
        "damaged",
        "negative",
    ),
    # files that are two things
    lies(
        "Trail of Bits 2023, an archive behind a safetensors file",
        lambda data: SAFE + zipped(data),
        "damaged",
        "after its last tensor",
    ),
    lies(
        "Trail of Bits 2023, an archive in a hole of a safetensors file",
        lambda data: safe({"w": entry(len(zipped(data)), len(zipped(data)) + 2)}, zipped(data) + b"\0\0"),
        "damaged",
        "leaves a hole",
    ),
    lies(
        "Trail of Bits 2023, a safetensors file behind an archive",
        lambda data: zipped(data) + SAFE,
        "damaged",
        "has bytes after",
    ),
    lies(
        "an archive whose first bytes are a header's length",
        lambda data: struct.pack("<Q", 60) + b"{" + zipped(data),
        "damaged",
        "its header is not JSON",
    ),
]


@pytest.mark.parametrize("bypass", PUBLIC_BYPASSES, ids=lambda bypass: bypass.advisory)
def test_a_published_bypass_is_refused_and_does_nothing(tmp_path: Path, bypass: Bypass) -> None:
    mark = tmp_path / "it ran"
    path = tmp_path / bypass.name
    path.write_bytes(bypass.data(str(mark)))
    before = set(sys.modules)
    with pytest.raises((CheckpointError, IntegrityError)) as caught:
        open_checkpoint(path)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.where) == (bypass.kind, str(path))
    assert bypass.words in problem.message
    assert not mark.exists()
    assert set(sys.modules) - before <= {"pickletools"}, "something was imported"


def test_what_hides_in_a_tensor_is_a_tensor(tmp_path: Path) -> None:
    """An archive may be the bytes of a tensor: then it is these bytes, and read as nothing else."""
    mark = tmp_path / "it ran"
    hidden = zipped(PROTO + call(str(mark)) + b".")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safe({"w": entry(0, len(hidden), [len(hidden)], "U8")}, hidden))
    assert zipfile.is_zipfile(path)
    assert str(open_checkpoint(path).tensors["w"]) == f"U8 [{len(hidden)}]"
    assert not mark.exists()


def test_the_calls_are_real(tmp_path: Path) -> None:
    """What is refused above makes a directory where Python's own pickle reads it."""
    import pickle

    pickle.loads(PROTO + table(text("w"), call(str(tmp_path / "it ran"))) + b".")
    assert (tmp_path / "it ran").is_dir()


def test_the_rebuilding_itself_is_no_bypass(tmp_path: Path) -> None:
    """The rows differ from this file by their trick alone."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(zipped(PROTO + table(text("w"), TENSOR) + b"."))
    assert REBUILD in path.read_bytes()
    assert list(open_checkpoint(path).tensors) == ["w"]
