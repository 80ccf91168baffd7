"""Settings: base of all Config records, whose fields say what they mean and which values they take.

    velocity: Literal["unet", "mlp"] = setting("unet", "velocity network: the paper's, or its ablation")
    dropout: float = setting(0.1, "of all hidden layers", ge=0, lt=1)

The docstring of a record lists its fields, and a record with a value that cannot be meant is never made.
"""

from __future__ import annotations

import math
import operator
import re
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, asdict, field
from functools import cache
from inspect import cleandoc
from os import PathLike, fspath
from types import UnionType
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

__all__ = ["Described", "Settings", "comparable", "described", "parameters", "setting"]

BOUNDS = {
    "ge": ("at least", operator.ge),
    "gt": ("above", operator.gt),
    "le": ("at most", operator.le),
    "lt": ("below", operator.lt),
}
NOUNS = {  # one, and several
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
}


def setting(
    default: Any,
    doc: str,
    *,
    choices: Collection[str] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Make a field of a record.

    Parameters
    ----------
    default
        Its value, if none is given.
    doc
        What it means, in a line.
    choices
        The names of a registry, if text is one of these; other choices are a Literal.
    ge, gt, le, lt
        Bounds of its numbers: at least, above, at most, below.
    """
    bounds = {name: bound for name, bound in {"ge": ge, "gt": gt, "le": le, "lt": lt}.items() if bound is not None}
    return field(default=default, metadata={"doc": doc, "choices": choices, "bounds": bounds})


class Settings:
    """Base of Config records: frozen dataclasses whose values are checked, and plain Python, which JSON can hold.

    ``for seed in np.arange(5)`` gives NumPy integers, which compute like Python's and cannot be saved. Checks that
    involve two fields stand in `__post_init__` of a record, which calls this one first.

    Examples
    --------
    >>> import numpy as np
    >>> from invirtuo import FitConfig
    >>> FitConfig(seed=np.int64(3)).seed
    3
    >>> FitConfig(schedule="linear")
    Traceback (most recent call last):
    ValueError: FitConfig.schedule is 'linear'; expected one of cosine, constant, plateau, val_plateau
    """

    PREFIX: ClassVar[str] = ""  # of the names of fields in messages
    RETIRED: ClassVar[Mapping[str, Any]] = {}  # fields that earlier versions had, with the value that still holds

    def __init_subclass__(cls, **options: Any) -> None:
        """List the fields in the docstring."""
        super().__init_subclass__(**options)
        if listed := parameters(cls):
            cls.__doc__ = f"{cleandoc(cls.__doc__ or '')}\n\nParameters\n----------\n{listed}"

    def __post_init__(self) -> None:
        """Turn values into plain ones, and refuse those that cannot be meant.

        Raises
        ------
        ValueError
            If a value has another type than its field, is no choice of it, or is out of bounds.
        """
        for each in _checked(type(self)):
            value = _plain(getattr(self, each.name))
            if not each.admits(value):
                raise ValueError(f"{self.PREFIX}{each.name} is {value!r}; expected {each.expected}")
            object.__setattr__(self, each.name, value)


def described(cls: type[Settings]) -> list[Described]:
    """The fields of a record that say what they mean, inherited ones first."""
    return [each for each in _all_fields(cls) if each.doc]


def parameters(cls: type[Settings]) -> str:
    """The fields of a record as numpydoc lists them."""
    entries = []
    for each in described(cls):
        begins_with_word = re.match("[a-z]+[ ,:]", each.doc)
        doc = each.doc[0].upper() + each.doc[1:] if begins_with_word else each.doc
        text = textwrap.fill(f"{doc}.", 100, initial_indent="    ", subsequent_indent="    ")
        entries.append(f"{each.name} : {each.expected}, default {each.default!r}\n{text}\n")
    return "".join(entries)


def comparable(record: Any) -> dict[str, Any]:
    """The values of a record by name, with those of retired fields, as earlier versions wrote them."""
    return dict(getattr(record, "RETIRED", {})) | asdict(record)


class Described(NamedTuple):
    """A field of a record: its name, type, default and meaning, and which values it takes."""

    name: str
    kind: Any
    default: Any
    doc: str = ""
    choices: Collection[str] | None = None
    bounds: Mapping[str, float] = {}

    @property
    def expected(self) -> str:
        """The values that it takes, in words."""
        kinds = get_args(self.kind) if get_origin(self.kind) in (Union, UnionType) else (self.kind,)
        named = [_noun(kind) for kind in kinds if kind is not type(None)]
        if self.choices is not None:
            named = [f"one of {', '.join(self.choices)}"]
        limits = " and ".join(f"{BOUNDS[name][0]} {bound:g}" for name, bound in self.bounds.items())
        text = ", or ".join(named) + (f", {limits}" if limits else "")
        return f"{text}, or None" if type(None) in kinds else text

    def admits(self, value: Any) -> bool:
        """Whether it takes a value."""
        if self.choices is not None and isinstance(value, str):
            return value in self.choices
        return self._has_type(value, self.kind)

    def _has_type(self, value: Any, kind: Any) -> bool:
        origin, inner = get_origin(kind), get_args(kind)
        if kind in (int, float):
            return self._is_number(value, kind)
        if origin is Literal:
            return value in inner
        if origin in (Union, UnionType):
            return any(self._has_type(value, one) for one in inner)
        if origin is Mapping:
            return isinstance(value, Mapping) and all(self._has_type(one, inner[1]) for one in value.values())
        if origin is tuple:
            return isinstance(value, tuple) and self._have_types(value, inner)
        return kind is Any or isinstance(value, origin or kind)

    def _have_types(self, values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(values)
        return len(values) == len(kinds) and all(map(self._has_type, values, kinds))

    def _is_number(self, value: Any, kind: Any) -> bool:
        """Whether a value is a finite number within the bounds; an int is a float, and a bool is neither."""
        is_kind = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_kind or not math.isfinite(value):
            return False
        return all(BOUNDS[name][1](value, bound) for name, bound in self.bounds.items())


def _noun(kind: Any, *, many: bool = False) -> str:
    """A type in words, of one value or of many."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in NOUNS:
        return NOUNS[kind][many]
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, UnionType):
        return " or ".join(_noun(one, many=many) for one in inner)
    if origin is Mapping:
        return f"a mapping of names to {_noun(inner[1], many=True)}"
    if origin is tuple:
        number = ("lists" if many else "a list") if inner[-1] is ... else ("pairs" if many else "a pair")
        return f"{number} of {_noun(inner[0], many=True)}"
    return str(getattr(kind, "__name__", kind))


def _all_fields(cls: type) -> tuple[Described, ...]:
    """All fields of a record, also of one that is being made and is no dataclass yet."""
    found: dict[str, Field[Any]] = {}
    for base in reversed(cls.__mro__):
        found |= vars(base).get("__dataclass_fields__", {})
        found |= {name: value for name, value in vars(base).items() if isinstance(value, Field)}
    hints = get_type_hints(cls) if found else {}
    fields = {name: each for name, each in found.items() if get_origin(hints[name]) is not ClassVar}
    return tuple(Described(name, hints[name], each.default, **each.metadata) for name, each in fields.items())


_checked: Callable[[type], tuple[Described, ...]] = cache(_all_fields)  # of records that are made


def _plain(value: Any) -> Any:
    """The value without what NumPy, pandas, torch or pathlib put around it; lists become tuples."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
