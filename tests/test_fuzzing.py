"""Everything that is parsed, given what is nearly right: it is refused in words, or what is accepted holds.

A case that fails names its seed and has its bytes in the message. What it showed is mended, and stays as a test where
the module's other tests are. The long suite's cases are other ones with BAYLING_DELTA_FUZZ_SEED, and more or fewer with
BAYLING_DELTA_FUZZ_CASES.
"""

import io
import json
import os
import pickletools
import re
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from random import Random
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import strategies as st
from safetensors.torch import save as saved

from bayling_delta import apply, plan_apply, repair, system, verify
from bayling_delta.checkpoint import Checkpoint, open_checkpoint, open_weights
from bayling_delta.companions import check, collect
from bayling_delta.downloads import expected_sha256
from bayling_delta.errors import OutputError, Problem, refuse
from bayling_delta.expectations import Expectation, own_expectations, read_manifest, read_sums
from bayling_delta.inspecting import inspect_checkpoint
from bayling_delta.journal import read_journal, write_journal
from bayling_delta.manifest import parse_digest, to_json, weights_digest
from bayling_delta.registering import entry_from_manifest
from bayling_delta.release_entry import entry_document, read_entry
from bayling_delta.releases import load_releases
from bayling_delta.sources import open_source
from bayling_delta.staging import partial_path, staged_directory
from bayling_delta.strict_json import load_strict
from bayling_delta.tally import FinishedFile
from bayling_delta.tensors import DTYPES, RANK_CAP, TensorRef
from bayling_delta.tokenizer_files import read_tokenizer
from tests.failing import facts
from tests.fuzz import INTEGERS, JSON_WORDS, Campaign, Target, as_json, documents, spoiled
from tests.journals import documents_of, signed, signed_again
from tests.meta import Size, random_model, save_meta
from tests.pairs import CONFIG, llama, save
from tests.strategies import Described, Storage, pickled, read_tensor, row_major_bytes
from tests.test_resuming import SHARD, end_before

MIB = 1 << 20
SEED = int(os.environ.get("BAYLING_DELTA_FUZZ_SEED", "7"))
LONG_CASES = int(os.environ.get("BAYLING_DELTA_FUZZ_CASES", "100000"))
SHORT_CASES = 2000

WORDS = [
    *JSON_WORDS,
    *(f'"{dtype}"'.encode() for dtype in (*DTYPES, "F8_E4M3", "float16", "bfloat16")),
    *(
        f'"{key}"'.encode()
        for key in ("dtype", "shape", "data_offsets", "__metadata__", "weight_map", "sha256", "size")
    ),
]


def digest(number: int, digits: int = 64) -> str:
    return f"{number:0{digits}x}"


# weights


def small_state() -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": torch.arange(24.0).reshape(4, 6).half(),
        "model.norm.weight": torch.ones(6).bfloat16(),
        "counts": torch.arange(3),
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 7),
    }


def assert_lie_in_their_file(refs: Mapping[str, TensorRef], size: int) -> None:
    """Every element of every tensor is in the file, and all counts are right."""
    for ref in refs.values():
        assert ref.dtype in DTYPES
        assert len(ref.shape) <= RANK_CAP
        assert ref.elements == sum(view.elements for view in ref.views)
        for view in ref.views:
            assert min(view.shape, default=1) >= 0
            assert len(view.steps) == len(view.shape)
            if view.elements:
                last = sum((size - 1) * step for size, step in zip(view.shape, view.steps, strict=True))
                assert view.offset >= 0
                assert min(view.steps, default=0) >= 0
                assert view.offset + (last + 1) * DTYPES[ref.dtype] <= size


def assert_names_a_file_here(name: str) -> None:
    """The system's own opinion, and that of Windows."""
    assert PurePosixPath(name).name == name
    assert PureWindowsPath(name).name == name
    assert not re.search(r"[\x00-\x1f]", name)


def framed(header: bytes, data: bytes) -> bytes:
    """A safetensors file whose length fits its header."""
    return len(header).to_bytes(8, "little") + header + data


