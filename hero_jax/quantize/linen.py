"""Steps that have to see a Linen network run: activations, batch normalisation, biases, the inputs of its layers.

Each takes `apply_fn(variables, inputs)`, evaluation mode, with variables {"params": ..., "batch_stats": ...}, and looks
at its layers: the `nn.Conv`, `nn.ConvTranspose`, `nn.Dense` and `nn.DenseGeneral` modules that it calls, those of an
attention included. It must not be compiled, and its layers not be inside `jax.jit`, `nn.scan` or `nn.remat`: that is
refused. So are layers that do not use their kernel as it is: subclasses, and layers that `nn.WeightNorm`,
`nn.SpectralNorm` or another `nn.map_variables` gives another kernel. None of the steps is done unless asked for. Needs
flax.

Every result says in `left_out` which leaves with two or more axes it does not cover, and why.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import tracers

from hero_jax import _tree, errors
from hero_jax._jax import Tracer
from hero_jax.errors import ArgumentError
from hero_jax.quantize import _activations, _grid
from hero_jax.quantize.spec import MAX_BITS, MIN_BITS

__all__ = [
    "BatchNormPair",
    "BiasCorrection",
    "Calibration",
    "activation_ranges",
    "batch_norm_pairs",
    "bias_correction",
    "fold_batch_norm",
    "input_grams",
    "quantized_activations",
    "reestimate_batch_stats",
]

PyTree = Any
Apply = Callable[[PyTree, Any], Any]
Interceptor = Callable[[nn.Module, str, Any, Any], Any]

# Layers whose outputs are linear in their kernel, which they use as it is; a subclass may standardise it.
_LINEAR = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
# Layers whose outputs are rounded.
_LAYERS = (*_LINEAR, nn.ConvLocal, nn.Einsum)
# Fields that put another arithmetic in place of a layer's own.
_ARITHMETIC = ("promote_dtype", "dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
_INSIDE = "is inside jit, nn.scan or nn.remat, where what happens to it would stay"
_NO_BATCH = "`batches` must hold at least one batch; got none."
_UNKNOWN = "not the kernel of a layer that was seen"
T = TypeVar("T")


@jax.tree_util.register_pytree_with_keys_class
class Calibration(dict[str, T], Generic[T]):
    """What was measured: a dict by path. A pytree.

    left_out: by path of a leaf with two or more axes that is not covered, why; of `batch_norm_pairs`, by path of a
      kernel with a BatchNorm after it.

    >>> Calibration({"head/kernel": 1}, {"embed/embedding": "not the kernel of a layer that was seen"})
    Calibration({'head/kernel': 1}, left_out={'embed/embedding': 'not the kernel of a layer that was seen'})
    """

    def __init__(self, results: Mapping[str, T], left_out: Mapping[str, str]) -> None:
        super().__init__(results)
        self.left_out = dict(left_out)

    def __repr__(self) -> str:
        return f"Calibration({super().__repr__()}, left_out={self.left_out})"

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        names = sorted(self)
        children = [(jax.tree_util.DictKey(name), self[name]) for name in names]
        return children, (tuple(names), tuple(self.left_out.items()))

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> Calibration[Any]:
        return cls(dict(zip(static[0], children, strict=True)), dict(static[1]))


class BatchNormPair(NamedTuple):
    """The BatchNorm that follows a layer: its path, such as "stage1_block1/bn1", and its epsilon."""

    path: str
    epsilon: float


@dataclasses.dataclass(frozen=True)
class BiasCorrection:
    """What `bias_correction` makes: a function, `quantized params -> variables`.

    left_out: by path of a leaf with two or more axes whose error stays, why.
    """

    correct: Callable[[PyTree], PyTree] = dataclasses.field(repr=False)
    left_out: dict[str, str]

    def __call__(self, quantized: PyTree) -> PyTree:
        return self.correct(quantized)


def activation_ranges(
    apply_fn: Apply,
    variables: PyTree,
    batches: Iterable[Any],
    *,
    pairs: Mapping[str, BatchNormPair] | None = None,
    inputs: bool = False,
) -> Calibration[tuple[jax.Array, jax.Array]]:
    """Measures the range of every layer's outputs over calibration batches.

    The layers are those above, subclasses included, with ConvLocal and Einsum.

    Args:
      apply_fn, variables: the network; see the top of this module.
      batches: inputs, a few hundred examples in all.
      pairs: what `batch_norm_pairs` returned, or some of it: instead of the outputs of these layers, those of the
        BatchNorm after each, by path of the BatchNorm.
      inputs: True: also the range of every layer's inputs, by path of the module and ":inputs"; not of integers.

    Returns:
      By path of the module, (lowest, highest) of its outputs, 0 included.

    Raises:
      ArgumentError: no batches, or the network calls no layer.

    Cost: one forward pass of the batches.

    Source: Jacob et al., CVPR 2018, section 3 (static ranges from calibration data).
    """
    pairs = {} if pairs is None else pairs
    norms = {pair.path for pair in pairs.values()}

    @jax.jit
    def measure(variables: PyTree, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        seen: dict[str, tuple[jax.Array, jax.Array]] = {}

        def note(key: str, values: jax.Array) -> jax.Array:
            if not jnp.issubdtype(values.dtype, jnp.floating):
                return values
            low, high = seen.get(key, (jnp.zeros(()), jnp.zeros(())))
            wide = _tree.wide(values)
            seen[key] = jnp.minimum(low, wide.min()), jnp.maximum(high, wide.max())
            return values

        def watch(module: nn.Module, path: str, given: Any, outputs: Any) -> Any:
            return outputs if path in pairs else note(path, outputs)

        before = (lambda path, given: note(path + _activations.INPUTS, given)) if inputs else None
        _watched(apply_fn, watch, variables, batch, norms=norms, before=before)
        return seen

    def merge(a: Any, b: Any) -> Any:
        return {path: (jnp.minimum(a[path][0], b[path][0]), jnp.maximum(a[path][1], b[path][1])) for path in a}

    ranges = functools.reduce(merge, _over(batches, functools.partial(measure, variables)))
    params = _flat(variables.get("params", {}))
    layers = {*ranges, *(path for path, pair in pairs.items() if pair.path in ranges)}
    covered = {_join(path, name) for path in layers for name in ("kernel", "bias")}
    return Calibration(ranges, _left_out(params, covered, {}))


def quantized_activations(
    apply_fn: Apply, ranges: Mapping[str, tuple[jax.Array, jax.Array]], bits: jax.typing.ArrayLike
) -> Apply:
    """Makes the network that rounds the outputs of its layers to 2^bits levels of a static range.

        y_hat = scale * (clip(round(y / scale + z), -L, L - 1) - z),   scale = (hi - lo) / (2^bits - 1)

    Args:
      apply_fn: the network.
      ranges: what `activation_ranges` returned, or some of it: outputs of layers and BatchNorms, and inputs of layers.
        What is not in it is left alone.
      bits: integer in 2..16, may be traced.

    Returns:
      `(variables, inputs) -> outputs`, to be given to `evaluate.classifier`, and with 8 bits to `onnx.save`.

    Cost: element-wise work beside the forward pass.
    """
    errors.integer("quantized_activations(bits=...)", bits, low=MIN_BITS, high=MAX_BITS)

    def rounded(key: str, values: jax.Array) -> jax.Array:
        if key not in ranges:
            return values
        low, high = (jnp.asarray(x).reshape((1,) * values.ndim) for x in ranges[key])
        scale, zero_point = _grid.affine(low, high, bits, _activations.SPEC)
        codes = _grid.encode(values, scale, zero_point, bits, _activations.SPEC)
        return _grid.decode(codes, scale, zero_point).astype(values.dtype)

    def before(path: str, given: jax.Array) -> jax.Array:
        return rounded(path + _activations.INPUTS, given)

    def watch(module: nn.Module, path: str, given: Any, outputs: Any) -> Any:
        return rounded(path, outputs)

    run = functools.partial(_watched, apply_fn, watch, norms=ranges, before=before)
    return _activations.Rounded(apply_fn, ranges, bits, run)


def batch_norm_pairs(apply_fn: Apply, variables: PyTree, inputs: Any) -> Calibration[BatchNormPair]:
    """Finds the layers whose output is, as it is, the input of a BatchNorm.

    Args:
      apply_fn, variables: the network; of the variables only shapes and types count.
      inputs: one batch, or its shapes (`jax.ShapeDtypeStruct`); the network is not computed.

    Returns:
      By path of the module, the BatchNorm; without modules and BatchNorms that are called more than once, layers that
      do not use their kernel as it is, and those inside `jax.jit` or `nn.remat`. `left_out` names them. A module whose
      output goes to a BatchNorm and elsewhere is not told apart: folding would change that network.

    Cost: one trace of the network.
    """
    seen = _look(apply_fn, variables, inputs)
    pairs, left_out = {}, {}
    for path, pair, why in seen.followed:
        many = [name for name in (path, pair.path) if seen.calls.count(name) > 1]
        why = why or (f"{many[0]!r} is called more than once" if many else "")
        if why:
            left_out[_join(path, "kernel")] = why
        else:
            pairs[path] = pair
    return Calibration(pairs, left_out)


def fold_batch_norm(variables: PyTree, pairs: Mapping[str, BatchNormPair]) -> PyTree:
    """Moves the factor of each BatchNorm into the kernel before it; the network in evaluation mode stays the same.

        kernel <- kernel * s,  bias <- bias * s,  s = scale / sqrt(var + epsilon)  for each entry of their last axis
        BatchNorm: scale <- 1, mean <- mean * s, var <- 1 - epsilon, its bias stays

    What is left of the BatchNorm is a shift, so that the tree keeps its structure and any `apply_fn` its code.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      pairs: what `batch_norm_pairs` returned, or some of it.

    Returns:
      The new variables.

    Raises:
      ArgumentError: a pair that is not in `variables`, two with the same BatchNorm, layers stacked by a scan.

    Source: Jacob et al., CVPR 2018, section 3.2.
    """
    params, stats = (_flat(variables.get(name, {})) for name in ("params", "batch_stats"))
    norms = [pair.path for pair in pairs.values()]
    for path, (norm, epsilon) in pairs.items():
        if norms.count(norm) > 1:
            raise ArgumentError(f"`fold_batch_norm(pairs=...)` must not name a BatchNorm twice; it does {norm!r}.")
        kernel, bias = _join(path, "kernel"), _join(path, "bias")
        for tree, key in ((params, kernel), (stats, f"{norm}/mean"), (stats, f"{norm}/var")):
            if key not in tree:
                raise ArgumentError(
                    f"`fold_batch_norm(pairs=...)` must name modules of the network; it has no {key!r}."
                )
        factor = params.get(f"{norm}/scale", 1) / jnp.sqrt(stats[f"{norm}/var"] + epsilon)
        if factor.shape != params[kernel].shape[-1:]:
            raise ArgumentError(
                f"`fold_batch_norm(pairs=...)` must name layers that are not stacked; {norm!r} has statistics of shape"
                f" {factor.shape}."
            )
        for key in (kernel, bias):
            if key in params:
                along = factor.reshape((1,) * (params[key].ndim - 1) + factor.shape)
                params[key] = (params[key] * along).astype(params[key].dtype)
        if f"{norm}/scale" in params:
            params[f"{norm}/scale"] = jnp.ones_like(params[f"{norm}/scale"])
        stats[f"{norm}/mean"] = stats[f"{norm}/mean"] * factor
        stats[f"{norm}/var"] = jnp.full_like(stats[f"{norm}/var"], 1 - epsilon)
    new = {"params": params, "batch_stats": stats}
    return {**variables, **{name: _replaced(variables[name], new[name]) for name in new if name in variables}}


def reestimate_batch_stats(
    update_fn: Callable[[PyTree, Any], PyTree], batch_stats: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Measures the statistics of BatchNorm anew, after its inputs changed.

        mean = sum_b n_b mean_b / n,   var = sum_b n_b (var_b + (mean_b - mean)^2) / n

    Args:
      update_fn: `(batch_stats, inputs) -> batch_stats` after one batch in training mode, with the weights as they are
        now: BatchNorm moves its statistics s to m s + (1 - m) batch statistic, whatever m. Give it compiled.
      batch_stats: the running statistics. Those of BatchNorm, a `mean` with a `var`, count for their structure only;
        others, such as those of `nn.SpectralNorm`, stay as they are.
      batches: inputs, a few hundred examples in all; n_b is the length of their first axis.

    Returns:
      The new statistics. Each layer's inputs are normalised by the statistics of the batch, as in training.

    Raises:
      ArgumentError: no batches; statistics that `update_fn` does not move.

    Cost: two forward passes of the first batch, one of each other.

    Source: Sun, Cao, Yang and Dong, Hybrid 8-bit floating point training, NeurIPS 2019 (re-tuning BatchNorm
    statistics); Finkelstein et al., Fighting quantization bias with bias, 2019.
    """
    given = _flat(batch_stats)
    norms = {key: key.removesuffix("mean") + "var" for key in given if key.rpartition("/")[2] == "mean"}
    norms = {mean: var for mean, var in norms.items() if var in given}
    keys = [key for pair in norms.items() for key in pair]

    def update(stats: dict[str, jax.Array], inputs: Any) -> dict[str, jax.Array]:
        moved = _flat(update_fn(_replaced(batch_stats, given | stats), inputs))
        return {key: moved[key] for key in keys}

    zeros = {key: jnp.zeros_like(given[key]) for key in keys}
    parts, sizes, keep = [], [], None
    for inputs in batches:
        moved = update(zeros, inputs)  # (1 - m) batch statistic
        if keep is None:
            # From statistics as large as what is added to them, so that nothing cancels.
            start = {key: jnp.abs(x) + 1 for key, x in moved.items()}
            again = update(start, inputs)
            keep = {key: (again[key] - moved[key]) / start[key] for key in keys}  # m
            if any(bool((m >= 1).any()) for m in keep.values()):
                raise ArgumentError("`update_fn` must move the statistics; in evaluation mode BatchNorm keeps them.")
        parts.append({key: moved[key] / (1 - keep[key]) for key in keys})
        sizes.append(jax.tree.leaves(inputs)[0].shape[0])
    if not parts:
        raise ArgumentError("`reestimate_batch_stats(batches=...)` must have at least one batch; got none.")
    fractions = [n / sum(sizes) for n in sizes]
    result = {key: sum(f * part[key] for f, part in zip(fractions, parts, strict=True)) for key in keys}
    for mean, var in norms.items():
        result[var] += sum(f * (part[mean] - result[mean]) ** 2 for f, part in zip(fractions, parts, strict=True))
    return _replaced(batch_stats, given | result)


