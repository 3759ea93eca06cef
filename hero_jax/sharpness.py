"""Sharpness as it is quoted: how much a change of the weights raises the loss, and the curvature of single batches.

worst_case         max L(w + e) - L(w) over ||e|| <= rho (SAM) or ||e / |w| || <= rho (ASAM)
average_case       E L(w + e) - L(w) over normal e
increase_along     L(w + d) - L(w) against its prediction g^T d + 1/2 d^T H d
batch_eigenvalues  the largest Hessian eigenvalue of every batch alone

L is a `mean_loss`, a function of the weights alone: `MeanLoss` makes one of a loss and the data it is taken over.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _autodiff, _check, _loop, _tree, curvature, errors, spectrum
from hero_jax.errors import ArgumentError
from hero_jax.examples import Batches, Examples, Stream
from hero_jax.mean_loss import MeanLoss, Value, over_data

__all__ = [
    "AverageCase",
    "BatchEigenvalues",
    "Increase",
    "WorstCase",
    "average_case",
    "batch_eigenvalues",
    "increase_along",
    "worst_case",
]

PyTree = Any
LossFn = Callable[[PyTree, PyTree], jax.Array]
MeanLossFn = Callable[[PyTree], jax.typing.ArrayLike] | MeanLoss


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


class AverageCase(NamedTuple):
    """The mean increase of the loss under random changes of the weights; float32 or wider.

    increase: mean over probes of [L(w + e) + L(w - e)] / 2 - L(w); may be negative.
    sem: its standard error; infinite for a single probe.
    loss: L(w).
    increases: (num_probes,), those of the probes.
    num_evals: int32, evaluations of the loss.
    """

    increase: jax.Array
    sem: jax.Array
    loss: jax.Array
    increases: jax.Array
    num_evals: jax.Array


class BatchEigenvalues(NamedTuple):
    """The eigenvalue of largest magnitude of every batch's Hessian, n of them, sign kept.

    eigenvalues, residuals, converged: (n,), as in `spectrum.Eigenpairs`.
    num_matvecs: int32, products taken in all.
    """

    eigenvalues: jax.Array
    residuals: jax.Array
    converged: jax.Array
    num_matvecs: jax.Array


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
    mean_loss: MeanLossFn,
    params: PyTree,
    key: jax.Array,
    *,
    rho: float,
    adaptive: bool = False,
    num_steps: int = 20,
    num_starts: int = 2,
) -> WorstCase:
    """Looks for the largest increase of the loss in a ball around the weights, by projected gradient ascent.

        max L(w + s u) - L(w) over ||u|| <= rho,   s = 1, or |w| element-wise where `adaptive`
        u <- project(u + a_t s grad L(w + s u) / ||s grad L(w + s u)||),   a_t = rho (1 - t / num_steps)

    The first start goes straight to the SAM or ASAM point, so the result is at least the increase there; the others
    begin at random points of the sphere. The best of all points visited is kept.

    Args:
      mean_loss: `params -> scalar`, L, which JAX can trace; or a `MeanLoss`, also over a stream.
      params: pytree of floating-point arrays, w.
      key: for the random starts.
      rho: radius of the ball: in weights, or relative to each weight where `adaptive`.
      adaptive: the ASAM ball; a weight of 0 stays 0 there. Static.
      num_steps: ascent steps per start. Static.
      num_starts: starts, the first being that of SAM. Static.

    Returns:
      `WorstCase`. NaN where the loss is NaN at w; points with a NaN loss elsewhere are passed over.

    Raises:
      ArgumentError: `rho` negative, fewer than one step or start; what `MeanLoss` raises.

    Batch statistics: those `mean_loss` uses.

    Cost: num_starts x (num_steps + 1) gradients over all the data; memory of one gradient and five vectors. Compiled
    and looped as `spectrum.power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(x @ w**2) / 2
    >>> mean_loss = MeanLoss(loss_fn, jnp.array([[1.0, 4.0]]))
    >>> result = worst_case(mean_loss, jnp.zeros(2), jax.random.key(0), rho=0.5)
    >>> round(float(result.increase), 2)
    0.5

    Source: Foret, Kleiner, Mobahi and Neyshabur, Sharpness-aware minimization, ICLR 2021, equation 1; Kwon, Kim, Park
    and Choi, ASAM, ICML 2021, section 3.
    """
    name = "worst_case"
    errors.non_negative(f"{name}(rho=...)", rho)
    errors.boolean(f"{name}(adaptive=...)", adaptive)
    errors.integer(f"{name}(num_steps=...)", num_steps, low=1)
    errors.integer(f"{name}(num_starts=...)", num_starts, low=1)
    _check.floating_tree("params", params)
    value_and_grad = over_data(name, mean_loss, _ValueAndGrad, params)
    solver = _Ascent(num_steps, num_starts, adaptive)
    ascent = _loop.run(solver, value_and_grad, _start(solver, params, rho, key))
    return WorstCase(
        increase=ascent.increases.max(),
        loss=ascent.loss,
        perturbation=_tree.cast_like(ascent.best, params),
        increases=ascent.increases,
        num_grads=ascent.num_grads,
    )


def average_case(
    mean_loss: MeanLossFn,
    params: PyTree,
    key: jax.Array,
    *,
    sigma: float,
    adaptive: bool = False,
    num_probes: int = 20,
) -> AverageCase:
    """Estimates the mean increase of the loss under normal noise on the weights.

        E [L(w + e) + L(w - e)] / 2 - L(w),   e = sigma s z,   z standard normal, s = 1 or |w| where `adaptive`

    which is the mean of L(w + e) - L(w), since e and -e are as likely; a pair leaves out what is odd in e. To second
    order it is sigma^2 / 2 tr(S H S), S the diagonal matrix of s.

    Args:
      mean_loss: `params -> scalar`, L, which JAX can trace; or a `MeanLoss`, also over a stream.
      params: pytree of floating-point arrays, w.
      key: for the noise.
      sigma: standard deviation of the noise: in weights, or relative to each weight where `adaptive`. (Its length is
        about sigma times the root of the number of weights: beside `worst_case`, compare sigma with rho over that.)
      adaptive: noise in proportion to the weights. Static.
      num_probes: independent e, each with -e. Static.

    Returns:
      `AverageCase`.

    Raises:
      ArgumentError: `sigma` negative, fewer than one probe; what `MeanLoss` raises.

    Batch statistics: those `mean_loss` uses.

    Cost: 2 num_probes + 1 forward passes over all the data; memory of three vectors. Compiled and looped as
    `spectrum.power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> found = average_case(lambda w: jnp.sum(w**2), jnp.ones(200), jax.random.key(0), sigma=0.1, num_probes=50)
    >>> bool(abs(found.increase - 0.1**2 * 200) < 3 * found.sem), int(found.num_evals)
    (True, 101)

    Source: Andriushchenko, Croce, Mueller, Hein and Flammarion, A modern look at the relationship between sharpness and
    generalization, ICML 2023, section 3.
    """
    name = "average_case"
    errors.non_negative(f"{name}(sigma=...)", sigma)
    errors.boolean(f"{name}(adaptive=...)", adaptive)
    errors.integer(f"{name}(num_probes=...)", num_probes, low=1)
    _check.floating_tree("params", params)
    value = over_data(name, mean_loss, Value, params)
    noise = _loop.run(_Noise(num_probes, adaptive), value, _quiet(num_probes, params, sigma, key))
    mean, sem = _mean_and_sem(noise.increases)
    return AverageCase(increase=mean, sem=sem, loss=noise.loss, increases=noise.increases, num_evals=noise.num_evals)


def increase_along(mean_loss: MeanLossFn, params: PyTree, direction: PyTree) -> Increase:
    """Compares the increase of the loss along a given change of the weights with its second-order prediction.

        L(w + d) - L(w)   against   g^T d + d^T H d / 2

    For a quantization error d = quantized - w this says how much of the damage the Hessian explains.

    Args:
      mean_loss: `params -> scalar`, L, which JAX can trace; or a `MeanLoss`, also over a stream.
      params: pytree of floating-point arrays, w.
      direction: d, with the structure and shapes of `params`; taken in their types.

    Returns:
      `Increase`.

    Raises:
      ArgumentError: `direction` does not match `params`; what `MeanLoss` raises.

    Batch statistics: those `mean_loss` uses.

    Cost: two forward passes and one twice-differentiated one in forward mode (about 6 forward passes), and no memory
    beyond them; with a `custom_vjp` in the loss, which has no forward mode, those of a Hessian-vector product.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, x):
    ...     return jnp.mean(x * w**3)
    >>> result = increase_along(MeanLoss(loss_fn, jnp.array([[2.0]])), jnp.array([1.0]), jnp.array([0.5]))
    >>> float(result.measured), float(result.gradient_term), float(result.curvature_term)
    (4.75, 3.0, 1.5)

    Source: Taylor's theorem; as a measure of quantization damage, Dong, Yao, Gholami, Mahoney and Keutzer, HAWQ, ICCV
    2019.
    """
    _check.floating_tree("params", params)
    _check.matching_tree("direction", direction, params)
    return over_data("increase_along", mean_loss, _Along, params)(params, direction)


def batch_eigenvalues(
    loss_fn: LossFn,
    params: PyTree,
    batches: Stream | Batches,
    key: jax.Array,
    *,
    mask: curvature.Mask | None = None,
    rtol: float = 1e-3,
    max_matvecs: int = 300,
) -> BatchEigenvalues:
    """Finds the Hessian eigenvalue of largest magnitude of every batch alone.

        lambda_b of H_b = Hessian of loss_fn(w, b), by Lanczos: `spectrum.top_eigenpairs`

    A step of SGD meets H_b, not their mean H, whose largest magnitude of an eigenvalue is at most the mean of theirs.

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch. It may couple the examples: no batch is split.
      params: pytree of floating-point arrays, w.
      batches: an iterable of batches, passed over once, a function that returns one, or a `Stream`.
      key: for the start vector, the same for every batch.
      mask: restricts the Hessians, as in `curvature.hessian_operator`.
      rtol, max_matvecs: as in `spectrum.top_eigenpairs`, for each batch.

    Returns:
      `BatchEigenvalues`.

    Raises:
      ArgumentError: no batch; otherwise as `curvature.hessian_operator` and `spectrum.top_eigenpairs`.

    Cost: `num_matvecs` products, each of one batch, compiled once for each size of batch; memory as
    `spectrum.top_eigenpairs` of one.

    >>> import jax, jax.numpy as jnp
    >>> batches = [jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 3.0], [0.0, 1.0]])]
    >>> found = batch_eigenvalues(lambda w, x: jnp.mean((x @ w) ** 2) / 2, jnp.zeros(2), batches, jax.random.key(0))
    >>> found.eigenvalues.round(3), bool(found.converged.all())
    (Array([1., 5.], dtype=float32), True)

    Source: Jastrzebski, Szymczak, Fort, Arpit, Tabor, Cho and Geras, The break-even point on optimization trajectories
    of deep neural networks, ICLR 2020 (the spectral norm along minibatches).
    """
    found = []
    for batch in _batches(batches):
        operator = curvature.hessian_operator(loss_fn, params, batch, mask=mask)
        pairs = spectrum.top_eigenpairs(operator, key, k=1, rtol=rtol, max_matvecs=max_matvecs)
        # The vectors of all batches would be as many copies of the parameters.
        found.append(pairs._replace(eigenvectors=None))
    if not found:
        raise ArgumentError("`batch_eigenvalues(batches=...)` must give at least one batch; got none.")
    return BatchEigenvalues(
        eigenvalues=jnp.concatenate([x.eigenvalues for x in found]),
        residuals=jnp.concatenate([x.residuals for x in found]),
        converged=jnp.concatenate([x.converged for x in found]),
        num_matvecs=jnp.stack([x.num_matvecs for x in found]).sum(dtype=jnp.int32),
    )


def _batches(batches: Any) -> Iterable[PyTree]:
    """A pass over batches; raises where it is one batch."""
    made = batches() if callable(batches) else batches
    is_data = isinstance(made, Examples | Mapping | jax.Array | np.ndarray)
    if is_data or not isinstance(made, Iterable):
        raise TypeError(
            "`batch_eigenvalues(batches=...)` must be an iterable of batches, a function that returns one or a Stream;"
            f" got {errors.brief(made)}."
        )
    return made


@dataclasses.dataclass(frozen=True)
class _ValueAndGrad:
    loss_fn: LossFn

    def __call__(self, params: PyTree, batch: PyTree) -> tuple[jax.Array, PyTree]:
        return jax.value_and_grad(self.loss_fn)(params, batch)


@dataclasses.dataclass(frozen=True)
class _Along:
    loss_fn: LossFn

    def __call__(self, params: PyTree, direction: PyTree, batch: PyTree) -> Increase:
        def loss_fn(params: PyTree) -> jax.Array:
            return self.loss_fn(params, batch)

        loss, first, second = _autodiff.second_order(loss_fn, params, direction)
        moved = _tree.cast_like(_tree.add(params, _tree.cast_like(direction, params)), params)
        loss = _tree.wide(loss)
        return Increase(loss, _tree.wide(loss_fn(moved)) - loss, _tree.wide(first), _tree.wide(second) / 2)


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


class _NoiseState(NamedTuple):
    """increases: those of the pairs taken so far, half of one where only its first point is."""

    params: PyTree
    sigma: jax.Array
    key: jax.Array
    loss: jax.Array
    increases: jax.Array
    num_evals: jax.Array


@dataclasses.dataclass(frozen=True)
class _Noise:
    """The loss at w, then at w + e and w - e of one probe after another."""

    num_probes: int
    adaptive: bool

    def is_running(self, carry: _NoiseState) -> jax.Array:
        return carry.num_evals < 2 * self.num_probes + 1

    def argument(self, carry: _NoiseState) -> PyTree:
        probe, is_second = jnp.divmod(carry.num_evals - 1, 2)
        sign = jnp.where(carry.num_evals == 0, 0, 1 - 2 * is_second).astype(carry.sigma.dtype)
        noise = _tree.random_normal(jax.random.fold_in(carry.key, jnp.maximum(probe, 0)), carry.params)
        if self.adaptive:
            noise = jax.tree.map(lambda z, w: jnp.abs(_tree.wide(w)) * z, noise, carry.params)
        return _tree.cast_like(_tree.add(carry.params, noise, sign * carry.sigma), carry.params)

    def advance(self, carry: _NoiseState, product: jax.Array) -> _NoiseState:
        value = product.astype(carry.loss.dtype)
        is_first = carry.num_evals == 0
        probe = jnp.maximum(carry.num_evals - 1, 0) // 2
        added = jnp.where(is_first, 0, (value - carry.loss) / 2)
        return carry._replace(
            loss=jnp.where(is_first, value, carry.loss),
            increases=carry.increases.at[probe].add(added),
            num_evals=carry.num_evals + 1,
        )


@functools.partial(jax.jit, static_argnums=0)
def _quiet(num_probes: int, params: PyTree, sigma: Any, key: jax.Array) -> _NoiseState:
    dtype = _tree.wide_type(*jax.tree.leaves(params))
    return _NoiseState(
        params=params,
        sigma=jnp.asarray(sigma, dtype),
        key=key,
        loss=jnp.zeros((), dtype),
        increases=jnp.zeros(num_probes, dtype),
        num_evals=jnp.zeros((), jnp.int32),
    )


@jax.jit
def _mean_and_sem(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    n = len(samples)
    sem = jnp.std(samples, ddof=1) / math.sqrt(n) if n > 1 else jnp.full((), jnp.inf, samples.dtype)
    return samples.mean(), sem
