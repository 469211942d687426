"""How much there is to do for a pair: bytes read, written and digested, as bayling-delta plans it."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import PIPE
from typing import Any

__all__ = ["Work", "weights_digest", "work_of"]

_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Work:
    """Bytes."""

    input_bytes: int
    output_bytes: int
    sha256_bytes: int
    """Every digest that the run takes counts: of files, and of tensors."""
    crc32_bytes: int
    parameters: int
    tensors: int


def work_of(base: Path, delta: Path) -> Work:
    """Ask for the plan of a pair, in a process of its own: the code that is measured stays out of this one."""
    return Work(**_ask("benchmark.work", str(base), str(delta)))


def weights_digest(model: Path) -> str:
    """The weights digest of a model."""
    return str(_ask("bayling_delta", "record", "--quiet", "--json", str(model))["result"]["weights_digest"])


def _ask(module: str, *words: str) -> dict[str, Any]:
    """Run a module of the checkout, and return the document that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(_ROOT / "src"), str(_ROOT / "scripts")))}
    command = [sys.executable, "-m", module, *words]
    found: dict[str, Any] = json.loads(subprocess.run(command, env=environment, check=True, stdout=PIPE).stdout)
    return found


def _planned(base: Path, delta: Path) -> Work:
    from bayling_delta.checkpoint import open_checkpoint
    from bayling_delta.plan import make_plan
    from bayling_delta.reads import Span

    plan = make_plan(open_checkpoint(base), open_checkpoint(delta))
    reads = (plan.base_reads, plan.delta_reads)
    tensors = list(plan.tensors)
    digested = sum(sum(sizes.values()) for side in reads for sizes in (side.files, side.tensors))
    return Work(
        input_bytes=sum(side.nbytes for side in reads),
        output_bytes=plan.output_bytes,
        sha256_bytes=digested + plan.output_bytes + sum(tensor.nbytes for tensor in tensors),
        crc32_bytes=sum(
            record.size for side in reads for step in side.steps if isinstance(step, Span) for record in step.records
        ),
        parameters=sum(tensor.delta.elements for tensor in tensors),
        tensors=len(tensors),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="work")
    parser.add_argument("base", type=Path)
    parser.add_argument("delta", type=Path)
    options = parser.parse_args()
    print(json.dumps(asdict(_planned(options.base, options.delta))))