def bias_correction(
    apply_fn: Apply,
    variables: PyTree,
    batches: Sequence[Any],
    pairs: Mapping[str, BatchNormPair] | None = None,
) -> BiasCorrection:
    """Makes a function that takes the mean error which rounding a kernel makes in a layer's outputs out of its bias.

        shift = E[f(W_hat, x) - f(W, x)]  for each entry of the bias, x the inputs at full precision
        bias <- bias - shift,   or, where the layer has none and a BatchNorm follows,   mean <- mean + shift

    The bias is that of `variables`: the (heads, head_dim) biases of an attention, which are rounded by default, lose
    their own error too.

    Args:
      apply_fn, variables: the network at full precision.
      batches: inputs, a few hundred examples in all.
      pairs: what `batch_norm_pairs` returned, for layers without a bias.

    Returns:
      `quantized params -> variables`, with these params and corrected biases or means. Layers with neither a bias nor a
      pair stay as they are; `left_out` names them.

    Raises:
      ArgumentError: no batches, no layer, one that does not use its kernel as it is, or nothing to correct.

    Cost: two forward passes of the batches for each call, which compile once.

    Source: Nagel et al., Data-free quantization through weight equalization and bias correction, ICCV 2019, section
    4.2, with the inputs of the network at full precision for all layers at once.
    """
    params = _flat(variables["params"])
    if not len(batches):
        raise ArgumentError(_NO_BATCH)
    seen = _look(apply_fn, variables, batches[0])
    layers = seen.layers
    _refuse(layers)
    biases = {path: _join(path, "bias") for path in layers if _join(path, "bias") in params}
    means = {path: f"{pair.path}/mean" for path, pair in (pairs or {}).items() if path in layers and path not in biases}
    kernels = {path: _join(path, "kernel") for path in layers if path in biases or path in means}
    bare = {_join(path, "kernel"): "its layer has no bias, and no BatchNorm in `pairs`" for path in layers}
    others = {_join(path, "kernel"): why for path, why in seen.others.items()}
    left_out = _left_out(params, {*biases.values(), *kernels.values()}, bare | others)

    @jax.jit
    def measure(variables: PyTree, change: dict[str, jax.Array], inputs: Any) -> dict[str, jax.Array]:
        seen = {}

        def watch(module: nn.Module, path: str, inputs: Any, outputs: Any) -> Any:
            if path not in kernels:
                return outputs
            error = _linear(module, change[kernels[path]], inputs)
            kept = _bias_axes(module, error.ndim)
            shift = error.sum(axis=tuple(i for i in range(error.ndim) if i not in kept))
            total, count = seen.get(path, (0, 0))
            seen[path] = total + shift, count + error.size // shift.size
            return outputs

        _watched(apply_fn, watch, variables, inputs)
        return {path: total / count for path, (total, count) in seen.items()}

    def correct(quantized: PyTree) -> PyTree:
        if not kernels:
            raise ArgumentError(
                "`bias_correction(pairs=...)` must name a BatchNorm: no Conv or Dense has its own bias."
            )
        new, stats = _flat(quantized), _flat(variables.get("batch_stats", {}))
        if missing := [key for key in kernels.values() if key not in new]:
            raise ArgumentError(f"`quantized` must have the leaves of `variables['params']`; it lacks {missing[0]}.")
        change = {key: _tree.wide(new[key]) - _tree.wide(params[key]) for key in kernels.values()}
        shifts = _mean_over(batches, functools.partial(measure, variables, change))
        for path, shift in shifts.items():
            if path in biases:
                key = biases[path]
                new[key] = (params[key] - shift).astype(new[key].dtype)
            else:
                key = means[path]
                stats[key] = (stats[key] + shift).astype(stats[key].dtype)
        trees = {"params": _replaced(quantized, new)}
        if stats:
            trees["batch_stats"] = _replaced(variables["batch_stats"], stats)
        return {**variables, **trees}

    return BiasCorrection(correct, left_out)