def safetensors_file(place: Path) -> Target:
    path = place / "model.safetensors"
    examples = [saved(small_state(), {"format": "pt"}), saved({"a": torch.ones(2, 3)}), saved({})]
    parts = [(data[8 : 8 + int.from_bytes(data[:8], "little")], data) for data in examples]
    data = [whole[8 + len(header) :] for header, whole in parts]

    def read(case: bytes) -> None:
        path.write_bytes(case)
        container, file, refs = open_weights(path)
        assert container == "safetensors"
        assert_lie_in_their_file(refs, file.size)
        try:
            reference = dict(safetensors.deserialize(case))  # type: ignore[no-untyped-call]
        except safetensors.SafetensorError as error:  # half a character in a name, NaN where nobody reads it
            if "invalid JSON" not in str(error):
                raise
            return
        assert refs.keys() == reference.keys()
        for name, ref in refs.items():
            entry, start = reference[name], ref.views[0].offset
            assert (ref.dtype, list(ref.shape)) == (entry["dtype"], entry["shape"])
            assert case[start : start + ref.nbytes] == entry["data"]

    def spoil(random: Random) -> bytes:
        way = random.random()
        if way < 0.3:
            return spoiled(random, examples, WORDS)
        if way < 0.4:  # a length that nothing bears out
            length = random.choice([*INTEGERS, random.randrange(1 << 27)])
            return length.to_bytes(8, "little") + random.choice(examples)[8:]
        number = random.randrange(len(parts))
        header = spoiled(random, [parts[number][0]], WORDS)
        return framed(header, random.choice(data))

    near = documents(json.loads(parts[0][0])).map(lambda document: framed(as_json(document), data[0]))
    return Target(examples, read, spoil, near)


