"""Plain values out of a pickle that anybody may have written, without ``pickle``: nothing is imported, made or called.

Numbers, texts, bytes, lists, tuples and dicts are read; of everything else, an instance of a class above all, it is
only noted that it stood there, as None. What ``pickletools`` says of the opcodes is enough for that. A container cannot
be referred to twice, so what comes out is a tree; texts can, up to ``MAX_READ`` bytes in all.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, Final

from protocol.queues.payload import MAX_READ

_MAX_DEPTH: Final = 64
# Each takes half a microsecond and more: others have to wait for no longer than some hundredths of a second.
_MAX_OPCODES: Final = 50_000
_MAX_KEY: Final = 1 << 63


class PickleRefusedError(ValueError):
    """It is no pickle, or one that is not only data."""


class _Mark:
    """Where a collection began on the stack."""


_MARK: Final = _Mark()

_CONSTANTS: Final[dict[str, object]] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
# Opcodes that carry their value.
_VALUES: Final = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BYTEARRAY8",
))  # fmt: skip
_EMPTY: Final[dict[str, Callable[[], object]]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_FIXED: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What makes instances: how many values it takes from the stack and how many it leaves, all of them nothing to us.
_OPAQUE: Final = {
    "GLOBAL": (0, 1), "STACK_GLOBAL": (2, 1), "REDUCE": (2, 1), "NEWOBJ": (2, 1), "NEWOBJ_EX": (3, 1), "BUILD": (1, 0),
    "PERSID": (0, 1), "BINPERSID": (1, 1), "EXT1": (0, 1), "EXT2": (0, 1), "EXT4": (0, 1), "EMPTY_SET": (0, 1),
}  # fmt: skip
_OPAQUE_TO_MARK: Final = {"OBJ": True, "INST": True, "FROZENSET": True, "ADDITEMS": False}
_PUT: Final = frozenset(("PUT", "BINPUT", "LONG_BINPUT"))
_GET: Final = frozenset(("GET", "BINGET", "LONG_BINGET"))
_NOTHING: Final = frozenset(("PROTO", "FRAME"))


def read_pickle(data: bytes) -> Any:
    """The value in a pickle of any protocol.

    Raises:
        PickleRefusedError: it is malformed, too large, nested beyond all measure, or does what data has no need of.
    """
    if len(data) > MAX_READ:
        raise PickleRefusedError(f"a pickle of {len(data)} bytes is not looked into")
    try:
        value = _run(data)
        _check_depth(value)
    except PickleRefusedError:
        raise
    except (ValueError, IndexError, TypeError, KeyError, OverflowError) as error:
        raise PickleRefusedError(f"not a pickle of data: {error}") from None
    return value


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    repeated = 0
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count >= _MAX_OPCODES:
            raise PickleRefusedError(f"more than {_MAX_OPCODES} opcodes are not looked into")
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _PUT:
            memo[int(argument)] = stack[-1]
        elif name in _GET:
            value = memo[int(argument)]
            if isinstance(value, dict | list | tuple) and value:
                raise PickleRefusedError("a container is referred to twice")
            if isinstance(value, str | bytes | bytearray):  # two bytes that stand for many, each time
                repeated += len(value)
                if repeated > MAX_READ:
                    raise PickleRefusedError("it unfolds to more than is looked into")
            stack.append(value if not isinstance(value, dict | list) else None)
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _FIXED:
            taken = _pop(stack, _FIXED[name])
            stack.append(tuple(taken))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = _pop_to_mark(stack)
            stack.append(tuple(items) if name == "TUPLE" else items if name == "LIST" else _pairs({}, items))
        elif name in ("APPEND", "APPENDS"):
            items = _pop(stack, 1) if name == "APPEND" else _pop_to_mark(stack)
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _pop(stack, 2) if name == "SETITEM" else _pop_to_mark(stack)
            if isinstance(stack[-1], dict):
                _pairs(stack[-1], items)
        elif name in _OPAQUE:
            takes, leaves = _OPAQUE[name]
            _pop(stack, takes)
            if leaves:
                stack.append(None)
            else:
                stack[-1] = None
        elif name in _OPAQUE_TO_MARK:
            _pop_to_mark(stack)
            if _OPAQUE_TO_MARK[name]:
                stack.append(None)
        elif name == "STOP":
            (value,) = _pop(stack, 1)
            return value
        elif name not in _NOTHING:
            raise PickleRefusedError(f"{name} is not needed for data")
    raise PickleRefusedError("it has no end")


def _pop(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise PickleRefusedError("it takes more than it has")
    taken = stack[len(stack) - count :]
    if _MARK in taken:
        raise PickleRefusedError("a collection has no end")
    del stack[len(stack) - count :]
    return taken


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    for position in range(len(stack) - 1, -1, -1):
        if stack[position] is _MARK:
            items = stack[position + 1 :]
            del stack[position:]
            return items
    raise PickleRefusedError("a collection has no beginning")


def _pairs(into: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Keys of other kinds lead nowhere. Of numbers without end each hash takes long, and all may be the same.
        if isinstance(key, str | float | bytes) or (isinstance(key, int) and -_MAX_KEY <= key < _MAX_KEY):
            into[key] = value
    return into


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        deeper: list[object] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(item.values())
            elif isinstance(item, list | tuple):
                deeper.extend(item)
        level = [item for item in deeper if isinstance(item, dict | list | tuple)]
        if not level:
            return
    raise PickleRefusedError("it is nested too deeply")