def input_grams(apply_fn: Apply, variables: PyTree, batches: Iterable[Any]) -> Calibration[jax.Array]:
    """Measures G = E[x x^T] of the inputs of every layer, for `rounding.optimized`.

        y = W^T x  at each position, hence  E ||(W_hat - W)^T x||^2 = tr((W_hat - W)^T G (W_hat - W))

    Args:
      apply_fn, variables: the network at full precision.
      batches: inputs, a few hundred examples in all.

    Returns:
      By path of the kernel, (g, K, K): the mean over examples and positions; K is the number of inputs of one output,
      in the order of the kernel's first axes, g the number of groups of a grouped convolution. x of a ConvTranspose has
      zeros where no input reaches. `left_out` names the leaves without: those of no layer, a ConvTranspose with
      `transpose_kernel`, a DenseGeneral with `batch_dims`.

    Raises:
      ArgumentError: no batches, no layer, a convolution with a mask, or a layer that does not use its kernel as it is.

    Cost: a forward pass with K outputs in place of each layer's own, and K^2 multiplications for each position.
    """

    first, batches = _peeked(batches)
    _refuse(_look(apply_fn, variables, first).layers)
    without: dict[str, str] = {}

    @jax.jit
    def measure(variables: PyTree, inputs: Any) -> dict[str, jax.Array]:
        seen = {}

        def watch(module: nn.Module, path: str, inputs: Any, outputs: Any) -> Any:
            if why := _no_gram(module):
                without[_join(path, "kernel")] = why
                return outputs
            if getattr(module, "mask", None) is not None:
                # It would mask the kernel that copies; and each output has inputs, and a matrix, of its own.
                raise ArgumentError(
                    f"`input_grams(apply_fn=...)` must have no {_name(module)} with a mask; {path!r} has one. Multiply"
                    " the kernel by it and leave it out."
                )
            kernel = nn.meta.unbox(module.variables["params"]["kernel"])
            groups = getattr(module, "feature_group_count", 1)
            axes = kernel.shape[: kernel.ndim - _num_output_axes(module)]
            size = math.prod(axes)
            # A kernel that copies: its outputs are the inputs of each position.
            copies = jnp.tile(jnp.eye(size).reshape(*axes, size), groups)
            x = _linear(module, copies, inputs, features=groups * size).reshape(-1, groups, size)
            total, count = seen.get(path, (0, 0))
            seen[path] = total + jnp.einsum("ngk,ngj->gkj", x, x, precision="highest"), count + x.shape[0]
            return outputs

        _watched(apply_fn, watch, variables, inputs)
        return {_join(path, "kernel"): total / count for path, (total, count) in seen.items()}

    grams = _mean_over(batches, functools.partial(measure, variables))
    return Calibration(grams, _left_out(_flat(variables["params"]), set(grams), without))


