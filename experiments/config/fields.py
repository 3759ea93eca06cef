"""Types of fields with their rules, and dataclasses that are checked by them.

A number or a word is written `Count | Literal["all"]`, the number first: the word says what None would leave open.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from hero_jax import errors, quantize

Count = Annotated[int, functools.partial(errors.integer, low=1)]
Several = Annotated[int, functools.partial(errors.integer, low=2)]
Whole = Annotated[int, functools.partial(errors.integer, low=0)]
Bits = Annotated[int, functools.partial(errors.integer, low=quantize.MIN_BITS, high=quantize.MAX_BITS)]
Positive = Annotated[float, errors.positive]
NonNegative = Annotated[float, errors.non_negative]
Fraction = Annotated[float, errors.fraction]


@dataclasses.dataclass(frozen=True)
class Checked:
    """A dataclass; ArgumentError where a field breaks the rule of its type, TypeError where it is of another kind."""

    def __post_init__(self) -> None:
        for name, kind in types_of(type(self)).items():
            _check(name, getattr(self, name), kind)


def check_once(argument: str, values: Sequence[Any]) -> None:
    """Raises ValueError where a value comes twice: it would count twice."""
    for value in values:
        if list(values).count(value) > 1:
            raise errors.ArgumentError(f"`{argument}` must name each once; got {value!r} twice.")


def number(value: Any) -> Any:
    """A number as it is, and None for a word such as "all"."""
    return None if isinstance(value, str) else value


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """The types of the fields of a dataclass, with their rules."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _check(name: str, value: Any, kind: Any) -> None:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        for rule in arguments[1:]:
            if callable(rule):
                rule(name, value)
    elif origin is Literal:
        errors.one_of(name, value, arguments)
    elif origin in (typing.Union, types.UnionType):
        words = [word for other in arguments if typing.get_origin(other) is Literal for word in typing.get_args(other)]
        if words and isinstance(value, str):
            if value not in words:
                wanted = " or ".join(map(repr, words))
                raise errors.ArgumentError(f"`{name}` must be a number or {wanted}; got {value!r}.")
        elif value is not None or types.NoneType not in arguments:
            _check(name, value, arguments[0])
    elif origin is tuple:
        for item in value:
            _check(name, item, arguments[0])
    elif kind is bool:
        errors.boolean(name, value)
