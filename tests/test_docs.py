"""What the documents say of the program, held against it."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from bayling_delta.cli import EXIT_CODES, commands
from bayling_delta.errors import KINDS, InterruptedRunError

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]


def test_every_kind_of_problem_is_described() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\d) \| (yes)? ?\| (.+) \|$", (ROOT / "docs/formats.md").read_text(), re.MULTILINE
    )
    expected = [
        (
            kind,
            str(next(code for error, code in EXIT_CODES.items() if issubclass(meaning.error, error))),
            "yes" if meaning.allow else "",
            meaning.meaning,
        )
        for kind, meaning in KINDS.items()
        if meaning.error is not InterruptedRunError
    ]
    assert rows == expected


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_that_are_shown_have_the_options_that_are_shown(document: Path) -> None:
    """Each ``bayling-delta COMMAND …`` of the documents names a command, and options that it has."""
    for command, rest in re.findall(r"bayling-delta (\w+)((?: [^\s`|#]+)*)", document.read_text()):
        if command not in commands.commands:
            continue
        known = {name for option in commands.commands[command].params for name in option.opts} | {"--help"}
        assert {word for word in rest.split() if re.fullmatch(r"--?[a-z][a-z-]*", word)} <= known, rest


def test_the_help_of_every_command_has_an_example() -> None:
    for name, command in commands.commands.items():
        help_text = CliRunner().invoke(command, ["--help"]).output
        assert "Examples:" in help_text, name
        assert f"bayling-delta {name}" in help_text, name
