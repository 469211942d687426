"""What is imported, and when: the heavy libraries of this field take seconds and hundreds of megabytes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pairs import llama, save

HEAVY = {"torch", "transformers", "safetensors", "sentencepiece"}

SHOW = """
import json, sys
from bayling_delta.cli import main
try:
    main(sys.argv[1:])
except SystemExit as done:
    print(json.dumps([done.code, sorted(sys.modules)]), file=sys.stderr)
"""


def modules_after(*words: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", SHOW, *words], capture_output=True, text=True)
    code, modules = json.loads(done.stderr.splitlines()[-1])
    assert code == 0, done.stderr
    return set(modules)


def test_help_imports_almost_nothing() -> None:
    registry = {"bayling_delta.releases", "bayling_delta.release_entry"}
    for words in (["--help"], ["apply", "--help"], ["releases", "--help"], ["--version"]):
        assert not modules_after(*words) & {*HEAVY, *registry, "numpy", "numkong", "tqdm", "huggingface_hub"}


def test_the_registry_is_shown_without_heavy_libraries() -> None:
    assert not modules_after("releases", "bayling-7b-diff") & {*HEAVY, "numkong", "tqdm", "huggingface_hub"}


@pytest.mark.parametrize("dry", [True, False], ids=["dry-run", "apply"])
def test_apply_does_not_import_torch(tmp_path: Path, dry: bool) -> None:
    base, delta = save(tmp_path / "base", llama(1)), save(tmp_path / "delta", llama(2, 0.01))
    words = ["apply", "--base", str(base), "--delta", str(delta), "--out", str(tmp_path / "out")]
    assert not modules_after(*words, *(["--dry-run"] if dry else [])) & HEAVY
    assert (tmp_path / "out").exists() != dry


def test_verify_record_and_inspect_do_not_import_torch(tmp_path: Path) -> None:
    base, delta = save(tmp_path / "base", llama(1)), save(tmp_path / "delta", llama(2, 0.01))
    pair = ["--base", str(base), "--delta", str(delta)]
    out = str(tmp_path / "out")
    modules_after("apply", *pair, "--out", out)
    for words in (["verify", out], ["record", out], ["inspect", str(base)]):
        assert "huggingface_hub" not in modules_after(*words), words
    for words in (["verify", out], ["verify", out, *pair], ["record", out], ["inspect", out], ["inspect", str(base)]):
        assert not modules_after(*words) & HEAVY, words
