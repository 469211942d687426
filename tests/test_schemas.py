"""Every JSON document that is printed or written keeps to its schema, and the schemas refuse what they should."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

import bayling_delta
from bayling_delta.cli import main
from tests.pairs import llama, save

SCHEMAS = Path(bayling_delta.__file__).parent / "data" / "schemas"


def check(document: Any, name: str) -> None:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(document)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save(tmp_path / "base", llama(1), container="safetensors")
    save(tmp_path / "delta", llama(2, 0.01), shards=2)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    """The one document that a command prints with --json."""
    with pytest.raises(SystemExit):
        main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def test_documents_keep_to_their_schemas(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = ("--base", place / "base", "--delta", place / "delta", "--out", place / "out")
    check(printed(capsys, "apply", *pair, "--dry-run"), "plan")
    manifest = printed(capsys, "apply", *pair, "--dtype", "bfloat16")
    check(manifest, "manifest")
    check(json.loads((place / "out" / "bayling-delta.json").read_text()), "manifest")
    check(printed(capsys, "record", place / "base"), "manifest")
    check(printed(capsys, "verify", place / "out"), "verify")
    check(printed(capsys, "verify", place / "out", *pair[:4], "--load"), "verify")


def test_what_is_known_of_releases_keeps_to_its_schemas(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(printed(capsys, "releases"), "releases")
    for name in ("bayling-7b-diff", "llama-7b", "minigpt-4"):
        document = printed(capsys, "releases", name)
        check(document, "releases")
        check(document["release"], "release")
    (place / "manifest.json").write_text(json.dumps(printed(capsys, "record", place / "base")))
    check(printed(capsys, "releases", "--from-manifest", place / "manifest.json"), "release")


FAILURES = [
    (["apply", "--base", "base"], "usage"),
    (["apply", "--base", "absent", "--delta", "absent", "--out", "o"], "checkpoint"),
    (["apply", "--base", "base", "--delta", "other", "--out", "o"], "mismatch"),
    (["apply", "--base", "base", "--delta", "delta", "--out", "o", "--expect", "0" * 64], "integrity"),
    (["verify", "base"], "no_record"),
    (["apply", "--base", "base", "--delta", "delta", "--out", "base"], "output"),
    (["nonsense"], "usage"),
    (["releases", "nonsense"], "usage"),
    (["releases", "--registry", "base"], "checkpoint"),
]


@pytest.mark.parametrize(("words", "kind"), FAILURES, ids=[f"{words[0]}-{kind}" for words, kind in FAILURES])
def test_failures_keep_to_their_schema(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], kind: str
) -> None:
    monkeypatch.chdir(place)
    save(place / "other", {"one.weight": llama(1)["model.norm.weight"]})
    document = printed(capsys, *words)
    check(document, "failure")
    assert document["error"]["kind"] == kind


def test_a_schema_refuses_what_it_does_not_say(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = printed(capsys, "record", place / "base")
    for change in ({"more": 1}, {"ok": False}, {"created": "yesterday"}, {"operation": "apply"}):
        with pytest.raises(ValidationError):
            check(manifest | change, "manifest")
