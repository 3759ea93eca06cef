"""The update step behind every transformation: perturb, penalize, combine, average, record."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax import _check, _tree, errors, parallel
from hero_jax.errors import ArgumentError
from hero_jax.penalties import UNPERTURBED, Penalized, Penalty, Point
from hero_jax.perturbations import Mask, ascent_on, moved_leaves, scaled_leaves, suppressed
from hero_jax.spectrum._residual import relative_residual

PyTree = Any
Scalar = jax.typing.ArrayLike | optax.Schedule
# optax types a state as a tree of arrays, which is narrower than the NamedTuples it is used with.
OptState = Any
GradFn = Callable[[PyTree], PyTree]


class Metrics(NamedTuple):
    """What the last step saw, as float32 scalars.

    grad_norm: ||g||, the gradient at the weights.
    perturbed_grad_norm: ||g*||, the gradient at the perturbed weights, before anything of it is suppressed.
    perturbation_norm: ||w* - w||, which is ||e|| up to the rounding of w + e to the types of the parameters.
    penalty: G, without gamma.
    penalty_grad_norm: ||gamma grad G||, the norm of what the penalty added to g*.

    Norms are global, over all leaves. With `sync=False` each is the mean over devices of the local value.
    """

    grad_norm: jax.Array
    perturbed_grad_norm: jax.Array
    perturbation_norm: jax.Array
    penalty: jax.Array
    penalty_grad_norm: jax.Array


class HeroState(NamedTuple):
    """State of `hero`, `sam` and `grad_l1`.

    count: int32 scalar, steps taken; schedules are evaluated at it.
    metrics: `Metrics` of the last step, zeros before the first.
    eigenvector: for penalty "eigenvalue" the unit tree v (float32 or wider, zero outside R); zeros before the first
      step, which starts it from the gradient. None for the other penalties.
    eigenvector_residual: how good v was at the last step, float32: ||H v - lambda v|| / |lambda| on R with lambda =
      v^T H v, large where two eigenvalues of opposite sign tie. None for the other penalties.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    metrics: Metrics
    eigenvector: PyTree | None
    eigenvector_residual: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Perturbation:
    """How w* is found; see `perturbations.ascent`."""

    rho: Scalar
    adaptive: bool | Mask
    scope: str
    mask: Mask | None
    eps: jax.typing.ArrayLike


