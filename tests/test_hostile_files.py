"""Files that are there to do harm, through the whole program: what is no file, and names that command a terminal."""

import json
import os
import re
import shlex
import shutil
import socket
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bayling_delta import apply, inspect_checkpoint, plan_apply
from bayling_delta.cli import main
from bayling_delta.errors import CheckpointError
from bayling_delta.system import System
from tests.journals import journal_of
from tests.pairs import CONFIG, llama, save
from tests.running import Run
from tests.strategies import write_archive
from tests.test_state_pickle import PROTO
from tests.test_zip_records import Entry, archive
from tests.wrong_input import HeadersOnly, pipe, snapshot


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, and the model rebuilt from it."""
    place = tmp_path_factory.mktemp("hostile")
    save(place / "base", llama(1, rotary=False))
    save(place / "delta", llama(2, 0.01, rotary=False))
    apply(place / "base", place / "delta", place / "model")
    return place


@pytest.fixture
def place(tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# devices


def listen(_: Path) -> None:
    """A socket, which stays when its owner has gone."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("special")


def link(target: str) -> Callable[[Path], None]:
    def make(place: Path) -> None:
        if not Path(target).exists():
            pytest.skip(f"there is no {target} here")
        (place / "special").symlink_to(target)

    return make


SPECIAL: dict[str, Callable[[Path], object]] = {
    "zeros without end": link("/dev/zero"),
    "nothing": link("/dev/null"),
    "a full device": link("/dev/full"),
    "a terminal": link("/dev/tty"),
    "a disk": link("/dev/loop0"),
    "a pipe": pipe("special"),
    "a socket": listen,
    "an empty directory": lambda place: (place / "special").mkdir(),
}

ASKED = """
apply --base special --delta delta --out out
apply --base base --delta special --out out
apply --base base --delta delta --out out --registry special
apply --base base --delta delta --out special
apply --base special --delta delta --out out --dry-run
verify special
verify model --against special
verify model --base special --delta delta
verify model --base base --delta special
verify model --registry special --against bayling-7b
inspect special
record special
record base -o special
repair special --base base --delta delta
releases --registry special
releases --from-manifest special
""".strip().splitlines()


