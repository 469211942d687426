"""The addition: tensor by tensor, over whatever of base, delta, result and model lies in memory together."""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from bayling_delta.arithmetic import STORED, Array, Operation, as_float, differing
from bayling_delta.plan import OutputFile, OutputTensor
from bayling_delta.tensors import DTYPES, TensorRef
from bayling_delta.windows import Window

__all__ = ["Adder", "Additions", "Difference"]

_BOUNCE_BYTES: Final = 64 << 10
"""What is copied at once of a tensor that lies at an odd address."""
_BLANK_ELEMENTS: Final = 64 << 10
_FIRST_DIFFERENCES: Final = 3
Additions = Callable[[str, str, str], Operation]
"""(base, delta and result dtype) -> the addition for them."""


@dataclass(slots=True)
class Difference:
    """How one tensor of a model differs from the sum."""

    count: int = 0
    """Elements that differ."""
    first: list[tuple[int, float, float]] = field(default_factory=list)
    """The first few: (place in row-major order, what the sum has, what the model has)."""


_INPUTS: Final = ("base", "delta", "model")
_Wait = Generator[str, Window, Any]
"""Part of the addition: it yields the stream of which it needs the next window, and is sent that."""


class Adder:
    """Adds tensor by tensor, over whatever of base, delta and result lies in memory together."""

    def __init__(
        self,
        files: Sequence[OutputFile],
        additions: Additions,
        release: Callable[[Window], None],
        emit: Callable[[Window], None],
        means: Mapping[str, Array],
    ) -> None:
        """``means``: the mean of the base's rows, for the tensors that it stands in for rows of."""
        self.done_bytes = 0
        self.non_finite: dict[str, int] = {}
        self.differences: dict[str, Difference] = {}
        self._additions = additions
        self._release = release
        self._emit = emit
        self._arrived: dict[str, deque[Window]] = {stream: deque() for stream in (*_INPUTS, "result")}
        self._current: dict[str, Window | None] = dict.fromkeys((*_INPUTS, "result"))
        self._bounce = {stream: np.empty(_BOUNCE_BYTES, np.uint8) for stream in _INPUTS}
        self._means = means
        self._operations: dict[tuple[str, str, str], Operation] = {}
        self._work = self._all(files)
        self._wanted: str | None = next(self._work, None)

    @property
    def finished(self) -> bool:
        """Whether every tensor has been added."""
        return self._wanted is None

    def take(self, window: Window) -> None:
        """A window has arrived: go on as far as what is here allows."""
        self._arrived[window.stream].append(window)
        while self._wanted is not None and self._arrived[self._wanted]:
            try:
                self._wanted = self._work.send(self._arrived[self._wanted].popleft())
            except StopIteration:
                self._wanted = None
        if self.finished:  # what an input still has is digested, and not added
            for stream in _INPUTS:
                while self._arrived[stream]:
                    self._release(self._arrived[stream].popleft())

    def _all(self, files: Sequence[OutputFile]) -> _Wait:
        for file in files:
            position = yield from self._header(file)
            for tensor in file.tensors:
                yield from self._tensor(file, tensor, position)
                position += tensor.nbytes
            self._send_result(position)
        for stream in _INPUTS:
            if (window := self._current[stream]) is not None:
                self._release(window)

    def _header(self, file: OutputFile) -> Generator[str, Window, int]:
        position = 0
        while position < len(file.header):
            window = yield from self._room(file, position)
            start = position - window.origin
            part = file.header[position : position + len(window.buffer) - start]
            window.buffer[start : start + len(part)] = part
            position += len(part)
        return position

    def _tensor(self, file: OutputFile, tensor: OutputTensor, position: int) -> _Wait:
        """Add one tensor; ``position`` is its first byte's in the file."""
        item_bytes = DTYPES[tensor.dtype]
        elements, found = tensor.delta.elements, 0
        held = tensor.base.elements if tensor.base else 0
        done = 0
        while done < elements:
            if tensor.base is not None and done < held:
                base = yield from self._elements("base", tensor.base, done)
                base = base[: held - done]
                operation = self._operation(tensor.base.dtype, tensor)
            else:
                base = self._instead(tensor, done)
                operation = self._operation(tensor.delta.dtype, tensor)
            delta = yield from self._elements("delta", tensor.delta, done)
            window = yield from self._room(file, position)
            start = position - window.origin
            count = min(base.size, delta.size, elements - done, (len(window.buffer) - start) // item_bytes)
            model: Array | None = None
            if tensor.model is not None:
                model = yield from self._elements("model", tensor.model, done)
                count = min(count, model.size)
            result = np.frombuffer(window.buffer, STORED[tensor.dtype], count, start)
            found += operation(result, base[:count], delta[:count])
            if model is not None:
                self._compare(tensor, done, result, model[:count])
            window.tensors.append((tensor.name, start, start + count * item_bytes))
            position += count * item_bytes
            self.done_bytes += count * item_bytes
            done += count
        if found:
            self.non_finite[tensor.name] = found

    def _operation(self, base_dtype: str, tensor: OutputTensor) -> Operation:
        dtypes = (base_dtype, tensor.delta.dtype, tensor.dtype)
        operation = self._operations.get(dtypes)
        if operation is None:
            operation = self._operations[dtypes] = self._additions(*dtypes)
        return operation

    def _instead(self, tensor: OutputTensor, done: int) -> Array:
        """What is added from a tensor's ``done``-th element on, where the base has none; in the delta's dtype."""
        if tensor.stand_in == "mean" and tensor.base is not None:
            return self._means[tensor.name][done % tensor.shape[-1] :]
        blank = np.zeros(_BLANK_ELEMENTS, STORED[tensor.delta.dtype])
        if tensor.stand_in != "zero" or tensor.base is None:
            blank.view(np.uint8)[blank.itemsize - 1 :: blank.itemsize] = 0x80  # -0.0: adding it changes nothing
        return blank

    def _compare(self, tensor: OutputTensor, done: int, result: Array, model: Array) -> None:
        places = differing(result, model, tensor.dtype)
        if places.size:
            difference = self.differences.setdefault(tensor.name, Difference())
            difference.count += places.size
            for place in places[: _FIRST_DIFFERENCES - len(difference.first)].tolist():
                values = (as_float(array[place], tensor.dtype) for array in (result, model))
                difference.first.append((done + place, *values))

    def _room(self, file: OutputFile, position: int) -> Generator[str, Window, Window]:
        """The result's window that has a position, with room for one element at least; a full one is sent off."""
        window = self._current["result"]
        if window is not None and position - window.origin == len(window.buffer):
            self._send_result(position)
            window = None
        if window is None:
            window = self._current["result"] = yield "result"
            window.space, window.origin, window.tensors = file, position, []
        return window

    def _send_result(self, position: int) -> None:
        """The result's window is complete up to a position of its file."""
        window = self._current["result"]
        if window is not None:
            window.stop = position
            self._current["result"] = None
            self._emit(window)

    def _elements(self, stream: str, ref: TensorRef, done: int) -> Generator[str, Window, Array]:
        """Elements of a tensor from its ``done``-th on, one at least.

        They are where they were read, or copied from there if that is an odd address.
        """
        item_bytes = DTYPES[ref.dtype]
        space, position, end = _place(ref, done * item_bytes)
        window = yield from self._seek(stream, space, position)
        start = position - window.origin
        if start % item_bytes == 0:
            count = (min(window.stop, end) - position) // item_bytes
            return np.frombuffer(window.buffer, STORED[ref.dtype], count, start)
        bounce = self._bounce[stream]
        wanted = min(bounce.size, end - position)
        copied = 0
        while copied < wanted:
            window = yield from self._seek(stream, space, position + copied)
            start = position + copied - window.origin
            count = min(wanted - copied, window.stop - position - copied)
            bounce[copied : copied + count] = np.frombuffer(window.buffer, np.uint8, count, start)
            copied += count
        return bounce[:wanted].view(STORED[ref.dtype])

    def _seek(self, stream: str, space: Path | TensorRef, position: int) -> Generator[str, Window, Window]:
        """The input's window that has a position; those before it are released."""
        window = self._current[stream]
        while window is None or window.space != space or not window.origin <= position < window.stop:
            if window is not None:
                self._current[stream] = None
                self._release(window)
            window = self._current[stream] = yield stream
        return window


def _place(ref: TensorRef, start: int) -> tuple[Path | TensorRef, int, int]:
    """Where a tensor's bytes from ``start`` on come by: the windows' space, the position in it, and how far they go."""
    if not ref.in_order:
        return ref, start, ref.nbytes
    for view in ref.views:
        nbytes = view.elements * DTYPES[ref.dtype]
        if start < nbytes:
            return view.file, view.offset + start, view.offset + nbytes
        start -= nbytes
    raise ValueError("a tensor has no bytes there")
