"""The error that every refused argument raises."""

__all__ = ["ArgumentError"]


class ArgumentError(ValueError):
    """An argument with a value, a shape or a structure that a function cannot take: one line with the argument,
    the rule and the value.

    Arguments of the wrong kind (a string for a number, say) raise TypeError instead.

    >>> import hero_jax
    >>> hero_jax.sam(-0.1)
    Traceback (most recent call last):
    hero_jax.errors.ArgumentError: `sam(rho=...)` must be non-negative and finite; got -0.1.
    """