class Frugal(HeadersOnly):
    """Ends a run that reads on and on; it may write, if it can."""

    open_write = System.open_write
    make_directory = System.make_directory


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
@pytest.mark.parametrize("command", ASKED)
@pytest.mark.parametrize("make", SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file_is_refused_and_not_waited_for(
    place: Path, run: Run, make: Callable[[Path], object], command: str
) -> None:
    make(place)
    before = snapshot(place)
    done = run(command, Frugal())
    assert done.code in (2, 3, 5, 6), done.errors
    assert "special" in done.errors
    assert snapshot(place) == before


INSIDE = """
base/pytorch_model.bin delta/pytorch_model.bin delta/config.json delta/tokenizer.json delta/tokenizer.model
delta/generation_config.json delta/merges.txt base/SHA256SUMS base/bayling-delta.json base/checklist.chk
""".split()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no such files here")
@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("make", [SPECIAL["zeros without end"], SPECIAL["a pipe"], SPECIAL["a socket"]])
def test_nor_in_the_place_of_a_file_that_belongs_to_a_model(
    place: Path, run: Run, make: Callable[[Path], object], name: str
) -> None:
    make(place)
    (place / name).unlink(missing_ok=True)
    (place / "special").rename(place / name)
    for command in ("apply --base base --delta delta --out out", "record delta", "inspect base", "verify base"):
        done = run(command, Frugal())
        assert done.code in (0, 3, 5), done.errors
        assert done.code or command in ("record delta", "inspect base"), done.errors


# names that command a terminal

RUDE = "\x1b[2J\x07\x9b31m\x7f\u200f\u202e\u2028\r\nerror: forged"
"""Clears the screen, rings, turns what follows red, deletes, turns it round, and begins a line of its own."""
RUDE_NAME = RUDE.replace("\n", "")
"""The same where a newline cannot be."""


def is_calm(output: str) -> bool:
    """Whether a terminal only shows it: no control character but the newline, no other separator, no turning round."""
    categories = {unicodedata.category(character) for character in output if character != "\n"}
    return not categories & {"Cc", "Cs", "Zl", "Zp"} and not any(
        unicodedata.bidirectional(character) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        or character in "\u061c\u200e\u200f"
        for character in output
    )


def rude_tensors(place: Path) -> None:
    state = {**llama(2, 0.01, rotary=False), RUDE: torch.zeros(2).half()}
    (place / "delta/pytorch_model.bin").unlink()
    save_file(state, place / "delta/model.safetensors", {"format": RUDE, RUDE: RUDE})


def rude_pickle(place: Path) -> None:
    name = RUDE_NAME.encode()
    write_archive(place / "delta/pytorch_model.bin", PROTO + b"c" + name + b"\n" + name + b"\n.", {RUDE: b""})


def rude_zip(place: Path) -> None:
    (place / "delta/pytorch_model.bin").write_bytes(archive(Entry(RUDE, local={"name": b"x" * len(RUDE.encode())})))


def rude_index(place: Path) -> None:
    index = {"weight_map": {RUDE: "pytorch_model.bin", "w": RUDE, "v": RUDE_NAME + ".bin"}}
    (place / "delta/pytorch_model.bin").rename(place / "delta/pytorch_model-00001-of-00001.bin")
    (place / "delta/pytorch_model.bin.index.json").write_text(json.dumps(index))


def rude_config(place: Path) -> None:
    words = {"architectures": [RUDE], "model_type": RUDE, "torch_dtype": RUDE, "_name_or_path": f"/{RUDE}"}
    (place / "delta/config.json").write_text(json.dumps({**CONFIG, **words, RUDE: RUDE}))
    tokenizer = {"tokenizer_class": RUDE, "bos_token": RUDE, RUDE: RUDE}
    (place / "delta/tokenizer_config.json").write_text(json.dumps(tokenizer))
    (place / "delta/special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": RUDE}}))
    (place / "delta/tokenizer.json").write_text(json.dumps({"model": {"vocab": {RUDE: 0}}}))
    (place / "delta/generation_config.json").write_text(json.dumps({RUDE: RUDE}))


def rude_types(place: Path) -> None:
    words = {"tie_word_embeddings": RUDE, "hidden_size": RUDE, "vocab_size": [RUDE]}
    (place / "delta/config.json").write_text(json.dumps({**CONFIG, **words}))


def rude_json(place: Path) -> None:
    (place / "delta/config.json").write_text(f'{{"{RUDE_NAME.encode("unicode_escape").decode()}": {RUDE}')
    (place / "base/config.json").write_text(json.dumps({RUDE: 1})[:-1] + "," + json.dumps({RUDE: 1})[1:])


def rude_names(place: Path) -> None:
    for side in ("base", "delta"):
        (place / side / f"pytorch_model{RUDE_NAME}.bin").write_bytes(b"<html>")
        (place / side / "pytorch_model.bin").rename(place / side / f"pytorch_model-{RUDE_NAME}.bin")
        (place / side / RUDE).write_bytes(b"")


def rude_place(place: Path) -> None:
    for side in ("base", "delta"):
        (place / side).rename(place / RUDE)
        (place / side).symlink_to(RUDE)
        (place / side).unlink()
        (place / RUDE).rename(place / f"{side}{RUDE}")


