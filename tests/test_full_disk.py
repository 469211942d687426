"""A disk that is really full: a small tmpfs, in a mount namespace that ends with the process; and a limit on files."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayling_delta import apply
from bayling_delta.staging import partial_path
from tests.failing import assert_whole
from tests.pairs import llama, save

SHARD = 70_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, its sum, and where a small disk may be."""
    place = tmp_path_factory.mktemp("disk")
    save(place / "base", llama(1), shards=2)
    save(place / "delta", llama(2, 0.01), shards=2)
    apply(place / "base", place / "delta", place / "whole", max_shard_size=SHARD)
    (place / "small").mkdir()
    return place


@pytest.fixture(scope="module")
def on_a_small_disk(place: Path) -> Callable[..., Any]:
    """Runs `tests.filling` in a mount namespace of its own; skips where the system has none for us."""
    namespace = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare(1)")
    mount = [*namespace, "mount", "-t", "tmpfs", "tmpfs", str(place / "small")]
    tried = subprocess.run(mount, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"no small disk can be mounted: {tried.stderr.strip()}")

    def run(what: str, step: int = 1) -> Any:
        command = [*namespace, sys.executable, "-m", "tests.filling", str(place), what, str(step)]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not list((place / "small").iterdir())  # it went with the process
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.long)])
def test_the_disk_becomes_full(
    on_a_small_disk: Callable[..., Any], record_property: Callable[[str, object], None], step: int
) -> None:
    """At whatever byte: in the lock, the journal, the first file or a later one; the next run goes on."""
    found = on_a_small_disk("bytes", step)
    assert {run["kind"] for run in found} == {"disk_space", ""}
    assert [run["kind"] for run in found][::-1].index("disk_space") < len(found) - 2  # from some room on, it is enough
    kept = [sum(name.endswith(".safetensors") for name in run["kept"]) for run in found]
    assert kept[0] == 0
    assert max(kept) >= 2
    record_property("runs that met a full disk", sum(bool(run["kind"]) for run in found))


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.long)])
def test_the_disk_has_no_more_names(
    on_a_small_disk: Callable[..., Any], record_property: Callable[[str, object], None], step: int
) -> None:
    """There is room for bytes, and none for another file."""
    found = on_a_small_disk("names", step)
    assert {run["kind"] for run in found} == {"disk_space", ""}
    record_property("runs that met a full disk", sum(bool(run["kind"]) for run in found))


def test_too_little_room_is_seen_beforehand(on_a_small_disk: Callable[..., Any]) -> None:
    found = on_a_small_disk("refused")
    assert found["code"] == 6
    assert [problem["kind"] for problem in found["document"]["error"]["problems"]] == ["disk_space"]
    assert found["left"] == []


@pytest.mark.long
def test_the_disk_is_filled_while_the_program_runs(
    on_a_small_disk: Callable[..., Any], record_property: Callable[[str, object], None]
) -> None:
    found = on_a_small_disk("meanwhile")
    ends = {(run["code"], *run["kinds"]) for run in found}
    assert (6, "disk_space") in ends
    assert ends <= {(0,), (6, "disk_space")}  # one that was stopped too late needs no more room
    assert not any("Traceback" in run["errors"] for run in found)
    record_property("runs that met a full disk", sum(run["code"] == 6 for run in found))
    record_property("of which left files to go on with", sum(bool(run["kept"]) for run in found))


LIMITS = [10, 1_200, 3_000, 60_000, 70_000]


@pytest.mark.parametrize("limit", [*(pytest.param(limit, marks=pytest.mark.long) for limit in LIMITS[:-1]), LIMITS[-1]])
def test_no_file_may_be_so_large(place: Path, tmp_path: Path, limit: int) -> None:
    """``ulimit -f``: a write past it fails, and the signal that comes with it does not end the process."""
    out = tmp_path / "out"
    words = ["apply", "--base", place / "base", "--delta", place / "delta", "--out", out, "--max-shard-size", SHARD]
    command = [sys.executable, "-B", "-m", "bayling_delta", *map(str, words), "--json"]

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert ended.returncode == 6, ended
    assert not out.exists()
    kinds = {problem["kind"] for problem in json.loads(ended.stdout)["error"]["problems"]}
    assert kinds <= {"disk_space", "output_place"}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert_whole(out, place / "whole")
    assert not partial_path(out).exists()
