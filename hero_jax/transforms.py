"""HERO, SAM, ASAM and GRAD L1 as Optax gradient transformations."""

from __future__ import annotations

import jax
import optax

from hero_jax import _check, errors, parallel
from hero_jax._update import HeroState, Metrics, Perturbation, Scalar, Transformation, is_zero
from hero_jax.errors import ArgumentError
from hero_jax.penalties import GRADIENT_L1, PENALTIES, PERTURBED, PRODUCTS, REDUCTIONS, UNPERTURBED
from hero_jax.perturbations import SCOPES, Mask

__all__ = ["HeroState", "Metrics", "grad_l1", "hero", "sam"]


def hero(
    rho: Scalar,
    gamma: Scalar,
    *,
    adaptive: bool | Mask = True,
    scope: str = "global",
    penalty: str = "detached",
    reduction: str = "mean",
    product: str = "exact",
    suppress: Scalar = 0.0,
    mask: Mask | None = None,
    perturb_mask: Mask | None = None,
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

        "detached"     G = sum_R mean_i(d^2), g constant too          4 gradients per step
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
      adaptive: scale the perturbation with the weights (ASAM) or not (SAM); or a mask of the leaves to scale, the
        others taking g itself, within one norm (the ASAM authors' code, which leaves biases unscaled: a bias of 0 that
        is scaled is never perturbed). Static, as all that follows but `eps`.
      scope: "global" takes the norm in e over the whole tree, "leaf" over each leaf.
      penalty: "detached" (the authors' released code), "difference", "hvp" or "eigenvalue".
      reduction: "mean" (the authors' code) or "sum" over the entries of each leaf in G; "eigenvalue" has none.
      product: "exact" takes products with the Hessian by `jax.jvp`. "difference" takes them by a difference of two
        gradients (`curvature.grad_difference`), which costs one gradient less: 3 in all for "detached", 4 for
        "difference"; there is none for the other penalties. It is for smooth networks alone: on one of ReLUs it has in
        float32 little to do with the Hessian. 16-bit parameters are refused; it is no use either where `grad_fn`
        computes in 16 bits inside.
      suppress: share, in [0, 1], that is taken from the components of g* with 0 < g*_i / g_i < 1, those that agree with
        g and are smaller (`perturbations.suppressed`): against noisy labels. A float, a traced scalar or a schedule.
        Only g* is changed, not d or the penalty. It costs nothing, or with `part_grad_fn` a gradient of the part.
      mask: bool tree, prefix of one, or callable from params to one, naming R. Default: leaves with ndim >= 2, which
        in attention heads and scanned layers includes biases. Perturbation and update do not depend on it.
        Under `optax.inject_hyperparams` a callable, here and in the other masks, needs `static_args`, which else takes
        it for a schedule.
      perturb_mask: likewise, the leaves that are perturbed; the norm in e is over these. Default: all. (SAM-ON perturbs
        normalisation layers alone.)
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
      `grad_fn`); it ignores extra arguments, except these:

      * `penalize=False`, static, leaves the penalty out of a step: one of SAM or ASAM, at its cost. `perturb=False`,
        static, leaves out the perturbation too: the direction is g, at no cost.
      * `penalty_grad_fn: params -> grads`, the gradient of a part of the batch, takes the place of `grad_fn` in H and T
        alone: with a fraction f of the batch "detached" costs 2 + 3 f gradients, less than without where f < 2/3. Where
        the part is drawn at random and normalised alike, the directions of "detached" and "difference" are unbiased for
        those of the whole batch; G of "hvp" and "eigenvalue", and the residual of v, are those of the part.
      * `part_grad_fn: params -> grads` says that `updates` is the gradient of a part of the batch, by this function: g,
        e, d and the penalty are of that part, and g* alone is of the whole batch. "detached" costs 1 + 4 f gradients
        then, SAM 1 + f. Not of `grad_l1`, and neither is the next.
      * `ascent`, a tree like `params`, takes the place of g in e: a momentum, say. g stays what it is elsewhere, and
        devices are averaged over as for `updates`.

      It emits trees in the types of `params`; norms, dots and differences are float32 or wider.

    Raises:
      ArgumentError: a negative or non-finite `rho` or `gamma`, `suppress` outside [0, 1], an unknown name,
        `product="difference"` with a penalty that has none, or with 16-bit parameters, `sync=False` without
        `axis_name`; at update no `grad_fn`, no `params`, a tree that does not match `params`, a mask that selects
        nothing.
      TypeError: an argument or a parameter of the wrong kind.

    Cost: as listed, counting g, which the caller computes; under `jit`, by XLA's count of operations. Temporary memory
    of ResNet20 at batch 64, in gradients: 2.5, 4.8, 5.2 and 3.0 in the order above; 1 for gamma = 0.

    `grad_fn` must be differentiable: host callbacks are not; a `custom_vjp` is, and where its backward function has one
    too, products take two reverse passes instead of one forward. 16-bit parameters round w + e; where rho is below
    their resolution nothing is perturbed, which `metrics.perturbation_norm` shows: keep float32 parameters and cast
    them inside the loss. Model state stays with the caller: `grad_fn` closes over BatchNorm statistics and drops the
    updated ones. `optax.MultiSteps` around it is wrong (the perturbed gradient would see the last microbatch only);
    accumulate inside `grad_fn` instead, with `optax.microbatching`.

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
    _check.schedule("hero(rho=...)", rho)
    _check.schedule("hero(gamma=...)", gamma)
    errors.one_of("hero(penalty=...)", penalty, PENALTIES)
    errors.one_of("hero(reduction=...)", reduction, REDUCTIONS)
    errors.one_of("hero(product=...)", product, PRODUCTS)
    _check.schedule("hero(suppress=...)", suppress, errors.fraction)
    if product == "difference" and PENALTIES[penalty].cost_by_difference is None:
        raise ArgumentError(
            f"`hero(product='difference')` needs penalty 'detached' or 'difference': third derivatives by differences"
            f" have no correct digit; got penalty {penalty!r}."
        )
    if penalty == "eigenvalue" and reduction != "mean":
        raise ArgumentError(
            "`hero(reduction=...)` must be left out with penalty='eigenvalue', which reduces nothing; got"
            f" {reduction!r}."
        )
    return Transformation(
        "hero",
        PENALTIES[penalty].without if is_zero(gamma) else PENALTIES[penalty],
        _perturbation("hero", rho, adaptive, scope, perturb_mask, eps),
        suppress=suppress,
        by_difference=product == "difference",
        gamma=gamma,
        reduction=reduction,
        mask=mask,
        axis_name=axis_name,
        sync=sync,
    ).optax()


def sam(
    rho: Scalar,
    *,
    adaptive: bool | Mask = False,
    scope: str = "global",
    suppress: Scalar = 0.0,
    perturb_mask: Mask | None = None,
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
      adaptive: False for SAM, True for ASAM, or a mask of the leaves that are scaled, as in `hero`.
      scope: "global" or "leaf", where the norm in e is taken.
      suppress: share taken from the components of g* that point the way of g and are smaller, as in `hero`: against
        noisy labels.
      perturb_mask: the leaves that are perturbed, as in `hero`; default all.
      axis_name: the mapped axis, as in `hero`.
      sync: False perturbs with the gradient of the device (m-sharpness) and needs `axis_name`.
      eps: guards the norm in e.

    Returns:
      A transformation with state `HeroState`; `metrics.penalty` and `metrics.penalty_grad_norm` are 0.

    Cost: 2 gradients per step. `updates` may be the gradient of a part of the batch, for less: see `part_grad_fn` in
    `hero`.

    >>> import hero_jax, jax, jax.numpy as jnp
    >>> tx = hero_jax.sam(0.5)
    >>> grad_fn = jax.grad(lambda w: jnp.sum(w**2))
    >>> w = jnp.array([3.0, 4.0])
    >>> tx.update(grad_fn(w), tx.init(w), w, grad_fn=grad_fn)[0]
    Array([6.6, 8.8], dtype=float32)

    Source: Foret et al., ICLR 2021; Kwon et al., ICML 2021.
    """
    _check.schedule("sam(rho=...)", rho)
    _check.schedule("sam(suppress=...)", suppress, errors.fraction)
    perturbation = _perturbation("sam", rho, adaptive, scope, perturb_mask, eps)
    return Transformation("sam", PERTURBED, perturbation, suppress, axis_name=axis_name, sync=sync).optax()


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
    _check.schedule("grad_l1(gamma=...)", gamma)
    return Transformation(
        "grad_l1",
        UNPERTURBED if is_zero(gamma) else GRADIENT_L1,
        gamma=gamma,
        reduction="sum",
        mask=mask,
        axis_name=axis_name,
        sync=sync,
    ).optax()


def _perturbation(
    name: str,
    rho: Scalar,
    adaptive: bool | Mask,
    scope: str,
    mask: Mask | None,
    eps: jax.typing.ArrayLike,
) -> Perturbation:
    """The perturbation of a transformation, its arguments checked."""
    errors.one_of(f"{name}(scope=...)", scope, SCOPES)
    errors.non_negative(f"{name}(eps=...)", eps)
    _check.bools(f"{name}(adaptive=...)", adaptive)
    return Perturbation(rho, adaptive, scope, mask, eps)
