"""The error that every refused argument raises, and the rules of single arguments, for code that builds on hero_jax.

A rule returns nothing where the value is allowed. Otherwise it raises, in one line that names the argument, the rule
and the value: `ArgumentError` for a value, TypeError for something of another kind. Python and NumPy values, and
concrete JAX scalars, are checked at the call. A traced scalar may have any value.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax._jax import Tracer

__all__ = ["ArgumentError", "boolean", "brief", "fraction", "integer", "non_negative", "one_of", "positive", "scalar"]


class ArgumentError(ValueError):
    """An argument with a value, a shape or a structure that a function cannot take: one line with the argument,
    the rule and the value.

    Arguments of the wrong kind (a string for a number, say) raise TypeError instead.

    >>> import hero_jax
    >>> hero_jax.sam(-0.1)
    Traceback (most recent call last):
    hero_jax.errors.ArgumentError: `sam(rho=...)` must be non-negative and finite; got -0.1.
    """


def scalar(argument: str, value: Any) -> None:
    """Raises unless `value` is one real number, traced or not.

    Args:
      argument: its name, for the message.
      value: what was given.

    Raises:
      TypeError: an array, a string, None.
    """
    if not (_is_scalar(value, jnp.floating) or _is_scalar(value, jnp.integer)):
        raise TypeError(f"`{argument}` must be a real scalar; got {brief(value)}.")


def non_negative(argument: str, value: Any) -> None:
    """Raises unless `value` is a finite scalar >= 0.

    Args:
      argument: its name, for the message.
      value: what was given.

    >>> non_negative("rho", 0.05)
    >>> non_negative("rho", -1)
    Traceback (most recent call last):
    hero_jax.errors.ArgumentError: `rho` must be non-negative and finite; got -1.0.
    """
    scalar(argument, value)
    if not isinstance(value, Tracer) and not (math.isfinite(value) and value >= 0):
        raise ArgumentError(f"`{argument}` must be non-negative and finite; got {float(value)!r}.")


def positive(argument: str, value: Any) -> None:
    """Raises unless `value` is a finite scalar > 0.

    Args:
      argument: its name, for the message.
      value: what was given.
    """
    scalar(argument, value)
    if not isinstance(value, Tracer) and not (math.isfinite(value) and value > 0):
        raise ArgumentError(f"`{argument}` must be positive and finite; got {float(value)!r}.")


def fraction(argument: str, value: Any) -> None:
    """Raises unless `value` is a scalar in [0, 1].

    Args:
      argument: its name, for the message.
      value: what was given.
    """
    scalar(argument, value)
    if not isinstance(value, Tracer) and not 0 <= value <= 1:
        raise ArgumentError(f"`{argument}` must be between 0 and 1; got {float(value)!r}.")


def integer(argument: str, value: Any, *, low: int, high: int | None = None) -> None:
    """Raises unless `value` is an integer in low..high.

    Args:
      argument: its name, for the message.
      value: what was given.
      low: the least that is allowed.
      high: the most; None: any.
    """
    rule = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
    if not _is_scalar(value, jnp.integer):
        raise TypeError(f"`{argument}` must be {rule}; got {brief(value)}.")
    if isinstance(value, Tracer):
        return
    value = int(value)
    if value < low or (high is not None and value > high):
        raise ArgumentError(f"`{argument}` must be {rule}; got {value}.")


def boolean(argument: str, value: Any) -> None:
    """Raises unless `value` is a Python bool.

    Args:
      argument: its name, for the message.
      value: what was given.
    """
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be True or False; got {brief(value)}.")


def one_of(argument: str, value: Any, known: Iterable[str]) -> None:
    """Raises unless `value` is one of the `known` names; suggests the nearest.

    Args:
      argument: its name, for the message.
      value: what was given.
      known: the names that are allowed.

    >>> one_of("method", "sm", ("sgd", "sam"))
    Traceback (most recent call last):
    hero_jax.errors.ArgumentError: `method` must be one of 'sgd', 'sam'; got 'sm'. Did you mean 'sam'?
    """
    known = list(known)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ArgumentError(f"`{argument}` must be one of {', '.join(map(repr, known))}; got {value!r}.{hint}")


def brief(value: Any) -> str:
    """`value` for an error message: itself where that is short and one line, its type or shape otherwise."""
    if isinstance(value, Tracer | jax.Array | np.ndarray) and value.ndim:
        return f"an array of shape {value.shape}"
    if inspect.isroutine(value):
        return f"a function ({value.__name__})"
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def _is_scalar(value: Any, kind: Any) -> bool:
    if isinstance(value, Tracer):
        return value.ndim == 0 and bool(jnp.issubdtype(value.dtype, kind))
    if not isinstance(value, int | float | np.generic | np.ndarray | jax.Array):
        return False
    return np.ndim(value) == 0 and bool(jnp.issubdtype(np.asarray(value).dtype, kind))
