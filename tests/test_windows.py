"""The checksums of records that come in pieces, against zlib's of the whole."""

import zlib
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bayling_delta.reads import ReadList, Span
from bayling_delta.windows import RecordChecker
from bayling_delta.zip_records import Record

FILE = Path("weights.pth")


def checker(data: bytes, offset: int, crc32: int) -> RecordChecker:
    record = Record("data/0", offset, len(data), crc32)
    return RecordChecker(ReadList((Span(FILE, 0, offset + len(data), False, (), (record,)),), {}, {}, {}))


@given(
    data=st.binary(min_size=1, max_size=40),
    offset=st.integers(0, 99),
    wrong=st.sampled_from([0, 0, 1, 1 << 31]),
    choices=st.data(),
)
def test_pieces_in_any_order_make_the_whole(data: bytes, offset: int, wrong: int, choices: st.DataObject) -> None:
    cuts = sorted({0, len(data), *choices.draw(st.lists(st.integers(0, len(data)), max_size=6))})
    pieces = choices.draw(st.permutations(list(pairwise(cuts))))
    records = checker(data, offset, zlib.crc32(data) ^ wrong)
    for start, stop in pieces:
        records.update(FILE, "data/0", offset + start, memoryview(data)[start:stop])
    assert records.finish() == ({(FILE, "data/0")} if wrong else set())


def test_a_record_that_did_not_come_whole_is_no_silence() -> None:
    records = checker(b"abc", 5, zlib.crc32(b"abc"))
    records.update(FILE, "data/0", 5, memoryview(b"ab"))
    with pytest.raises(RuntimeError, match="1 records are unfinished"):
        records.finish()
