"""The peers, each installed from PyPI into an environment of its own."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = ["Peers"]

_CONSTRAINTS: Final = Path(__file__).resolve().parents[1] / "constraints.txt"
# FastChat's own requirements are those of its servers and miss transformers; apply_delta needs these.
_STEPS: Final = {
    "fastchat": (
        ("torch", "transformers", "accelerate", "sentencepiece", "protobuf", "requests", "psutil"),
        ("--no-deps", "fschat==0.2.36"),
    ),
    "mergekit": (("mergekit==0.1.5",),),
}
_REPORTED: Final = {
    "fastchat": ("fschat", "torch", "transformers"),
    "mergekit": ("mergekit", "torch", "transformers"),
}


@dataclass(frozen=True, slots=True)
class Peers:
    """Where their environments are."""

    directory: Path

    def program(self, peer: str, name: str) -> Path:
        return self.directory / peer / "bin" / name

    def install(self, peer: str) -> None:
        """Make a peer's environment, unless it is complete."""
        home = self.directory / peer
        stamp, steps = home / "installed", repr(_STEPS[peer])
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == steps:
            return
        print(f"bench: installing {peer} into an environment of its own", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home)], check=True)
        for step in _STEPS[peer]:
            words = ["install", "--quiet", "--disable-pip-version-check", "-c", str(_CONSTRAINTS), *step]
            subprocess.run([str(self.program(peer, "python")), "-m", "pip", *words], check=True)
        stamp.write_text(steps, encoding="utf-8")

    def versions(self, peer: str) -> dict[str, str]:
        """The versions of what matters of it."""
        code = "import sys, importlib.metadata as m; print(*(f'{n}={m.version(n)}' for n in sys.argv[1:]))"
        command = [str(self.program(peer, "python")), "-c", code, *_REPORTED[peer]]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return dict(word.split("=", 1) for word in done.stdout.split())