def rude_manifest(place: Path) -> None:
    path = place / "model/bayling-delta.json"
    manifest = json.loads(path.read_text())
    manifest["inputs"]["delta"]["name"] = RUDE
    manifest["result"]["files"].append({"name": RUDE, "size": 1, "sha256": None})
    manifest["result"]["tensors"][RUDE] = dict(next(iter(manifest["result"]["tensors"].values())))
    manifest["recipe"] = manifest["created"] = manifest["tool"]["version"] = RUDE
    path.write_text(json.dumps(manifest))
    shutil.copy(path, place / "delta/bayling-delta.json")


def rude_record(place: Path) -> None:
    """A manifest that can be used."""
    path = place / "model/bayling-delta.json"
    manifest = json.loads(path.read_text())
    manifest["inputs"]["delta"]["name"] = manifest["recipe"] = manifest["created"] = RUDE
    manifest["result"]["files"].append({"name": "a\u200fb", "size": 1, "sha256": None})
    manifest["verification"] = [{"what": RUDE, "against": RUDE, "outcome": RUDE, "source": RUDE}]
    path.write_text(json.dumps(manifest))


def rude_sums(place: Path) -> None:
    for side in ("model", "delta"):
        (place / side / "SHA256SUMS").write_text(f"{'0' * 64}  {RUDE_NAME}\n", newline="")


def rude_lists(place: Path) -> None:
    """Lists that can be used."""
    for side in ("model", "delta"):
        (place / side / "SHA256SUMS").write_text(f"{'0' * 64}  a\u200fb\n{'0' * 64}  pytorch_model.bin\n", newline="")
    (place / "model/bayling-delta.json").unlink()


def rude_registry(place: Path) -> None:
    line = RUDE.translate(dict.fromkeys((*range(32), 127)))
    file = {"name": f"{line}.bin", "size": 1, "sha256": []}
    own = {
        "schema": "bayling-delta/release/1", "name": "mine", "title": line, "kind": "full", "source": ["me"],
        "sources": {"me": line}, "unrecorded": [line], "notes": [{"about": "use", "text": line, "source": ["me"]}],
        "forms": [{"title": line, "container": "torch", "source": ["me"], "files": [file]}],
        "licence": {"names": [line], "text": line, "source": ["me"]},
        "prompt": {"name": line, "system": RUDE, "source": [line], "placeholders": {line: line}},
    }  # fmt: skip
    (place / "own.json").write_text(json.dumps(own))
    (place / "other.json").write_text(json.dumps({**own, "name": RUDE, RUDE: RUDE, "kind": RUDE, "recipe": RUDE}))


def rude_partial(place: Path) -> None:
    (place / "out.partial/model").mkdir(parents=True)
    (place / "out.partial/lock").write_text(json.dumps({"pid": 1, "started": RUDE}))
    (place / "out.partial/journal").write_bytes(journal_of([{"schema": RUDE, "version": RUDE, "recipe": RUDE}]))
    (place / "out.partial/model" / RUDE).write_bytes(b"")


def rude_params(place: Path) -> None:
    for side in ("base", "delta"):
        (place / side / "pytorch_model.bin").unlink()
        torch.save({RUDE: torch.zeros(1), "norm.weight": torch.zeros(3)}, place / side / "consolidated.00.pth")
        (place / side / "params.json").write_text(json.dumps({"dim": RUDE, "n_layers": 1, "n_heads": 2}))
    (place / "base/params.json").write_text(json.dumps({"dim": 64, "n_layers": 1, "n_heads": 2, RUDE: RUDE}))


RUDENESS: list[Callable[[Path], object]] = [
    rude_tensors, rude_pickle, rude_zip, rude_index, rude_config, rude_types, rude_json, rude_names, rude_place,
    rude_manifest, rude_record, rude_sums, rude_lists, rude_registry, rude_partial, rude_params,
]  # fmt: skip

TOLD = """
apply --base {base} --delta {delta} --out planned --dry-run
apply --base {base} --delta {delta} --out out
inspect {base}
inspect {delta}
verify model
verify model --against delta
verify model --against own.json
verify model --base {base} --delta {delta}
verify {delta}
record {delta}
record {delta} -o recorded.json
repair model --base {base} --delta {delta}
releases --from-manifest model
releases --from-manifest model/bayling-delta.json --name mine
releases --registry own.json
releases mine --registry own.json
releases --registry other.json
""".strip().splitlines()


