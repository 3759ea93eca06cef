"""Types of fields with their rules, and the check of a dataclass by them.

A field of a number or a word is written `Count | Literal["all"]`: the word says what None would leave open.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Annotated, Any, Literal

from hero_jax import errors, quantize

Count = Annotated[int, functools.partial(errors.integer, low=1)]
Several = Annotated[int, functools.partial(errors.integer, low=2)]
Whole = Annotated[int, functools.partial(errors.integer, low=0)]
Bits = Annotated[int, functools.partial(errors.integer, low=quantize.MIN_BITS, high=quantize.MAX_BITS)]
Positive = Annotated[float, errors.positive]
NonNegative = Annotated[float, errors.non_negative]
Fraction = Annotated[float, errors.fraction]


def check(config: Any) -> None:
    """Raises where a field of a dataclass is not what its type says.

    Raises:
      ArgumentError: a value that its rule does not allow, a word that is none of those of a Literal.
      TypeError: a value of another kind.
    """
    for name, kind in types_of(type(config)).items():
        _check(name, getattr(config, name), kind)


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
        if isinstance(value, str) and value not in words:
            raise errors.ArgumentError(f"`{name}` must be a number or {' or '.join(map(repr, words))}; got {value!r}.")
        if not isinstance(value, str):
            _check(name, value, next(other for other in arguments if typing.get_origin(other) is not Literal))
    elif origin is tuple:
        for item in value:
            _check(name, item, arguments[0])
    elif kind is bool:
        errors.boolean(name, value)
