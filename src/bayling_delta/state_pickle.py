"""The pickle of a ``.bin`` file, read as data.

A pickle is a program for a small stack machine. This one interprets the few instructions that a state
dict needs and builds nothing but tables, tuples, numbers, strings and `TensorSpec`: a name of a function
or class stays a name, and only those in `_STORAGES`, `_REBUILD` and ``collections.OrderedDict`` are known.
Nothing is imported, nothing is called, nothing is given to Python's own pickle. Every instruction takes
at least one byte and makes at most one object, tables and tuples are counted, and so time and memory are bounded.

Sources: Lib/pickletools.py for the instructions; torch/_utils.py and torch/serialization.py for what
PyTorch writes with them.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeGuard

from bayling_delta.errors import shown
from bayling_delta.tensors import RANK_CAP

__all__ = ["PickleError", "TensorSpec", "read_state_dict"]


class PickleError(ValueError):
    """The pickle is damaged, or asks for something that no state dict needs."""

    def __init__(self, message: str, *, unsafe: bool = False, unsupported: bool = False) -> None:
        super().__init__(message)
        self.unsafe = unsafe
        self.unsupported = unsupported


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor as the pickle describes it: a strided view of a storage. Nothing in it is checked yet."""

    storage: "_Storage"
    offset: int
    """Elements from the storage's start."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str
    key: str
    """The record ``ROOT/data/KEY`` has its bytes."""
    elements: int


@dataclass(frozen=True, slots=True)
class _Name:
    """A function or class that the pickle names."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class _Mark:
    """Where a tuple, list or table of many items begins on the stack."""


_MARK: Final = _Mark()
_STACK_CAP: Final = 100_000
"""Python's pickler fills tables a thousand items at a time; a real stack stays far below."""
_MADE_CAP: Final = 10_000_000
"""Some seven for each tensor."""
_ORDERED_DICT = _Name("collections", "OrderedDict")
_REBUILD = (_Name("torch._utils", "_rebuild_tensor_v2"), _Name("torch._utils", "_rebuild_parameter"))
_STORAGES = {
    _Name("torch", f"{kind}Storage"): dtype
    for kind, dtype in {
        "Bool": "BOOL", "Byte": "U8", "Char": "I8", "Short": "I16", "Int": "I32", "Long": "I64",
        "Half": "F16", "BFloat16": "BF16", "Float": "F32", "Double": "F64",
    }.items()
}  # fmt: skip
_UNSUPPORTED_DTYPES = {
    _Name("torch._utils", "_rebuild_tensor_v3"),
    _Name("torch.storage", "UntypedStorage"),
    _Name("torch", "ComplexFloatStorage"),
    _Name("torch", "ComplexDoubleStorage"),
    _Name("torch", "QInt8Storage"),
    _Name("torch", "QUInt8Storage"),
    _Name("torch", "QInt32Storage"),
    _Name("torch._utils", "_rebuild_qtensor"),
}
"""Harmless names of tensors whose dtype is not read here."""

_DESCRIPTIONS = {dict: "a table", list: "a list", tuple: "a tuple", str: "a string", bool: "a flag"} | {
    int: "a number", float: "a number", type(None): "nothing"
}  # fmt: skip


def read_state_dict(pickle: bytes) -> dict[str, TensorSpec]:
    """Return the tensors of a pickled state dict by name, in its order.

    Raises:
        PickleError: it is not the pickle of a table from names to tensors.
    """
    state = _Machine(pickle).run()
    if not isinstance(state, dict):
        raise PickleError(f"the file holds {_describe(state)}, not a state dict", unsupported=True)
    specs: dict[str, TensorSpec] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise PickleError(f"the state dict has {_describe(name)} for a name", unsupported=True)
        if isinstance(value, dict) and value:
            raise PickleError(
                f"{shown(name)!r} is a table in the table; save the state dict by itself, without what surrounds it",
                unsupported=True,
            )
        if not isinstance(value, TensorSpec):
            raise PickleError(f"{shown(name)!r} is {_describe(value)}, not a tensor", unsupported=True)
        specs[name] = value
    return specs


def _describe(value: object) -> str:
    return "a tensor" if isinstance(value, TensorSpec) else _DESCRIPTIONS.get(type(value), "something else")