PICKLE_WORDS = [
    *(entry.code.encode("latin-1") for entry in pickletools.opcodes),
    *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n"),
    *(b"ctorch\nFloatStorage\n", b"ctorch\nHalfStorage\n", b"ctorch\nLongStorage\n", b"cos\nsystem\n"),
    *(b"X\x00\x00\x00\x00", b"X\x07\x00\x00\x00storage", b"K\x00", b"J\xff\xff\xff\xff", b"\x8a\x09" + b"\xff" * 9),
    *(b"h\x00", b"q\x00", b"h\x01", b"q\x01", b"j\x00\x00\x00\x00", b"r\x00\x00\x00\x00", b"G\x7f\xf0" + b"\0" * 6),
]
ZIP_WORDS = [
    *(b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x07\x08"),
    *(b"\x01\x00\x08\x00", b"\xff\xff\xff\xff", b"\xff\xff", b"data.pkl", b"data/0", b"byteorder", b"constants.pkl"),
    *(b"archive/", b"code/", b"/", b"\x00\x08\x08\x00"),
]


def archived(records: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip archive of these records, with their right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in records:
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def records_of(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def resized(random: Random, data: bytes) -> bytes:
    """An archive that says in both places where it does that a record has another size, or is elsewhere."""
    places = [[found.start() for found in re.finditer(sign, data)] for sign in (rb"PK\x03\x04", rb"PK\x01\x02")]
    here, listed = random.choice(list(zip(*places, strict=False)))
    (size,) = struct.unpack_from("<I", data, here + 22)
    number = random.choice(
        [*INTEGERS[:-2], size + 1, size * 2, size + random.randrange(5000), random.randrange(len(data))]
    )
    changed = bytearray(data)
    for place in (here + 18, here + 22, listed + 20, listed + 24) if random.random() < 0.7 else (listed + 42,):
        struct.pack_into("<I", changed, place, number % (1 << 32))
    return bytes(changed)


def spoiled_archive(random: Random, examples: Sequence[bytes]) -> bytes:
    """The archive's bytes changed; or its pickle, in an archive that is whole; or its records."""
    way = random.random()
    if way < 0.3:
        return spoiled(random, examples, ZIP_WORDS)
    if way < 0.4:
        return resized(random, random.choice(examples))
    records = records_of(random.choice(examples))
    if way < 0.9:
        pickles = [data for name, data in records if name.endswith("data.pkl")]
        changed = spoiled(random, pickles, PICKLE_WORDS)
        return archived([(name, changed if name.endswith("data.pkl") else data) for name, data in records])
    place = random.randrange(len(records))
    name, data = records[place]
    other, changed = random.choice(records)
    records[place] = random.choice(
        [(name, spoiled(random, [data or b"0"], ZIP_WORDS)), (name, changed), (f"x{other}", data)]
    )
    return archived(records)


SIZES = st.integers(-1, 9) | st.sampled_from([24, 25, 2**31, 2**62, 2**63, 2**64, True, None])


@st.composite
def described_archives(draw: st.DrawFn) -> bytes:
    """Archives that are whole, whose tensors lie where no tensor can."""
    kinds = st.sampled_from([torch.FloatStorage, torch.HalfStorage, torch.LongStorage, torch.BoolStorage])
    state = {
        name: Described(
            tuple(draw(st.lists(SIZES, max_size=3))),
            tuple(draw(st.lists(SIZES, max_size=3))),
            draw(SIZES),
            Storage(draw(kinds), draw(st.sampled_from(["0", "1", 0])), draw(st.sampled_from([24, 12, 0, 2**62]))),
        )
        for name in draw(st.lists(st.text(max_size=3), max_size=2, unique=True))
    }
    return archived(
        [("archive/data.pkl", pickled(state)), ("archive/data/0", bytes(96)), ("archive/data/1", bytes(24))]
    )


def torch_saved(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def assert_is_what_torch_loads(path: Path, refs: Mapping[str, TensorRef]) -> None:
    """What PyTorch reads too, which wants records that are of no use here, it reads alike."""
    try:
        with zipfile.ZipFile(path) as archive, warnings.catch_warnings():
            if archive.testzip() is not None:  # of damaged data it may make whatever its memory holds
                return
            warnings.simplefilter("ignore")
            state = torch.load(path, weights_only=True)
    except Exception:  # there are dozens
        return
    assert list(state) == list(refs)
    with open_source(path) as source:
        for name, ref in refs.items():
            assert tuple(state[name].shape) == ref.shape
            assert row_major_bytes(state[name]) == read_tensor(source, ref, 64)


def torch_file(place: Path) -> Target:
    path = place / "pytorch_model.bin"
    whole = torch.arange(24.0).reshape(4, 6)
    module = torch.nn.Linear(3, 2)
    examples = [
        torch_saved(small_state()),
        torch_saved(
            {"whole": whole, "transposed": whole.t(), "row": whole[2], "step": whole[:, ::2], "none": whole[4:]}
        ),
        torch_saved(module.state_dict()),
        torch_saved({"parameter": torch.nn.Parameter(torch.zeros(2)), "repeated": torch.zeros(1).expand(5, 2)}),
    ]

    def read(case: bytes) -> None:
        path.write_bytes(case)
        container, file, refs = open_weights(path)
        assert container == "torch"
        assert_lie_in_their_file(refs, file.size)
        assert_is_what_torch_loads(path, refs)

    return Target(examples, read, lambda random: spoiled_archive(random, examples), described_archives())


# what lies beside the weights


def in_directory(place: Path, name: str, sources: Sequence[Path]) -> Callable[[bytes], Path]:
    """A function that puts a case under a name into a directory with these files, and gives the directory."""
    directory = place / "beside"
    directory.mkdir()
    for path in sources:
        shutil.copy(path, directory)

    def put(case: bytes) -> Path:
        (directory / name).write_bytes(case)
        return directory

    return put


def numbered(goods: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Documents near one of these, whose number is the first byte."""
    numbers = st.integers(0, len(goods) - 1)
    return numbers.flatmap(
        lambda number: documents(goods[number]).map(lambda document: bytes([number]) + as_json(document))
    )


def index_file(place: Path) -> Target:
    whole = save(
        place / "index", {f"layers.{n}.weight": torch.ones(2) for n in range(6)}, container="safetensors", shards=2
    )
    name = "model.safetensors.index.json"
    good = (whole / name).read_bytes()
    put = in_directory(place, name, list(whole.iterdir()))

    def read(case: bytes) -> None:
        directory = put(case)
        checkpoint = open_checkpoint(directory)
        assert {file.path.parent for file in checkpoint.files} == {directory}
        placed = load_strict(case)["weight_map"]
        assert {name: ref.views[0].file.name for name, ref in checkpoint.tensors.items()} == placed
        for file in placed.values():
            assert_names_a_file_here(file)
        assert len(open_checkpoint(directory / name).tensors) == len(placed)

    near = documents(json.loads(good)).map(as_json)
    return Target([good], read, lambda random: spoiled(random, [good], WORDS), near)


def assert_can_be_written(delta: Checkpoint) -> None:
    """The files beside a checkpoint, fitted to a result: each a JSON table again where it was one."""
    problems, _ = check(delta)
    refuse(problems)
    for companion in collect(delta, "F16"):
        if isinstance(companion.content, bytes) and companion.name.endswith(".json"):
            assert isinstance(json.loads(companion.content), dict)
            assert companion.changes


def config_file(place: Path) -> Target:
    state = {
        "model.embed_tokens.weight": torch.ones(160, 4),
        "lm_head.weight": torch.ones(160, 4),
        "norm": torch.ones(4),
    }
    whole = save(place / "config", state, container="safetensors")
    put = in_directory(place, "config.json", [whole / "model.safetensors"])
    examples = [as_json(CONFIG), as_json(CONFIG | {"_name_or_path": "/home/a", "torch_dtype": "float32"})]

    def read(case: bytes) -> None:
        checkpoint = open_checkpoint(put(case))
        assert checkpoint.config == load_strict(case)
        assert checkpoint.weights.keys() <= checkpoint.tensors.keys()
        assert_can_be_written(checkpoint)

    near = documents(CONFIG).map(as_json)
    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), near)


TOKENIZER_CONFIG = {
    "add_bos_token": True, "bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "", "unk_token": None,
    "model_max_length": 2048, "tokenizer_class": "LLaMATokenizer",
}  # fmt: skip
TOKENIZER_FILES = {
    "tokenizer.json": {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
        "added_tokens": [{"content": "c"}],
    },
    "tokenizer_config.json": TOKENIZER_CONFIG,
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": ""},
    "added_tokens.json": {"[PAD]": 2},
    "generation_config.json": {"_from_model_config": True, "bos_token_id": 1},
}


def tokenizer_tables(place: Path) -> Target:
    """The first byte says which of the files has the rest."""
    names = list(TOKENIZER_FILES)
    whole = save(place / "tokenizer", {"model.embed_tokens.weight": torch.ones(160, 4)}, container="safetensors")
    put = in_directory(place, "tokenizer.model", [whole / "model.safetensors", whole / "config.json"])
    directory = put(b"\n\0")
    examples = [bytes([number]) + as_json(TOKENIZER_FILES[name]) for number, name in enumerate(names)]

    def read(case: bytes) -> None:
        for name in names:
            (directory / name).write_bytes(as_json(TOKENIZER_FILES[name]))
        (directory / names[case[0] % len(names) if case else 0]).write_bytes(case[1:])
        problems: list[Problem] = []
        tokens = read_tokenizer(open_checkpoint(directory), problems).tokens
        assert tokens is None or type(tokens) is int
        assert_can_be_written(open_checkpoint(directory))

    near = numbered(list(TOKENIZER_FILES.values()))
    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), near)


def tokenizer_model(place: Path) -> Target:
    whole = save(place / "pieces", {"model.embed_tokens.weight": torch.ones(160, 4)}, container="safetensors")
    put = in_directory(place, "tokenizer.model", [whole / "model.safetensors", whole / "config.json"])
    examples = [b"".join(b"\n" + bytes([len(piece)]) + piece for piece in (b"\n\1a", b"\n\2bc", b"")) + b"\x12\2\1\1"]

    def read(case: bytes) -> None:
        checkpoint = open_checkpoint(put(case))
        tokens = read_tokenizer(checkpoint, []).tokens
        assert_can_be_written(checkpoint)
        if tokens is None:
            refuse([Problem("tokenizer", "", "it is not counted")])
        assert 0 < (tokens or 0) <= len(case)

    return Target(examples, read, lambda random: spoiled(random, examples, [b"\n", b"\x80", b"\x12", b"\xff" * 5]))


META = Size(dim=16, layers=1, heads=2, kv_heads=2, inner=32, words=8)


def params_file(place: Path) -> Target:
    folder = save_meta(place / "params", random_model(META), META, 2)
    good = (folder / "params.json").read_bytes()
    put = in_directory(place, "params.json", list(folder.iterdir()))

    def read(case: bytes) -> None:
        directory = put(case)
        checkpoint = open_checkpoint(directory)
        for file in checkpoint.files:
            refs = {
                f"{name}-{place}": TensorRef(ref.dtype, view.shape, (view,))
                for name, ref in checkpoint.tensors.items()
                for place, view in enumerate(ref.views)
                if view.file == file.path
            }
            assert_lie_in_their_file(refs, file.size)
        assert (checkpoint.config or {})["hidden_size"] == META.dim
        to_json(checkpoint.config or {})

    near = documents(json.loads(good)).map(as_json)
    return Target([good], read, lambda random: spoiled(random, [good], WORDS), near)


def meta_part(place: Path) -> Target:
    """Only the pickle is spoiled: of all shapes, few make a model."""
    folder = save_meta(place / "part", random_model(META), META, 1)
    shapes = {name: ref.shape for name, ref in open_checkpoint(folder).tensors.items()}
    part = "consolidated.00.pth"
    records = records_of((folder / part).read_bytes())
    (pickle,) = (data for name, data in records if name.endswith("data.pkl"))
    put = in_directory(place, part, [folder / "params.json"])

    def read(case: bytes) -> None:
        checkpoint = open_checkpoint(
            put(archived([(name, case if data is pickle else data) for name, data in records]))
        )
        assert {name: ref.shape for name, ref in checkpoint.tensors.items()} == shapes

    return Target([pickle], read, lambda random: spoiled(random, [pickle], PICKLE_WORDS))


# records


def rebuilt(place: Path) -> Path:
    """A model of ours, of three files."""
    base, delta = save(place / "base", llama(1), shards=2), save(place / "delta", llama(2, 0.01), shards=2)
    apply(base, delta, place / "model", max_shard_size=3 * SHARD)
    return place / "model"


def assert_is_a_record(expected: Expectation) -> None:
    for name, tensor in (expected.tensors or {}).items():
        assert name.isprintable()
        assert tensor.name == name
        assert tensor.dtype in DTYPES
        assert all(type(size) is int and size >= 0 for size in tensor.shape)
        assert re.fullmatch("[0-9a-f]{64}", tensor.sha256)
    if expected.tensors is not None:
        assert expected.weights_digest == weights_digest(expected.tensors.values())
    for name, file in expected.files.items():
        assert_names_a_file_here(name)
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        assert file.md5 is None or re.fullmatch("[0-9a-f]{32}", file.md5)
        assert file.size is None or type(file.size) is int


def small_manifest(place: Path) -> bytes:
    base = save(place / "small-base", small_floats())
    delta = save(place / "small-delta", {name: tensor / 8 for name, tensor in small_floats().items()})
    apply(base, delta, place / "small")
    return (place / "small" / "bayling-delta.json").read_bytes()


def small_floats() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.arange(6.0).reshape(2, 3).half(), "b.bias": torch.ones(2)}


def manifest_file(place: Path) -> Target:
    registry = load_releases()
    path = place / "bayling-delta.json"
    example = small_manifest(place)

    def read(case: bytes) -> None:
        path.write_bytes(case)
        expected = read_manifest(path)
        assert_is_a_record(expected)
        assert expected.tensors is not None
        entry_from_manifest(path, registry, name="of-my-own")

    near = documents(json.loads(example)).map(as_json)
    return Target([example], read, lambda random: spoiled(random, [example], WORDS), near)


def digest_argument(_: Path) -> Target:
    examples = [f"sha256:{digest(5)}".encode(), digest(1 << 250).upper().encode()]

    def read(case: bytes) -> None:
        try:
            found = parse_digest(case.decode("utf-8", "surrogateescape"))
        except ValueError as error:  # which the command line turns into an exception of ours
            raise OutputError(Problem("option", "--expect", str(error))) from error
        assert re.fullmatch("sha256:[0-9a-f]{64}", found)

    return Target(examples, read, lambda random: spoiled(random, examples, [b"sha256:", b" ", "\u0660".encode()]))


LIST_WORDS = [b"\n", b"\r\n", b"  ", b" *", b"../", b"/", b"\\", b"\0", b"\xff", b"\xed\xa0\x80"]


def list_of_digests(name: str, digits: int) -> Callable[[Path], Target]:
    def target(place: Path) -> Target:
        put = in_directory(place, name, [])
        files = ["config.json", "pytorch_model-00001-of-00002.bin", "模型.bin"]
        text = "".join(f"{digest(number, digits)}  {file}\n" for number, file in enumerate(files))
        examples = [text.encode(), text.replace("  ", " *").replace("\n", "\r\n").encode("utf-8-sig")]

        def read(case: bytes) -> None:
            directory = put(case)
            (expected,) = own_expectations(directory)
            assert expected.files
            assert_is_a_record(expected)
            if digits == 64:
                assert read_sums(directory / name) == expected

        words = [*LIST_WORDS, digest(3, digits).encode()]
        return Target(examples, read, lambda random: spoiled(random, examples, words))

    return target


def metadata_of_the_hub(place: Path) -> Target:
    directory = place / "local"
    metadata = directory / ".cache" / "huggingface" / "download" / "model.bin.metadata"
    metadata.parent.mkdir(parents=True)
    (directory / "model.bin").write_bytes(b"weights")
    examples = [
        f"{digest(1, 40)}\n{etag}\n{time}\n".encode() for etag in (digest(2), digest(2, 40)) for time in (1e9, 9e9)
    ]

    def read(case: bytes) -> None:
        metadata.write_bytes(case)
        found = expected_sha256(directory / "model.bin")
        if found is None:
            refuse([Problem("record", "", "it is a hint, which is not taken")])
        assert re.fullmatch("[0-9a-f]{64}", found or "")
        assert (found or "").encode() in case

    words = [b"\n", b"nan", b"inf", b"1e999", b"-1", b"_", b"\r", "\u0661".encode()]
    return Target([examples[1]], read, lambda random: spoiled(random, examples, words))


# the registry


def entries() -> list[bytes]:
    """Some that come with the program, under names of their own."""
    known = load_releases()
    found: list[bytes] = []
    for name in ("bayling-7b-diff", "gpt4-x", "vicuna-7b-v1.1"):
        release = known.get(name)
        forms = tuple(replace(form, hub=()) for form in release.forms)
        found.append(as_json(entry_document(replace(release, name=f"my-{name}", aliases=(), forms=forms))))
    return found


def registry_entry(_: Path) -> Target:
    examples = entries()

    def read(case: bytes) -> None:
        try:
            document = load_strict(case)
        except ValueError as error:
            raise OutputError(Problem("registry", "", str(error))) from error
        if not isinstance(document, dict):
            raise OutputError(Problem("registry", "", "no table"))
        release, faults = read_entry(document)
        refuse([Problem("registry", "", fault) for fault in faults])
        assert release is not None
        assert read_entry(json.loads(to_json(entry_document(release)))) == (release, [])

    near = st.sampled_from([json.loads(example) for example in examples]).flatmap(documents).map(as_json)
    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), near)


def registry(place: Path) -> Target:
    path = place / "mine.json"
    examples = entries()

    def read(case: bytes) -> None:
        path.write_bytes(case)
        (own,) = load_releases([path]).own
        release = load_releases([path]).get(own)
        assert release.name == own

    near = st.sampled_from([json.loads(example) for example in examples]).flatmap(documents).map(as_json)
    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), near, spare_bytes=16 * MIB)


# an unfinished output


def left_by_a_run(place: Path) -> tuple[Path, Path]:
    """The pair of a run that was ended, and its output."""
    pair = save(place / "base", llama(1), shards=2), save(place / "delta", llama(2, 0.01), shards=2)
    end_before(2, pair, place / "out")
    return pair


def journal_file(place: Path) -> Target:
    left_by_a_run(place)
    good = (partial_path(place / "out") / "journal").read_bytes()
    path, again = place / "journal", place / "again"
    lines = documents_of(good)

    def read(case: bytes) -> None:
        path.write_bytes(case)
        found = read_journal(path)
        assert found is not None
        head, finished = found
        for entry in finished:
            assert_names_a_file_here(entry.name)
            digests = [entry.sha256, *entry.parts.values()]
            if isinstance(entry, FinishedFile):
                assert all(type(count) is int and count > 0 for count in (entry.size, *entry.non_finite.values()))
                digests += [*entry.tensors.values(), *entry.base.values(), *entry.delta.values()]
            else:
                assert entry.role in ("base", "delta")
            assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
        write_journal(again, head, finished)
        assert read_journal(again) == found

    near = documents(lines).map(as_lines)
    return Target([good], read, lambda random: spoiled_lines(random, good), near)


def as_lines(documents: Sequence[Any]) -> bytes:
    return b"".join(signed(as_json(document)) for document in documents)


def spoiled_lines(random: Random, good: bytes) -> bytes:
    """A journal with something wrong in it; of four, three whose lines are what somebody wrote so."""
    spoilt = spoiled(random, [good], WORDS)
    return signed_again(spoilt) if random.random() < 0.75 else spoilt


def journal_to_go_on_with(place: Path) -> Target:
    """The right weights come out, or nothing does."""
    pair = left_by_a_run(place)
    out, left = place / "out", place / "left"
    partial_path(out).rename(left)
    good = (left / "journal").read_bytes()
    apply(*pair, place / "whole", max_shard_size=SHARD)
    wanted = facts(place / "whole")["result"]

    def read(case: bytes) -> None:
        shutil.copytree(left, partial_path(out))
        (partial_path(out) / "journal").write_bytes(case)
        try:
            apply(*pair, out, max_shard_size=SHARD, memory_limit=4 * MIB)
            assert facts(out)["result"] == wanted
            verify(out)
        finally:
            for directory in (out, partial_path(out)):
                shutil.rmtree(directory, ignore_errors=True)

    near = documents(documents_of(good)).map(as_lines)
    return Target([good], read, lambda random: spoiled_lines(random, good), near, spare_bytes=16 * MIB)


def lock_file(place: Path) -> Target:
    """What a run says of another that holds the lock."""
    out = place / "locked"
    examples = [b'{"pid": 17, "started": "2026-01-01T00:00:00+00:00"}']
    lock = partial_path(out) / "lock"
    lock.parent.mkdir()

    def read(case: bytes) -> None:
        lock.write_bytes(case)
        handle = system.calls.open_update(lock)
        assert system.calls.lock(handle)
        with pytest.raises(OutputError, match="is being written by another run") as refused, staged_directory(out):
            pass
        system.calls.close(handle)
        if ", process " not in str(refused.value):
            raise refused.value

    near = documents(json.loads(examples[0])).map(as_json)
    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), near)


# all together


def pair_to_add(place: Path) -> Target:
    """The first byte says which file of a base and a delta has the rest."""
    base = save(place / "b", llama(1), shards=2)
    delta = save(place / "d", llama(2, 0.01), container="safetensors", shards=2)
    for name, table in TOKENIZER_FILES.items():
        (delta / name).write_bytes(as_json(table))
    (delta / "bayling-delta.json").write_bytes(small_manifest(place))
    paths = [path for side in (base, delta) for path in sorted(side.iterdir()) if path.suffix == ".json"]
    whole = {path: path.read_bytes() for path in paths}
    examples = [bytes([number]) + data for number, data in enumerate(whole.values())]

    def read(case: bytes) -> None:
        path = paths[case[0] % len(paths) if case else 0]
        path.write_bytes(case[1:])
        try:
            to_json(inspect_checkpoint(path.parent))
            plan = plan_apply(base, delta, place / "sum", allow=["tokenizer"])
            assert {tensor.name for file in plan.files for tensor in file.tensors} >= {"lm_head.weight"}
        finally:
            path.write_bytes(whole[path])

    near = numbered([json.loads(data) for data in whole.values()])
    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), near, spare_bytes=16 * MIB)


def model_to_verify(place: Path) -> Target:
    """The first byte says which file of a model of ours has the rest."""
    model = rebuilt(place)
    paths = [path for path in sorted(model.iterdir()) if path.suffix == ".json" or path.name == "SHA256SUMS"]
    whole = {path: path.read_bytes() for path in paths}
    examples = [bytes([number]) + data for number, data in enumerate(whole.values())]

    def read(case: bytes) -> None:
        path = paths[case[0] % len(paths) if case else 0]
        path.write_bytes(case[1:])
        try:
            verify(model, memory_limit=4 * MIB)
            assert path.read_bytes() == whole[path]
        finally:
            path.write_bytes(whole[path])

    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), spare_bytes=16 * MIB)


def manifest_to_repair_by(place: Path) -> Target:
    """What says how a model was made; what the model is, is left alone, or there would be nothing to do."""
    model = rebuilt(place)
    manifest = json.loads((model / "bayling-delta.json").read_text())
    result = manifest.pop("result")
    whole = {path: path.read_bytes() for path in sorted(model.iterdir())}
    examples = [as_json(manifest)]

    def read(case: bytes) -> None:
        for path, data in whole.items():
            path.write_bytes(data)
        (model / "README.md").unlink()
        (model / "SHA256SUMS").unlink()
        (model / "config.json").write_text("{}")
        try:
            said = load_strict(case)
        except ValueError as error:
            raise OutputError(Problem("record", "", str(error))) from error
        document = said | {"result": result} if isinstance(said, dict) else said
        (model / "bayling-delta.json").write_bytes(as_json(document))
        repair(model, base=place / "base", delta=place / "delta", memory_limit=4 * MIB)
        assert (model / "config.json").read_bytes() == whole[model / "config.json"]

    near = documents(manifest).map(as_json)
    return Target(examples, read, lambda random: spoiled(random, examples, WORDS), near, spare_bytes=16 * MIB)


TARGETS: dict[str, tuple[Callable[[Path], Target], int]] = {
    "a safetensors file": (safetensors_file, 18_000),
    "a .bin file": (torch_file, 22_000),
    "an index": (index_file, 6_000),
    "config.json": (config_file, 6_000),
    "params.json": (params_file, 2_000),
    "a part of Meta's": (meta_part, 3_000),
    "a tokenizer's tables": (tokenizer_tables, 3_000),
    "tokenizer.model": (tokenizer_model, 2_000),
    "a manifest": (manifest_file, 9_000),
    "a digest": (digest_argument, 2_000),
    "SHA256SUMS": (list_of_digests("SHA256SUMS", 64), 3_000),
    "checklist.chk": (list_of_digests("checklist.chk", 32), 2_000),
    "metadata of the Hub": (metadata_of_the_hub, 2_000),
    "an entry of the registry": (registry_entry, 7_000),
    "the registry": (registry, 700),
    "a journal": (journal_file, 9_000),
    "a journal to go on with": (journal_to_go_on_with, 500),
    "a lock": (lock_file, 1_500),
    "a pair to add": (pair_to_add, 500),
    "a model to verify": (model_to_verify, 500),
    "a manifest to repair by": (manifest_to_repair_by, 300),
}
"""What is fed, and how many cases of a hundred thousand it gets."""


@pytest.fixture
def campaign(request: pytest.FixtureRequest, tmp_path: Path) -> Campaign:
    return Campaign(request.param, TARGETS[request.param][0](tmp_path))


def test_the_long_suite_has_100_000_cases() -> None:
    assert sum(cases for _, cases in TARGETS.values()) == 100_000


@pytest.mark.parametrize("campaign", TARGETS, indirect=True)
def test_a_few_cases(campaign: Campaign) -> None:
    campaign.measured = 5
    campaign.run(TARGETS[campaign.name][1] * SHORT_CASES // 100_000, SEED)


@pytest.mark.long
@pytest.mark.parametrize("campaign", TARGETS, indirect=True)
def test_many_cases(campaign: Campaign, record_property: Callable[[str, object], None]) -> None:
    campaign.run(TARGETS[campaign.name][1] * LONG_CASES // 100_000, SEED + 1)
    record_property("cases", {"accepted": campaign.accepted, "refused": campaign.refused})
    assert campaign.accepted
    assert campaign.refused