def _check_plain(apply_fn: Apply) -> None:
    if isinstance(apply_fn, jax.stages.Wrapped):
        raise TypeError("`apply_fn` must not be compiled, so that its modules are seen; give the function inside.")


class _Seen(NamedTuple):
    """What a network calls.

    layers: by path, why a layer does not use its kernel as it is, or may not; "" where it does.
    others: by path, that a layer is not supported.
    followed: of each layer with a BatchNorm after it, the path, the BatchNorm, and why it cannot be folded, or "".
    calls: the paths of layers and BatchNorms, one for each call.
    """

    layers: dict[str, str]
    others: dict[str, str]
    followed: list[tuple[str, BatchNormPair, str]]
    calls: list[str]


def _look(apply_fn: Apply, variables: PyTree, inputs: Any) -> _Seen:
    """Traces the network once, on variables of the same shapes: other numbers, which no module returns by chance."""
    _check_plain(apply_fn)
    rng = np.random.default_rng(0)

    def draw(x: Any, shape: jax.ShapeDtypeStruct, first_sign: int) -> Any:
        if not jnp.issubdtype(shape.dtype, jnp.floating):
            return x
        size = np.exp2(12 * rng.random(math.prod(shape.shape), np.float32) - 6)
        size[::2] *= first_sign
        return jnp.asarray(size.reshape(shape.shape), shape.dtype)

    shapes, drawn = jax.eval_shape(lambda: variables), {}
    for name, tree in variables.items():
        # Weights of both signs and many sizes: a module may clip them, or take their magnitude. A variance is positive.
        drawn[name] = jax.tree.map(
            functools.partial(draw, first_sign=-1 if name == "params" else 1), tree, shapes[name]
        )
    given = {name: _flat(drawn.get(name, {})) for name in ("params", "batch_stats")}
    seen = _Seen({}, {}, [], [])

    def traced(inputs: Any) -> Any:
        trace, outputs = tracers.current_trace(), []

        def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module, path = context.module, "/".join(context.module.path)
            is_norm = isinstance(module, nn.BatchNorm)
            if context.method_name != "__call__" or not (is_norm or isinstance(module, _LAYERS)):
                return next_fun(*args, **kwargs)
            seen.calls.append(path)
            why = _INSIDE if tracers.current_trace() != trace else _why_not(module, given)
            if is_norm:
                x, pair = _inputs(args, kwargs), BatchNormPair(path, module.epsilon)
                if not why and (np.atleast_1d(module.axis) % x.ndim).tolist() != [x.ndim - 1]:
                    why = "has another axis than the last"
                why = why and f"its BatchNorm {path!r} {why}"
                seen.followed.extend((name, pair, its or why) for output, name, its in outputs if output is x)
                return next_fun(*args, **kwargs)
            if isinstance(module, _LINEAR):
                seen.layers[path] = seen.layers.get(path) or why
            else:
                why = seen.others[path] = f"{_name(module)} is not supported"
            result = next_fun(*args, **kwargs)
            outputs.append((result, path, why or _is_transposed(module)))
            return result

        # What is made of the variables alone is computed, so that it can be compared.
        with nn.intercept_methods(intercept), jax.ensure_compile_time_eval():
            return apply_fn(drawn, inputs)

    # A NaN from made-up numbers says nothing.
    with jax.debug_nans(False), jax.debug_infs(False):
        jax.eval_shape(traced, inputs)
    return seen


