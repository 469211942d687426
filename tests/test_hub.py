"""Ids of the Hub, against a server on this machine that speaks its API."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils.tqdm import are_progress_bars_disabled

from bayling_delta import apply, inspect_checkpoint, plan_apply, record, system, verify
from bayling_delta.cli import main
from bayling_delta.errors import BaylingDeltaError, CheckpointError, IntegrityError, OutputError
from bayling_delta.hub import HubId, local_copies, parse_id
from bayling_delta.system import System
from tests.hub_server import SIGNATURE, TOKEN, Handler, Hub, answers, cuts, serve
from tests.pairs import assert_same, llama, load, published_sum, save, shuffled

BASE, DELTA = Path("meta/llama"), Path("lab/some.delta-7b")
FIRST, SECOND = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
INDEX = "pytorch_model.bin.index.json"
SAFE = "model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directories that are published: a base in two ``.bin`` files, a delta in both containers."""
    place = tmp_path_factory.mktemp("published")
    save(place / "base", llama(1), shards=2)
    save(place / "delta", llama(2, 0.01), container="safetensors")
    save(place / "other", llama(2, 0.01), shards=2, config=None)
    for file in (place / "other").iterdir():
        file.rename(place / "delta" / file.name)
    (place / "delta" / "tokenizer.model").write_bytes(b"pieces")
    for name in ("original", "onnx"):
        (place / "delta" / name).mkdir()
    for name in (
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "model.gguf",
        "logo.png",
        "tf_model.h5",
        "README.md",
    ):
        (place / "delta" / name).write_bytes(b"what nobody needs")
    return place


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty Hub, and huggingface_hub set to use it, with a cache that is empty too."""
    with serve() as hub:
        home = tmp_path / "hf"
        settings = {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "AGENT_HARNESSES_PATH": str(home / "harnesses"),
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        wait = time.sleep
        monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.01)))  # before it tries again
        monkeypatch.chdir(tmp_path)
        yield hub
        huggingface_hub.close_session()


@dataclass
class Published:
    hub: Hub
    base: str
    delta: str
    """Commits."""
    cache: Path

    def snapshot(self, path: Path = BASE, commit: str = "") -> Path:
        folder = "models--" + str(path).replace("/", "--")
        return self.cache / folder / "snapshots" / (commit or (self.base if path == BASE else self.delta))


@pytest.fixture
def there(hub: Hub, folders: Path) -> Published:
    """A base and a delta on the Hub."""
    base, delta = (hub.publish(str(id_), folders / name) for id_, name in ((BASE, "base"), (DELTA, "delta")))
    return Published(hub, base, delta, Path(constants.HF_HUB_CACHE))


def kinds(error: pytest.ExceptionInfo[BaylingDeltaError]) -> list[str]:
    return [problem.kind for problem in error.value.problems]


def sum_of_both() -> dict[str, torch.Tensor]:
    return published_sum(llama(1), llama(2, 0.01))


# what an id is

IDS = [
    ("owner/name", ("owner/name", "main", None)),
    ("Owner-1/a_b.7B-v1.1@v1.0", ("Owner-1/a_b.7B-v1.1", "v1.0", None)),
    ("owner/name@refs/pr/1", ("owner/name", "refs/pr/1", None)),
    ("owner/name@v1.0+cu118", ("owner/name", "v1.0+cu118", None)),
    (f"owner/name@{'0' * 40}", ("owner/name", "0" * 40, None)),
    (f"owner/name/{INDEX}", ("owner/name", "main", INDEX)),
    (f"owner/name@refs/pr/1/{SAFE}", ("owner/name", "refs/pr/1", SAFE)),
    *((text, None) for text in (
        "name", "../owner/name", "/owner/name", "~/owner", "owner/name/more", "owner/..", "owner/",
        "owner--more/name", "owner/na me", "owner/name@", "owner/name@a@b", "base/pytorch_model.bin", "a/config.json",
        "base/model.safetensors", "owner/näme", "C:/name", "owner/name@../main", "owner/name@a/../b",
        "owner/name@a..b", "owner/name@-f", "owner/name@ma\udcffin", "owner/name@a b", "owner/name@main\n",
        "owner/name@a:b", "owner/name@$x", "owner/name\n", "",
    )),
]  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), IDS, ids=[repr(text) for text, _ in IDS])
def test_what_an_id_is(text: str, parts: tuple[str, str, str | None] | None) -> None:
    assert parse_id(Path(text)) == (HubId(text, *parts) if parts else None)


def test_what_is_on_the_disk_is_no_id(there: Published, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / save(tmp_path / "mine", llama(3)), BASE)
    assert local_copies([BASE]) == [BASE]
    (tmp_path / DELTA.parent).mkdir()
    DELTA.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="neither a regular file nor a directory"):
        apply(BASE, DELTA, tmp_path / "out")
    assert there.hub.requests == []


# fetching


def test_a_cold_cache_gets_what_is_needed_and_no_more(there: Published, tmp_path: Path) -> None:
    told: list[str] = []
    manifest = apply(BASE, DELTA, tmp_path / "out", tell=told.append)
    assert_same(load(tmp_path / "out"), sum_of_both())
    assert there.hub.bodies().keys() == {"config.json", INDEX, FIRST, SECOND, SAFE, "tokenizer.model"}
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"
    names = [manifest["inputs"][side]["name"] for side in ("base", "delta")]
    assert names == [f"{BASE}@{there.base}", f"{DELTA}@{there.delta}"]
    assert f"The delta, {DELTA}@{there.delta} (safetensors)" in (tmp_path / "out" / "README.md").read_text()
    text = "\n".join(told)
    assert f"{BASE}@{there.base}: 0.2 MB of weights are fetched into {there.cache}" in text
    assert f"fetching {SECOND}, 0.1 MB" in text


def test_a_warm_cache_is_not_fetched_again(there: Published, tmp_path: Path) -> None:
    apply(BASE, DELTA, tmp_path / "out")
    there.hub.forget()
    apply(BASE, DELTA, tmp_path / "out-2")
    assert there.hub.bodies() == {}
    asked = {request.file for request in there.hub.requests if request.file}
    assert asked == {"config.json"}  # which commit "main" is, for huggingface_hub to remember


def test_a_commit_is_not_asked_for_its_name(there: Published) -> None:
    pinned = Path(f"{BASE}@{there.base}")
    assert local_copies([pinned]) == [there.snapshot()]
    there.hub.forget()
    local_copies([pinned])
    assert [request.file for request in there.hub.requests if "/api/models" not in request.path] == []


def test_a_token_goes_to_the_hub_alone(there: Published, tmp_path: Path) -> None:
    apply(BASE, DELTA, tmp_path / "out")
    sent = {(request.path.startswith("/cdn/"), request.token) for request in there.hub.requests if request.file}
    assert sent == {(True, None), (False, f"Bearer {TOKEN}")}


@pytest.mark.parametrize(
    ("file", "needed"),
    [(INDEX, {INDEX, FIRST, SECOND}), ("model.safetensors", {SAFE}), (FIRST, {FIRST})],
)
def test_a_file_that_is_named_is_what_is_fetched(there: Published, file: str, needed: set[str]) -> None:
    (place,) = local_copies([DELTA / file])
    assert place == there.snapshot(DELTA) / file
    assert there.hub.bodies().keys() == needed | {"config.json", "tokenizer.model"}


def test_the_index_says_which_shards(there: Published, folders: Path) -> None:
    """Not the names: a repository may have shards of an older cut beside those of its index."""
    stale = {"pytorch_model-00001-of-00033.bin": b"stale", "pytorch_model-99-of-33.bin": b"stale"}
    there.hub.publish("lab/stale", folders / "base", stale)
    local_copies([Path("lab/stale")])
    assert there.hub.bodies().keys() == {"config.json", INDEX, FIRST, SECOND}


def test_records_of_the_publisher_are_fetched_and_held_against_it(
    there: Published, folders: Path, tmp_path: Path
) -> None:
    made = tmp_path / "made"
    apply(folders / "base", folders / "delta", made)
    there.hub.publish("lab/made", made)
    document = verify(Path("lab/made"))
    against = [entry["against"] for entry in document["compared"]]
    assert [Path(source).name for source in against[:2]] == ["bayling-delta.json", "SHA256SUMS"]
    assert against[2].startswith("the Hub's record of lab/made@")


def test_a_connection_that_is_cut_is_resumed(there: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has arrived is kept by the chunk
    there.hub.faults.append(cuts(FIRST, times=1))
    apply(BASE, DELTA, tmp_path / "out")
    assert_same(load(tmp_path / "out"), sum_of_both())
    pieces = [request for request in there.hub.requests if request.file == FIRST and request.sent]
    size = (there.snapshot() / FIRST).stat().st_size
    assert [piece.range for piece in pieces] == [None, f"bytes={size // 2 // 1000 * 1000}-"]
    assert sum(piece.sent for piece in pieces) < size + 1000


def test_a_download_that_fails_keeps_what_is_complete(there: Published) -> None:
    there.hub.faults.append(answers(503, to=f"/{SECOND}"))
    with pytest.raises(
        CheckpointError, match=rf"{SECOND} is not in the Hub's cache, and 127\.0\.0\.1 has a fault"
    ) as error:
        local_copies([BASE])
    assert kinds(error) == ["network"]
    there.hub.faults.clear()
    there.hub.forget()
    local_copies([BASE])
    assert there.hub.bodies().keys() == {SECOND}
    assert not list(there.cache.rglob("*.incomplete"))


def test_a_branch_that_moves_meanwhile(there: Published, tmp_path: Path) -> None:
    """What was found at first is what is fetched, all of it."""
    moved: list[str] = []

    def move(handler: Handler) -> bool:
        if "/resolve/" in handler.path and not moved:
            save(tmp_path / "newer", llama(9), shards=2)
            moved.append(there.hub.publish(str(BASE), tmp_path / "newer", {"config.json": b"{}"}))
        return False

    there.hub.faults.append(move)
    manifest = apply(BASE, DELTA, tmp_path / "out")
    assert moved
    assert_same(load(tmp_path / "out"), sum_of_both())
    assert manifest["inputs"]["base"]["name"] == f"{BASE}@{there.base}"


def test_a_file_that_changes_between_two_requests(there: Published) -> None:
    """A mirror that has another file under the same commit."""

    def change(handler: Handler) -> bool:
        if f"/{FIRST}" in handler.path:
            there.hub.commits[str(BASE)][there.base][FIRST] = b"another"
        return False

    there.hub.faults.append(change)
    with pytest.raises(
        CheckpointError, match="is not the file that the Hub said it is; download it again: hf"
    ) as error:
        local_copies([BASE])
    assert kinds(error) == ["changed"]


def test_a_blob_that_is_too_short_is_no_file_of_the_hub(there: Published) -> None:
    local_copies([BASE])
    os.truncate((there.snapshot() / FIRST).resolve(), 1000)
    with pytest.raises(CheckpointError, match=f"hf download {BASE} {FIRST} --revision {there.base} --force-download"):
        local_copies([BASE])


# the Hub says no

REFUSALS = {
    "no such repository": ([], "lab/nothing", "not_found", ("no file or directory here", "no repository", "hf auth")),
    "no such revision": ([], f"{BASE}@v9", "not_found", (f"{BASE} has no revision v9; it has main",)),
    "no such file": ([], f"{BASE}/model.safetensors", "not_found", ("has no model.safetensors",)),
    "an id of nobody": ([], f"lab/{'x' * 200}", "not_found", ("no id that the Hub could have",)),
    "no weights": ([], "lab/words", "not_found", ("has no model*.safetensors and no pytorch_model*.bin",)),
    "gated, without a token": (
        [answers(401, "GatedRepo", to="/resolve/")], str(BASE), "access",
        (f"accept its conditions at https://huggingface.co/{BASE}", "HF_TOKEN"),
    ),
    "gated, and not on the list": ([answers(403, "GatedRepo", to="/resolve/")], str(BASE), "access", ("is gated",)),
    "gated, weights only": ([answers(403, "GatedRepo", to="bin")], str(BASE), "access", (INDEX, "is gated")),
    "a token that is not known": (
        [answers(401, to="/api/models", message="Invalid credentials in Authorization header")], str(BASE), "access",
        ("does not know the token", "hf auth login"),
    ),
    "a token without the right": ([answers(403, to="/api/models")], str(BASE), "access", ("who may have it",)),
    "disabled": (
        [answers(403, to="/resolve/", message="Access to this resource is disabled.")], str(BASE), "access",
        ("has disabled",),
    ),
    "a fault": ([answers(500, to="/api/models")], str(BASE), "network", ("has a fault (HTTP 500)", "run again later")),
    "a fault at a file": ([answers(502, to="/resolve/")], str(BASE), "network", ("config.json", "HTTP 502")),
    "too many requests": ([answers(429, to="/api/models")], str(BASE), "network", ("asks to come back later",)),
    "a file that is gone": ([answers(404, "EntryNotFound", to=FIRST)], str(BASE), "changed", ("a moment ago",)),
    "a page instead of an answer": (
        [lambda handler: handler.reply(b"<html>Log in to this network</html>") is None], str(BASE), "network",
        ("cannot be reached as a Hub",),
    ),
    "a file without a commit": (
        [lambda handler: "/resolve/" in handler.path and handler.reply(b"{}") is None], str(BASE), "network",
        ("config.json", "cannot be reached as a Hub"),
    ),
    "a file cut for good": (
        [lambda handler: "/cdn/" in handler.path and handler.reply(b"short") is None], str(BASE), "incomplete",
        ("came with another size",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("story", REFUSALS)
def test_what_a_user_is_told(
    there: Published, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, story: str
) -> None:
    faults, text, kind, words = REFUSALS[story]
    there.hub.publish("lab/words", folders / "delta" / "onnx", {"README.md": b"words"})
    there.hub.faults += faults
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 5)
    with pytest.raises(SystemExit) as done:
        main(["record", text, "-o", "new.json", "--json"])
    printed = capsys.readouterr()
    assert done.value.code == 3
    (problem,) = json.loads(printed.out)["error"]["problems"]
    assert (problem["kind"], problem["where"]) == (kind, text)
    for word in words:
        assert word in problem["message"]
    said = printed.out + printed.err
    assert TOKEN not in said
    assert SIGNATURE not in said
    assert "Traceback" not in said
    assert printed.err.splitlines()[-1] == f"error: {text}: {problem['message']}"
    assert all(line.startswith("note: ") for line in printed.err.splitlines()[:-1])


def test_a_hub_that_does_not_answer(there: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)

    def sleeps(_: Handler) -> bool:
        time.sleep(0.01)
        import select

        select.select([], [], [], 0.5)
        return False

    there.hub.faults.append(sleeps)
    with pytest.raises(CheckpointError, match=r"cannot be reached as a Hub \(ReadTimeout\)"):
        local_copies([BASE])


def test_everything_that_is_wrong_is_told_before_anything_is_fetched(there: Published, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as error:
        apply(Path("lab/nothing"), Path(f"{DELTA}@v9"), tmp_path / "out")
    assert sorted(kinds(error)) == ["not_found", "not_found", "output_exists"]
    with pytest.raises(OutputError):
        apply(BASE, DELTA, tmp_path / "out")
    assert there.hub.bodies() == {}


# without the Hub


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "no network"])
def test_without_the_hub_the_cache_serves(
    there: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    apply(BASE, DELTA, tmp_path / "out")
    there.hub.forget()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        there.hub.faults.append(answers(503, to="/api"))
    told: list[str] = []
    manifest = apply(BASE, DELTA, tmp_path / "out-2", tell=told.append)
    assert manifest["inputs"]["delta"]["name"] == f"{DELTA}@{there.delta}"
    assert f"{BASE}@{there.base} is taken from the Hub's cache: " in told[0]
    assert how in told[0] or "has a fault" in told[0]
    assert there.hub.bodies() == {}
    assert verify(Path(f"{BASE}@{there.base}"))["ok"]


def test_without_the_hub_and_without_a_cache(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as error:
        apply(BASE, DELTA, tmp_path / "out")
    assert kinds(error) == ["network", "network"]
    what = (
        "is no file or directory here: is it spelled right? As an id of the Hub it is not in the cache, "
        "and HF_HUB_OFFLINE forbids asking the Hub"
    )
    assert str(error.value.problems[0]) == f"{BASE}: {what}"
    assert hub.requests == []


@pytest.mark.parametrize("lacking", ["pointer", "blob"])
def test_without_the_hub_and_with_half_of_it(there: Published, monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    local_copies([BASE])
    shard = there.snapshot() / SECOND
    (shard if lacking == "pointer" else shard.resolve()).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"has no {SECOND}.* HF_HUB_OFFLINE") as error:
        local_copies([BASE])
    assert kinds(error) == ["network"]


# what only looks


@pytest.mark.parametrize("what", ["inspect", "plan"])
def test_what_only_looks_fetches_no_weights(there: Published, tmp_path: Path, what: str) -> None:
    def look() -> Any:
        return inspect_checkpoint(DELTA) if what == "inspect" else plan_apply(BASE, DELTA, tmp_path / "out")

    with pytest.raises(CheckpointError, match=r"0\.2 MB of weights are not in the Hub's cache") as error:
        look()
    (command,) = re.findall(rf"hf download {DELTA} (.+)", str(error.value))
    assert command == f"{SAFE} --revision {there.delta}"
    assert not there.hub.bodies().keys() & {FIRST, SECOND, SAFE}
    for id_, names in ((BASE, [FIRST, SECOND]), (DELTA, [SAFE])):
        commit = there.snapshot(id_).name
        for name in names:
            hf_hub_download(str(id_), name, revision=commit)
    assert look()


# the expected digests


def flip(path: Path, place: int) -> None:
    """Damage a file, keeping its time as a disk that fails would."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def damages(path: Path) -> Iterator[str]:
    """What each command says of the damaged file in a directory."""
    for command in (verify, record):
        with pytest.raises(IntegrityError) as error:
            command(path)
        yield next(str(problem) for problem in error.value.problems if problem.kind == "digest")


