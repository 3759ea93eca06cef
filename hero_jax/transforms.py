"""HERO, SAM, ASAM and GRAD L1 as Optax gradient transformations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hero_jax import _check, _tree, parallel, penalties
from hero_jax.perturbations import SCOPES, perturbation
from hero_jax.spectrum.power import relative_residual

PyTree = Any
Scalar = jax.typing.ArrayLike | optax.Schedule
Mask = PyTree | Callable[[PyTree], PyTree]
# optax types a state as a tree of arrays, which is narrower than the NamedTuples it is used with.
OptState = Any


class Metrics(NamedTuple):
    """What the last step saw, as float32 scalars.

    grad_norm: ||g||, the gradient at the weights.
    perturbed_grad_norm: ||g*||, the gradient at the perturbed weights.
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


def hero(
    rho: Scalar,
    gamma: Scalar,
    *,
    adaptive: bool = True,
    scope: str = "global",
    penalty: str = "detached",
    reduction: str = "mean",
    mask: Mask | None = None,
    axis_name: parallel.AxisName | None = None,
    sync: bool = True,
    eps: jax.typing.ArrayLike = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    """Replaces a gradient by the HERO direction, which lowers the loss, its sharpness and its curvature.

        g  = grad L(w)                            the incoming updates
        e  = rho w^2 g / (|| |w| g || + eps)      adaptive=True; rho g / (||g|| + eps) otherwise
        g* = grad L(w + e)
        direction = g* + gamma grad G

    with the penalty G, in which e and v are constant when differentiating, d = g* - g, R the leaves in `mask`:

        "detached"     G = sum_R mean_i(d^2), g constant too          4 gradients a step
        "difference"   G = sum_R mean_i(d^2)                          6
        "hvp"          G = sum_R mean_i((H(w) e)^2)                   8.5
        "eigenvalue"   G = |v^T H(w + e) v|, v the tracked            6.3
                       dominant eigenvector of H restricted to R

    Chain it first: it needs the raw gradient. Weight decay, momentum and the learning rate come after it. L is the mean
    loss of the batch in `grad_fn`, and `updates` must be its gradient at `params` on that same batch. v takes one
    warm-started power-iteration product a step, from the first gradient on: it follows the dominant eigenvector while
    that changes slowly, cannot settle between eigenvalues of equal magnitude and opposite sign, and cannot leave a
    subspace that every Hessian met so far maps to itself; `HeroState.eigenvector_residual` says how well it follows.

    Args:
      rho: radius of the perturbation, >= 0: a float, a traced scalar or a schedule of this transformation's step count.
        The paper's h, the authors' `--step_size`.
      gamma: strength of the penalty, >= 0, likewise. The Python number 0 leaves SAM or ASAM, at their cost.
      adaptive: scale the perturbation with the weights (ASAM) or not (SAM). Static, as all that follows but `eps`.
      scope: "global" takes the norm in e over the whole tree, "leaf" over each leaf.
      penalty: "detached" (the authors' released code), "difference", "hvp" or "eigenvalue".
      reduction: "mean" (the authors' code) or "sum" over the entries of each leaf in G; "eigenvalue" has none.
      mask: bool tree, prefix of one, or callable from params to one, naming R. Default: leaves with ndim >= 2, which
        in attention heads and scanned layers includes biases. All leaves are perturbed and updated, whatever the mask.
        Under `optax.inject_hyperparams`, a callable needs `static_args="mask"`.
      axis_name: name (or tuple of names) of the mapped axis under `vmap`, `pmap` or `shard_map`: every axis that the
        batch is split over. The parameters are whole and identical on every device; `updates` and `grad_fn` are those
        of the device, with a loss that is not averaged over devices, and this transformation averages. (It may put
        `grad_fn(params)` in place of `updates`, where these cannot be told from a sum.) None under plain `jit`, also
        with sharded data or parameters, and for a loss already averaged inside `shard_map(check_vma=True)`.
      sync: True perturbs with the averaged gradient: the result is that of one device with the whole batch, for one
        all-reduce for each quantity that the next one depends on, and not only linearly: g, then g*, then the products.
        That is 2 for gamma = 0, 3 for the penalties, of one parameter-sized vector each (the last of "hvp" has two),
        and 2 for "eigenvalue", of one and of three.
        False perturbs with the local one (m-sharpness): the mean over devices of the HERO direction of each, for one
        all-reduce, of a parameter-sized vector and the metrics ("eigenvalue": of two). Needs `axis_name`.
      eps: added to the norm in e, >= 0. A zero gradient gives e = 0, whatever `eps`.

    Returns:
      A transformation with state `HeroState`. `update(updates, state, params, grad_fn=...)` needs `params` and, by
      keyword, `grad_fn: params -> grads` (or `value_fn: params -> scalar`, whose gradient is taken where there is no
      `grad_fn`); it ignores extra arguments, but for two that make a step cheaper. `penalize=False`, static, leaves
      the penalty out of it: a step of SAM or ASAM, at its cost. `penalty_grad_fn: params -> grads`, the gradient of a
      part of the batch, takes the place of `grad_fn` in H and T alone: with a fraction f of the batch "detached" costs
      2 + 3 f gradients, less than without where f < 2/3. Where the part is drawn at random and normalised alike, the
      directions of "detached" and "difference" are unbiased for those of the whole batch; G of "hvp" and "eigenvalue",
      and the residual of v, are those of the part. It emits trees in the types of `params`; norms, dots and
      differences are float32 or wider.

    Raises:
      ValueError: a negative or non-finite `rho` or `gamma`, an unknown name, `sync=False` without `axis_name`; at
        update no `grad_fn`, no `params`, a tree that does not match `params`, a mask that selects nothing.
      TypeError: an argument or a parameter of the wrong kind.

    Cost: as listed, counting g, which the caller computes; under `jit`, by XLA's count of operations. Temporary memory
    of ResNet20 at batch 64, in gradients: 2.5, 4.8, 5.2 and 3.0 in the order above; 1 for gamma = 0.

    `grad_fn` must be differentiable forwards: losses with `custom_vjp` are, host callbacks are not. 16-bit parameters
    round w + e; where rho is below their resolution nothing is perturbed, which `metrics.perturbation_norm` shows: keep
    float32 parameters and cast them inside the loss. Model state stays with the caller: `grad_fn` closes over BatchNorm
    statistics and drops the updated ones. `optax.MultiSteps` around it is wrong (the perturbed gradient would see the
    last microbatch only); accumulate inside `grad_fn` instead, with `optax.microbatching`.

    >>> import hero_jax, jax, jax.numpy as jnp, optax
    >>> def loss_fn(params, batch):
    ...     return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)
    >>> batch = {"x": jnp.array([[1.0, 2.0], [3.0, 5.0]]), "y": jnp.array([[1.0], [2.0]])}
    >>> params = {"w": jnp.ones((2, 1)), "b": jnp.zeros(1)}
    >>> tx = optax.chain(hero_jax.hero(rho=0.1, gamma=1e-3), optax.sgd(0.01, momentum=0.9))
    >>> @jax.jit
    ... def step(params, opt_state, batch):
    ...     grad_fn = lambda p: jax.grad(loss_fn)(p, batch)
    ...     updates, opt_state = tx.update(grad_fn(params), opt_state, params, grad_fn=grad_fn)
    ...     return optax.apply_updates(params, updates), opt_state
    >>> opt_state = tx.init(params)
    >>> for _ in range(50):
    ...     params, opt_state = step(params, opt_state, batch)
    >>> bool(loss_fn(params, batch) < 0.1)
    True

    Source: Yang, Yang, Gong, Chen, HERO, DAC 2022 (arXiv 2111.11986), with the authors' released defaults: ASAM
    perturbation, clean gradient detached, mean over each tensor. Departures: the penalty leaves out every vector leaf
    (theirs leaks in the scales of shortcut BatchNorms), and a zero gradient is no NaN.
    """
    _check.non_negative("hero(rho=...)", rho)
    _check.non_negative("hero(gamma=...)", gamma)
    _check.one_of("hero(scope=...)", scope, SCOPES)
    _check.one_of("hero(penalty=...)", penalty, penalties.PENALTIES)
    _check.one_of("hero(reduction=...)", reduction, penalties.REDUCTIONS)
    _check.non_negative("hero(eps=...)", eps)
    _check.boolean("hero(adaptive=...)", adaptive)
    return _transformation(
        "hero",
        functools.partial(perturbation, adaptive=adaptive, scope=scope, eps=eps),
        "none" if _is_zero(gamma) else penalty,
        rho=rho,
        gamma=gamma,
        reduction=reduction,
        mask=mask,
        axis_name=axis_name,
        sync=sync,
    )


def sam(
    rho: Scalar,
    *,
    adaptive: bool = False,
    scope: str = "global",
    axis_name: parallel.AxisName | None = None,
    sync: bool = True,
    eps: jax.typing.ArrayLike = 1e-12,
) -> optax.GradientTransformationExtraArgs:
    """Replaces a gradient by the one at the perturbed weights: SAM, or ASAM with `adaptive=True`.

        e = rho g / (||g|| + eps)                    adaptive=False, SAM
        e = rho w^2 g / (|| |w| g || + eps)          adaptive=True, ASAM
        direction = grad L(w + e)

    `hero` with gamma = 0: see there for the update call, the arguments, what is averaged and what is raised.

    Args:
      rho: radius, >= 0: a float, a traced scalar or a schedule of this transformation's step count.
      adaptive: False for SAM, True for ASAM.
      scope: "global" or "leaf", where the norm in e is taken.
      axis_name: the mapped axis, as in `hero`.
      sync: False perturbs with the gradient of the device (m-sharpness) and needs `axis_name`.
      eps: guards the norm in e.

    Returns:
      A transformation with state `HeroState`; `metrics.penalty` and `metrics.penalty_grad_norm` are 0.

    Cost: 2 gradients a step.

    >>> import hero_jax, jax, jax.numpy as jnp
    >>> tx = hero_jax.sam(0.5)
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
    >>> w = jnp.array([3.0, 4.0])
    >>> tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]
    Array([6.6, 8.8], dtype=float32)

    Source: Foret et al., ICLR 2021; Kwon et al., ICML 2021.
    """
    _check.non_negative("sam(rho=...)", rho)
    _check.one_of("sam(scope=...)", scope, SCOPES)
    _check.non_negative("sam(eps=...)", eps)
    _check.boolean("sam(adaptive=...)", adaptive)
    return _transformation(
        "sam",
        functools.partial(perturbation, adaptive=adaptive, scope=scope, eps=eps),
        "none",
        rho=rho,
        gamma=0.0,
        reduction="mean",
        mask=None,
        axis_name=axis_name,
        sync=sync,
    )


def grad_l1(
    gamma: Scalar,
    *,
    mask: Mask | None = None,
    axis_name: parallel.AxisName | None = None,
    sync: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of the gradient's l1 norm: GRAD L1, the paper's quantization baseline.

        G = sum_R ||g_i||_1,   direction = g + gamma H(w) sign(g)       (sign on R, 0 elsewhere)

    See `hero` for the update call, the arguments, what is averaged and what is raised.

    Args:
      gamma: strength, >= 0: a float, a traced scalar or a schedule of this transformation's step count.
      mask: names R; default the leaves with ndim >= 2.
      axis_name: the mapped axis, as in `hero`.
      sync: False takes the sign of each device's own gradient and needs `axis_name`.

    Returns:
      A transformation with state `HeroState`; there is no perturbation, so `metrics.perturbed_grad_norm` is that of g.

    Cost: 3 gradients a step.

    >>> import hero_jax, jax, jax.numpy as jnp
    >>> tx = hero_jax.grad_l1(0.1)
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**3))
    >>> w = jnp.array([[1.0, -2.0]])
    >>> tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]
    Array([[ 3.6, 10.8]], dtype=float32)

    Source: Alizadeh et al., Gradient l1 regularization for quantization robustness, ICLR 2020.
    """
    _check.non_negative("grad_l1(gamma=...)", gamma)
    return _transformation(
        "grad_l1",
        lambda params, grads, rho: jax.tree.map(lambda g: jnp.zeros_like(_tree.wide(g)), grads),
        "unchanged" if _is_zero(gamma) else "gradient_l1",
        rho=0.0,
        gamma=gamma,
        reduction="sum",
        mask=mask,
        axis_name=axis_name,
        sync=sync,
    )


def _transformation(
    name: str,
    perturb: Callable[[PyTree, PyTree, jax.typing.ArrayLike], PyTree],
    penalty: str,
    *,
    rho: Scalar,
    gamma: Scalar,
    reduction: str,
    mask: Mask | None,
    axis_name: parallel.AxisName | None,
    sync: bool,
) -> optax.GradientTransformationExtraArgs:
    """The one transformation behind the public ones: perturb, penalise, average, record."""
    _check.boolean(f"{name}(sync=...)", sync)
    _check.axis_name(f"{name}(axis_name=...)", axis_name)
    if not sync and axis_name is None:
        raise ValueError(f"`{name}(sync=False)` needs `axis_name`: without one there is no device to be local to.")
    is_penalized = penalty not in ("none", "unchanged")
    without_penalty = "unchanged" if penalty in ("unchanged", "gradient_l1") else "none"
    follows_eigenvector = penalty == "eigenvalue"

    def selected(params: PyTree) -> PyTree:
        """R as a tree of bools; a mask is checked even where no penalty uses it."""
        if mask is None and not is_penalized:
            return _tree.kernels(params)
        return _check.bool_tree(f"{name}(mask=...)", _tree.kernels if mask is None else mask, params)

    def init_fn(params: PyTree) -> OptState:
        if jax.tree.leaves(params):  # optax.tree.map_params asks for the state of a placeholder without any
            _check.no_masked_nodes("params", params)
            _check.floating_tree("params", params)
            selected(params)
        return HeroState(
            count=jnp.zeros((), jnp.int32),
            metrics=Metrics(*(jnp.zeros((), jnp.float32) for _ in Metrics._fields)),
            eigenvector=jax.tree.map(lambda w: jnp.zeros_like(_tree.wide(w)), params) if follows_eigenvector else None,
            eigenvector_residual=jnp.zeros((), jnp.float32) if follows_eigenvector else None,
        )

    def update_fn(
        updates: PyTree,
        state: OptState,
        params: PyTree | None = None,
        *,
        grad_fn: Callable[[PyTree], PyTree] | None = None,
        value_fn: Callable[[PyTree], jax.Array] | None = None,
        penalty_grad_fn: Callable[[PyTree], PyTree] | None = None,
        penalize: bool = True,
        **extra_args: Any,
    ) -> tuple[PyTree, OptState]:
        del extra_args
        _check.boolean(f"{name} update(penalize=...)", penalize)
        follows = follows_eigenvector and penalize
        grad_fn = _required_grad_fn(name, updates, params, grad_fn, value_fn)
        part_fn = grad_fn
        if penalty_grad_fn is not None:
            part_fn = _checked_grad_fn(name, "penalty_grad_fn", penalty_grad_fn)
        # Those of this device alone; a jvp of them is right in every mode.
        grad_fn, part_fn = (parallel.local_grad_fn(fn, axis_name) for fn in (grad_fn, part_fn))
        mean = functools.partial(parallel.mean, axis_name=axis_name if sync else None)
        grads = mean(_device_updates(updates, params, grad_fn, axis_name, sync))
        eigenvector = state.eigenvector
        if not sync:
            assert axis_name is not None
            params, eigenvector = parallel.vary((params, eigenvector), axis_name)

        diagonal = penalties.selection(selected(params), params, reduction)
        if follows:
            _check.matching_tree("state.eigenvector", eigenvector, params)
            eigenvector = _started(eigenvector, grads, diagonal)

        e = perturb(params, grads, _at(f"{name}(rho=...)", rho, state.count))
        perturbed = _tree.cast_like(_tree.add(params, e), params)
        penalty_of = getattr(penalties, penalty if penalize else without_penalty)
        result = penalty_of(grad_fn, part_fn, mean, penalties.Point(params, grads, e, perturbed), diagonal, eigenvector)
        strength = _at(f"{name}(gamma=...)", gamma, state.count)
        # A strength of 0 adds nothing, even to a product that is not finite (0 * inf is NaN).
        added = jax.tree.map(lambda x: jnp.where(strength == 0, 0, x), _tree.scale(strength, result.grads))
        direction = _tree.cast_like(_tree.add(result.perturbed_grads, added), params)
        metrics = Metrics(
            grad_norm=_tree.norm(grads),
            perturbed_grad_norm=_tree.norm(result.perturbed_grads),
            perturbation_norm=_tree.norm(_tree.subtract(perturbed, params)),
            penalty=result.value,
            penalty_grad_norm=_tree.norm(added),
        )
        metrics = Metrics(*(m.astype(jnp.float32) for m in metrics))
        product = result.product
        if not sync:
            direction, metrics, product = parallel.mean((direction, metrics, product), axis_name)
            # The v that devices share; at the first step it is zero, and its residual infinite.
            eigenvector = state.eigenvector
        next_eigenvector, residual = state.eigenvector, state.eigenvector_residual
        if follows:
            residual = relative_residual(eigenvector, product, _tree.dot(eigenvector, product)).astype(jnp.float32)
            next_eigenvector = _followed(state.eigenvector, product)
        count = jnp.asarray(optax.safe_increment(state.count))
        return direction, HeroState(count, metrics, next_eigenvector, residual)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _required_grad_fn(
    name: str,
    updates: PyTree,
    params: PyTree | None,
    grad_fn: Callable[[PyTree], PyTree] | None,
    value_fn: Callable[[PyTree], jax.Array] | None,
) -> Callable[[PyTree], PyTree]:
    """Checks what an update was given; returns `grad_fn`, which checks what it returns."""
    if params is None:
        raise ValueError(f"`{name}` needs `params`: call `tx.update(grads, state, params, grad_fn=grad_fn)`; got None.")
    if grad_fn is None and value_fn is None:
        raise ValueError(
            f"`{name}` needs `grad_fn` (params -> grads on the same batch) or `value_fn`: call"
            " `tx.update(grads, state, params, grad_fn=grad_fn)`; got None."
        )
    _check.no_masked_nodes("updates", updates)
    _check.floating_tree("params", params)
    _check.matching_tree("updates", updates, params)
    if grad_fn is not None:
        return _checked_grad_fn(name, "grad_fn", grad_fn)
    if not callable(value_fn):
        raise TypeError(f"`{name}` needs a callable `value_fn`; got {_check.brief(value_fn)}.")
    return _checked_grad_fn(name, "value_fn", jax.grad(value_fn))


def _checked_grad_fn(name: str, argument: str, grad_fn: Any) -> Callable[[PyTree], PyTree]:
    """`grad_fn`, which checks what it returns."""
    if not callable(grad_fn):
        raise TypeError(f"`{name}` needs a callable `{argument}`; got {_check.brief(grad_fn)}.")

    def checked_grad_fn(params: PyTree) -> PyTree:
        grads = grad_fn(params)
        _check.matching_tree(f"{argument}(params)", grads, params)
        return grads

    return checked_grad_fn


def _device_updates(
    updates: PyTree,
    params: PyTree,
    device_grads: Callable[[PyTree], PyTree],
    axis_name: parallel.AxisName | None,
    sync: bool,
) -> PyTree:
    """The gradient of this device: the incoming one, unless it may have been summed or averaged already.

    Under `check_vma=True` a gradient that does not vary was summed by autodiff, or averaged by the caller; without
    `sync`, a gradient that the caller averaged would perturb as if with it. One cannot tell. `device_grads(params)` is
    right in every case, and costs nothing under `jit`, where it shares the caller's local gradient.
    """
    if axis_name is None:
        return updates
    if not sync:
        return device_grads(params)
    if parallel.tracks_varying(axis_name) and not all(parallel.varies(g, axis_name) for g in jax.tree.leaves(updates)):
        return device_grads(params)
    return updates


def _at(argument: str, value: Scalar, count: jax.Array) -> jax.typing.ArrayLike:
    """The value of a hyper-parameter at this step."""
    if not callable(value):
        return value
    scheduled = value(count)
    _check.scalar(argument, scheduled)
    return scheduled


def _is_zero(gamma: Scalar) -> bool:
    """Whether gamma is the Python (or NumPy) number 0, which is known before anything is traced."""
    return isinstance(gamma, int | float | np.number) and bool(gamma == 0)


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