def _why_not(module: Any, given: dict[str, dict[str, Any]]) -> str:
    """Why a layer or BatchNorm does not use its variables as they are given, or may not; "" where it does."""
    if type(module) not in (*_LAYERS, nn.BatchNorm):
        return f"is a {type(module).__name__}, which may not use its parameters as they are"
    for name in _ARITHMETIC:
        own = getattr(module, name, None)
        if own not in (getattr(type(module), name, None), jax.lax.dot_general, jax.lax.conv_general_dilated):
            return f"has a {name} of its own, which may not use its parameters as they are"
    names = {"params": ("kernel", "bias", "scale"), "batch_stats": ("mean", "var")}
    for collection, flat in given.items():
        # The scope may be that of another module as well (nn.share_scope), and have more in it.
        own = nn.meta.unbox(module.variables.get(collection, {}))
        for name in (name for name in names[collection] if name in own):
            value, key = own[name], _join("/".join(module.path), name)
            # A network may be computed in another type than that of its variables.
            if key not in flat or isinstance(value, Tracer) or not _are_equal(value, flat[key]):
                return f"has another {name!r} than `variables`: nn.WeightNorm, nn.SpectralNorm or the like changes it"
    return ""


def _are_equal(x: jax.Array, y: jax.Array) -> bool:
    return x.shape == y.shape and bool(np.array_equal(np.asarray(x), np.asarray(y).astype(x.dtype)))


