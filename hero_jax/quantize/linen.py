"""Steps that have to see a Linen network run: activations, batch normalisation, biases, the inputs of its layers.

Each takes `apply_fn(variables, inputs)`, evaluation mode, with variables {"params": ..., "batch_stats": ...}, and looks
at the `nn.Conv` and `nn.Dense` modules that it calls. It must not be compiled, and its layers not be inside `jax.jit`,
`nn.scan` or `nn.remat`: that is refused. None of the steps is done unless asked for. Needs flax.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import tracers
from flax.traverse_util import flatten_dict, unflatten_dict

from hero_jax import _check, _tree
from hero_jax.quantize import _grid
from hero_jax.quantize.spec import MAX_BITS, MIN_BITS, QuantSpec

PyTree = Any
Apply = Callable[[PyTree, Any], Any]
Interceptor = Callable[[nn.Module, str, Any, Any], Any]

_ACTIVATIONS = QuantSpec("tensor", "full", symmetric=False)
# Layers that use their kernel as it is; a subclass may standardise it.
_PLAIN = (nn.Conv, nn.Dense)


class BatchNormPair(NamedTuple):
    """The BatchNorm that follows a layer: its path, such as "stage1_block1/bn1", and its epsilon."""

    path: str
    epsilon: float


def activation_ranges(
    apply_fn: Apply, variables: PyTree, batches: Iterable[Any]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Measures the range of every Conv and Dense output over calibration batches.

    Args:
      apply_fn, variables: the network; see the top of this module.
      batches: inputs, a few hundred examples in all.

    Returns:
      By path of the module, (lowest, highest) of its outputs, 0 included.

    Raises:
      ValueError: no batches, or the network calls no Conv and no Dense.

    Cost: one forward pass of the batches.

    Source: Jacob et al., CVPR 2018, section 3 (static ranges from calibration data).
    """

    @jax.jit
    def measure(variables: PyTree, inputs: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        seen: dict[str, tuple[jax.Array, jax.Array]] = {}

        def watch(module: nn.Module, path: str, inputs: Any, outputs: Any) -> Any:
            low, high = seen.get(path, (jnp.zeros(()), jnp.zeros(())))
            outputs_wide = _tree.wide(outputs)
            seen[path] = jnp.minimum(low, outputs_wide.min()), jnp.maximum(high, outputs_wide.max())
            return outputs

        _watched(apply_fn, watch, variables, inputs)
        return seen

    def merge(a: Any, b: Any) -> Any:
        return {path: (jnp.minimum(a[path][0], b[path][0]), jnp.maximum(a[path][1], b[path][1])) for path in a}

    return functools.reduce(merge, _over(batches, functools.partial(measure, variables)))


def quantized_activations(
    apply_fn: Apply, ranges: Mapping[str, tuple[jax.Array, jax.Array]], bits: jax.typing.ArrayLike
) -> Apply:
    """Makes the network that rounds the outputs of its Conv and Dense modules to 2^bits levels of a static range.

        y_hat = scale * (clip(round(y / scale + z), -L, L - 1) - z),   scale = (hi - lo) / (2^bits - 1)

    Args:
      apply_fn: the network.
      ranges: what `activation_ranges` returned; modules that are not in it are left alone.
      bits: integer in 2..16, may be traced.

    Returns:
      `(variables, inputs) -> outputs`, to be given to `evaluate.classifier`.

    Cost: element-wise work beside the forward pass.
    """
    _check.integer("quantized_activations(bits=...)", bits, low=MIN_BITS, high=MAX_BITS)

    def rounded(module: nn.Module, path: str, inputs: Any, outputs: Any) -> Any:
        if path not in ranges:
            return outputs
        low, high = (jnp.asarray(x).reshape((1,) * outputs.ndim) for x in ranges[path])
        scale, zero_point = _grid.affine(low, high, bits, _ACTIVATIONS)
        codes = _grid.encode(outputs, scale, zero_point, bits, _ACTIVATIONS)
        return _grid.decode(codes, scale, zero_point).astype(outputs.dtype)

    return lambda variables, inputs: _watched(apply_fn, rounded, variables, inputs)


def batch_norm_pairs(apply_fn: Apply, variables: PyTree, inputs: Any) -> dict[str, BatchNormPair]:
    """Finds the Conv and Dense modules whose output is, as it is, the input of a BatchNorm.

    Args:
      apply_fn, variables: the network.
      inputs: one batch, or its shapes (`jax.ShapeDtypeStruct`); nothing is computed.

    Returns:
      By path of the module, the BatchNorm; without modules and BatchNorms that are called more than once, and without
      subclasses of Conv and Dense, which may not use their kernel as it is. A module whose output goes to a BatchNorm
      and elsewhere is not told apart: folding would change that network.
    """
    _check_plain(apply_fn)
    found: list[tuple[str, BatchNormPair]] = []
    calls: list[str] = []
    outputs: list[tuple[Any, str]] = []

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__" or not isinstance(module, nn.BatchNorm | nn.Conv | nn.Dense):
            return next_fun(*args, **kwargs)
        calls.append(path)
        if isinstance(module, nn.BatchNorm):
            before = [name for output, name in outputs if output is _inputs(args, kwargs)]
            found.extend((name, BatchNormPair(path, module.epsilon)) for name in before)
        result = next_fun(*args, **kwargs)
        if type(module) in _PLAIN:
            outputs.append((result, path))
        return result

    with nn.intercept_methods(intercept):
        # A function of its own: jax remembers what it traced and would not call the network a second time.
        jax.eval_shape(lambda *arguments: apply_fn(*arguments), variables, inputs)
    return {name: pair for name, pair in found if calls.count(name) == calls.count(pair.path) == 1}


def fold_batch_norm(variables: PyTree, pairs: Mapping[str, BatchNormPair]) -> PyTree:
    """Moves the factor of each BatchNorm into the kernel before it; the network in evaluation mode stays the same.

        kernel <- kernel * s,  bias <- bias * s,  s = scale / sqrt(var + epsilon)  for each output channel
        BatchNorm: scale <- 1, mean <- mean * s, var <- 1 - epsilon, its bias stays

    What is left of the BatchNorm is a shift, so that the tree keeps its structure and any `apply_fn` its code.

    Args:
      variables: {"params": ..., "batch_stats": ...}.
      pairs: what `batch_norm_pairs` returned, or some of it.

    Returns:
      The new variables.

    Raises:
      ValueError: a pair that is not in `variables`, two with the same BatchNorm, layers stacked by a scan.

    Source: Jacob et al., CVPR 2018, section 3.2.
    """
    params, stats = (_flat(variables.get(name, {})) for name in ("params", "batch_stats"))
    norms = [pair.path for pair in pairs.values()]
    for path, (norm, epsilon) in pairs.items():
        if norms.count(norm) > 1:
            raise ValueError(f"`fold_batch_norm(pairs=...)` must not name a BatchNorm twice; it does {norm!r}.")
        for tree, key in ((params, f"{path}/kernel"), (stats, f"{norm}/mean"), (stats, f"{norm}/var")):
            if key not in tree:
                raise ValueError(f"`fold_batch_norm(pairs=...)` must name modules of the network; it has no {key!r}.")
        factor = params.get(f"{norm}/scale", 1) / jnp.sqrt(stats[f"{norm}/var"] + epsilon)
        if factor.shape != params[f"{path}/kernel"].shape[-1:]:
            raise ValueError(
                f"`fold_batch_norm(pairs=...)` must name layers that are not stacked; {norm!r} has statistics of shape"
                f" {factor.shape}."
            )
        for key in (f"{path}/kernel", f"{path}/bias"):
            if key in params:
                params[key] = (params[key] * factor).astype(params[key].dtype)
        if f"{norm}/scale" in params:
            params[f"{norm}/scale"] = jnp.ones_like(params[f"{norm}/scale"])
        stats[f"{norm}/mean"] = stats[f"{norm}/mean"] * factor
        stats[f"{norm}/var"] = jnp.full_like(stats[f"{norm}/var"], 1 - epsilon)
    return variables | {"params": unflatten_dict(params, sep="/"), "batch_stats": unflatten_dict(stats, sep="/")}


def reestimate_batch_stats(
    update_fn: Callable[[PyTree, Any], PyTree], batch_stats: PyTree, batches: Iterable[Any]
) -> PyTree:
    """Measures the statistics of BatchNorm anew, after its inputs changed.

        mean = sum_b n_b mean_b / n,   var = sum_b n_b (var_b + (mean_b - mean)^2) / n

    Args:
      update_fn: `(batch_stats, inputs) -> batch_stats` after one batch in training mode, with the weights as they are
        now: BatchNorm moves its statistics s to m s + (1 - m) batch statistic, whatever m. Give it compiled.
      batch_stats: the running statistics, for their structure.
      batches: inputs, a few hundred examples in all; n_b is the length of their first axis.

    Returns:
      The new statistics. Each layer's inputs are normalised by the statistics of the batch, as in training.

    Raises:
      ValueError: no batches; statistics that `update_fn` does not move.

    Cost: two forward passes of the first batch, one of each other.

    Source: Sun, Cao, Yang and Dong, Hybrid 8-bit floating point training, NeurIPS 2019 (re-tuning BatchNorm
    statistics); Finkelstein et al., Fighting quantization bias with bias, 2019.
    """
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    parts, sizes, keep = [], [], None
    for inputs in batches:
        moved = update_fn(zeros, inputs)  # (1 - m) batch statistic
        if keep is None:
            # From statistics as large as what is added to them, so that nothing cancels.
            start = jax.tree.map(lambda x: jnp.abs(x) + 1, moved)
            keep = jax.tree.map(lambda x, y, s: (x - y) / s, update_fn(start, inputs), moved, start)  # m
            if any(bool((m >= 1).any()) for m in jax.tree.leaves(keep)):
                raise ValueError("`update_fn` must move the statistics; in evaluation mode BatchNorm keeps them.")
        parts.append(jax.tree.map(lambda x, m: x / (1 - m), moved, keep))
        sizes.append(jax.tree.leaves(inputs)[0].shape[0])
    if not parts:
        raise ValueError("`reestimate_batch_stats(batches=...)` must have at least one batch; got none.")
    fractions = [n / sum(sizes) for n in sizes]
    flat = [_flat(part) for part in parts]
    result = {}
    for key in flat[0]:
        result[key] = sum(f * part[key] for f, part in zip(fractions, flat, strict=True))
    for key in [key for key in result if key.endswith("/var") or key == "var"]:
        mean = key.removesuffix("var") + "mean"
        result[key] += sum(f * (part[mean] - result[mean]) ** 2 for f, part in zip(fractions, flat, strict=True))
    return unflatten_dict(result, sep="/")


def bias_correction(
    apply_fn: Apply,
    variables: PyTree,
    batches: Sequence[Any],
    pairs: Mapping[str, BatchNormPair] | None = None,
) -> Callable[[PyTree], PyTree]:
    """Makes a function that takes the mean error which rounding a kernel makes in a layer's outputs out of its bias.

        shift = E[f(W_hat, x) - f(W, x)]  for each output channel, x the inputs at full precision
        bias <- bias - shift,   or, where the layer has none and a BatchNorm follows,   mean <- mean + shift

    Args:
      apply_fn, variables: the network at full precision.
      batches: inputs, a few hundred examples in all.
      pairs: what `batch_norm_pairs` returned, for layers without a bias.

    Returns:
      `quantized params -> variables`, with these params and corrected biases or means. Layers with neither a bias nor a
      pair stay as they are.

    Raises:
      ValueError: no batches, no Conv or Dense, one that is a subclass, or nothing that could be corrected.

    Cost: two forward passes of the batches for each call, which compile once.

    Source: Nagel et al., Data-free quantization through weight equalization and bias correction, ICCV 2019, section
    4.2, with the inputs of the network at full precision for all layers at once.
    """
    params = _flat(variables["params"])

    @jax.jit
    def measure(variables: PyTree, change: dict[str, jax.Array], inputs: Any) -> dict[str, jax.Array]:
        seen = {}

        def watch(module: nn.Module, path: str, inputs: Any, outputs: Any) -> Any:
            error = _linear(module, change[_join(path, "kernel")], inputs)
            total, count = seen.get(path, (0, 0))
            seen[path] = total + error.sum(axis=tuple(range(error.ndim - 1))), count + error[..., 0].size
            return outputs

        _watched(apply_fn, watch, variables, inputs)
        return {path: total / count for path, (total, count) in seen.items()}

    def correct(quantized: PyTree) -> PyTree:
        new = _flat(quantized)
        stats = _flat(variables.get("batch_stats", {}))
        change = {key: _tree.wide(new[key]) - _tree.wide(params[key]) for key in params if key.endswith("kernel")}
        shifts = _mean_over(batches, functools.partial(measure, variables, change))
        is_corrected = False
        for path, shift in shifts.items():
            bias, mean = _join(path, "bias"), f"{pairs[path].path}/mean" if pairs and path in pairs else None
            if bias in new:
                new[bias] = (new[bias] - shift).astype(new[bias].dtype)
            elif mean is not None:
                stats[mean] = (stats[mean] + shift).astype(stats[mean].dtype)
            is_corrected |= bias in new or mean is not None
        if not is_corrected:
            raise ValueError("`bias_correction(pairs=...)` must name a BatchNorm: no Conv or Dense has its own bias.")
        corrected = variables | {"params": unflatten_dict(new, sep="/")}
        return corrected | ({"batch_stats": unflatten_dict(stats, sep="/")} if stats else {})

    return correct


def input_grams(apply_fn: Apply, variables: PyTree, batches: Iterable[Any]) -> dict[str, jax.Array]:
    """Measures G = E[x x^T] of the inputs of every Conv and Dense, for `rounding.optimized`.

    Args:
      apply_fn, variables: the network at full precision.
      batches: inputs, a few hundred examples in all.

    Returns:
      By path of the kernel, (g, K, K): the mean over examples and positions; K is the number of inputs of one output,
      in the order of the kernel's axes, g the number of groups of a grouped convolution.

    Raises:
      ValueError: no batches, no Conv and no Dense, a Conv with a mask, or one that is a subclass.

    Cost: a forward pass with K outputs in place of each layer's own, and K^2 multiplications for each position.
    """

    @jax.jit
    def measure(variables: PyTree, inputs: Any) -> dict[str, jax.Array]:
        seen = {}

        def watch(module: nn.Module, path: str, inputs: Any, outputs: Any) -> Any:
            if getattr(module, "mask", None) is not None:
                # It would mask the kernel that copies; and each output has inputs, and a matrix, of its own.
                raise ValueError(
                    f"`input_grams(apply_fn=...)` must have no nn.Conv with a mask; {path!r} has one. Multiply the"
                    " kernel by it and leave it out."
                )
            kernel = module.variables["params"]["kernel"]
            groups = getattr(module, "feature_group_count", 1)
            size = math.prod(kernel.shape[:-1])
            # A kernel that copies: its outputs are the inputs of each position.
            copies = jnp.tile(jnp.eye(size).reshape(*kernel.shape[:-1], size), groups)
            x = _linear(module, copies, inputs).reshape(-1, groups, size)
            total, count = seen.get(path, (0, 0))
            seen[path] = total + jnp.einsum("ngk,ngj->gkj", x, x, precision="highest"), count + x.shape[0]
            return outputs

        _watched(apply_fn, watch, variables, inputs)
        return {_join(path, "kernel"): total / count for path, (total, count) in seen.items()}

    return _mean_over(batches, functools.partial(measure, variables))


def _check_plain(apply_fn: Apply) -> None:
    if isinstance(apply_fn, jax.stages.Wrapped):
        raise TypeError("`apply_fn` must not be compiled, so that its modules are seen; give the function inside.")


def _flat(tree: PyTree) -> dict[str, Any]:
    return dict(flatten_dict(tree, sep="/"))


def _linear(module: nn.Module, kernel: jax.Array, inputs: Any) -> jax.Array:
    """What a Conv or Dense without bias and with another kernel makes of the inputs, wide."""
    if type(module) not in _PLAIN:
        raise ValueError(
            f"`apply_fn` must call nn.Conv and nn.Dense themselves; {'/'.join(module.path)!r} is a"
            f" {type(module).__name__}, which may not use its kernel as it is."
        )
    other: Any = module.clone(parent=None, name=None, features=kernel.shape[-1], use_bias=False, dtype=None)  # pyright: ignore
    return other.apply({"params": {"kernel": kernel}}, _tree.wide(inputs))


def _watched(apply_fn: Apply, watch: Interceptor, variables: PyTree, inputs: Any) -> Any:
    """`apply_fn(variables, inputs)`, each Conv and Dense giving `watch(module, path, inputs, outputs)` instead."""
    _check_plain(apply_fn)
    seen, is_watching, trace = 0, False, tracers.current_trace()

    def intercept(next_fun: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal seen, is_watching
        module, path = context.module, "/".join(context.module.path)
        # What `watch` calls is not watched.
        if context.method_name != "__call__" or not isinstance(module, nn.Conv | nn.Dense) or is_watching:
            return next_fun(*args, **kwargs)
        if tracers.current_trace() != trace:
            raise ValueError(
                f"`apply_fn` must call its layers itself; {path!r} is inside jit, nn.scan or nn.remat, where what"
                " happens to it would stay."
            )
        outputs = next_fun(*args, **kwargs)
        seen, is_watching = seen + 1, True
        try:
            return watch(module, path, _inputs(args, kwargs), outputs)
        finally:
            is_watching = False

    with nn.intercept_methods(intercept):
        result = apply_fn(variables, inputs)
    if not seen:
        raise ValueError("`apply_fn` must be a Linen network with a Conv or a Dense inside; it called none.")
    return result


def _inputs(args: Any, kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _join(path: str, name: str) -> str:
    """The path of a parameter; that of a network which is one layer has no folder."""
    return f"{path}/{name}" if path else name


def _over(batches: Iterable[Any], function: Callable[[Any], Any]) -> list[Any]:
    results = [function(inputs) for inputs in batches]
    if not results:
        raise ValueError("`batches` must hold at least one batch; got none.")
    return results


def _mean_over(batches: Iterable[Any], function: Callable[[Any], PyTree]) -> PyTree:
    """The mean of `function(inputs)` over batches, each weighted by the number of its examples."""
    total, count = None, 0
    for inputs in batches:
        size = jax.tree.leaves(inputs)[0].shape[0]
        part = _tree.scale(size, function(inputs))
        total, count = part if total is None else _tree.add(total, part), count + size
    if total is None:
        raise ValueError("`batches` must hold at least one batch; got none.")
    return _tree.scale(1 / count, total)
