"""Pickles read without being run: a small machine for their opcodes that knows data and a few constructors, and calls nothing else.

Other classes become inert `Record`s. A call of anything that is no class is refused, as is whatever lives in a module that a
checkpoint has no reason to name.
"""

from __future__ import annotations

import pickletools
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from teratron.config import UserError

REFUSED = frozenset({
    "os", "posix", "nt", "sys", "subprocess", "shutil", "importlib", "runpy", "pty", "socket", "ctypes", "builtins", "__builtin__",
    "code", "commands", "webbrowser", "pickle", "marshal", "multiprocessing", "operator", "types",
})  # fmt: skip
"""Modules of which nothing is taken, but for what `Readers` knows."""
INERT_CALLS = frozenset({
    "torch.device", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_device_tensor_from_numpy", "datetime.timedelta",
    "datetime.datetime", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy._core.numeric._frombuffer",
    "numpy.core.numeric._frombuffer", "functools.partial",
    "torch.storage._load_from_bytes", "torch.serialization._get_layout",
})  # fmt: skip
"""Functions whose calls checkpoints hold, which become records too."""


class Global(NamedTuple):
    """A name of a module: `torch.float32`, `argparse.Namespace`."""

    name: str


@dataclass(eq=False)
class Record:
    """What a pickle says of an object: its class, what this would be called with, and what it would be filled with."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)

    @property
    def attributes(self) -> dict[str, Any]:
        """Of an object whose state is a dict; with slots that is the second half."""
        states = self.state if isinstance(self.state, tuple) else (self.state,)
        return {str(key): value for state in states if isinstance(state, dict) for key, value in state.items()}


Readers = Mapping[str, Callable[..., Any]]
"""What stands for a class or function of this name: called with the pickle's arguments, it returns plain data."""
_PLAIN: Readers = {
    "collections.OrderedDict": lambda pairs=(): dict(pairs),
    "collections.defaultdict": lambda *_: {},
    "builtins.set": lambda items=(): set(items),
    "builtins.frozenset": lambda items=(): frozenset(items),
    "builtins.bytearray": lambda *given: bytes(given[0]) if given and isinstance(given[0], bytes) else b"",
    "builtins.complex": complex,
    "builtins.slice": slice,
    "builtins.object": lambda: None,
    "builtins.getattr": lambda owner, name: _member(owner, name),
    "copyreg._reconstructor": lambda kind, *_: Record(kind.name),
    "_codecs.encode": lambda text, *_: text.encode("latin-1"),
    "torch.Size": lambda sizes=(): tuple(sizes),
    "pathlib.PosixPath": lambda *names: posixpath.join("", *names),
    "pathlib._local.PosixPath": lambda *names: posixpath.join("", *names),
    "pathlib.Path": lambda *names: posixpath.join("", *names),
}
_OLDER = {"builtins.": "__builtin__.", "copyreg.": "copy_reg."}
PLAIN: Readers = {
    **_PLAIN,
    **{name.replace(new, old, 1): _PLAIN[name] for new, old in _OLDER.items() for name in _PLAIN if name.startswith(new)},
}
"""Those of every pickle."""


def _member(owner: Any, name: Any) -> Global:
    """A member of an enum, as Python 3.11 and 3.12 pickle it; of anything else it is refused."""
    if not isinstance(owner, Global) or not isinstance(name, str) or name.startswith("_"):
        raise ValueError(f"asks {owner!r} for {name!r}")
    return _checked(Global(f"{owner.name}.{name}"))


def _checked(found: Global) -> Global:
    """A name, unless it is of a module that no checkpoint needs."""
    if found.name.partition(".")[0] in REFUSED and found.name not in PLAIN:
        raise ValueError(f"names {found.name}, which no checkpoint needs")
    return found


_MARK = object()


def read_pickle(file: BinaryIO, name: str, readers: Readers | None = None, stored: Callable[[Any], Any] | None = None) -> Any:
    """The data of one pickle; nothing in it is run.

    Args: name: for messages; readers: beside `PLAIN`; stored: what stands for an identity of something outside the pickle.
    Raises `UserError` for a damaged pickle, and for one that would call something.
    """
    machine = _Machine({**PLAIN, **(readers or {})}, stored)
    try:
        for opcode, argument, _ in pickletools.genops(file):
            machine.do(opcode.name, argument)
        return machine.pop()
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, UnicodeError, EOFError, OverflowError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{name}: not a checkpoint's pickle: it {reason}: it was not run; get the file from a source that you trust"
        ) from None


