"""The loss along lines and planes through the weights: what a picture of a loss landscape shows.

filter_normalized  d random, each of its filters as long as that of w
line               L(w + a d)
plane              L(w + a d1 + b d2)
interpolate        L((1 - t) w1 + t w2), the straight line through two networks
barrier            how far the loss rises between them
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hero_jax import _check, _tree, errors
from hero_jax.errors import ArgumentError

__all__ = ["Line", "Plane", "barrier", "filter_normalized", "interpolate", "line", "plane"]

PyTree = Any
EvalFn = Callable[[PyTree], PyTree]
Report = Callable[[int, int], None]
Steps = Sequence[float] | np.ndarray


class Line(NamedTuple):
    """Values along a line.

    steps: (n,) float64, a; or t of `interpolate`.
    values: what `eval_fn` returned, each scalar as (n,) float64; NaN and infinities stay.
    finite: (n,) bool, whether all values of a point are finite.
    """

    steps: np.ndarray
    values: PyTree
    finite: np.ndarray


class Plane(NamedTuple):
    """Values on a plane; entry [i, j] is that at a[i], b[j].

    a: (n,) float64, steps along the first direction.
    b: (m,) float64, steps along the second.
    values: what `eval_fn` returned, each scalar as (n, m) float64; NaN and infinities stay.
    finite: (n, m) bool, whether all values of a point are finite.
    """

    a: np.ndarray
    b: np.ndarray
    values: PyTree
    finite: np.ndarray


def filter_normalized(params: PyTree, key: jax.Array, *, channel_axis: int = -1) -> PyTree:
    """Draws a random direction, each of its filters as long as that of the weights.

        d_f = ||w_f|| z_f / ||z_f||,   z standard normal, w_f the weights of one output (a filter), Frobenius norms
        d = 0 in leaves with fewer than two axes: biases and normalization scales

    So a step of 1 is as large, relative to the weights, in every filter of every network, and scaling one layer up and
    the next one down, which changes nothing in a ReLU network, does not change the picture.

    Networks of the same shapes get the same z from the same key, each normalized by its own weights: their directions
    are parallel in every filter, and that is what "the same random direction" of two networks means. Two keys give
    directions that are nearly orthogonal where there are many weights, not exactly.

    Args:
      params: pytree of floating-point arrays, w.
      key: of z. Where each entry of z goes depends on the shapes and the order of all leaves of `params`.
      channel_axis: the axis that counts filters: -1 for Flax kernels (..., inputs, outputs), 0 where the outputs come
        first (PyTorch, Equinox). Static.

    Returns:
      d, like `params`, in float32 or wider. 0 for a filter of zeros.

    Raises:
      ArgumentError: no leaf with two axes or more, or one that has no `channel_axis`.
      TypeError: leaves that are not floating point.

    Cost: no evaluation; memory of two trees like `params`.

    >>> import jax, jax.numpy as jnp
    >>> w = {"kernel": jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 2.0]]), "bias": jnp.array([5.0, 6.0, 7.0])}
    >>> d = filter_normalized(w, jax.random.key(0))
    >>> print(jnp.linalg.norm(d["kernel"], axis=0).round(3), d["bias"])
    [5.    0.    2.236] [0. 0. 0.]

    Source: Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, NeurIPS 2018, section
    4. It speaks of filters of convolutional and dense layers only; the code that they released sets directions of
    biases and BatchNorm to 0 where it is told so (`--xignore biasbn`), as in all its examples but one line between two
    networks, and takes d = w there otherwise.
    """
    _check.floating_tree("params", params)
    axes = [jnp.ndim(x) for x in jax.tree.leaves(params) if jnp.ndim(x) >= 2]
    if not axes:
        raise ArgumentError("`params` must have a leaf with two axes or more, which has filters; got none.")
    errors.integer("filter_normalized(channel_axis=...)", channel_axis, low=-min(axes), high=min(axes) - 1)
    return _filter_normalized(params, key, channel_axis)


def line(eval_fn: EvalFn, params: PyTree, direction: PyTree, steps: Steps, *, report: Report | None = None) -> Line:
    """Evaluates a loss along a line through the weights.

        values[i] = eval_fn(w + steps[i] d)

    Args:
      eval_fn: `params -> scalar`, or a tree of scalars such as {"loss": ..., "accuracy": ...}. It is called as it is,
        outside of any trace, with weights of the same shapes and types at every point: it may loop over a data set on
        the host, as functions made by `evaluate.classifier` do, and compiles once where it is compiled. Give it a
        jitted function that takes the data as an argument. Which data, which mean, and the BatchNorm statistics are
        its own: close over the running statistics of w for the usual picture.
      params: pytree of floating-point arrays, w. Points are computed in float32 or wider and rounded to its types, so
        steps that bfloat16 cannot resolve do not move.
      direction: d, with the structure and shapes of `params`, such as `filter_normalized` draws.
      steps: (n,) finite numbers, in any order; at 0 the weights are exactly w.
      report: called with the number of evaluations done, and their total.

    Returns:
      `Line`.

    Raises:
      ArgumentError: `steps` that are not finite or not one axis of at least one; `direction` that does not match
        `params`; no scalar from `eval_fn`, or other ones at a later point.
      TypeError: leaves that are not floating point; a value that is not a real scalar.

    Cost: n evaluations; memory of one copy of the parameters, besides `params` and `direction`.

    >>> import jax.numpy as jnp
    >>> found = line(lambda w: jnp.sum(w**2), jnp.array([1.0, 2.0]), jnp.array([0.0, -1.0]), [0, 1, 2])
    >>> print(found.steps, found.values)
    [0. 1. 2.] [5. 2. 1.]
    """
    _check.floating_tree("params", params)
    _check_direction("line(direction=...)", direction, params)
    axis = _axis("line(steps=...)", steps)
    values, finite = _evaluate("line", eval_fn, functools.partial(_moved, params, (direction,)), [axis], report)
    return Line(axis, values, finite)


def plane(
    eval_fn: EvalFn,
    params: PyTree,
    directions: tuple[PyTree, PyTree],
    a: Steps,
    b: Steps,
    *,
    report: Report | None = None,
) -> Plane:
    """Evaluates a loss on a grid of a plane through the weights.

        values[i, j] = eval_fn(w + a[i] d1 + b[j] d2)

    Args:
      eval_fn, params, report: as in `line`.
      directions: (d1, d2), each as in `line`.
      a, b: (n,) and (m,) finite numbers, steps along d1 and d2.

    Returns:
      `Plane`.

    Raises:
      ArgumentError, TypeError: as `line`; not two directions.

    Cost: n m evaluations; memory of one copy of the parameters, besides `params` and `directions`.

    >>> import jax.numpy as jnp
    >>> directions = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> found = plane(lambda w: w[0] ** 2 + 3 * w[1], jnp.array([1.0, 2.0]), directions, a=[-1, 0], b=[0, 1, 2])
    >>> print(found.values)
    [[ 6.  9. 12.]
     [ 7. 10. 13.]]

    Source: Li et al., NeurIPS 2018, sections 3 and 4.
    """
    _check.floating_tree("params", params)
    if not isinstance(directions, tuple | list) or len(directions) != 2:
        raise ArgumentError(f"`plane(directions=...)` must be two trees like `params`; got {errors.brief(directions)}.")
    for i, direction in enumerate(directions):
        _check_direction(f"plane(directions=...)[{i}]", direction, params)
    first, second = _axis("plane(a=...)", a), _axis("plane(b=...)", b)
    values, finite = _evaluate(
        "plane", eval_fn, functools.partial(_moved, params, tuple(directions)), [first, second], report
    )
    return Plane(first, second, values, finite)


def interpolate(eval_fn: EvalFn, first: PyTree, second: PyTree, steps: Steps, *, report: Report | None = None) -> Line:
    """Evaluates a loss along the straight line through two networks.

        values[i] = eval_fn((1 - t) w1 + t w2),   t = steps[i]

    Args:
      eval_fn, report: as in `line`. Neither network's BatchNorm statistics, nor their average, are those of a network
        in between: estimate them anew inside `eval_fn` (`quantize.linen.reestimate_batch_stats`).
      first, second: w1 and w2, pytrees of floating-point arrays of the same structure and shapes; points are in the
        types of `first`.
      steps: (n,) finite numbers t, in [0, 1] between the networks. At 0 and 1 the weights are exactly w1 and w2.

    Returns:
      `Line`, its steps being t.

    Raises:
      ArgumentError, TypeError: as `line`; `second` that does not match `first`.

    Cost: n evaluations; memory of one copy of the parameters, besides `first` and `second`.

    >>> import jax.numpy as jnp
    >>> found = interpolate(lambda w: (w**2 - 1.0) ** 2, jnp.array(-1.0), jnp.array(1.0), [0, 0.25, 0.5, 1])
    >>> print(found.values)
    [0.     0.5625 1.     0.    ]

    Source: Goodfellow, Vinyals and Saxe, Qualitatively characterizing neural network optimization problems, ICLR 2015.
    On BatchNorm: Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI 2018, section
    3.2; Jordan et al., REPAIR, ICLR 2023.
    """
    _check.floating_tree("first", first)
    _check.floating_tree("second", second)
    _check.matching_tree("interpolate(second=...)", second, first, than="first")
    axis = _axis("interpolate(steps=...)", steps)
    values, finite = _evaluate("interpolate", eval_fn, functools.partial(_between, first, second), [axis], report)
    return Line(axis, values, finite)


def barrier(steps: Steps, losses: Steps) -> float:
    """Returns how far the loss between two networks rises above the straight line through their own losses.

        B = max over t in [0, 1] of   L(w(t)) - (1 - t) L(w1) - t L(w2)

    Args:
      steps: (n,), t of `interpolate`, in any order; 0 and 1 must be among them, and those outside [0, 1] are not used.
      losses: (n,), one of its values: a loss, or an error such as 1 - accuracy.

    Returns:
      B >= 0: a lower bound of that over all t, since only `steps` are seen. NaN or infinity where a loss in [0, 1] is.

    Raises:
      ArgumentError: other shapes, or no step at 0 or at 1.

    Cost: none.

    >>> found = interpolate(lambda w: (w**2 - 1) ** 2 + w, jnp.array(-1.0), jnp.array(1.0), [0, 0.25, 0.5, 0.75, 1])
    >>> barrier(found.steps, found.values)
    1.0

    Source: Entezari, Sedghi, Saukh and Neyshabur, The role of permutation invariance in linear mode connectivity of
    neural networks, ICLR 2022, section 2. Frankle, Dziugaite, Roy and Carbin, Linear mode connectivity and the lottery
    ticket hypothesis, ICML 2020, section 2, subtract the mean of the two losses in place of the line: the same where
    these are equal.
    """
    t, values = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if t.ndim != 1 or t.shape != values.shape:
        raise ArgumentError(
            f"`barrier` needs one loss a step; got shapes {t.shape} of steps and {values.shape} of losses."
        )
    # Those that rounding put beside the ends, as in np.linspace(-0.3, 1.3, 17).
    t = np.where(np.isclose(t, t.round(), rtol=0, atol=1e-12), t.round(), t)
    if 0 not in t or 1 not in t:
        raise ArgumentError(f"`barrier(steps=...)` must have the steps 0 and 1, the two networks; got {t.tolist()}.")
    at_first, at_second = (values[t == end][0] for end in (0, 1))
    inside = (t >= 0) & (t <= 1)
    # Where an end is infinite there is no line to rise above: NaN.
    with np.errstate(invalid="ignore"):
        return float(np.max((values - (1 - t) * at_first - t * at_second)[inside]))


def _evaluate(
    name: str, eval_fn: EvalFn, point: Callable[[np.ndarray], PyTree], axes: list[np.ndarray], report: Report | None
) -> tuple[PyTree, np.ndarray]:
    """`eval_fn(point(steps))` for all combinations of steps on the axes, and whether these are finite."""
    shape = tuple(len(axis) for axis in axes)
    if report is not None:
        report(0, math.prod(shape))
    rows, first = [], None
    for steps in itertools.product(*axes):
        found = eval_fn(point(np.array(steps)))
        leaves = jax.tree_util.tree_leaves_with_path(found)
        for path, leaf in leaves:
            errors.scalar(f"eval_fn(...){jax.tree_util.keystr(path)}", leaf)
        if not leaves:
            raise ArgumentError(f"`{name}(eval_fn=...)` must return at least one scalar; got {errors.brief(found)}.")
        first = found if first is None else first
        _check.matching_tree("eval_fn(...)", found, first, than="its first value")
        # To the host: waits for this point before the weights of the next one are made.
        rows.append([float(leaf) for _, leaf in leaves])
        if report is not None:
            report(len(rows), math.prod(shape))
    table = np.array(rows).reshape(*shape, -1)
    values = jax.tree.unflatten(jax.tree.structure(first), list(np.moveaxis(table, -1, 0)))
    return values, np.asarray(np.isfinite(table).all(-1))


@functools.partial(jax.jit, static_argnums=2)
def _filter_normalized(params: PyTree, key: jax.Array, channel_axis: int) -> PyTree:
    def normalized(z: jax.Array, w: jax.Array) -> jax.Array:
        if w.ndim < 2:
            return jnp.zeros_like(z)
        norms, lengths = (_filter_norms(x, channel_axis) for x in (w, z))
        return norms * (z / jnp.where(lengths > 0, lengths, 1))

    return jax.tree.map(normalized, _tree.random_normal(key, params), params)


def _filter_norms(x: jax.Array, channel_axis: int) -> jax.Array:
    """The norm of each filter, wide, in a shape that multiplies x; scaled, so that no square over- or underflows."""
    x = _tree.wide(x)
    axes = tuple(i for i in range(x.ndim) if i != channel_axis % x.ndim)
    peaks = jnp.max(jnp.abs(x), axes, keepdims=True, initial=0)
    scaled = x / jnp.where(peaks > 0, peaks, 1)
    return peaks * jnp.sqrt(jnp.sum(scaled**2, axes, keepdims=True))


@jax.jit
def _moved(params: PyTree, directions: tuple[PyTree, ...], steps: jax.Array) -> PyTree:
    moved = params
    for i, direction in enumerate(directions):
        moved = _tree.add(moved, direction, steps[i])
    return _tree.cast_like(moved, params)


@jax.jit
def _between(first: PyTree, second: PyTree, steps: jax.Array) -> PyTree:
    return _tree.cast_like(_tree.add(_tree.scale(1 - steps[0], first), second, steps[0]), first)


def _check_direction(argument: str, direction: PyTree, params: PyTree) -> None:
    _check.matching_tree(argument, direction, params)
    _check.floating_tree(argument, direction)


def _axis(argument: str, steps: Steps) -> np.ndarray:
    """`steps` as an array; raises unless they are finite numbers along one axis."""
    values = np.asarray(steps)
    if values.dtype.kind not in "iuf":
        raise TypeError(f"`{argument}` must be real numbers; got {errors.brief(steps)}.")
    if values.ndim != 1 or not values.size:
        raise ArgumentError(f"`{argument}` must have one axis and at least one step; got shape {values.shape}.")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ArgumentError(f"`{argument}` must be finite; got {values[~np.isfinite(values)][0]}.")
    return values