class _Machine:
    """The stack machine: one pickle, run once."""

    def __init__(self, pickle: bytes) -> None:
        self.pickle = pickle
        self.position = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.made = 0

    def run(self) -> object:
        if self._take(2) != b"\x80\x02":
            raise PickleError("the pickle is not of protocol 2, which PyTorch writes", unsupported=True)
        stack, instructions = self.stack, _INSTRUCTIONS  # there are some 30 instructions for each tensor
        while (code := self._byte()) != 0x2E:  # STOP
            instruction = instructions.get(code)
            if instruction is None:
                at = self.position - 1
                raise PickleError(f"instruction {_opcode_name(code)} at byte {at}: no state dict needs it", unsafe=True)
            instruction(self)
            if len(stack) > _STACK_CAP:
                raise PickleError("the pickle piles up more objects than a state dict needs")
        if len(self.stack) != 1 or self.position != len(self.pickle):
            raise PickleError("the pickle does not end with one object")
        return self._pop()

    # the stack

    def _take(self, count: int) -> bytes:
        data = self.pickle[self.position : self.position + count]
        if len(data) < count:
            raise PickleError("the pickle ends in the middle of an instruction")
        self.position += count
        return data

    def _byte(self) -> int:
        position = self.position
        if position == len(self.pickle):
            raise PickleError("the pickle ends in the middle of an instruction")
        self.position = position + 1
        return self.pickle[position]

    def _number(self, form: struct.Struct) -> int:
        start = self.position
        end = start + form.size
        if end > len(self.pickle):
            raise PickleError("the pickle ends in the middle of an instruction")
        self.position = end
        number: int = form.unpack_from(self.pickle, start)[0]
        return number

    def _line(self) -> str:
        end = self.pickle.find(b"\n", self.position, self.position + 256)
        if end < 0:
            raise PickleError("the pickle has a name without an end")
        line = self._take(end - self.position)
        self.position += 1
        return _text(line)

    def _make(self, made: object) -> None:
        """Push a new table, list, tuple or tensor."""
        self.made += 1
        if self.made > _MADE_CAP:
            raise PickleError("the pickle makes more objects than a state dict needs")
        self.stack.append(made)

    def _pop(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("the pickle takes an object from an empty stack")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while self.stack:
            item = self.stack.pop()
            if item is _MARK:
                items.reverse()
                return items
            items.append(item)
        raise PickleError("the pickle ends a group that it has not begun")

    # numbers and strings

    def none(self) -> None:
        self.stack.append(None)

    def true(self) -> None:
        self.stack.append(True)

    def false(self) -> None:
        self.stack.append(False)

    def int4(self) -> None:
        self.stack.append(self._number(_INT4))

    def fraction(self) -> None:
        self.stack.append(_FLOAT8.unpack(self._take(8))[0])

    def uint1(self) -> None:
        self.stack.append(self._byte())

    def uint2(self) -> None:
        self.stack.append(self._number(_UINT2))

    def long1(self) -> None:
        length = self._byte()
        if length > 9:
            raise PickleError("the pickle has a number of more than 64 bits")
        self.stack.append(int.from_bytes(self._take(length), "little", signed=True))

    def text(self) -> None:
        self.stack.append(_text(self._take(self._number(_UINT4))))

    # the memo

    def put1(self) -> None:
        self._put(self._byte())

    def put4(self) -> None:
        self._put(self._number(_UINT4))

    def _put(self, index: int) -> None:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("the pickle remembers an object that it has not made")
        if index >= len(self.pickle):  # a pickler counts; numbers of one's choice could have a table of them collide
            raise PickleError("the pickle remembers more objects than it can make")
        self.memo[index] = self.stack[-1]

    def get1(self) -> None:
        self._get(self._byte())

    def get4(self) -> None:
        self._get(self._number(_UINT4))

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError("the pickle recalls an object that it has not made")
        self.stack.append(self.memo[index])

    # tuples, lists, tables

    def mark(self) -> None:
        self.stack.append(_MARK)

    def empty_tuple(self) -> None:
        self._make(())

    def empty_list(self) -> None:
        self._make([])

    def empty_table(self) -> None:
        self._make({})

    def tuple_from_mark(self) -> None:
        self._make(tuple(self._pop_to_mark()))

    def tuple1(self) -> None:
        self._make((self._pop(),))

    def tuple2(self) -> None:
        second, first = self._pop(), self._pop()
        self._make((first, second))

    def tuple3(self) -> None:
        third, second, first = self._pop(), self._pop(), self._pop()
        self._make((first, second, third))

    def append(self) -> None:
        self._extend([self._pop()])

    def appends(self) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, list):
            raise PickleError("the pickle appends to what is not a list")
        target.extend(items)
        self.stack.append(target)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set([key, value])

    def set_items(self) -> None:
        self._set(self._pop_to_mark())

    def _set(self, items: list[object]) -> None:
        target = self._pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("the pickle sets items of what is not a table")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | int):
                raise PickleError("the pickle has a table whose key is neither a string nor a number")
            if isinstance(key, int) and not 0 <= key < len(self.pickle):  # as in the memo
                raise PickleError("the pickle has a table whose key is a number that no count is", unsupported=True)
            if key in target:
                raise PickleError(f"the pickle has {shown(str(key))!r} twice in one table")
            target[key] = value
        self.stack.append(target)

    # names, and what may be done with them

    def name(self) -> None:
        name = _Name(self._line(), self._line())
        if name in _UNSUPPORTED_DTYPES:
            raise PickleError(f"{name}: tensors of this dtype are not read here", unsupported=True)
        if name != _ORDERED_DICT and name not in _REBUILD and name not in _STORAGES:
            what = f"{name} is not something that a plain state dict needs; nothing was run"
            raise PickleError(f"{what}. Get the weights from their publisher, or in safetensors", unsafe=True)
        self.stack.append(name)

    def storage(self) -> None:
        match self._pop():
            case ("storage", _Name() as kind, str(key), str(), int(elements)) if kind in _STORAGES:
                self._make(_Storage(_STORAGES[kind], key, elements))
            case _:
                raise PickleError("the pickle refers to a storage in a way that PyTorch does not", unsafe=True)

    def reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        match function, arguments:
            case _Name("collections", "OrderedDict"), ():
                self._make({})
            case _Name(_, "_rebuild_tensor_v2"), (
                _Storage() as storage,
                int(offset),
                tuple(shape),
                tuple(strides),
                _,
                _,
            ):
                self._make(TensorSpec(storage, offset, _sizes(shape), _sizes(strides)))
            case _Name(_, "_rebuild_tensor_v2"), (_Storage(), int(), tuple(), tuple(), _, _, dict()):
                # Metadata is written for tensors that are negated or conjugated by a flag alone.
                raise PickleError("a tensor is negated by a flag; save it after resolve_neg()", unsupported=True)
            case _Name(_, "_rebuild_parameter"), (TensorSpec() as data, *_):
                self.stack.append(data)
            case _:
                called = str(function) if isinstance(function, _Name) else _describe(function)
                raise PickleError(f"the pickle calls {called} in a way that PyTorch does not", unsafe=True)

    def build(self) -> None:
        state, target = self._pop(), self._pop()
        # A module's state dict carries its versions as an attribute, and nothing else.
        if not isinstance(target, dict) or not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise PickleError("the pickle sets attributes that no state dict has", unsafe=True)
        self.stack.append(target)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PickleError("the pickle has a string that is not UTF-8") from error