@dataclasses.dataclass(frozen=True)
class Transformation:
    """What a transformation is made of; see `hero`.

    name: of the public function, for its errors.
    perturbation: None where the penalty does not perturb.
    suppress: the Python number 0 leaves g* as it is, at no cost.
    by_difference: whether the products are differences of gradients.
    """

    name: str
    penalty: Penalty
    perturbation: Perturbation | None = None
    suppress: Scalar = 0.0
    by_difference: bool = False
    gamma: Scalar = 0.0
    reduction: str = "mean"
    mask: Mask | None = None
    axis_name: parallel.AxisName | None = None
    sync: bool = True

    def __post_init__(self) -> None:
        _check.local(self.name, self.sync, self.axis_name)

    def optax(self) -> optax.GradientTransformationExtraArgs:
        """The two functions of Optax."""
        return optax.GradientTransformationExtraArgs(self.init_fn, self.update_fn)

    def init_fn(self, params: PyTree) -> OptState:
        """The state before the first step."""
        if jax.tree.leaves(params):  # optax.tree.map_params asks for the state of a placeholder without any
            _check.no_masked_nodes("params", params)
            _check.floating_tree("params", params)
            self._check_products(params)
            self._penalized_leaves(params)
            self._perturbed_leaves(params)
        follows = self.penalty.follows_eigenvector
        return HeroState(
            count=jnp.zeros((), jnp.int32),
            metrics=Metrics(*(jnp.zeros((), jnp.float32) for _ in Metrics._fields)),
            eigenvector=jax.tree.map(lambda w: jnp.zeros_like(_tree.wide(w)), params) if follows else None,
            eigenvector_residual=jnp.zeros((), jnp.float32) if follows else None,
        )

    def update_fn(
        self,
        updates: PyTree,
        state: OptState,
        params: PyTree | None = None,
        *,
        grad_fn: GradFn | None = None,
        value_fn: Callable[[PyTree], jax.Array] | None = None,
        penalty_grad_fn: GradFn | None = None,
        part_grad_fn: GradFn | None = None,
        ascent: PyTree | None = None,
        penalize: bool = True,
        perturb: bool = True,
        **extra_args: Any,
    ) -> tuple[PyTree, OptState]:
        """One step, in five: gradient, perturbation, penalty, direction, state."""
        del extra_args
        errors.boolean(f"{self.name} update(penalize=...)", penalize)
        errors.boolean(f"{self.name} update(perturb=...)", perturb)
        penalty = (self.penalty if penalize else self.penalty.without) if perturb else UNPERTURBED
        grad_fn = required_grad_fn(self.name, updates, params, grad_fn, value_fn)
        compared_fn = grad_fn if part_grad_fn is None else _checked_grad_fn(self.name, "part_grad_fn", part_grad_fn)
        part_fn = compared_fn
        if penalty_grad_fn is not None:
            part_fn = _checked_grad_fn(self.name, "penalty_grad_fn", penalty_grad_fn)
        if self.perturbation is None and (part_grad_fn is not None or ascent is not None):
            given = "part_grad_fn" if part_grad_fn is not None else "ascent"
            raise ArgumentError(f"`{self.name}` takes no `{given}`, since it perturbs nothing; got one.")
        if ascent is not None:
            _check.matching_tree("ascent", ascent, params)
        self._check_products(params)
        self._check_state(state, params, penalty)

        # 1. The gradient at w, averaged with `sync`. A jvp of a device's own gradient function is right in every mode.
        local = {fn: parallel.local_grad_fn(fn, self.axis_name) for fn in {grad_fn, compared_fn, part_fn}}
        grad_fn, compared_fn, part_fn = (local[fn] for fn in (grad_fn, compared_fn, part_fn))
        mean = functools.partial(parallel.mean, axis_name=self.axis_name if self.sync else None)
        grads = mean(device_updates(updates, params, compared_fn, self.axis_name, self.sync))
        eigenvector = state.eigenvector
        if ascent is not None:
            ascent = mean(ascent)
        if not self.sync:
            assert self.axis_name is not None
            params, eigenvector, ascent = parallel.vary((params, eigenvector, ascent), self.axis_name)

        # 2. The perturbed weights.
        e = self._perturb(params, grads if ascent is None else ascent, state.count) if perturb else None
        perturbed = params if e is None else _tree.cast_like(_tree.add(params, e), params)

        # 3. The gradient there, and that of the penalty.
        diagonal = _diagonal(self._penalized_leaves(params), params, self.reduction)
        if penalty.follows_eigenvector:
            eigenvector = _started(eigenvector, grads, diagonal)
        point = Point(
            params,
            grads,
            e,
            perturbed,
            grad_fn,
            compared_fn,
            part_fn,
            mean,
            diagonal,
            eigenvector,
            self.by_difference,
        )
        found = penalty.at(point)

        # 4. The direction, and what the step saw.
        added = self._strengthened(found, state.count)
        kept = found.perturbed_grads if e is None else self._kept(point, found, state.count)
        direction = kept if added is None else _tree.add(kept, added)
        direction = _tree.cast_like(direction, params)
        metrics = _metrics(point, found, added)
        product = found.product

        # 5. What all devices share, and the next state.
        if not self.sync:
            direction, metrics, product = parallel.mean((direction, metrics, product), self.axis_name)
            # The v that devices share; at the first step it is zero, and its residual infinite.
            eigenvector = state.eigenvector
        following = state.eigenvector, state.eigenvector_residual
        if penalty.follows_eigenvector:
            residual = relative_residual(eigenvector, product, _tree.dot(eigenvector, product))
            following = _followed(state.eigenvector, product), residual.astype(jnp.float32)
        count = jnp.asarray(optax.safe_increment(state.count))
        return direction, HeroState(count, metrics, *following)

    def _penalized_leaves(self, params: PyTree) -> PyTree:
        """R as a tree of bools; a mask is checked even where no penalty uses it."""
        argument = f"{self.name}(mask=...)"
        if self.mask is not None:
            return _check.bool_tree(argument, self.mask, params)
        if self.penalty.without is self.penalty:
            return _tree.kernels(params)
        return _check.bool_tree(argument, _tree.kernels, params)

    def _perturbed_leaves(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Which leaves are scaled and which are perturbed, as trees of bools."""
        if self.perturbation is None:
            return None, None
        return (
            scaled_leaves(f"{self.name}(adaptive=...)", self.perturbation.adaptive, params),
            moved_leaves(f"{self.name}(perturb_mask=...)", self.perturbation.mask, params),
        )

    def _perturb(self, params: PyTree, grads: PyTree, count: jax.Array) -> PyTree | None:
        """e, or None where nothing is perturbed."""
        if self.perturbation is None:
            return None
        rho = at(f"{self.name}(rho=...)", self.perturbation.rho, count)
        leaves = self._perturbed_leaves(params)
        return ascent_on(*leaves, params, grads, rho, self.perturbation.scope, self.perturbation.eps)

    def _kept(self, point: Point, found: Penalized, count: jax.Array) -> PyTree:
        """g*, less what is suppressed of it."""
        share = at(f"{self.name}(suppress=...)", self.suppress, count)
        if is_zero(share):
            return found.perturbed_grads
        compared = point.compared(found.perturbed_grads) if found.compared is None else found.compared
        return suppressed(point.grads, found.perturbed_grads, share, compared)

    def _strengthened(self, found: Penalized, count: jax.Array) -> PyTree | None:
        """gamma grad G, or None where there is no penalty."""
        strength = at(f"{self.name}(gamma=...)", self.gamma, count)
        if found.grads is None:
            return None
        # A strength of 0 adds nothing, even to a product that is not finite (0 * inf is NaN).
        return jax.tree.map(lambda x: jnp.where(strength == 0, 0, x), _tree.scale(strength, found.grads))

    def _check_products(self, params: PyTree) -> None:
        if self.by_difference:
            reason = f"`{self.name}(product='difference')` has no correct digit in 16 bits"
            _check.wide_tree("params", params, reason)

    def _check_state(self, state: Any, params: PyTree, penalty: Penalty) -> None:
        _check.state(self.name, state, HeroState)
        if penalty.follows_eigenvector:
            _check.matching_tree("state.eigenvector", state.eigenvector, params)


def device_updates(
    updates: PyTree, params: PyTree, device_grads: GradFn, axis_name: parallel.AxisName | None, sync: bool = True
) -> PyTree:
    """The gradient of this device: the incoming one, unless it may have been summed or averaged already.

    Under `check_vma=True` a gradient that does not vary was summed by autodiff, or averaged by the caller; without
    `sync`, a gradient that the caller averaged would perturb as if with it. One cannot tell. `device_grads(params)` is
    right in every case, and costs nothing under `jit`, where it shares the caller's local gradient.
    """
    if axis_name is None:
        return updates
    is_tracked = parallel.tracks_varying(axis_name)
    if not sync or (is_tracked and not all(parallel.varies(g, axis_name) for g in jax.tree.leaves(updates))):
        return device_grads(params)
    return updates


def _diagonal(mask: PyTree, params: PyTree, reduction: str) -> PyTree:
    """The diagonal of D, one Python float for each leaf: 1/n_i or 1 where `mask` is True, 0.0 elsewhere."""

    def weight(selected: bool, x: jax.Array) -> float:
        if not selected:
            return 0.0
        return 1.0 / max(jnp.size(x), 1) if reduction == "mean" else 1.0

    return jax.tree.map(weight, mask, params)


def _metrics(point: Point, found: Penalized, added: PyTree | None) -> Metrics:
    """Norms of the step, float32."""
    zero = jnp.zeros((), jnp.float32)
    is_moved = point.perturbation is not None
    metrics = Metrics(
        grad_norm=_tree.norm(point.grads),
        perturbed_grad_norm=_tree.norm(found.perturbed_grads),
        perturbation_norm=_tree.norm(_tree.subtract(point.perturbed, point.params)) if is_moved else zero,
        penalty=found.value,
        penalty_grad_norm=zero if added is None else _tree.norm(added),
    )
    return Metrics(*(m.astype(jnp.float32) for m in metrics))


def required_grad_fn(
    name: str,
    updates: PyTree,
    params: PyTree | None,
    grad_fn: Callable[[PyTree], PyTree] | None,
    value_fn: Callable[[PyTree], jax.Array] | None,
) -> Callable[[PyTree], PyTree]:
    """Checks what an update was given; returns `grad_fn`, which checks what it returns."""
    if params is None:
        raise ArgumentError(
            f"`{name}` needs `params`: call `tx.update(grads, state, params, grad_fn=grad_fn)`; got None."
        )
    if grad_fn is None and value_fn is None:
        raise ArgumentError(
            f"`{name}` needs `grad_fn` (params -> grads on the same batch) or `value_fn`: call"
            " `tx.update(grads, state, params, grad_fn=grad_fn)`; got None."
        )
    _check.no_masked_nodes("updates", updates)
    _check.floating_tree("params", params)
    _check.matching_tree("updates", updates, params)
    if grad_fn is not None:
        return _checked_grad_fn(name, "grad_fn", grad_fn)
    if not callable(value_fn):
        raise TypeError(f"`{name}` needs a callable `value_fn`; got {errors.brief(value_fn)}.")
    return _checked_grad_fn(name, "value_fn", jax.grad(value_fn))


def _checked_grad_fn(name: str, argument: str, grad_fn: Any) -> Callable[[PyTree], PyTree]:
    """`grad_fn`, which checks what it returns."""
    if not callable(grad_fn):
        raise TypeError(f"`{name}` needs a callable `{argument}`; got {errors.brief(grad_fn)}.")

    def checked_grad_fn(params: PyTree) -> PyTree:
        grads = grad_fn(params)
        _check.matching_tree(f"{argument}(params)", grads, params)
        return grads

    return checked_grad_fn


def is_zero(value: Scalar) -> bool:
    """Whether a hyper-parameter is the Python (or NumPy) number 0, which is known before anything is traced."""
    return isinstance(value, int | float | np.number) and bool(value == 0)


def at(argument: str, value: Scalar, count: jax.Array) -> jax.typing.ArrayLike:
    """The value of a hyper-parameter at this step."""
    if not callable(value):
        return value
    scheduled = value(count)
    errors.scalar(argument, scheduled)
    return scheduled


def _started(eigenvector: PyTree, grads: PyTree, diagonal: PyTree) -> PyTree:
    """v, or before the first product the unit gradient on R: a start with no hidden random key."""
    restricted = jax.tree.map(lambda weight, g: float(weight > 0) * _tree.wide(g), diagonal, grads)
    start, _ = _tree.normalize(restricted)
    is_new = _tree.norm(eigenvector) == 0
    return jax.tree.map(lambda s, v: jnp.where(is_new, s, v), start, eigenvector)


def _followed(eigenvector: PyTree, product: PyTree) -> PyTree:
    """H v / ||H v||, the next v; the present one where the product is zero or not finite."""
    unit, length = _tree.normalize(product)
    is_usable = (length > 0) & jnp.isfinite(length)
    return jax.tree.map(lambda u, v: jnp.where(is_usable, u, v), unit, eigenvector)
