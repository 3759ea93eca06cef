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
those of `grad_fn`, or g and d are those of another part, `compared_fn`. With `by_difference` the products are
`curvature.grad_difference`, one gradient less for each. (`jax.experimental.jet`, the other way to it, fails on a Flax
BatchNorm network in jax 0.10, with a leaked tracer.)

`PENALTIES` is the table of those that `hero` knows, `GRADIENT_L1` that of `grad_l1`.

Source: Yang et al., HERO, DAC 2022 (arXiv 2111.11986); Alizadeh et al., Gradient l1 regularization for quantization
robustness, ICLR 2020.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _autodiff, _tree, curvature

__all__ = [
    "GRADIENT_L1",
    "PENALTIES",
    "PERTURBED",
    "PRODUCTS",
    "REDUCTIONS",
    "UNPERTURBED",
    "Penalized",
    "Penalty",
    "Point",
]

PyTree = Any
GradFn = Callable[[PyTree], PyTree]
REDUCTIONS = ("mean", "sum")
PRODUCTS = ("exact", "difference")


class Point(NamedTuple):
    """Where a step stands, and how derivatives are taken there.

    params: w.
    grads: g, averaged over devices.
    perturbation: e, in float32 or wider.
    perturbed: w* = w + e, in the types of w.
    grad_fn: `params -> gradient` of this device.
    compared_fn: that of the part of the batch that g, and so e and d, is of; `grad_fn` where that is all of it.
    part_fn: that of the part of the batch that H and T are of.
    mean: the average of a tree over devices.
    diagonal: D, a Python float for each leaf.
    eigenvector: v, for the penalty that follows one; otherwise None.
    by_difference: whether products are differences of gradients.
    """

    params: PyTree
    grads: PyTree
    perturbation: PyTree
    perturbed: PyTree
    grad_fn: GradFn
    compared_fn: GradFn
    part_fn: GradFn
    mean: Callable[[PyTree], PyTree]
    diagonal: PyTree
    eigenvector: PyTree | None
    by_difference: bool = False

    def compared(self, perturbed_grads: PyTree) -> PyTree:
        """The gradient at w* of the part of the batch that g is of, given that of the whole batch."""
        is_whole = self.compared_fn is self.grad_fn
        return perturbed_grads if is_whole else self.mean(self.compared_fn(self.perturbed))

    def on_r(self, tree: PyTree) -> PyTree:
        """The leaves of R, and None in place of the others."""
        return jax.tree.map(lambda weight, x: x if weight > 0 else None, self.diagonal, tree)

    def diagonal_times(self, vector: PyTree) -> PyTree:
        """D u, wide, of a vector on R."""
        return jax.tree.map(lambda weight, x: weight * _tree.wide(x), self.on_r(self.diagonal), vector)

    def of_r(self, fn: GradFn, params: PyTree) -> GradFn:
        """`fn` of the leaves of R alone, the others constant: a tangent of zeros would be computed with."""
        return lambda on_r: fn(_tree.merge(on_r, params))

    def product(self, params: PyTree, vector: PyTree, grads: PyTree) -> PyTree:
        """What over devices averages to H(params) vector, of a vector on R.

        `grads` is the gradient there of the part that g is of.
        """
        if not self.by_difference:
            return curvature.grad_product(self.of_r(self.part_fn, params), self.on_r(params), vector)
        known = grads if self.part_fn is self.compared_fn else None
        # Zeros that wait for `grads`: what is subtracted from is then averaged at once.
        zeros = jax.tree.map(lambda x: 0.0 * _tree.wide(x), grads)
        return curvature.grad_difference(self.part_fn, params, _tree.merge(vector, zeros), known)


class Penalized(NamedTuple):
    """What a penalty gives: g*, G, grad G (wide; None for 0), and H(w*) v where an eigenvector is followed.

    compared: `Point.compared` where the penalty needed it, so that it is not evaluated once more.
    """

    perturbed_grads: PyTree
    value: jax.Array
    grads: PyTree | None
    product: PyTree | None = None
    compared: PyTree | None = None


@dataclasses.dataclass(frozen=True)
class Penalty:
    """A penalty, or none.

    at: `Point -> Penalized`.
    cost: gradients of a step with it, that of the caller included, in operations as XLA counts them.
    cost_by_difference: the same where products are differences of gradients; None where none can be.
    perturbs: whether g* is taken at w + e; otherwise there is no perturbation, and g* is g.
    follows_eigenvector: whether it needs v and gives H(w*) v.
    """

    at: Callable[[Point], Penalized]
    cost: float
    cost_by_difference: float | None = None
    perturbs: bool = True
    follows_eigenvector: bool = False

    @property
    def without(self) -> Penalty:
        """What a step without the penalty is: the perturbed gradient alone, or the gradient."""
        return PERTURBED if self.perturbs else UNPERTURBED


