"""The curvature penalties G of HERO and their exact gradients.

With g = grad L(w), e the perturbation, w* = w + e, g* = grad L(w*), d = g* - g, H the Hessian, T the third derivative,
R the penalised leaves and D the diagonal map that is 1/n_i (reduction "mean") or 1 ("sum") on leaf i of R, 0 elsewhere:

    detached      G = sum_R mean_i(d^2), g constant      grad G = 2 H(w*) D d             the authors' released code
    difference    G = sum_R mean_i(d^2)                  grad G = 2 [H(w*) - H(w)] D d
    hvp           G = sum_R mean_i((H(w) e)^2)           grad G = 2 T(w)[e, D H(w) e]
    eigenvalue    G = |v^T H(w*) v|                      grad G = s T(w*)[v, v], s = sign(v^T H(w*) v)
    gradient_l1   G = sum_R ||g||_1                      grad G = H(w) sign(g) on R       GRAD L1, with e = 0

In each of them e (and v) is constant when differentiating. Products are `jax.jvp` of the gradient function, nested once
for the third derivative, each along its vector scaled to a largest entry of 1: D d underflows in float16. `grad_fn` is
that of one device and `mean` the average over devices: what goes together is averaged together, linear combinations
after they are formed. H and T are those of `part_fn`, the same gradient or that of a part of the batch; g, g* and d are
those of `grad_fn`. (`jax.experimental.jet`, the other way to it, fails on a Flax BatchNorm network in jax 0.10,
with a leaked tracer.)

Source: Yang et al., HERO, DAC 2022 (arXiv 2111.11986); Alizadeh et al., Gradient l1 regularization for quantization
robustness, ICLR 2020.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _tree, curvature

PyTree = Any
GradFn = Callable[[PyTree], PyTree]
REDUCTIONS = ("mean", "sum")
Mean = Callable[[PyTree], PyTree]


class Point(NamedTuple):
    """Where a step stands: w, g = grad L(w), e and w* = w + e (in the types of w)."""

    params: PyTree
    grads: PyTree
    perturbation: PyTree
    perturbed: PyTree


class Penalty(NamedTuple):
    """What a penalty gives: g*, G, grad G (wide), and H(w*) v for the penalty that follows an eigenvector."""

    perturbed_grads: PyTree
    value: jax.Array
    grads: PyTree
    product: PyTree | None = None


def selection(mask: PyTree, params: PyTree, reduction: str) -> PyTree:
    """The diagonal of D, one Python float a leaf: 1/n_i or 1 where `mask` is True, 0.0 elsewhere."""

    def weight(selected: bool, x: jax.Array) -> float:
        if not selected:
            return 0.0
        return 1.0 / max(jnp.size(x), 1) if reduction == "mean" else 1.0

    return jax.tree.map(weight, mask, params)


def none(
    grad_fn: GradFn, part_fn: GradFn, mean: Mean, point: Point, diagonal: PyTree, eigenvector: PyTree | None
) -> Penalty:
    """G = 0: SAM or ASAM, at their cost of 2 gradients a step."""
    del part_fn, diagonal, eigenvector
    zeros = jax.tree.map(lambda g: jnp.zeros_like(_tree.wide(g)), point.grads)
    return Penalty(mean(grad_fn(point.perturbed)), jnp.zeros((), jnp.float32), zeros)


def unchanged(
    grad_fn: GradFn, part_fn: GradFn, mean: Mean, point: Point, diagonal: PyTree, eigenvector: PyTree | None
) -> Penalty:
    """G = 0 without perturbation: the gradient itself, at no further cost."""
    del grad_fn, part_fn, mean, diagonal, eigenvector
    zeros = jax.tree.map(lambda g: jnp.zeros_like(_tree.wide(g)), point.grads)
    return Penalty(point.grads, jnp.zeros((), jnp.float32), zeros)


def detached(
    grad_fn: GradFn, part_fn: GradFn, mean: Mean, point: Point, diagonal: PyTree, eigenvector: PyTree | None
) -> Penalty:
    """grad G = 2 H(w*) D d; 4 gradients a step with g and g*."""
    del eigenvector
    perturbed_grads = mean(grad_fn(point.perturbed))
    d = _tree.subtract(perturbed_grads, point.grads)
    scaled = _times(diagonal, d)
    product = scaled_product(part_fn, mean, point.perturbed, scaled)
    return Penalty(perturbed_grads, _tree.dot(d, scaled), _tree.scale(2.0, product))


def difference(
    grad_fn: GradFn, part_fn: GradFn, mean: Mean, point: Point, diagonal: PyTree, eigenvector: PyTree | None
) -> Penalty:
    """grad G = 2 [H(w*) - H(w)] D d; 6 gradients a step with g and g*."""
    del eigenvector
    perturbed_grads = mean(grad_fn(point.perturbed))
    d = _tree.subtract(perturbed_grads, point.grads)
    scaled = _times(diagonal, d)
    along, peak = _tree.peak_scaled(scaled)
    at_perturbed = curvature.grad_product(part_fn, point.perturbed, along)
    at_params = curvature.grad_product(part_fn, point.params, along)
    change = mean(_tree.subtract(at_perturbed, at_params))
    return Penalty(perturbed_grads, _tree.dot(d, scaled), _tree.scale(2 * peak, change))


def hvp(
    grad_fn: GradFn, part_fn: GradFn, mean: Mean, point: Point, diagonal: PyTree, eigenvector: PyTree | None
) -> Penalty:
    """grad G = 2 T(w)[e, D H(w) e], the derivative of w -> H(w) e along D H(w) e."""
    del eigenvector
    along, peak = _tree.peak_scaled(point.perturbation)

    def product(params: PyTree) -> PyTree:
        return curvature.grad_product(part_fn, params, along)

    curved = _tree.scale(peak, mean(product(point.params)))
    scaled = _times(diagonal, curved)
    along_curved, peak_curved = _tree.peak_scaled(scaled)
    third = curvature.grad_product(product, point.params, along_curved)
    perturbed_grads, third = mean((grad_fn(point.perturbed), third))
    return Penalty(perturbed_grads, _tree.dot(curved, scaled), _tree.scale(2 * peak * peak_curved, third))


def eigenvalue(
    grad_fn: GradFn, part_fn: GradFn, mean: Mean, point: Point, diagonal: PyTree, eigenvector: PyTree | None
) -> Penalty:
    """grad G = s T(w*)[v, v]; H(w*) v and T(w*)[v, v] come from one nest of two jvps along v."""
    scaled, peak = _tree.peak_scaled(eigenvector)
    along = _tree.cast_like(scaled, point.params)

    def product_fn(params: PyTree) -> PyTree:
        return curvature.grad_product(part_fn, params, along)

    product, third = jax.jvp(product_fn, (point.perturbed,), (along,))
    perturbed_grads, product, third = mean((grad_fn(point.perturbed), product, third))
    restricted = _times(jax.tree.map(lambda weight: float(weight > 0), diagonal), _tree.scale(peak, product))
    rayleigh = _tree.dot(eigenvector, restricted)
    grads = _tree.scale(jnp.sign(rayleigh) * peak**2, third)
    return Penalty(perturbed_grads, jnp.abs(rayleigh), grads, restricted)


def gradient_l1(
    grad_fn: GradFn, part_fn: GradFn, mean: Mean, point: Point, diagonal: PyTree, eigenvector: PyTree | None
) -> Penalty:
    """grad G = H(w) sign(g) on R; 3 gradients a step with g."""
    del grad_fn, eigenvector
    signs = _times(diagonal, jax.tree.map(jnp.sign, point.grads))
    product = mean(curvature.grad_product(part_fn, point.params, signs))
    return Penalty(point.grads, _tree.dot(point.grads, signs), jax.tree.map(_tree.wide, product))


PENALTIES = {"detached": detached, "difference": difference, "hvp": hvp, "eigenvalue": eigenvalue}


def scaled_product(part_fn: GradFn, mean: Mean, params: PyTree, vector: PyTree) -> PyTree:
    """H(w) u, averaged, wide: taken along u over its largest entry, and scaled back."""
    along, peak = _tree.peak_scaled(vector)
    return _tree.scale(peak, mean(curvature.grad_product(part_fn, params, along)))


def _times(diagonal: PyTree, tree: PyTree) -> PyTree:
    """D u, wide. Multiplies by 0.0 rather than making zeros, which would lose the device axis that u varies over."""
    return jax.tree.map(lambda c, x: c * _tree.wide(x), diagonal, tree)
