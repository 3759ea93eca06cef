"""Exact curvature products of a loss, on pytrees: the Hessian, the Gauss-Newton matrix and the empirical Fisher.

Three matrices that are easily confused, for a model f, a loss l of its outputs, and the mean over N examples:

    Hessian            H = 1/N sum_n d^2 l_n / dw^2           the curvature of the loss; indefinite
    Gauss-Newton       G = 1/N sum_n J_n^T (d^2 l_n / df^2) J_n   H without the curvature of the model; no negative
                           eigenvalue where l is convex in f. For softmax cross-entropy (and squared error) it is the
                           Fisher matrix, with labels drawn from the model
    empirical Fisher   F = 1/N sum_n g_n g_n^T                g_n the gradient of example n at its given label; not an
                           approximation of H in general, and zero where every example is fitted

An operator is a function `vector -> vector` for these at fixed parameters. Over one batch it is a
`jax.tree_util.Partial` that holds parameters and data, to be called under jit as well; over `batches` it is a
`HostOperator`, which takes a pass over the data for each product, one compiled call a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from hero_jax import _check, _tree, examples, parallel
from hero_jax._loop import HostOperator

__all__ = [
    "HostOperator",
    "empirical_fisher_operator",
    "ggn_operator",
    "grad_product",
    "hessian_operator",
    "hvp",
    "restrict",
]

PyTree = Any
Batches = Iterable[PyTree] | Callable[[], Iterable[PyTree]]


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
      ValueError: `vector` does not match `params` (names the first path that differs).
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
      ValueError: `vector` does not match `params` (names the first path that differs).
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
    return jax.jvp(grad_fn, (params,), (_tree.cast_like(vector, params),))[1]


def hessian_operator(
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree | None = None,
    *,
    batches: Batches | None = None,
    microbatch_size: int | None = None,
    weight_fn: Callable[[PyTree], Any] | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    axis_name: parallel.AxisName | None = None,
    coupled: bool = False,
) -> Callable[[PyTree], PyTree]:
    """Makes the product with the Hessian of a mean loss, over one batch or a whole data set.

        H v = sum_b weight_b H_b v / sum_b weight_b,   H_b the Hessian of loss_fn(params, b)

    Args:
      loss_fn: `(params, batch) -> scalar`, the mean over the batch. It must be the same function object from call to
        call for what is compiled to be shared.
      params: pytree of floating-point arrays: where the Hessian is taken.
      batch: pytree of arrays with the examples along the first axis, which may be sharded over devices. Under
        `axis_name`, the local examples.
      batches: instead of `batch`, batches that do not fit together: an iterable that can be passed over again and
        again, or a function that returns a new iterator. They may differ in size (each size is compiled once).
      microbatch_size: examples of `batch` to take at a time, in a loop on the device; the rest, if any, comes first.
        Where it divides the number of examples, each microbatch takes every so many examples, which keeps a sharded
        first axis sharded; otherwise they are taken in order.
      weight_fn: `batch -> scalar`, what `loss_fn` has divided by: the number of valid tokens, say. Default the number
        of examples.
      mask: bool tree (or a prefix, or a callable giving either) naming the leaves to restrict to, P^T H P. The
        operator then takes and returns trees with None in place of the others: see `restrict`.
      axis_name: mapped axis (pmap, shard_map, vmap) to average over, weights included. Vectors are replicated.
      coupled: accept a loss that couples the examples of a batch, as batch normalisation in training mode does. The
        result is then the mean over batches of their Hessians, not the Hessian of the whole.

    Returns:
      `vector -> H vector`, stored in float32 or wider but computed in the types of `params`; symmetric up to rounding.

    Raises:
      ValueError: no examples; batch leaves of different lengths; data whose total weight is 0, or changes from pass to
        pass; a loss that couples a batch that is to be split (found by comparing the loss of four examples with that of
        one and three). Values are looked at outside a trace only; under one a total weight of 0 gives NaN.
      TypeError: both or neither of `batch` and `batches`; a one-shot iterator; parameters that are not floating point.

    Which batch statistics: those `loss_fn` uses. Running statistics (evaluation mode) are constants of the function;
    batch statistics are part of it and of its Hessian.

    Cost: one product of a batch is about 2 gradients beyond the gradient, and with `microbatch_size` or `batches` its
    memory is that of one microbatch; `jax.checkpoint` inside `loss_fn` lowers it further. XLA:CPU runs convolutions
    inside a loop some forty times slower: for convolutional networks on CPU use `batches` rather than
    `microbatch_size`.

    >>> import jax, jax.numpy as jnp
    >>> def loss_fn(w, batch):
    ...     x, y = batch
    ...     return 0.5 * jnp.mean((x @ w - y) ** 2)
    >>> x, y = jnp.arange(10.0).reshape(5, 2), jnp.ones(5)
    >>> w, v = jnp.zeros(2), jnp.array([1.0, -1.0])
    >>> hessian_operator(loss_fn, w, (x, y))(v)
    Array([-4., -5.], dtype=float32)
    >>> hessian_operator(loss_fn, w, (x, y), microbatch_size=2)(v)
    Array([-4., -5.], dtype=float32)
    >>> hessian_operator(loss_fn, w, batches=[(x[:3], y[:3]), (x[3:], y[3:])])(v)
    Array([-4., -5.], dtype=float32)

    Source: Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 1994.
    """
    data = (batch, batches, microbatch_size, weight_fn, axis_name)
    return _operator("hessian_operator", _Hessian(loss_fn), loss_fn, params, mask, coupled, data)


def ggn_operator(
    model_fn: Callable[[PyTree, PyTree], PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree | None = None,
    *,
    batches: Batches | None = None,
    microbatch_size: int | None = None,
    weight_fn: Callable[[PyTree], Any] | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    axis_name: parallel.AxisName | None = None,
    coupled: bool = False,
) -> Callable[[PyTree], PyTree]:
    """Makes the product with the generalised Gauss-Newton matrix of a mean loss.

        G v = J^T (d^2 L / df^2) J v,   f = model_fn(params, batch),   L = loss_fn(f, batch),   J = df / dparams

    Args:
      model_fn: `(params, batch) -> outputs`, any pytree of floating-point arrays.
      loss_fn: `(outputs, batch) -> scalar`, the mean over the batch.
      params, batch, batches, microbatch_size, weight_fn, mask, axis_name, coupled: as in `hessian_operator`.

    Returns:
      `vector -> G vector`, stored and computed as in `hessian_operator`; symmetric, and without negative eigenvalues
      where the loss is convex in the outputs.

    Raises:
      As `hessian_operator`.

    Batch statistics: as `hessian_operator`.

    Cost: one forward-mode and one reverse-mode pass through the model, about 1.5 gradients; memory as
    `hessian_operator`.

    >>> import jax.numpy as jnp
    >>> def model_fn(w, x):
    ...     return jnp.tanh(x @ w)
    >>> def loss_fn(outputs, x):
    ...     return 0.5 * jnp.mean(outputs**2)
    >>> matvec = ggn_operator(model_fn, loss_fn, jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> matvec(jnp.array([1.0, 0.0]))
    Array([5., 7.], dtype=float32)

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, Neural Computation
    2002.
    """
    data = (batch, batches, microbatch_size, weight_fn, axis_name)
    whole = _Composition(model_fn, loss_fn)
    return _operator("ggn_operator", _GaussNewton(model_fn, loss_fn), whole, params, mask, coupled, data)


def empirical_fisher_operator(
    losses_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batch: PyTree | None = None,
    *,
    batches: Batches | None = None,
    microbatch_size: int | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    axis_name: parallel.AxisName | None = None,
    coupled: bool = False,
) -> Callable[[PyTree], PyTree]:
    """Makes the product with the empirical Fisher matrix, the uncentered second moment of per-example gradients.

        F v = 1/N sum_n g_n (g_n^T v) = J^T J v / N,   J = d losses / dparams, a row g_n an example

    Args:
      losses_fn: `(params, batch) -> (N,)`, the loss of each example at its given label: not their mean.
      params, batch, batches, microbatch_size, mask, axis_name, coupled: as in `hessian_operator`.

    Returns:
      `vector -> F vector`, stored and computed as in `hessian_operator`; symmetric and without negative eigenvalues.

    Raises:
      ValueError: `losses_fn` returns anything but one loss an example. Otherwise as `hessian_operator`.

    Batch statistics: as `hessian_operator`.

    Cost: one forward-mode and one reverse-mode pass, about 1.5 gradients; no per-example gradient is stored.

    >>> import jax.numpy as jnp
    >>> matvec = empirical_fisher_operator(lambda w, x: x @ w, jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> matvec(jnp.array([1.0, 0.0]))
    Array([5., 7.], dtype=float32)

    Source: Kunstner, Balles and Hennig, Limitations of the empirical Fisher approximation, NeurIPS 2019.
    """
    data = (batch, batches, microbatch_size, None, axis_name)
    return _operator("empirical_fisher_operator", _EmpiricalFisher(losses_fn), losses_fn, params, mask, coupled, data)


def restrict(tree: PyTree, mask: PyTree | Callable[[PyTree], PyTree]) -> PyTree:
    """Keeps the leaves that `mask` selects and puts None in place of the others.

    None is a node without leaves: solvers given such a tree work on the selected ones alone, in their dimension.

    Args:
      tree: pytree of arrays.
      mask: bool tree, a prefix of one, or a callable `tree -> bool tree`.

    Returns:
      The tree with None for each leaf not selected.

    Raises:
      ValueError: `mask` does not match, or selects nothing. TypeError: it holds anything but bools.

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
    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, params: PyTree, others: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        return hvp(lambda params: self.loss_fn(_merge(params, others), batch), params, vector)


@dataclasses.dataclass(frozen=True)
class _GaussNewton:
    model_fn: Callable[[PyTree, PyTree], PyTree]
    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, params: PyTree, others: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        def model(params: PyTree) -> PyTree:
            return self.model_fn(_merge(params, others), batch)

        _check.matching_tree("vector", vector, params)
        outputs, tangent = jax.jvp(model, (params,), (_tree.cast_like(vector, params),))
        curved = hvp(self.loss_fn, outputs, tangent, batch)
        return jax.vjp(model, params)[1](curved)[0]


@dataclasses.dataclass(frozen=True)
class _EmpiricalFisher:
    losses_fn: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, params: PyTree, others: PyTree, vector: PyTree, batch: PyTree) -> PyTree:
        def losses(params: PyTree) -> jax.Array:
            losses = self.losses_fn(_merge(params, others), batch)
            if losses.shape != (examples.num_examples(batch),):
                raise ValueError(
                    f"`empirical_fisher_operator(losses_fn=...)` must return one loss an example,"
                    f" ({examples.num_examples(batch)},); got {losses.shape}."
                )
            return losses

        _check.matching_tree("vector", vector, params)
        values, tangent = jax.jvp(losses, (params,), (_tree.cast_like(vector, params),))
        return jax.vjp(losses, params)[1](tangent / len(values))[0]


@dataclasses.dataclass(frozen=True)
class _Composition:
    model_fn: Callable[[PyTree, PyTree], PyTree]
    loss_fn: Callable[[PyTree, PyTree], jax.Array]

    def __call__(self, params: PyTree, batch: PyTree) -> jax.Array:
        return self.loss_fn(self.model_fn(params, batch), batch)


def _operator(
    name: str,
    product: Callable[..., PyTree],
    loss_fn: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    mask: PyTree | Callable[[PyTree], PyTree] | None,
    coupled: bool,
    data: tuple[Any, ...],
) -> Callable[[PyTree], PyTree]:
    """The mean over the data of `product(selected params, other params, vector, batch)`, a function of the vector."""
    batch, batches, microbatch_size, weight_fn, axis_name = data
    _check.boolean(f"{name}(coupled=...)", coupled)
    selected, others = params, None
    if mask is not None:
        keep = _check.bool_tree(f"{name}(mask=...)", mask, params)
        selected = restrict(params, keep)
        others = jax.tree.map(lambda keep, x: None if keep else x, keep, params)
    _check.floating_tree("params", selected)
    if any(jnp.result_type(x).itemsize < 4 for x in jax.tree.leaves(selected)):
        product = _PeakScaled(product)
    mean = examples.mean_over(
        name,
        product,
        batch,
        batches,
        microbatch_size=microbatch_size,
        weight_fn=weight_fn,
        axis_name=axis_name,
    )
    if not coupled:
        examples.check_uncoupled(name, loss_fn, params, mean)
    if isinstance(mean, examples.StreamedMean):
        return HostOperator(lambda vector: mean(selected, others, vector))
    return jax.tree_util.Partial(mean.func, *mean.args, selected, others)


def _merge(params: PyTree, others: PyTree | None) -> PyTree:
    """The tree whose leaves two restricted trees share out between them."""
    if others is None:
        return params
    return jax.tree.map(lambda x, y: y if x is None else x, params, others, is_leaf=lambda x: x is None)
