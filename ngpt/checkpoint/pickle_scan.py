"""A pickle's instructions followed on paper before `torch.load` is let near them: nothing is imported, called or built.

`torch.load(weights_only=True)` runs no foreign code, but a small hostile file can still make it take hours or all
memory (keys that are tuples of tuples, ``bytearray(10**12)``), and what it refuses it names only inside advice on how
to be less careful. So every instruction is followed here first, with markers in place of objects. What comes out is
the list of classes that need an inert stand-in: training code leaves its configuration class, NumPy's random state
and other things beside the weights.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ngpt.checks import is_whole
from ngpt.errors import CorruptFileError, NGPTDeployError, UnsafeFormatError, shown

MAX_INSTRUCTIONS = 1 << 18  # under half a second; the file of a 48-layer model and its optimiser has some 40,000
_MAX_AXES = 64

_STORAGES_OF_SIZE = {
    1: "CharStorage ByteStorage BoolStorage storage.UntypedStorage",
    2: "HalfStorage BFloat16Storage ShortStorage",
    4: "FloatStorage IntStorage",
    8: "DoubleStorage LongStorage ComplexFloatStorage",
    16: "ComplexDoubleStorage",
}
_STORAGES = {f"torch.{name}": size for size, names in _STORAGES_OF_SIZE.items() for name in names.split()}

# Constructors of plain data whose call a stand-in may swallow. Any other call is refused: it could be of anything.
_INERT_CALLS = frozenset(
    {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
    | {f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")}
    | {f"numpy.random._pickle.__{name}_ctor" for name in ("bit_generator", "generator", "randomstate")}
    | {f"numpy.random.bit_generator.__pyx_unpickle_{name}" for name in ("SeedSequence", "SeedlessSeedSequence")}  # NumPy 2
    | {f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath")}
    | {f"pathlib._local.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")}
    | {f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")}
    | {f"builtins.{name}" for name in ("frozenset", "slice", "range", "object", "list", "dict", "tuple", "bytes")}
    | {
        "numpy.dtype",
        "numpy.ndarray",
        "collections.defaultdict",
        "collections.deque",
        "types.SimpleNamespace",
        "random.Random",
        "copyreg._reconstructor",
        "decimal.Decimal",
        "fractions.Fraction",
        "uuid.UUID",
        "torch._C.Generator",
    }
)
# torch.load refuses these modules, stand-in or not.
_BLOCKED = frozenset({"sys", "os", "posix", "nt"})


@dataclass
class StandIns:
    """Full names of the classes and constructors that need a stand-in, and of those that are filled like a dict or a list.

    Of some an instance takes a state: `attributes` where it is like a dict (EasyDict and its kin have both),
    `stateful` any other.
    """

    plain: set[str] = field(default_factory=set)
    mappings: set[str] = field(default_factory=set)
    sequences: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    stateful: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Name:
    path: str


@dataclass(frozen=True)
class _Object:
    path: str


@dataclass(frozen=True)
class _Storage:
    items: int
    item_bytes: int


class _Tensor:
    pass


class _Dict:
    """A dict of which only the keys matter, while they are put in."""


_MARK = object()


def scan_pickle(data: bytes, members: Mapping[str, int], where: str) -> StandIns:
    """Follow the pickle ``data`` of an archive whose ``members`` have these sizes in bytes. ``where`` names it in errors.

    Raises `UnsafeFormatError` naming the first object that is refused, `CorruptFileError` for a pickle that contradicts itself
    or asks for more bytes than there are.
    """
    machine = _Machine(members, where)
    try:
        for count, (instruction, argument, _) in enumerate(pickletools.genops(data)):
            if count == MAX_INSTRUCTIONS:
                raise UnsafeFormatError(
                    f"{where} holds more objects than a checkpoint has reason to",
                    expected=f"at most {MAX_INSTRUCTIONS} pickle instructions",
                    remedy="re-save model and model_args alone",
                )
            machine.step(instruction.name, argument)
    except NGPTDeployError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError, RecursionError, MemoryError) as error:
        raise _corrupt(where, f"{type(error).__name__}: {error}") from error
    found = machine.found
    clash = (found.mappings | found.sequences) & found.stateful | found.sequences & (found.attributes | found.mappings)
    if clash:
        raise _refused(where, min(clash), "filled like a container and built like an object")
    return found


class _Machine:
    """torch's unpickler (torch/_weights_only_unpickler.py), with markers for objects and no instruction that it lacks."""

    def __init__(self, members: Mapping[str, int], where: str) -> None:
        self.members = members
        self.where = where
        self.found = StandIns()
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Follow one instruction."""
        stack = self.stack
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name in ("BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "LONG1", "SHORT_BINSTRING"):
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif name in _TUPLES:
            items = [self.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("APPEND", "APPENDS"):
            items = [self.pop()] if name == "APPEND" else self.pop_mark()
            self.extend(self.top(), items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_mark()
            self.update(self.top(), items[::2])
        elif name == "GLOBAL":
            stack.append(self.name(argument))
        elif name == "BINPERSID":
            stack.append(self.storage(self.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = self.pop(), self.pop()
            if not isinstance(function, _Name) or not isinstance(arguments, tuple):
                raise _corrupt(self.where, f"{name} of {_shown(function)}")
            stack.append(self.call(function.path, arguments) if name == "REDUCE" else self.instance(function.path))
        elif name == "BUILD":
            self.build(self.pop(), self.top())
        elif name not in ("PROTO", "STOP"):
            raise UnsafeFormatError(
                f"{self.where} is not a pickle as torch.save writes it",
                expected="its default protocol, 2",
                found=f"the instruction {name}",
                remedy="re-save it with torch.save's default pickle_protocol",
            )

    def top(self) -> Any:
        """The top of the stack, which must be a value."""
        value = self.stack[-1]
        if value is _MARK:
            raise IndexError("a mark where a value should be")
        return value

    def pop(self) -> Any:
        """The top of the stack, taken away."""
        value = self.top()
        self.stack.pop()
        return value

    def pop_mark(self) -> list[Any]:
        """What lies above the last mark."""
        items = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def name(self, argument: str) -> _Name:
        """A global by its full name, in today's spelling."""
        module, name = argument.split(" ")
        if (module, name) in NAME_MAPPING:
            module, name = NAME_MAPPING[(module, name)]
        else:
            module = IMPORT_MAPPING.get(module, module)
        path = f"{module}.{name}"
        if module.split(".")[0] in _BLOCKED or (path.startswith("torch.") and not _known_of_torch(path)):
            raise _refused(self.where, path)
        if path not in _CALLS and (path in _INERT_CALLS or not path.startswith("torch.")):
            self.found.plain.add(path)
        return _Name(path)

    def call(self, path: str, arguments: tuple[Any, ...]) -> Any:
        """What a call gives back. Those in _CALLS torch makes itself, so their arguments are checked."""
        if path in _CALLS:
            result = _CALLS[path](arguments)
            if result is None:
                raise _refused(self.where, path, f"with the arguments {shown(tuple(map(_shown, arguments)))}")
            return result
        if path not in _INERT_CALLS:
            raise _refused(self.where, path)
        return _Object(path)

    def instance(self, path: str) -> _Object:
        """An object of any class: a stand-in takes its place."""
        if path in _CALLS or path in _STORAGES or path.startswith("torch."):
            raise _refused(self.where, path)
        return _Object(path)

    def extend(self, target: Any, items: list[Any]) -> None:
        """Into a list, or an object that is filled like one."""
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, _Object):
            self.found.sequences.add(target.path)
        else:
            raise _corrupt(self.where, f"items appended to {_shown(target)}")

    def update(self, target: Any, keys: list[Any]) -> None:
        """Into a dict, or an object that is filled like one."""
        for key in keys:
            if not _is_key(key):
                raise _corrupt(self.where, f"the dict key {_shown(key)}")
        if isinstance(target, _Object):
            self.found.mappings.add(target.path)
        elif not isinstance(target, _Dict):
            raise _corrupt(self.where, f"items put into {_shown(target)}")

    def build(self, state: Any, target: Any) -> None:
        """An object's state. OrderedDicts have one, too: a module's state_dict keeps its versions there."""
        if isinstance(target, _Object):
            itself = isinstance(state, _Object) and state.path == target.path
            (self.found.attributes if itself or isinstance(state, _Dict) else self.found.stateful).add(target.path)
        elif not (isinstance(target, _Dict) and isinstance(state, _Dict)):
            raise _corrupt(self.where, f"a state for {_shown(target)}")

    def storage(self, key: Any) -> _Storage:
        """The bytes of one member of the archive."""
        if not isinstance(key, tuple) or len(key) != 5:
            raise _corrupt(self.where, f"a storage {_shown(key)}")
        tag, kind, member, location, items = key
        known = tag == "storage" and isinstance(kind, _Name) and kind.path in _STORAGES
        if not known or not isinstance(member, str) or not isinstance(location, str) or not is_whole(items) or items < 0:
            raise _corrupt(self.where, f"a storage {_shown(key)}")
        item_bytes = _STORAGES[kind.path]
        available = self.members.get(f"data/{member}")
        if available is None or items * item_bytes > available:
            raise CorruptFileError(
                f"{self.where} asks for more bytes than there are: data/{shown(member)[1:-1]}",
                expected=f"{items * item_bytes} bytes",
                found="no such member" if available is None else f"{available}",
                remedy="copy or download the file again",
            )
        return _Storage(items, item_bytes)


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FRESH: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": _Dict}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _is_key(value: Any) -> bool:
    """Whether hashing it is cheap: tuples hash what they hold, and ints beyond a word can be made to collide."""
    if isinstance(value, int):
        return value.bit_length() < 61
    return value is None or isinstance(value, float | str | bytes)


