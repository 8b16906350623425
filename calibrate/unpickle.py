"""A pickle machine that has nothing to run: what a checkpoint says, without doing what it says.

A pickle is a program for a stack machine. The standard library only takes it apart into opcodes (pickletools); this is
the machine, and all that it makes by itself are numbers, texts, lists, tuples, dicts and sets. A name in the file is
looked up in a table of ours. Whatever is not there - a training framework's callback, a configuration, os.system - is a
`Foreign`: a name that does nothing. Called, instantiated or given a state, it is another Foreign. Nothing is imported.

Memory and time are bounded: a pickle has MOST_STEPS steps, copies count as steps, and nested values are never descended
into.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import IO, Any

MOST_STEPS = 1_000_000  # Stable Diffusion's pickle takes about 40 thousand
STEPS_OF_A_NAME = 4  # what one more costs in time

# No checkpoint has a reason to name these. Safety does not hang on the list - they would be as inert as any other
# name - but whoever holds such a file should know.
COMMANDS = {
    "os",
    "posix",
    "nt",
    "subprocess",
    "pty",
    "sys",
    "importlib",
    "runpy",
    "shutil",
    "socket",
    "ctypes",
    "pickle",
}
COMMANDS |= {f"builtins.{name}" for name in ("eval", "exec", "compile", "open", "__import__", "breakpoint")}
COMMANDS |= {"torch.load", "torch.serialization.load", "torch.hub", "torch.jit.load", "torch.utils.cpp_extension"}
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


class DamagedError(Exception):
    """The file is no torch checkpoint, or not whole, or claims more than it holds; the words say which."""


class RunsCodeError(Exception):
    """The file names something whose only use is to run code; the words are that name."""


class Foreign:
    """A class, function or object that the file names and this tool does not have; inert, equal to itself only."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name[:100].encode("unicode_escape").decode("ascii")

    def __repr__(self) -> str:
        return f"<{self.name}, not read>"


class Known(Foreign):
    """A name with a counterpart of ours: `build` gets what the file would call it with, and must trust none of it."""

    __slots__ = ("build",)

    def __init__(self, name: str, build: Callable[..., Any]) -> None:
        super().__init__(name)
        self.build = build


