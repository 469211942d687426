"""What huggingface_hub leaves on the disk, as its own functions write it, read back."""

import hashlib
import os
import time
from pathlib import Path

import pytest
from huggingface_hub._local_folder import write_download_metadata
from huggingface_hub.file_download import _create_symlink, repo_folder_name

from bayling_delta.downloads import Origin, download_again, expected_sha256, mended, origin, record_source
from bayling_delta.errors import Problem

COMMIT = "0123456789abcdef0123456789abcdef01234567"
DIGEST = hashlib.sha256(b"weights").hexdigest()


def cached(cache: Path, etag: str, name: str = "model.safetensors", repo: str = "owner/some.name") -> Path:
    """A file in the Hub's cache."""
    folder = cache / repo_folder_name(repo_id=repo, repo_type="model")
    blob, pointer = folder / "blobs" / etag, folder / "snapshots" / COMMIT / name
    for path in (blob, pointer):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(b"weights")
    _create_symlink(str(blob), str(pointer))
    return pointer


def in_local_dir(place: Path, etag: str, name: str = "model.safetensors") -> Path:
    """A file fetched with ``hf download --local-dir``."""
    place.mkdir(exist_ok=True)
    (place / name).write_bytes(b"weights")
    write_download_metadata(local_dir=place, filename=name, commit_hash=COMMIT, etag=etag)
    return place / name


@pytest.mark.parametrize("repo", ["owner/some.name", "gpt2", "Owner-1/a-b_c.7B"])
def test_a_snapshot_is_recognised_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo: str) -> None:
    snapshot = cached(tmp_path, DIGEST, repo=repo).parent
    (tmp_path / "link").symlink_to(snapshot)
    monkeypatch.chdir(snapshot)
    for path in (snapshot, tmp_path / "link", Path()):
        assert origin(path) == Origin(repo, COMMIT)
        assert str(origin(path)) == f"{repo}@{COMMIT}"
        assert record_source(path) == f"the Hub's record of {repo}@{COMMIT}"


def test_no_other_place_is_one(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, DIGEST).parent
    short = snapshot.with_name("main")
    short.mkdir()
    dataset = tmp_path / "datasets--owner--name" / "snapshots" / COMMIT
    for path in (short, dataset, snapshot.parent, snapshot / "more", tmp_path, Path("/"), Path(COMMIT)):
        assert origin(path) is None


def test_the_blob_of_an_lfs_file_is_named_by_its_digest(tmp_path: Path) -> None:
    assert expected_sha256(cached(tmp_path, DIGEST)) == DIGEST
    assert expected_sha256(cached(tmp_path, "a" * 40, "config.json")) is None


def test_only_the_first_link_counts(tmp_path: Path) -> None:
    """In a cache with a store for all repositories, blobs are links themselves, to a name that is a Xet hash."""
    pointer = cached(tmp_path, DIGEST)
    blob = pointer.parents[2] / "blobs" / DIGEST
    store = tmp_path / "blobs" / "ff" / ("f" * 64)
    store.parent.mkdir(parents=True)
    blob.rename(store)
    blob.symlink_to(store)
    assert expected_sha256(pointer) == DIGEST


def test_a_link_elsewhere_says_nothing(tmp_path: Path) -> None:
    (tmp_path / DIGEST).write_bytes(b"weights")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / DIGEST)
    assert expected_sha256(tmp_path / "model.safetensors") is None
    assert expected_sha256(tmp_path / DIGEST) is None
    assert expected_sha256(tmp_path / "absent") is None


def test_the_metadata_of_a_local_directory(tmp_path: Path) -> None:
    assert expected_sha256(in_local_dir(tmp_path, DIGEST)) == DIGEST
    assert expected_sha256(in_local_dir(tmp_path, "a" * 40, "config.json")) is None
    assert origin(tmp_path) is None
    assert record_source(tmp_path) == f"the Hub's record in {tmp_path / '.cache' / 'huggingface'}"


def test_metadata_is_of_the_file_that_was_fetched(tmp_path: Path) -> None:
    """As huggingface_hub has it: a file that is newer was put there by somebody else."""
    file = in_local_dir(tmp_path, DIGEST)
    for later, known in ((-100, True), (0, True), (100, False)):
        os.utime(file, (time.time() + later,) * 2)
        assert (expected_sha256(file) == DIGEST) is known


@pytest.mark.parametrize(
    "text",
    ["", "one line", f"{COMMIT}\n{DIGEST}\nyesterday\n", f"{COMMIT}\n{DIGEST}\nnan\n", "\0\xff\n" * 5, "x" * 9999],
)
def test_metadata_that_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    file = in_local_dir(tmp_path, DIGEST)
    (tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata").write_text(text)
    assert expected_sha256(file) is None


def test_the_command_that_fetches_a_file_again(tmp_path: Path) -> None:
    pointer = cached(tmp_path, DIGEST)
    known = f"hf download owner/some.name model.safetensors --revision {COMMIT} --force-download"
    assert download_again(pointer) == known
    general = "hf download OWNER/NAME model.safetensors --local-dir 'my models/base' --force-download"
    assert download_again(Path("my models", "base", "model.safetensors")) == general


def test_only_a_download_that_failed_is_mended_by_another() -> None:
    for kind, mends in (("incomplete", True), ("not_weights", True), ("unsafe_pickle", False), ("damaged", False)):
        problem = mended(Problem(kind, "a", "is wrong; download it again"), Path("a", "b"))
        assert ("again: hf download OWNER/NAME b" in problem.message) is mends