def _gradient(point: Point) -> Penalized:
    return Penalized(point.grads, jnp.zeros((), jnp.float32), None)


def _perturbed_gradient(point: Point) -> Penalized:
    return Penalized(point.mean(point.grad_fn(point.perturbed)), jnp.zeros((), jnp.float32), None)


def _detached(point: Point) -> Penalized:
    """grad G = 2 H(w*) D d."""
    perturbed_grads = point.mean(point.grad_fn(point.perturbed))
    compared = point.compared(perturbed_grads)
    d = _tree.subtract(point.on_r(compared), point.on_r(point.grads))
    scaled = point.diagonal_times(d)
    along, peak = _tree.peak_scaled(scaled)
    product = point.mean(point.product(point.perturbed, along, compared))
    return Penalized(perturbed_grads, _tree.dot(d, scaled), _tree.scale(2 * peak, product), compared=compared)


def _difference(point: Point) -> Penalized:
    """grad G = 2 [H(w*) - H(w)] D d."""
    perturbed_grads = point.mean(point.grad_fn(point.perturbed))
    compared = point.compared(perturbed_grads)
    d = _tree.subtract(point.on_r(compared), point.on_r(point.grads))
    scaled = point.diagonal_times(d)
    along, peak = _tree.peak_scaled(scaled)
    there, here = (
        point.product(params, along, grads)
        for params, grads in ((point.perturbed, compared), (point.params, point.grads))
    )
    change = _tree.subtract(there, here)
    grads = _tree.scale(2 * peak, point.mean(change))
    return Penalized(perturbed_grads, _tree.dot(d, scaled), grads, compared=compared)


def _hvp(point: Point) -> Penalized:
    """grad G = 2 T(w)[e, D H(w) e], the derivative of w -> H(w) e along D H(w) e."""
    along, peak = _tree.peak_scaled(point.perturbation)

    def product(params: PyTree) -> PyTree:
        return curvature.grad_product(point.part_fn, params, along)

    curved = point.on_r(_tree.scale(peak, point.mean(product(point.params))))
    scaled = point.diagonal_times(curved)
    along_curved, peak_curved = _tree.peak_scaled(scaled)
    third = curvature.grad_product(point.of_r(product, point.params), point.on_r(point.params), along_curved)
    perturbed_grads, third = point.mean((point.grad_fn(point.perturbed), third))
    return Penalized(perturbed_grads, _tree.dot(curved, scaled), _tree.scale(2 * peak * peak_curved, third))


def _eigenvalue(point: Point) -> Penalized:
    """grad G = s T(w*)[v, v]; H(w*) v and T(w*)[v, v] come from one nest of two jvps along v."""
    along, peak = _tree.peak_scaled(point.on_r(point.eigenvector))
    grad_fn = point.of_r(point.part_fn, point.perturbed)

    def product(params: PyTree) -> PyTree:
        return curvature.grad_product(grad_fn, params, along)

    curved, third = _autodiff.jvp(product, point.on_r(point.perturbed), along)
    perturbed_grads, curved, third = point.mean((point.grad_fn(point.perturbed), curved, third))
    # Multiplied by 0.0: zeros would lose the device axis that the leaf varies over.
    curved = jax.tree.map(lambda weight, x: float(weight > 0) * _tree.wide(x), point.diagonal, curved)
    curved = _tree.scale(peak, curved)
    rayleigh = _tree.dot(point.eigenvector, curved)
    grads = _tree.scale(jnp.sign(rayleigh) * peak**2, third)
    return Penalized(perturbed_grads, jnp.abs(rayleigh), grads, curved)


def _gradient_l1(point: Point) -> Penalized:
    """grad G = H(w) sign(g) on R."""
    grads = point.on_r(point.grads)
    signs = point.diagonal_times(jax.tree.map(jnp.sign, grads))
    product = point.mean(point.product(point.params, signs, point.grads))
    return Penalized(point.grads, _tree.dot(grads, signs), jax.tree.map(_tree.wide, product))


UNPERTURBED = Penalty(_gradient, cost=1, perturbs=False)
PERTURBED = Penalty(_perturbed_gradient, cost=2)
GRADIENT_L1 = Penalty(_gradient_l1, cost=3, perturbs=False)
PENALTIES = {
    "detached": Penalty(_detached, cost=4, cost_by_difference=3),
    "difference": Penalty(_difference, cost=6, cost_by_difference=4),
    "hvp": Penalty(_hvp, cost=8.5),
    "eigenvalue": Penalty(_eigenvalue, cost=6.3, follows_eigenvector=True),
}