class _Machine:
    """The stack and the memory of a pickle."""

    def __init__(self, readers: Readers, stored: Callable[[Any], Any] | None) -> None:
        self.readers, self.stored = readers, stored
        self.stack: list[Any] = []
        self.memory: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        """One opcode."""
        if name in _CONSTANTS:
            make = _CONSTANTS[name]
            self.stack.append(argument if make is None else make())
        elif name in _NOTHING:
            return
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memory[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memory[argument])
        elif name == "MEMOIZE":
            self.memory[len(self.memory)] = self.stack[-1]
        else:
            getattr(self, f"do_{name.lower()}")(argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("is not well formed")
        return value

    def pop_marked(self) -> list[Any]:
        """What lies above the last mark."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise ValueError("is not well formed")

    def called(self, function: Any, arguments: Any) -> Any:
        """What a call is read as."""
        if not isinstance(function, Global):
            raise ValueError(f"calls {type(function).__name__} objects")
        if function.name in self.readers:
            return self.readers[function.name](*arguments)
        kind = function.name.rpartition(".")[2].lstrip("_")
        if not kind[:1].isupper() and function.name not in INERT_CALLS:
            raise ValueError(f"calls {function.name}")
        return Record(function.name, tuple(arguments))

    def put(self, target: Any, pairs: list[Any]) -> None:
        """Set items of a dict or of an object that takes them."""
        owner = target.items if isinstance(target, Record) else target
        if not isinstance(owner, dict):
            raise ValueError("sets items of what has none")
        owner.update(zip(pairs[::2], pairs[1::2], strict=True))

    def do_mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def do_pop(self, _: Any) -> None:
        self.stack.pop()

    def do_pop_mark(self, _: Any) -> None:
        self.pop_marked()

    def do_dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def do_global(self, argument: str) -> None:
        self.stack.append(_checked(Global(argument.replace(" ", "."))))

    def do_stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        self.stack.append(_checked(Global(f"{module}.{name}")))

    def do_reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(self.called(function, arguments))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: Any) -> None:
        keywords, arguments, function = self.pop(), self.pop(), self.pop()
        self.stack.append(self.called(function, (*arguments, *keywords.values())))

    def do_inst(self, argument: str) -> None:
        self.stack.append(self.called(_checked(Global(argument.replace(" ", "."))), self.pop_marked()))

    def do_obj(self, _: Any) -> None:
        function, *arguments = self.pop_marked()
        self.stack.append(self.called(function, arguments))

    def do_build(self, _: Any) -> None:
        state = self.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state

    def do_binpersid(self, _: Any) -> None:
        if self.stored is None:
            raise ValueError("refers to something outside of it")
        self.stack.append(self.stored(self.pop()))

    def do_setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self.put(self.stack[-1], [key, value])

    def do_setitems(self, _: Any) -> None:
        pairs = self.pop_marked()
        self.put(self.stack[-1], pairs)

    def do_append(self, _: Any) -> None:
        value = self.pop()
        self.add([value])

    def do_appends(self, _: Any) -> None:
        self.add(self.pop_marked())

    def add(self, values: list[Any]) -> None:
        """Append to a list; what other objects would take is dropped."""
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def do_additems(self, _: Any) -> None:
        values = self.pop_marked()
        self.stack[-1].update(values)

    def do_list(self, _: Any) -> None:
        self.stack.append(self.pop_marked())

    def do_dict(self, _: Any) -> None:
        pairs = self.pop_marked()
        self.stack.append(dict(zip(pairs[::2], pairs[1::2], strict=True)))

    def do_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_marked()))

    def do_frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(self.pop_marked()))

    def do_tuple1(self, _: Any) -> None:
        self.pop_tuple(1)

    def do_tuple2(self, _: Any) -> None:
        self.pop_tuple(2)

    def do_tuple3(self, _: Any) -> None:
        self.pop_tuple(3)

    def pop_tuple(self, count: int) -> None:
        values = tuple(self.pop() for _ in range(count))
        self.stack.append(values[::-1])


_NOTHING = ("PROTO", "FRAME", "STOP")
_GIVEN = (
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 "
    "BYTEARRAY8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
)
_CONSTANTS: dict[str, Callable[[], Any] | None] = {
    **dict.fromkeys(_GIVEN.split()),
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
"""Opcodes that push a value: their argument, or a new object."""