class Machine:
    """One pickle's run. `known` has the values and Knowns that names stand for; `refer` resolves persistent ids."""

    def __init__(self, known: Mapping[str, Any], refer: Callable[[Any], Any]) -> None:
        self.known: dict[str, Any] = {**CONTAINERS, **known}
        self.refer = refer
        self.steps = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}

    def run(self, pickled: IO[bytes]) -> Any:
        """The object that the pickle describes; `pickled` stands behind it then.

        Raises:
            DamagedError: no pickle, or one that no checkpoint contains.
            RunsCodeError: it names a command.
            ValueError, TypeError, LookupError, OverflowError, RuntimeError: opcodes that do not fit each other.
        """
        for opcode, argument, _ in pickletools.genops(pickled):
            self.spend(1)
            if opcode.name in LITERALS:
                self.stack.append(argument)
            else:
                self._step(opcode.name, argument)
        return self.stack.pop()

    def spend(self, steps: int) -> None:
        """Count what takes time or memory.

        Raises:
            DamagedError: it was too much.
        """
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise DamagedError(f"a pickle of more than {MOST_STEPS:,} steps")

    def call(self, function: Any, arguments: Any) -> Any:
        """What the file would get by calling `function`: ours if it is known, otherwise a Foreign of its name."""
        if not isinstance(function, Foreign):
            raise DamagedError(f"a call of a {type(function).__name__}")
        if not isinstance(function, Known):
            return Foreign(function.name)
        if not isinstance(arguments, tuple):
            raise DamagedError("a call without arguments")
        self.spend(sum(len(a) for a in arguments if isinstance(a, (list, tuple, dict, set, frozenset))))
        return function.build(*arguments)

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[argument])
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(reversed([stack.pop() for _ in range(int(name[-1]))])))
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "TUPLE" | "LIST" | "DICT" | "FROZENSET":
                items = self._marked()
                self.stack.append(COLLECTED[name](items))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append(CONSTANTS[name])
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append(EMPTY[name]())
            case "GLOBAL":
                stack.append(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._named(module, attribute))
            case "REDUCE" | "NEWOBJ":
                arguments = stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "NEWOBJ_EX":
                _, arguments = stack.pop(), stack.pop()
                stack.append(self.call(stack.pop(), arguments))
            case "OBJ":
                items = self._marked()
                self.stack.append(self.call(items[0], tuple(items[1:])))
            case "INST":
                items = self._marked()
                self.stack.append(self.call(self._named(*argument.split(" ", 1)), tuple(items)))
            case "BUILD":  # attributes, of foreign objects or such as torch hangs on its dicts; nothing here has any
                stack.pop()
            case "BINPERSID":
                stack.append(self.refer(stack.pop()))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS":
                items = self._marked()
                _extend(self.stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items = self._marked()
                _set(self.stack[-1], items)
            case "ADDITEMS":
                items = self._marked()
                _add(self.stack[-1], items)
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self._marked()
            case "POP_MARK":
                self._marked()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:  # extension registries, buffers from outside, identities as text
                raise DamagedError(f"the opcode {name}, which no checkpoint has")

    def _marked(self) -> list[Any]:
        """What was put on the stack since the last mark."""
        items, self.stack = self.stack, self.below.pop()
        return items

    def _named(self, module: Any, attribute: Any) -> Any:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise DamagedError("a name that is no text")
        self.spend(STEPS_OF_A_NAME)
        name = f"{PYTHON_2.get(module, module)}.{attribute}"
        parts = name.split(".", 3)
        if any(".".join(parts[:n]) in COMMANDS for n in (1, 2, 3)):
            raise RunsCodeError(Foreign(name).name)
        return self.known[name] if name in self.known else Foreign(name)


def _key(value: Any) -> Any:
    """A dict's key or a set's item: of tuples and huge numbers, many that collide could be made, so they go unread."""
    if value is None or isinstance(value, (bool, float, str, bytes, Foreign)):
        return value
    return value if isinstance(value, int) and -(2**63) <= value < 2**63 else Foreign(type(value).__name__)


def _set(target: Any, items: list[Any]) -> Any:
    """Alternating keys and values into a dict."""
    if len(items) % 2:
        raise DamagedError("a key without a value")
    if isinstance(target, dict):
        target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
    elif not isinstance(target, Foreign):
        raise DamagedError(f"a key for a {type(target).__name__}")
    return target


def _extend(target: Any, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Foreign):
        raise DamagedError(f"an item for a {type(target).__name__}")


def _add(target: Any, items: list[Any]) -> None:
    if isinstance(target, set):
        target.update(map(_key, items))
    elif not isinstance(target, Foreign):
        raise DamagedError(f"an item for a {type(target).__name__}")


def _frozen(items: list[Any]) -> frozenset[Any]:
    return frozenset(map(_key, items))


def _listed(given: Any) -> list[Any]:
    # Not whatever can be iterated: a tensor's rows are without end.
    if not isinstance(given, (list, tuple, set, frozenset)):
        raise DamagedError("a container of what is no list")
    return list(given)


def _mapping(target: dict[Any, Any], given: Any) -> dict[Any, Any]:
    """A dict of what its constructor was given: another one, or pairs."""
    pairs = list(given.items()) if isinstance(given, dict) else _listed(given)
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise DamagedError("a dict of what are no pairs")
    return _set(target, [item for pair in pairs for item in pair])


# Numbers, texts and bytes, which pickletools has read.
LITERALS = {"BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
LITERALS |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: Mapping[str, Callable[[], Any]] = {
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
COLLECTED: Mapping[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "DICT": lambda items: _set({}, items),
    "FROZENSET": _frozen,
}
BUILDS: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda given=(): _mapping(OrderedDict(), given),
    "collections.defaultdict": lambda factory=None, given=(): _mapping({}, given),
    "collections.Counter": lambda given=(): _mapping({}, given),
    "builtins.set": lambda given=(): set(_frozen(_listed(given))),
    "builtins.frozenset": lambda given=(): _frozen(_listed(given)),
}
CONTAINERS = {name: Known(name, build) for name, build in BUILDS.items()}
