"""Exact curvature products of a loss, on pytrees: the Hessian, the Gauss-Newton matrix and the empirical Fisher.

Three matrices that are easily confused, for a model f, a loss l of its outputs, and the mean over N examples:

    Hessian            H = 1/N sum_n d^2 l_n / dw^2           the curvature of the loss; indefinite
    Gauss-Newton       G = 1/N sum_n J_n^T (d^2 l_n / df^2) J_n   H without the curvature of the model; no negative
                           eigenvalue where l is convex in f. For softmax cross-entropy (and squared error) it is the
                           Fisher matrix, with labels drawn from the model
    empirical Fisher   F = 1/N sum_n g_n g_n^T                g_n the gradient of example n at its given label; not an
                           approximation of H in general, and zero where every example is fitted

An operator (`Operator`) is the product `vector -> vector` with one of these at fixed parameters. Over a batch or
`Examples` it is a pytree that holds parameters and data, to be called under jit as well; over a `Stream` it is a
`HostOperator`, which takes a pass over the data for each product, one compiled call per batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _autodiff, _check, _mean, _tree, errors
from hero_jax.errors import ArgumentError
from hero_jax.examples import Examples, Stream
from hero_jax.operators import HostOperator, Operator

__all__ = [
    "Examples",
    "HostOperator",
    "Operator",
    "Stream",
    "empirical_fisher_operator",
    "ggn_operator",
    "grad_difference",
    "grad_product",
    "hessian_operator",
    "hvp",
    "restrict",
]

PyTree = Any
Mask = PyTree | Callable[[PyTree], PyTree]
LossFn = Callable[[PyTree, PyTree], jax.Array]


def hvp(loss_fn: Callable[..., jax.Array], params: PyTree, vector: PyTree, *args: Any) -> PyTree:
    """Multiplies the Hessian of a loss by a vector.

        H(w) u = d/dt grad L(w + t u) at t = 0,   L(w) = loss_fn(w, *args)

    Exact (no finite difference), linear in `vector`, and differentiable. The mean is that of `loss_fn`: a loss that is
    the mean over a batch gives the Hessian of that mean, and nothing is averaged over devices here
    (inside `shard_map(check_vma=True)`, mark replicated `params` and `vector` with `parallel.vary` first, then average:
    the product of replicated ones is summed over devices already). Where the loss
    normalises with batch statistics, they are part of the function and of its Hessian.

    Args:
      loss_fn: `(params, *args) -> scalar`.
      params: pytree of floating-point arrays, w.
      vector: pytree with the structure and shapes of `params`, u; taken in the types of `params`.
      *args: passed on to `loss_fn`, never differentiated; give data here rather than in a closure.

    Returns:
      H(w) u, with the structure, shapes and types of `params`.

    Raises:
      ArgumentError: `vector` does not match `params` (names the first path that differs).
      TypeError: a leaf of `params` is not floating point.

    Cost: about 2 gradients beyond the gradient itself, at twice its memory; independent of the number of parameters.

    >>> import jax.numpy as jnp
    >>> def loss_fn(w, scale):
    ...     return scale * (w["a"] ** 3).sum() + w["a"].sum() * w["b"]
    >>> w = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    >>> hvp(loss_fn, w, {"a": jnp.array([1.0, 1.0]), "b": jnp.array(1.0)}, 0.5)
    {'a': Array([4., 7.], dtype=float32), 'b': Array(2., dtype=float32, weak_type=True)}

    Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
    """
    return grad_product(lambda w: jax.grad(loss_fn)(w, *args), params, vector)


def grad_product(grad_fn: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree) -> PyTree:
    """Multiplies the Jacobian of a gradient function by a vector: `hvp` for a caller who has `grad_fn` only.

        H(w) u = d/dt grad_fn(w + t u) at t = 0

    Args:
      grad_fn: `params -> gradient`, shaped like `params`: which batch, which mean and whether an average over devices
        is in it are the caller's choice.
      params: pytree of floating-point arrays, w.
      vector: pytree with the structure and shapes of `params`, u; taken in the types of `params`.

    Returns:
      H(w) u alone, shaped like `grad_fn(params)`.

    Raises:
      ArgumentError: `vector` does not match `params` (names the first path that differs).
      TypeError: a leaf of `params` is not floating point.

    Cost: as `hvp`. Where the caller also evaluates `grad_fn(params)`, XLA's common-subexpression elimination merges
    that with the primal of this product under `jit`, so both cost 1 + 2 gradients (a test counts the operations).
    `jax.linearize` compiles to the same program, except around a `scan` (microbatching), where it would keep the
    residuals of every microbatch: ten times the memory.

    >>> import jax, jax.numpy as jnp
    >>> grad_product(jax.grad(lambda w: (w**3).sum()), jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0]))
    Array([  6., -12.], dtype=float32)

    Source: see `hvp`.
    """
    _check.floating_tree("params", params)
    _check.matching_tree("vector", vector, params)
    return _autodiff.jvp(grad_fn, params, vector)[1]


def grad_difference(
    grad_fn: Callable[[PyTree], PyTree], params: PyTree, vector: PyTree, grads: PyTree | None = None
) -> PyTree:
    """Approximates `grad_product` by a difference of two gradients, for smooth losses and one gradient less.

        H(w) u ~ [grad_fn(w + t u) - grad_fn(w)] / t,   t = sqrt(eps) ||w|| / (10 ||u||)

    eps is that of the coarsest type in `params`; ||w|| is taken as 1 where it is 0. The error has two parts: t/2
    T(w)[u, u] with T the third derivative, and the rounding of the two gradients (and of w + t u) divided by t. On the
    smooth networks of the tests they are below 1e-2 of H(w) u together in float32, and below 1e-6 in float64. In 16
    bits nothing is left of the difference, and such parameters are refused.

    **Where the loss has kinks, as every network of ReLUs or max-pooling has, this is not the Hessian in float32.** Each
    unit that changes its sign between w and w + t u adds a jump divided by t. On ResNet8 the result has almost nothing
    in common with the exact product (docs/cost.md has the figures). In float64 it has, since t is so small that nothing
    changes its sign. Use it with smooth activations (tanh, GELU, SiLU) and without max-pooling. A gradient function
    that computes in 16 bits inside is no use either, which cannot be seen here.

    Args:
      grad_fn: `params -> gradient`, as for `grad_product`.
      params: pytree of float32 or float64 arrays, w.
      vector: pytree with the structure and shapes of `params`, u.
      grads: `grad_fn(params)` where it is known; default: it is computed.

    Returns:
      The quotient, shaped like `params`, in float32 or wider. For u = 0 it is 0.

    Raises:
      ArgumentError: `vector` or `grads` does not match `params`; a leaf of `params` has 16 bits.
      TypeError: a leaf of `params` is not floating point.

    Cost: 1 gradient, or 2 without `grads`.

    >>> import jax, jax.numpy as jnp
    >>> grad_fn = jax.grad(lambda w: (w**3).sum())
    >>> product = grad_difference(grad_fn, jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0]))
    >>> bool(jnp.allclose(product, jnp.array([6.0, -12.0]), rtol=0.01))
    True

    Source: Nocedal and Wright, Numerical Optimization, 2nd edition, 2006, section 8.1; Knoll and Keyes, Jacobian-free
    Newton-Krylov methods, Journal of Computational Physics 2004, section 2.3.
    """
    _check.floating_tree("params", params)
    _check.wide_tree("params", params, "a difference of 16-bit gradients has no correct digit")
    _check.matching_tree("vector", vector, params)
    if grads is None:
        grads = grad_fn(params)
    else:
        _check.matching_tree("grads", grads, params)
    eps = max(float(jnp.finfo(jnp.result_type(w)).eps) for w in jax.tree.leaves(params))
    along, peak = _tree.peak_scaled(vector)
    size, length = _tree.norm(params), _tree.norm(along)
    step = 0.1 * eps**0.5 * jnp.where(size > 0, size, 1) / jnp.where(length > 0, length, 1)
    there = grad_fn(_tree.cast_like(_tree.add(params, along, step), params))
    return _tree.scale(peak / step, _tree.subtract(there, grads))


def hessian_operator(
    loss_fn: LossFn, params: PyTree, data: PyTree, *, mask: Mask | None = None, coupled: bool = False
) -> Operator:
    """Makes the product with the Hessian of a mean loss, over one batch or a whole data set.

        H v = sum_b weight_b H_b v / sum_b weight_b,   H_b the Hessian of loss_fn(params, b)

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch. It must be the same function object from call to
        call for what is compiled to be shared.
      params: pytree of floating-point arrays: where the Hessian is taken.
      data: a batch (pytree of arrays with the examples along the first axis), `Examples` or `Stream`, which say how the
        mean over it is taken and which weight a batch has.
      mask: bool tree (or a prefix, or a callable giving either) naming the leaves to restrict to, P^T H P. The
        operator then takes and returns trees with None in place of the others: see `restrict`.
      coupled: accept a loss that couples the examples of a batch that is split, as batch normalisation in training mode
        does. The result is then the mean over batches of their Hessians, not the Hessian of the whole.

    Returns:
      `Operator` on trees like `params` (restricted by `mask`), a `HostOperator` over a stream. H v is stored in float32
      or wider but computed in the types of `params`; symmetric up to rounding.

    Raises:
      ArgumentError: no examples; batch leaves of different lengths; a stream whose total weight is 0, or changes from
        pass to pass; a loss that couples a batch that is to be split (found by comparing the loss of four examples with
        that of one and three; of a stream, in every batch of the first pass). Values are looked at outside a trace
        only. Of examples at hand a total weight of 0 gives NaN.
      TypeError: parameters that are not floating point.

    Which batch statistics: those `loss_fn` uses. Running statistics (evaluation mode) are constants of the function;
    batch statistics are part of it and of its Hessian.

    Cost: one product of a batch is about 2 gradients beyond the gradient, and of microbatches or a stream its memory is
    that of one of them; `jax.checkpoint` inside `loss_fn` lowers it further.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(w, batch):
    ...     x, y = batch
    ...     return 0.5 * jnp.mean((x @ w - y) ** 2)
    >>> x, y = jnp.arange(10.0).reshape(5, 2), jnp.ones(5)
    >>> w, v = jnp.zeros(2), jnp.array([1.0, -1.0])
    >>> hessian_operator(loss_fn, w, (x, y))(v)
    Array([-4., -5.], dtype=float32)
    >>> hessian_operator(loss_fn, w, Examples((x, y), microbatch_size=2))(v)
    Array([-4., -5.], dtype=float32)
    >>> hessian_operator(loss_fn, w, Stream([(x[:3], y[:3]), (x[3:], y[3:])]))(v)
    Array([-4., -5.], dtype=float32)

    Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
    """
    return _operator("hessian_operator", _Hessian(loss_fn), loss_fn, params, data, mask, coupled)


def ggn_operator(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    output_loss_fn: LossFn,
    params: PyTree,
    data: PyTree,
    *,
    mask: Mask | None = None,
    coupled: bool = False,
) -> Operator:
    """Makes the product with the generalised Gauss-Newton matrix of a mean loss.

        G v = J^T (d^2 L / df^2) J v,   f = model_fn(params, batch),   L = output_loss_fn(f, batch),   J = df / dparams

    Args:
      model_fn: `(params, batch) -> outputs`, any pytree of floating-point arrays.
      output_loss_fn: `(outputs, batch) -> scalar`, the mean over the batch.
      params, data, mask, coupled: as in `hessian_operator`.

    Returns:
      `Operator`, as `hessian_operator`; symmetric, and without negative eigenvalues where the loss is convex in the
      outputs.

    Raises:
      As `hessian_operator`.

    Batch statistics: as `hessian_operator`.

    Cost: one forward-mode and one reverse-mode pass through the model, about 1.5 gradients; memory as
    `hessian_operator`. Where the model has a `custom_vjp`, J v takes two reverse-mode passes instead.

    >>> import jax.numpy as jnp
    >>> def model_fn(w, x):
    ...     return jnp.tanh(x @ w)
    >>> def output_loss_fn(outputs, x):
    ...     return 0.5 * jnp.mean(outputs**2)
    >>> operator = ggn_operator(model_fn, output_loss_fn, jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> operator(jnp.array([1.0, 0.0]))
    Array([5., 7.], dtype=float32)

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation
    2002.
    """
    whole = _Composition(model_fn, output_loss_fn)
    return _operator("ggn_operator", _GaussNewton(model_fn, output_loss_fn), whole, params, data, mask, coupled)


def empirical_fisher_operator(
    losses_fn: LossFn, params: PyTree, data: PyTree, *, mask: Mask | None = None, coupled: bool = False
) -> Operator:
    """Makes the product with the empirical Fisher matrix, the uncentered second moment of per-example gradients.

        F v = 1/N sum_n g_n (g_n^T v) = J^T J v / N,   J = d losses / dparams, a row g_n an example

    Args:
      losses_fn: `(params, batch) -> (N,)`, the loss of each example at its given label: not their mean.
      params, data, mask, coupled: as in `hessian_operator`; data without a `weight_fn`.

    Returns:
      `Operator`, as `hessian_operator`; symmetric and without negative eigenvalues.

    Raises:
      ArgumentError: `losses_fn` returns anything but one loss for each example; data with a `weight_fn`. Otherwise as
        `hessian_operator`.

    Batch statistics: as `hessian_operator`.

    Cost: one forward-mode and one reverse-mode pass, about 1.5 gradients; no per-example gradient is stored. Where
    `losses_fn` has a `custom_vjp`, J v takes two reverse-mode passes instead.

    >>> import jax.numpy as jnp
    >>> operator = empirical_fisher_operator(lambda w, x: x @ w, jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> operator(jnp.array([1.0, 0.0]))
    Array([5., 7.], dtype=float32)

    Source: Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation, NeurIPS 2019.
    """
    if isinstance(data, Examples | Stream) and data.weight_fn is not None:
        raise ArgumentError(
            "`empirical_fisher_operator(data=...)` must have no `weight_fn`, since every example counts alike; got one."
        )
    name = "empirical_fisher_operator"
    return _operator(name, _EmpiricalFisher(losses_fn), losses_fn, params, data, mask, coupled)


def restrict(tree: PyTree, mask: PyTree | Callable[[PyTree], PyTree]) -> PyTree:
    """Keeps the leaves that `mask` selects and puts None in place of the others.

    None is a node without leaves: solvers given such a tree work on the selected ones alone, in their dimension.

    Args:
      tree: pytree of arrays.
      mask: bool tree, a prefix of one, or a callable `tree -> bool tree`.

    Returns:
      The tree with None for each leaf not selected.

    Raises:
      ArgumentError: `mask` does not match, or selects nothing. TypeError: it holds anything but bools.

    Cost: none.

    >>> restrict({"kernel": 1.0, "bias": 2.0}, {"kernel": True, "bias": False})
    {'bias': None, 'kernel': 1.0}
    """
    selected = _check.bool_tree("mask", mask, tree)
    return jax.tree.map(lambda keep, x: x if keep else None, selected, tree)


@dataclasses.dataclass(frozen=True)
class _PeakScaled:
    """A linear product, of the vector over its largest entry: 16 bits have no room for the entries of a unit vector."""

    product: Callable[..., PyTree]

    def __call__(self, params: PyTree, others: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        scaled, peak = _tree.peak_scaled(vector)
        return _tree.scale(peak, self.product(params, others, scaled, batch))


@dataclasses.dataclass(frozen=True)
class _Hessian:
    loss_fn: LossFn

    def __call__(self, params: PyTree, others: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        grad_fn = jax.grad(lambda params: self.loss_fn(_tree.merge(params, others), batch))
        return _autodiff.jvp(grad_fn, params, vector)[1]


@dataclasses.dataclass(frozen=True)
class _GaussNewton:
    model_fn: Callable[[PyTree, PyTree], PyTree]
    output_loss_fn: LossFn

    def __call__(self, params: PyTree, others: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        def model(params: PyTree) -> PyTree:
            return self.model_fn(_tree.merge(params, others), batch)

        outputs, tangent = _autodiff.jvp(model, params, vector)
        curved = hvp(self.output_loss_fn, outputs, tangent, batch)
        return jax.vjp(model, params)[1](curved)[0]


@dataclasses.dataclass(frozen=True)
class _EmpiricalFisher:
    losses_fn: LossFn

    def __call__(self, params: PyTree, others: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        def losses(params: PyTree) -> jax.Array:
            losses = self.losses_fn(_tree.merge(params, others), batch)
            if losses.shape != (_mean.num_examples(batch),):
                raise ArgumentError(
                    f"`empirical_fisher_operator(losses_fn=...)` must return one loss an example,"
                    f" ({_mean.num_examples(batch)},); got {losses.shape}."
                )
            return losses

        values, tangent = _autodiff.jvp(losses, params, vector)
        return jax.vjp(losses, params)[1](tangent / len(values))[0]


@dataclasses.dataclass(frozen=True)
class _Composition:
    model_fn: Callable[[PyTree, PyTree], PyTree]
    output_loss_fn: LossFn

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        return self.output_loss_fn(self.model_fn(params, batch), batch)


def _operator(
    name: str,
    product: Callable[..., PyTree],
    loss_fn: LossFn,
    params: PyTree,
    data: PyTree,
    mask: Mask | None,
    coupled: bool,
) -> Operator:
    """The mean over the data of `product(selected params, other params, vector, batch)`, a function of the vector."""
    errors.boolean(f"{name}(coupled=...)", coupled)
    selected, others = params, None
    if mask is not None:
        keep = _check.bool_tree(f"{name}(mask=...)", mask, params)
        selected = restrict(params, keep)
        others = jax.tree.map(lambda keep, x: None if keep else x, keep, params)
    _check.floating_tree("params", selected)
    if any(jnp.result_type(x).itemsize < 4 for x in jax.tree.leaves(selected)):
        product = _PeakScaled(product)
    mean = _mean.over(name, product, loss_fn, params, data, coupled)
    if isinstance(mean, _mean.StreamedMean):
        return HostOperator(functools.partial(mean, selected, others), selected)
    return Operator(jax.tree_util.Partial(mean.func, *mean.args, selected, others), selected)