def _tensor(arguments: tuple[Any, ...]) -> _Tensor | None:
    """A dense tensor inside its storage: (storage, offset, size, stride, requires_grad, hooks [, dtype] [, metadata])."""
    if not 6 <= len(arguments) <= 8 or any(isinstance(extra, _Dict) for extra in arguments[6:]):
        return None
    storage, offset, size, stride = arguments[:4]
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        return None
    numbers = [offset, *size, *stride]
    if len(size) != len(stride) or len(size) > _MAX_AXES or not all(is_whole(n) and 0 <= n < 1 << 62 for n in numbers):
        return None
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    stated = _dtype(arguments[6].path) if len(arguments) > 6 and isinstance(arguments[6], _Name) else None
    item_bytes = storage.item_bytes if stated is None else stated.itemsize
    return _Tensor() if 0 in size or (last + 1) * item_bytes <= storage.items * storage.item_bytes else None


def _encoded(arguments: tuple[Any, ...]) -> bytes | None:
    """bytes, as protocol 2 spells them."""
    if len(arguments) != 2 or not isinstance(arguments[0], str) or arguments[1] not in ("latin1", "latin-1"):
        return None
    return arguments[0].encode("latin-1", "replace")


def _marker(valid: Callable[[tuple[Any, ...]], bool], result: Callable[[], Any]) -> Callable[[tuple[Any, ...]], Any]:
    return lambda arguments: result() if valid(arguments) else None


