"""The mean loss over data, L(w), as a function of the weights alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from hero_jax import _check, _mean, _tree, errors

__all__ = ["MeanLoss"]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]


class MeanLoss:
    """The mean loss over data: `MeanLoss(loss_fn, data)(params)` is a scalar.

        L(w) = sum_b weight_b loss_fn(w, b) / sum_b weight_b

    Functions that take a `mean_loss` take any `params -> scalar`; of this one they know how to take its gradient over
    data that is split. It is an `eval_fn` of `landscape` and `quantize`, too.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch.
      data: a batch, `Examples` or `Stream`, as in `curvature.hessian_operator`.
      coupled: accept a loss that couples the examples of a batch that is split, as there.

    Raises:
      As `curvature.hessian_operator`; what concerns values is raised by the first call with them. TypeError where it is
      traced over a stream.

    Cost: one forward pass over the data per call, compiled once.

    >>> import jax.numpy as jnp
    >>> from hero_jax import Stream
    >>> mean_loss = MeanLoss(lambda w, x: jnp.mean(x @ w), Stream([jnp.ones((3, 2)), jnp.zeros((1, 2))]))
    >>> float(mean_loss(jnp.array([1.0, 3.0])))
    3.0
    """

    def __init__(self, loss_fn: LossFn, data: PyTree, *, coupled: bool = False) -> None:
        _check.function("MeanLoss(loss_fn=...)", loss_fn)
        errors.boolean("MeanLoss(coupled=...)", coupled)
        self.loss_fn, self.data, self.coupled = loss_fn, data, coupled
        self._value: Callable[[PyTree], jax.Array] | None = None

    def __call__(self, params: PyTree) -> jax.Array:
        """`L(params)`."""
        if self._value is not None:
            return self._value(params)
        value = over_data("MeanLoss", self, Value, params)
        if not _tree.is_tracing() and not _tree.is_traced((params, self.data)):
            # Coupling is looked at once, with values.
            self._value = value
        return value(params)


def over_data(
    name: str, mean_loss: Callable[[PyTree], Any], of: Callable[[LossFn], Callable[..., PyTree]], params: PyTree
) -> Callable[..., PyTree]:
    """`(*args) -> mean over the data of of(loss_fn)(*args, batch)`, for `_loop.run` or to be called.

    `of(loss_fn)` is hashable and equal for equal functions, so that what is compiled is shared.
    """
    if isinstance(mean_loss, MeanLoss):
        return _mean.over(name, of(mean_loss.loss_fn), mean_loss.loss_fn, params, mean_loss.data, mean_loss.coupled)
    _check.function(f"{name}(mean_loss=...)", mean_loss)
    fn = of(lambda params, _: mean_loss(params))
    return lambda *args: fn(*args, None)


@dataclasses.dataclass(frozen=True)
class Value:
    """The loss itself."""

    loss_fn: LossFn

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        return self.loss_fn(params, batch)
