"""Digests and documents: the promises of docs/formats.md."""

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayling_delta import apply
from bayling_delta.manifest import TensorDigest, digest_text, parse_digest, sums_text, weights_digest
from tests.pairs import save

VECTOR = """\
9a22cb048948363ae1165194a7d94fd792350afd99266c8a957baad9845c7ac9  F16[2,2] a.weight
8e628779e6a74ee0b36991c10158f63cafec7d340ad4e075592502c8708524dd  F32[3] b.bias
"""
VECTOR_DIGEST = "sha256:f02c9072c5f45d02d97586988c417e1ade47672f17a472514693829afd1a1bb3"


def test_the_test_vector(tmp_path: Path) -> None:
    """Two tensors, their lines, and the digest of these, recomputed with nothing of ours."""
    base = {"b.bias": torch.tensor([1.0, 2.0, 3.0]), "a.weight": torch.tensor([[0.5, -1.0], [2.0, 0.0]]).half()}
    zeros = {name: torch.full_like(tensor, -0.0) for name, tensor in base.items()}
    manifest = apply(save(tmp_path / "b", base), save(tmp_path / "d", zeros), tmp_path / "out")
    result = manifest["result"]
    lines = [
        f"{entry['sha256']}  {entry['dtype']}[{','.join(map(str, entry['shape']))}] {name}\n"
        for name, entry in sorted(result["tensors"].items())
    ]
    assert "".join(lines) == VECTOR
    assert f"sha256:{hashlib.sha256(VECTOR.encode()).hexdigest()}" == VECTOR_DIGEST == result["weights_digest"]


def test_lines_are_sorted_by_the_bytes_of_the_name() -> None:
    """Not by code points or by UTF-16, and the order given does not matter."""
    names = ["z", "\uffff", "\U0001f600", "a.10", "a.2", "A", ""]
    digests = [TensorDigest(name, "F16", (), "0" * 64) for name in names]
    lines = digest_text(digests).encode().splitlines()
    assert [line.split(b" ", 3)[-1] for line in lines] == sorted(name.encode() for name in names)
    assert weights_digest(digests) == weights_digest(digests[::-1])
    assert lines[0] == b"0" * 64 + b"  F16[] "


@given(st.text("0123456789abcdefABCDEF", min_size=64, max_size=64), st.sampled_from(["", "sha256:", " SHA256:"]))
def test_a_digest_is_taken_with_and_without_its_prefix(digits: str, prefix: str) -> None:
    assert parse_digest(prefix + digits) == f"sha256:{digits.lower()}"


@pytest.mark.parametrize("text", ["", "sha256:", "0" * 63, "0" * 65, "md5:" + "0" * 32, "g" * 64, "0" * 64 + "\n0"])
def test_what_is_not_a_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a SHA-256"):
        parse_digest(text)


def test_sums_are_sorted_by_name() -> None:
    assert sums_text({"b": "2", "a": "1"}) == "1  a\n2  b\n"