def _refuse(layers: Mapping[str, str]) -> None:
    """Raises ArgumentError at a layer that does not use its kernel as it is, or that happens elsewhere."""
    for path, why in layers.items():
        if why:
            rule = "call its layers itself" if why == _INSIDE else "have layers that use their kernels as they are"
            raise ArgumentError(f"`apply_fn` must {rule}; {path!r} {why}.")


def _left_out(params: Mapping[str, Any], covered: set[str], reasons: Mapping[str, str]) -> dict[str, str]:
    """The leaves with two or more axes that are not covered, and why."""
    wide = [path for path, x in params.items() if jnp.ndim(x) >= 2 and path not in covered]
    return {path: reasons.get(path, _UNKNOWN) for path in wide}


def _flat(tree: PyTree) -> dict[str, Any]:
    """The leaves by their path, a name for `_replaced`; never taken apart, since a key may have a "/" in it."""
    leaves = [(_path(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
    flat = dict(leaves)
    if len(flat) != len(leaves):
        twice = next(path for path, _ in leaves if [name for name, _ in leaves].count(path) > 1)
        raise ArgumentError(f"`variables` must have paths that differ; two are {twice!r}.")
    return flat


def _replaced(tree: PyTree, flat: Mapping[str, Any]) -> PyTree:
    """The tree with other leaves, by path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[_path(path)], tree)


def _path(path: tuple[Any, ...]) -> str:
    # A box around a leaf (nn.Partitioned) has a key of another kind.
    return "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def _name(module: nn.Module) -> str:
    return f"nn.{type(module).__name__}"


def _num_output_axes(module: Any) -> int:
    """How many of a kernel's last axes count its outputs."""
    features = module.features if isinstance(module, nn.DenseGeneral) else ()
    return len(features) if isinstance(features, Sequence) and features else 1


def _bias_axes(module: Any, ndim: int) -> set[int]:
    """The axes of the outputs that a bias has."""
    if not module.use_bias or not isinstance(module, nn.DenseGeneral):
        return {ndim - 1}
    return {*range(_num_batch_axes(module)), *range(ndim - _num_output_axes(module), ndim)}


def _num_batch_axes(module: nn.DenseGeneral) -> int:
    return len(module.batch_dims) if isinstance(module.batch_dims, Sequence) else 1


def _is_transposed(module: Any) -> str:
    """That the last axis of a kernel does not count outputs, or ""."""
    is_so = isinstance(module, nn.ConvTranspose) and module.transpose_kernel
    return "nn.ConvTranspose with transpose_kernel: its last axis counts inputs" if is_so else ""


def _no_gram(module: Any) -> str:
    """Why no single matrix of inputs belongs to a layer's kernel, or ""."""
    if isinstance(module, nn.DenseGeneral) and _num_batch_axes(module):
        return "nn.DenseGeneral with batch_dims: each has inputs of its own"
    return _is_transposed(module) if isinstance(module, _LINEAR) else f"{_name(module)} is not supported"


def _linear(module: nn.Module, kernel: jax.Array, inputs: Any, **changes: Any) -> jax.Array:
    """What a layer without bias and with another kernel makes of the inputs, wide."""
    changes |= {"preferred_element_type": None} if isinstance(module, nn.ConvTranspose) else {}
    other: Any = module.clone(parent=None, name=None, use_bias=False, dtype=None, **changes)  # pyright: ignore
    return other.apply({"params": {"kernel": kernel}}, _tree.wide(inputs))


def _watched(
    apply_fn: Apply,
    watch: Interceptor,
    variables: PyTree,
    inputs: Any,
    *,
    norms: Container[str] = (),
    before: Callable[[str, Any], Any] | None = None,
) -> Any:
    """`apply_fn(variables, inputs)`, each layer giving `watch(module, path, inputs, outputs)` instead.

    So does each BatchNorm whose path is in `norms`. Layers are given `before(path, inputs)` in place of their inputs.
    """
    _check_plain(apply_fn)
    seen, is_watching, trace = 0, False, tracers.current_trace()

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal seen, is_watching
        module, path = context.module, "/".join(context.module.path)
        is_layer = isinstance(module, _LAYERS)
        is_meant = is_layer or (isinstance(module, nn.BatchNorm) and path in norms)
        # What `watch` calls is not watched.
        if context.method_name != "__call__" or not is_meant or is_watching:
            return next_fun(*args, **kwargs)
        if tracers.current_trace() != trace:
            _refuse({path: _INSIDE})
        if is_layer and before:
            args, kwargs = _with_inputs(args, kwargs, before(path, _inputs(args, kwargs)))
        outputs = next_fun(*args, **kwargs)
        seen, is_watching = seen + 1, True
        try:
            return watch(module, path, _inputs(args, kwargs), outputs)
        finally:
            is_watching = False

    with nn.intercept_methods(intercept):
        result = apply_fn(variables, inputs)
    if not seen:
        raise ArgumentError("`apply_fn` must be a Linen network with a Conv or a Dense inside; it called none.")
    return result


def _inputs(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs["x" if "x" in kwargs else "inputs"]


def _with_inputs(args: Any, kwargs: Any, inputs: Any) -> tuple[Any, Any]:
    """The arguments of a call with other inputs."""
    if args:
        return (inputs, *args[1:]), kwargs
    return args, {**kwargs, "x" if "x" in kwargs else "inputs": inputs}


def _join(path: str, name: str) -> str:
    """The path of a parameter; that of a network which is one layer has no folder."""
    return f"{path}/{name}" if path else name


def _over(batches: Iterable[Any], function: Callable[[Any], Any]) -> list[Any]:
    results = [function(inputs) for inputs in batches]
    if not results:
        raise ArgumentError(_NO_BATCH)
    return results


def _peeked(batches: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and all of them."""
    rest = iter(batches)
    for first in rest:
        return first, itertools.chain([first], rest)
    raise ArgumentError(_NO_BATCH)


def _mean_over(batches: Iterable[Any], function: Callable[[Any], PyTree]) -> PyTree:
    """The mean of `function(inputs)` over batches, each weighted by the number of its examples."""
    total, count = None, 0
    for inputs in batches:
        size = jax.tree.leaves(inputs)[0].shape[0]
        part = _tree.scale(size, function(inputs))
        total, count = part if total is None else _tree.add(total, part), count + size
    if total is None:
        raise ArgumentError(_NO_BATCH)
    return _tree.scale(1 / count, total)
