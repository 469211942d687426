"""The mean of a tensor's rows, which some recipes give a vocabulary's new rows. A pass of its own over that tensor."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Final

import numpy as np

from bayling_delta.arithmetic import STORED, Array, widen
from bayling_delta.gathering import read_elements
from bayling_delta.plan import OutputTensor
from bayling_delta.sources import open_source
from bayling_delta.tensors import DTYPES

__all__ = ["mean_rows"]

_BLOCK_BYTES: Final = 1 << 20
"""Rows are summed block by block, and the blocks' sums are summed: a fixed size, so that nothing else decides bits."""


def mean_rows(tensors: Iterable[OutputTensor]) -> dict[str, Array]:
    """The mean of the base's rows, float32, for each tensor whose new rows it is added to.

    Summed in float64 and rounded once. torch, which the published script uses, sums in float32 and in another order,
    so its last bits differ. Source: tatsu-lab/stanford_alpaca, train.py, smart_tokenizer_and_embedding_resize.

    Raises:
        CheckpointError: the base cannot be read.
    """
    means: dict[str, Array] = {}
    for tensor in tensors:
        base = tensor.base
        if tensor.stand_in != "mean" or base is None or base.shape == tensor.shape:
            continue
        rows, columns = base.shape
        total = np.zeros(columns)
        block_rows = max(1, _BLOCK_BYTES // (columns * DTYPES[base.dtype]))
        with ExitStack() as stack:
            sources = {view.file: stack.enter_context(open_source(view.file)) for view in base.views}
            for row in range(0, rows, block_rows):
                count = min(block_rows, rows - row) * columns
                values = read_elements(sources, base, row * columns, count).view(STORED[base.dtype])
                total += widen(values, base.dtype).reshape(-1, columns).sum(axis=0, dtype=np.float64)
        means[tensor.name] = (total / rows).astype(np.float32)
    return means
