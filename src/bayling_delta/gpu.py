"""The same addition on a GPU, with torch, bit for bit what the CPU gives.

The weights come from the disk and go back to it, so a GPU makes a rebuild no faster where the disk is what is
waited for; it is there for machines whose CPU is wanted for something else. Elements pass through pinned memory,
as many at a time as a window holds, so GPU memory is a few windows whatever the tensor.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bayling_delta.arithmetic import Array, Operation
from bayling_delta.errors import Problem, UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["make_additions"]

_BLOCK_ELEMENTS: Final = 1 << 18
"""How many are added at once; with casts to float32, 4 MiB of GPU memory."""


def make_additions(device: str) -> Callable[[str, str, str], Operation]:
    """Return what makes an addition for (base, delta, result) dtypes on a torch device such as ``cuda`` or ``cuda:1``.

    Raises:
        UsageError: there is no such device here.
    """
    import torch

    if device.startswith("cuda"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        number = int(device.removeprefix("cuda").removeprefix(":") or 0)
        if number >= count:
            found = f"torch {torch.__version__} finds {count or 'no'} CUDA device{'s' * (count > 1)} here"
            message = f"{found}; leave --device out: the CPU gives the same bytes, and the disk sets the pace"
            raise UsageError(Problem("device", f"--device {device}", message))
    return lambda base, delta, out: _make_addition(device, base, delta, out)


def _make_addition(device: str, base_dtype: str, delta_dtype: str, out_dtype: str) -> Operation:
    import torch

    dtypes = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    pinned = device.startswith("cuda")

    def stage(dtype: str) -> "torch.Tensor":
        return torch.empty(_BLOCK_ELEMENTS, dtype=dtypes[dtype], pin_memory=pinned)

    base_stage, delta_stage, out_stage = stage(base_dtype), stage(delta_dtype), stage(out_dtype)

    def upload(staged: "torch.Tensor", values: Array) -> "torch.Tensor":
        here = staged[: values.size]
        here.copy_(_as_tensor(values, here.dtype))
        return here.to(device, non_blocking=True)

    def add(out: Array, base: Array, delta: Array) -> int:
        found = 0
        for start in range(0, out.size, _BLOCK_ELEMENTS):
            piece = slice(start, start + _BLOCK_ELEMENTS)
            right = upload(delta_stage, delta[piece])
            total = upload(base_stage, base[piece]).to(right.dtype).add_(right).to(dtypes[out_dtype])
            bad = int(total.isfinite().logical_not_().sum())  # this waits for the GPU
            if bad:
                total.masked_fill_(total.isnan(), float("nan"))  # the quiet one, as on the CPU
                found += bad
            staged = out_stage[: total.numel()]
            staged.copy_(total)
            _as_tensor(out[piece], staged.dtype).copy_(staged)
        return found

    return add


def _as_tensor(values: Array, dtype: Any) -> "torch.Tensor":
    """A tensor over the array's own memory."""
    import torch

    return torch.from_numpy(values.view(np.int16 if values.itemsize == 2 else np.int32)).view(dtype)
