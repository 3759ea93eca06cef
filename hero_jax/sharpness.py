"""Sharpness as it is quoted: how much a bounded, or a given, change of the weights raises the loss.

worst case   max L(w + e) - L(w) over ||e|| <= rho (SAM) or ||e / |w| || <= rho (ASAM)
along d      L(w + d) - L(w) against its prediction g^T d + 1/2 d^T H d
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _check, _loop, _tree, examples, parallel
from hero_jax.curvature import Batches

PyTree = Any


class WorstCase(NamedTuple):
    """The largest increase of the loss that was found in a ball: a lower bound of the largest there is.

    increase: L(w + e) - L(w), >= 0; float32 or wider, rounded at about eps |L|.
    loss: L(w).
    perturbation: e, like `params`.
    increases: (num_starts,), the best of each start; starts that disagree say that the maximum is not settled.
    num_grads: int32, gradients taken.
    """

    increase: jax.Array
    loss: jax.Array
    perturbation: PyTree
    increases: jax.Array
    num_grads: jax.Array


class Increase(NamedTuple):
    """The increase of the loss along a given change of the weights, measured and predicted; float32 or wider.

    loss: L(w).
    measured: L(w + d) - L(w), rounded at about eps |L|.
    gradient_term: g^T d; 0 at a minimum.
    curvature_term: d^T H d / 2.
    """

    loss: jax.Array
    measured: jax.Array
    gradient_term: jax.Array
    curvature_term: jax.Array


def worst_case(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree | None = None,
    *,
    key: jax.Array,
    rho: float,
    adaptive: bool = False,
    num_steps: int = 20,
    num_starts: int = 2,
    batches: Batches | None = None,
    microbatch_size: int | None = None,
    weight_fn: Callable[[PyTree], Any] | None = None,
    axis_name: parallel.AxisName | None = None,
    coupled: bool = False,
) -> WorstCase:
    """Looks for the largest increase of the loss in a ball around the weights, by projected gradient ascent.

        max L(w + s u) - L(w) over ||u|| <= rho,   s = 1, or |w| element-wise where `adaptive`
        u <- project(u + a_t s grad L(w + s u) / ||s grad L(w + s u)||),   a_t = rho (1 - t / num_steps)

    The first start goes straight to the SAM or ASAM point, so the result is at least the increase there; the others
    begin at random points of the sphere. The best of all points visited is kept.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch.
      params: pytree of floating-point arrays, w.
      batch, batches, microbatch_size, weight_fn, axis_name, coupled: the data, as in `curvature.hessian_operator`.
      key: for the random starts.
      rho: radius of the ball: in weights, or relative to each weight where `adaptive`.
      adaptive: the ASAM ball; a weight of 0 stays 0 there. Static.
      num_steps: ascent steps a start. Static.
      num_starts: starts, the first being that of SAM. Static.

    Returns:
      `WorstCase`. NaN where the loss is NaN at w; points with a NaN loss elsewhere are passed over.

    Raises:
      ValueError: `rho` negative, fewer than one step or start; otherwise as `curvature.hessian_operator`.

    Batch statistics: as `curvature.hessian_operator`.

    Cost: num_starts x (num_steps + 1) gradients over all the data; memory of one gradient and five vectors. Compiled
    and looped as `spectrum.power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(x @ w**2) / 2
    >>> result = worst_case(loss_fn, jnp.zeros(2), jnp.array([[1.0, 4.0]]), key=jax.random.key(0), rho=0.5)
    >>> round(float(result.increase), 2)
    0.5

    Source: Foret, Kleiner, Mobahi and Neyshabur, Sharpness-aware minimization, ICLR 2021, equation 1; Kwon, Kim, Park
    and Choi, ASAM, ICML 2021, section 3.
    """
    name = "worst_case"
    _check.non_negative(f"{name}(rho=...)", rho)
    _check.boolean(f"{name}(adaptive=...)", adaptive)
    _check.boolean(f"{name}(coupled=...)", coupled)
    _check.integer(f"{name}(num_steps=...)", num_steps, low=1)
    _check.integer(f"{name}(num_starts=...)", num_starts, low=1)
    _check.floating_tree("params", params)
    mean = examples.mean_over(
        name,
        _ValueAndGrad(loss_fn),
        batch,
        batches,
        microbatch_size=microbatch_size,
        weight_fn=weight_fn,
        axis_name=axis_name,
    )
    if not coupled:
        examples.check_uncoupled(name, loss_fn, params, mean)
    operator = _loop.HostOperator(mean) if isinstance(mean, examples.StreamedMean) else mean
    solver = _Ascent(num_steps, num_starts, adaptive)
    ascent = _loop.run(solver, operator, _start(solver, params, rho, key))
    return WorstCase(
        increase=ascent.increases.max(),
        loss=ascent.loss,
        perturbation=_tree.cast_like(ascent.best, params),
        increases=ascent.increases,
        num_grads=ascent.num_grads,
    )


def increase_along(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    direction: PyTree,
    batch: PyTree | None = None,
    *,
    batches: Batches | None = None,
    microbatch_size: int | None = None,
    weight_fn: Callable[[PyTree], Any] | None = None,
    axis_name: parallel.AxisName | None = None,
    coupled: bool = False,
) -> Increase:
    """Compares the increase of the loss along a given change of the weights with its second-order prediction.

        L(w + d) - L(w)   against   g^T d + d^T H d / 2

    For a quantization error d = quantized - w this says how much of the damage the Hessian explains.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch.
      params: pytree of floating-point arrays, w.
      direction: d, with the structure and shapes of `params`; taken in their types.
      batch, batches, microbatch_size, weight_fn, axis_name, coupled: the data, as in `curvature.hessian_operator`.

    Returns:
      `Increase`.

    Raises:
      ValueError: `direction` does not match `params`; otherwise as `curvature.hessian_operator`.

    Batch statistics: as `curvature.hessian_operator`.

    Cost: two forward passes and one twice-differentiated one in forward mode (about 6 forward passes), and no memory
    beyond them.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(x * w**3)
    >>> result = increase_along(loss_fn, jnp.array([1.0]), jnp.array([0.5]), jnp.array([[2.0]]))
    >>> float(result.measured), float(result.gradient_term), float(result.curvature_term)
    (4.75, 3.0, 1.5)

    Source: Taylor's theorem; as a measure of quantization damage, Dong, Yao, Gholami, Mahoney and Keutzer, HAWQ, ICCV
    2019.
    """
    name = "increase_along"
    _check.boolean(f"{name}(coupled=...)", coupled)
    _check.floating_tree("params", params)
    _check.matching_tree("direction", direction, params)
    mean = examples.mean_over(
        name,
        _Along(loss_fn),
        batch,
        batches,
        microbatch_size=microbatch_size,
        weight_fn=weight_fn,
        axis_name=axis_name,
    )
    if not coupled:
        examples.check_uncoupled(name, loss_fn, params, mean)
    return mean(params, direction)


@dataclasses.dataclass(frozen=True)
class _ValueAndGrad:
    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        return jax.value_and_grad(self.loss_fn)(params, batch)


@dataclasses.dataclass(frozen=True)
class _Along:
    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, params: PyTree, direction: PyTree, batch: PyTree) -> Increase:
        direction = _tree.cast_like(direction, params)

        def slope(params: PyTree) -> tuple[jax.Array, jax.Array]:
            return jax.jvp(lambda params: self.loss_fn(params, batch), (params,), (direction,))

        (loss, first), (_, second) = jax.jvp(slope, (params,), (direction,))
        moved = _tree.cast_like(_tree.add(params, direction), params)
        loss = _tree.wide(loss)
        return Increase(loss, _tree.wide(self.loss_fn(moved, batch)) - loss, _tree.wide(first), _tree.wide(second) / 2)


class _State(NamedTuple):
    """u of the current start, in the ball of radius rho; e = scales u.

    num_grads counts the gradients of all starts; best is the perturbation of the largest of `increases`.
    """

    params: PyTree
    scales: PyTree
    rho: jax.Array
    key: jax.Array
    u: PyTree
    loss: jax.Array
    best: PyTree
    increases: jax.Array
    num_grads: jax.Array


@dataclasses.dataclass(frozen=True)
class _Ascent:
    """Projected gradient ascent, one start after another; at the last point of a start only the loss is used."""

    num_steps: int
    num_starts: int
    adaptive: bool

    def is_running(self, carry: _State) -> jax.Array:
        return carry.num_grads < self.num_starts * (self.num_steps + 1)

    def argument(self, carry: _State) -> PyTree:
        return _tree.cast_like(_tree.add(carry.params, self._perturbation(carry)), carry.params)

    def advance(self, carry: _State, product: tuple[jax.Array, PyTree]) -> _State:
        loss, grads = product
        start, step = jnp.divmod(carry.num_grads, self.num_steps + 1)
        # The very first gradient is taken at w itself.
        base = jnp.where(carry.num_grads == 0, loss, carry.loss).astype(carry.loss.dtype)
        increase = loss.astype(base.dtype) - base
        is_best = increase > carry.increases.max()
        perturbation = self._perturbation(carry)
        best = jax.tree.map(lambda e, b: jnp.where(is_best, e, b), perturbation, carry.best)
        # A comparison with NaN is False: such a point is passed over, unless it is w.
        reached = jnp.where(increase > carry.increases[start], increase, carry.increases[start])
        reached = jnp.where(jnp.isnan(base), base, reached)
        direction, _ = _tree.normalize(jax.tree.map(jnp.multiply, carry.scales, grads))
        u = _project(_tree.add(carry.u, direction, carry.rho * (1 - step / self.num_steps)), carry.rho)
        is_last = step == self.num_steps
        key = jax.random.fold_in(carry.key, start)
        fresh = _tree.scale(carry.rho, _tree.normalize(_tree.random_normal(key, carry.params))[0])
        return carry._replace(
            u=jax.tree.map(lambda a, b: jnp.where(is_last, a, b), fresh, u),
            loss=base,
            best=best,
            increases=carry.increases.at[start].set(reached),
            num_grads=carry.num_grads + 1,
        )

    def _perturbation(self, carry: _State) -> PyTree:
        return jax.tree.map(jnp.multiply, carry.scales, carry.u)


@functools.partial(jax.jit, static_argnums=0)
def _start(solver: _Ascent, params: PyTree, rho: Any, key: jax.Array) -> _State:
    wide = jax.tree.map(_tree.wide, params)
    zeros = jax.tree.map(jnp.zeros_like, wide)
    dtype = _tree.dot(wide, wide).dtype
    return _State(
        params=params,
        scales=jax.tree.map(jnp.abs if solver.adaptive else jnp.ones_like, wide),
        rho=jnp.asarray(rho, dtype),
        key=key,
        u=zeros,
        loss=jnp.zeros((), dtype),
        best=zeros,
        increases=jnp.zeros(solver.num_starts, dtype),
        num_grads=jnp.zeros((), jnp.int32),
    )


def _project(u: PyTree, rho: jax.Array) -> PyTree:
    """The point of the ball that is nearest to u."""
    length = _tree.norm(u)
    return _tree.scale(jnp.where(length > rho, rho / length, 1), u)
