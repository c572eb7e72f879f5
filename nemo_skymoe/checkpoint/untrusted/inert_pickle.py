"""Pickles read as data: nothing is imported, constructed or called, whatever they ask for.

A checkpoint's metadata is a pickle. Here a class or function becomes a `Global`, a call of it a `Record`; the rest
are numbers, strings and containers. Slower than the interpreter's own, but without its memo, an array that four
bytes of a damaged file can make 64 GB long.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nemo_skymoe.durable.errors import CheckpointError, ConfigurationError


@dataclass(frozen=True)
class Global:
    """A class or function by its full name."""

    name: str


class Record:
    """An object that was not built: its class, the arguments, the state and the contents it would have got."""

    def __init__(self, kind: str, arguments: tuple[Any, ...]):
        self.kind, self.arguments = kind, arguments
        self.state: Any = None
        self.contents: list[Any] = []
        """Elements of a list or set; keys and values, in turn, of a dictionary."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.contents += (key, value)

    def append(self, value: Any) -> None:
        """An element, as the unpickler gives it to a class of lists."""
        self.contents.append(value)

    def add(self, value: Any) -> None:
        """An element, as the unpickler gives it to a class of sets."""
        self.contents.append(value)

    def field(self, name: str) -> Any:
        """Return an attribute of the state; None without one."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def load(
    data: bytes,
    allowed: Container[str],
    file: Path,
    persistent: Any = None,
    called: Callable[[Record], None] | None = None,
) -> Any:
    """Return the values that a pickle describes.

    Args:
        data: The pickle.
        allowed: Full names of the classes and functions it may refer to.
        file: The file it is from, for messages.
        persistent: A function that gives what a persistent identifier becomes. Without one there may be none.
        called: Sees every object when it is made, and again whenever it gets a state. A real unpickler makes each of
            them, also those that the result does not hold.

    Raises:
        NotAllowedError: It refers to anything else.
        CheckpointError: It is damaged, or `called` raised it.
    """
    return load_next(io.BytesIO(data), allowed, file, persistent, called)


def load_next(
    stream: io.BytesIO,
    allowed: Container[str],
    file: Path,
    persistent: Any = None,
    called: Callable[[Record], None] | None = None,
) -> Any:
    """Return the values of the pickle that comes next in a stream of several; otherwise as `load`."""
    try:
        return _Unpickler(stream, allowed, persistent, called).load()
    except _RefusedError as reason:
        raise NotAllowedError(str(reason), file) from None
    except (ConfigurationError, MemoryError):  # no memory: better seen than taken for damage
        raise
    except Exception as reason:
        raise CheckpointError(
            f"'{file}' is damaged: {type(reason).__name__} in its pickle ({reason})"
        ) from None


class NotAllowedError(CheckpointError):
    """A file refers to a class or function that no checkpoint needs."""

    def __init__(self, name: str, file: Path):
        self.name, self.file = name, file
        super().__init__(name, file)  # what a worker process has to send of it

    def __str__(self) -> str:
        return f"'{self.file}' refers to '{self.name}', which has no place in a checkpoint: it was not read further"


class _RefusedError(Exception):
    pass


_OPCODES = (
    *("PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP"),
    *("MEMOIZE", "GET", "BINGET", "LONG_BINGET", "PUT", "BINPUT", "LONG_BINPUT"),
    *("GLOBAL", "STACK_GLOBAL", "PERSID", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE"),
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
)
"""These make numbers, strings and containers; calls are ours, below; everything else is refused."""


class _Unpickler(pickle._Unpickler):
    # Set by `load`, and not in typeshed.
    stack: list[Any]
    readline: Callable[[], bytes]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in _OPCODES
    }

    def __init__(
        self,
        stream: io.BytesIO,
        allowed: Container[str],
        persistent: Any,
        called: Callable[[Record], None] | None,
    ):
        super().__init__(stream)
        self._allowed, self._persistent, self._called = allowed, persistent, called

    def find_class(self, module: str, name: str) -> Global:
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise _RefusedError(full)
        return Global(full)

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise ValueError("unexpected persistent identifier")
        return self._persistent(pid)

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._append_record(function, arguments)

    def _call_with_keywords(self) -> None:
        keywords, arguments, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self._append_record(function, (*arguments, keywords))

    def _call_by_name(self) -> None:
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        arguments = tuple(self.pop_mark())
        self._append_record(self.find_class(module, name), arguments)

    def _call_first_of_mark(self) -> None:
        function, *arguments = self.pop_mark()
        self._append_record(function, tuple(arguments))

    def _append_record(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise ValueError("a call of something that is no function")
        self.stack.append(record := Record(function.name, arguments))
        if self._called is not None:
            self._called(record)

    def _build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise ValueError("a state for something that is no object")
        # As a real object does it: a copy, beside what an earlier state has set.
        earlier = self.stack[-1].state
        if isinstance(state, dict):
            state = (earlier if isinstance(earlier, dict) else {}) | state
        self.stack[-1].state = state
        if self._called is not None:
            self._called(self.stack[-1])

    dispatch |= {
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.NEWOBJ_EX[0]: _call_with_keywords,
        pickle.INST[0]: _call_by_name,
        pickle.OBJ[0]: _call_first_of_mark,
        pickle.BUILD[0]: _build,
    }