@pytest.mark.parametrize("make", RUDENESS, ids=lambda make: make.__name__)
def test_nothing_that_a_file_says_commands_the_terminal(
    place: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], object]
) -> None:
    make(place)
    rude = make is rude_place
    codes = set()
    for line in TOLD:
        words = shlex.split(line.format(base="BASE", delta="DELTA"))
        sides = {"BASE": f"base{RUDE}" if rude else "base", "DELTA": f"delta{RUDE}" if rude else "delta"}
        words = [sides.get(word, word) for word in words]
        for as_json in ([], ["--json"]):
            with pytest.raises(SystemExit) as exited:
                main([*words, *as_json])
            output, errors = capsys.readouterr()
            assert is_calm(output), ascii(output)
            assert is_calm(errors), ascii(errors)
            assert "\nerror: forged" not in output + errors
            assert exited.value.code != 1, errors
            codes.add(exited.value.code)
    assert codes - {0, 2}, "nothing was told"


def test_what_is_rude_is_noticed() -> None:
    """Else the test above would prove nothing."""
    assert not any(is_calm(f"a{character}b") for character in "\x1b\x07\x9b\x7f\u200f\u202e\u2028\r")


@pytest.mark.parametrize("name", ["model-\x1b[2J.safetensors", "model-\u202ex.safetensors", "model-\n.safetensors"])
@pytest.mark.parametrize("command", ["inspect {}", "record {}", "apply --base {} --delta {} --out out"])
def test_a_weight_file_whose_name_is_a_command_is_refused(tmp_path: Path, run: Run, name: str, command: str) -> None:
    """It would be printed, and written into the model card of a result."""
    place = save(tmp_path / "model", llama(1), container="safetensors")
    (place / "model.safetensors").rename(place / name)
    ended = run(command.replace("{}", shlex.quote(str(place))))
    said = json.dumps(ended.document) + ended.errors
    # inspect goes on with what can be read, and lists this as odd
    assert ended.code == (0 if command.startswith("inspect") and "\n" not in name else 3)
    assert "no name on every system" in said or "has no model" in said
    assert not re.search("[\x1b\u202e]", said)


def test_what_a_link_leads_to_is_told_before_it_is_copied(tmp_path: Path) -> None:
    save(tmp_path / "base", llama(1))
    delta = save(tmp_path / "delta", llama(2, 0.01))
    (tmp_path / "secret").write_text("mine")
    (delta / "merges.txt").symlink_to("../secret")
    told: list[str] = []
    apply(tmp_path / "base", delta, tmp_path / "out", tell=told.append)
    assert [text for text in told if "merges.txt: is a link" in text and str(tmp_path / "secret") in text]


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.model", "chat_template.jinja"])
def test_a_file_that_is_taken_over_is_no_larger_than_a_tokenizer(tmp_path: Path, name: str) -> None:
    """A sparse one takes nothing on its publisher's disk, and gigabytes on the user's."""
    save(tmp_path / "base", llama(1))
    delta = save(tmp_path / "delta", llama(2, 0.01))
    with (delta / name).open("wb") as file:
        file.truncate(2 << 30)
    with pytest.raises(CheckpointError, match="at most 64,000,000 are taken over"):
        plan_apply(tmp_path / "base", delta, tmp_path / "out")


def test_a_tokenizer_of_millions_of_pieces_is_none(tmp_path: Path) -> None:
    place = save(tmp_path / "model", llama(1), container="safetensors")
    (place / "tokenizer.model").write_bytes(b"\x0a\0" * 1_000_001)
    assert inspect_checkpoint(place)["tokenizer"]["vocabulary"] is None