def _sizes(values: tuple[object, ...]) -> tuple[int, ...]:
    if len(values) > RANK_CAP:
        raise PickleError(f"the pickle has a tensor of more than {RANK_CAP} dimensions")
    if not _are_numbers(values):
        raise PickleError("the pickle has a tensor whose shape is not made of numbers")
    return values  # itself: a copy for each of the tensors that name it would be many times the pickle


def _are_numbers(values: tuple[object, ...]) -> TypeGuard[tuple[int, ...]]:
    return set(map(type, values)) <= {int}


def _opcode_name(code: int) -> str:
    import pickletools  # for the names in messages alone

    opcode = next((entry for entry in pickletools.opcodes if entry.code == chr(code)), None)
    return opcode.name if opcode else f"0x{code:02x}"


_UINT2, _UINT4, _INT4 = (struct.Struct(form) for form in ("<H", "<I", "<i"))

_FLOAT8 = struct.Struct(">d")
_INSTRUCTIONS: dict[int, Callable[[_Machine], None]] = {
    ord("N"): _Machine.none,
    0x88: _Machine.true,
    0x89: _Machine.false,
    ord("J"): _Machine.int4,
    ord("G"): _Machine.fraction,
    ord("K"): _Machine.uint1,
    ord("M"): _Machine.uint2,
    0x8A: _Machine.long1,
    ord("X"): _Machine.text,
    ord("q"): _Machine.put1,
    ord("r"): _Machine.put4,
    ord("h"): _Machine.get1,
    ord("j"): _Machine.get4,
    ord("("): _Machine.mark,
    ord(")"): _Machine.empty_tuple,
    ord("]"): _Machine.empty_list,
    ord("}"): _Machine.empty_table,
    ord("t"): _Machine.tuple_from_mark,
    0x85: _Machine.tuple1,
    0x86: _Machine.tuple2,
    0x87: _Machine.tuple3,
    ord("a"): _Machine.append,
    ord("e"): _Machine.appends,
    ord("s"): _Machine.set_item,
    ord("u"): _Machine.set_items,
    ord("c"): _Machine.name,
    ord("Q"): _Machine.storage,
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
}