def test_a_damaged_blob_is_found_without_any_record(there: Published, tmp_path: Path) -> None:
    local_copies([BASE, DELTA])
    flip((there.snapshot(DELTA) / SAFE).resolve(), -9)
    for side in ((BASE, DELTA), (there.snapshot(), there.snapshot(DELTA))):
        with pytest.raises(IntegrityError) as error:
            apply(*side, tmp_path / "out")
        (problem,) = error.value.problems
        assert (problem.kind, problem.where) == ("digest", str(there.snapshot(DELTA) / SAFE))
        assert f"the Hub's record of {DELTA}@{there.delta} says" in problem.message
        again = f"hf download {DELTA} {SAFE} --revision {there.delta} --force-download"
        assert problem.message.endswith(f"download it again: {again}")
        assert not (tmp_path / "out").exists()
    for path in (DELTA, there.snapshot(DELTA)):
        for message in damages(path):
            assert again in message


def test_verify_finds_damage_in_the_inputs_too(there: Published, folders: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    apply(folders / "base", folders / "delta", made)
    assert verify(made, base=BASE, delta=DELTA)["ok"]
    flip((there.snapshot(DELTA) / SAFE).resolve(), -9)
    with pytest.raises(IntegrityError) as error:
        verify(made, base=BASE, delta=DELTA)
    assert str(there.snapshot(DELTA) / SAFE) in [problem.where for problem in error.value.problems]


def test_an_input_in_another_order_is_read_once_more_for_its_digest(there: Published, tmp_path: Path) -> None:
    state = llama(1)
    save(tmp_path / "shuffled", state, shards=2, order=shuffled(state))
    commit = there.hub.publish("lab/shuffled", tmp_path / "shuffled")
    manifest = apply(Path("lab/shuffled"), DELTA, tmp_path / "out")
    section = manifest["inputs"]["base"]
    snapshot = there.snapshot(Path("lab/shuffled"), commit)
    assert [file["sha256"] for file in section["files"]] == [
        (snapshot / name).resolve().name for name in (FIRST, SECOND)
    ]
    assert section["weights_digest"] == record(snapshot)["result"]["weights_digest"]
    plans = [plan_apply(base, there.snapshot(DELTA), tmp_path / "out-2") for base in (tmp_path / "shuffled", snapshot)]
    unknown, known = (plan.base_reads for plan in plans)
    assert (unknown.files, known.files) == ({}, {file["name"]: file["size"] for file in section["files"]})
    assert known.nbytes - unknown.nbytes <= sum(known.files.values())
    flip((snapshot / FIRST).resolve(), (snapshot / FIRST).read_bytes().index(b"ZZZZ"))
    with pytest.raises(IntegrityError, match="its SHA-256 is"):
        apply(snapshot, DELTA, tmp_path / "out-2")


def test_a_damaged_tokenizer_is_not_copied(there: Published, tmp_path: Path) -> None:
    local_copies([BASE, DELTA])
    flip((there.snapshot(DELTA) / "tokenizer.model").resolve(), 0)
    with pytest.raises(IntegrityError, match=r"tokenizer\.model: its SHA-256 is"):
        apply(BASE, DELTA, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_local_directory_has_expected_digests_too(there: Published, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    for name in ("config.json", INDEX, FIRST, SECOND):
        hf_hub_download(str(BASE), name, local_dir=place)
    there.hub.forget()
    document = verify(place)
    assert document["compared"][0]["what"] == "2 files"
    flip(place / SECOND, (place / SECOND).read_bytes().index(b"ZZZZ"))  # what no checksum of the format covers
    for message in damages(place):
        assert f"the Hub's record in {place / '.cache' / 'huggingface'} says" in message
        assert f"hf download OWNER/NAME {SECOND} --local-dir {place} --force-download" in message
    with pytest.raises(IntegrityError, match=SECOND):
        apply(place, DELTA, tmp_path / "out")


@pytest.mark.usefixtures("there")
def test_another_file_in_its_place_is_not_held_against_the_hub(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    for name in ("config.json", SAFE):
        hf_hub_download(str(DELTA), name, local_dir=place)
    save(tmp_path / "own", llama(5), container="safetensors")
    shutil.copy(tmp_path / "own" / SAFE, place / SAFE)
    os.utime(place / SAFE, (time.time() + 60,) * 2)
    assert record(place)["result"]["files"][0]["name"] == SAFE


# the disk


class FullDisk(System):
    def free_bytes(self, path: Path) -> int:
        return 100_000 if "hf" in path.parts or path.name.startswith("test_") else super().free_bytes(path)


def test_a_disk_too_small_is_seen_before_the_download(there: Published) -> None:
    with system.using(FullDisk()), pytest.raises(OutputError, match="the download needs") as error:
        record(BASE)
    assert kinds(error) == ["disk_space"]
    assert not there.hub.bodies().keys() & {FIRST, SECOND}


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, "disk_space"), (errno.EROFS, "write")])
@pytest.mark.usefixtures("there")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, code: int, kind: str) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), "blob")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", fails)
    with pytest.raises(OutputError, match=r"config\.json cannot be written to the Hub's cache") as error:
        local_copies([BASE])
    assert kinds(error) == [kind]


# what is said on the way


@pytest.mark.usefixtures("there")
def test_settings_of_the_library_are_given_back() -> None:
    before = logging.getLogger("huggingface_hub").level, are_progress_bars_disabled()
    local_copies([BASE])
    assert (logging.getLogger("huggingface_hub").level, are_progress_bars_disabled()) == before


def test_the_program(there: Published, tmp_path: Path) -> None:
    """A process, set by the environment alone: a cut connection, notes on stderr, nothing with --quiet."""
    there.hub.faults.append(cuts(FIRST, times=1))
    settings = {
        "HF_ENDPOINT": there.hub.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
    }
    command = [sys.executable, "-m", "bayling_delta", "apply", "--base", str(BASE), "--delta", str(DELTA), "--out"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], env=os.environ | settings, capture_output=True, text=True, timeout=60)

    done = run("out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["inputs"]["base"]["name"] == f"{BASE}@{there.base}"
    assert [line.split(" ")[:2] for line in done.stderr.splitlines()][1] == ["note:", "fetching"]
    assert TOKEN not in done.stderr
    assert SIGNATURE not in done.stderr
    shutil.rmtree(tmp_path / "hf")
    quiet = run("out-2", "-q")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