def _numbers(arguments: Any) -> bool:
    return isinstance(arguments, tuple | list) and all(isinstance(each, bool | int | float) for each in arguments)


_CALLS: dict[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _marker(lambda a: len(a) == 3 and isinstance(a[0], _Tensor), _Tensor),
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _marker(lambda a: not a, _Dict),
    "collections.Counter": _marker(lambda a: not a or (len(a) == 1 and isinstance(a[0], _Dict)), _Dict),
    "torch.Size": _marker(lambda a: len(a) == 1 and _numbers(a[0]), tuple),
    "torch.device": _marker(lambda a: all(isinstance(each, str | int) for each in a), lambda: _Object("torch.device")),
    "builtins.complex": _marker(_numbers, lambda: 0.0),
    "builtins.set": _marker(
        lambda a: not a or (len(a) == 1 and isinstance(a[0], list | tuple) and all(map(_is_key, a[0]))), lambda: _Object("set")
    ),
    "builtins.bytearray": _marker(
        lambda a: not a or isinstance(a[0], bytes) or (isinstance(a[0], str) and a[1:] in (("latin-1",), ("latin1",))),
        lambda: _Object("bytearray"),
    ),
}


def _known_of_torch(path: str) -> bool:
    """Whether torch's own object of that name is data, or a call that is checked or swallowed here."""
    if path in _CALLS or path in _STORAGES or path in _INERT_CALLS:
        return True
    return _dtype(path) is not None


def _dtype(path: str) -> torch.dtype | None:
    """torch's dtype of that name. Not by getattr, which imports modules of torch's on demand."""
    found = vars(torch).get(path.removeprefix("torch."))
    return found if isinstance(found, torch.dtype) else None


def _shown(value: Any) -> str:
    """A marker in words; what plain values hold is bounded by `shown`."""
    if isinstance(value, _Name | _Object):
        return value.path
    if isinstance(value, _Tensor | _Storage | _Dict):
        return type(value).__name__.strip("_").lower()
    return shown(value)


def _refused(where: str, path: str, why: str = "") -> UnsafeFormatError:
    return UnsafeFormatError(
        f"{where} asks for objects beyond tensors and plain values",
        found=shown(path, 160)[1:-1] + (f", {why}" if why else ""),
        remedy="do not load it unless you trust it; then re-save model and model_args alone (docs/building.md has the command)",
    )


def _corrupt(where: str, found: str) -> CorruptFileError:
    return CorruptFileError(f"{where} cannot be read", found=found[:200], remedy="copy or download the file again")
