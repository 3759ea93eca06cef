"""The spectral density by stochastic Lanczos quadrature, with a band over its probes."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hero_jax import _check, _tree, errors
from hero_jax.operators import Operator, like_of
from hero_jax.spectrum import _basis, _krylov

__all__ = ["SpectralDensity", "spectral_density"]

PyTree = Any
# Beyond five bandwidths a Gaussian has less than 1e-6 of its mass.
MARGIN = 5


class SpectralDensity(NamedTuple):
    """How many eigenvalues are where, as a fraction of all.

    grid: (num_points,), centers of equally wide cells that cover all nodes and five bandwidths on either side.
    density: (num_points,), mean density in each cell: cell width times its sum is one.
    sem: (num_points,), the standard error of `density` over probes; infinite for a single probe. It has no part from
      the smoothing, nor from the number of Lanczos steps.
    bandwidth: the standard deviation of the Gaussians.
    nodes: (num_probes, num_steps), Ritz values; NaN where a Krylov space ended before.
    weights: (num_probes, num_steps), their quadrature weights, each row summing to one; 0 where the node is NaN.
    num_matvecs: int32, products taken.
    asymmetry: the largest over the probes, see `Eigenpairs`.
    """

    grid: jax.Array
    density: jax.Array
    sem: jax.Array
    bandwidth: jax.Array
    nodes: jax.Array
    weights: jax.Array
    num_matvecs: jax.Array
    asymmetry: jax.Array


def spectral_density(
    operator: Operator,
    key: jax.Array,
    *,
    num_probes: int = 5,
    num_steps: int = 64,
    bandwidth: float | None = None,
    num_points: int = 1024,
) -> SpectralDensity:
    """Estimates the density of eigenvalues by stochastic Lanczos quadrature.

        density(x) = mean over probes z of sum_i w_i N(x; theta_i, bandwidth^2)

    where (theta_i, w_i) is the Gauss quadrature of z / ||z|| from `num_steps` of Lanczos: exact for the moments of
    H up to order 2 num_steps - 1, given the probe.

    The default bandwidth is (theta_max - theta_min) / num_steps, about the distance of neighbouring nodes and so what
    the quadrature can resolve; outliers of the spectrum widen it. It is at least 2 num_points eps max|theta|, so that
    the points of the grid stay apart as floats (with a smaller `bandwidth` they may coincide; the density is right).
    The density is averaged over each cell of the grid (by the error function, not sampled), so that its integral is one
    whatever the bandwidth.

    Args:
      operator: a symmetric `Operator`, H; which loss, data and mean are the caller's.
      key: for the probes.
      num_probes: starts with independent random signs; two or more for a band. Static.
      num_steps: Lanczos steps a probe, the dimension where that is smaller. Static.
      bandwidth: standard deviation of the Gaussians, in units of the eigenvalues.
      num_points: cells of the grid. Static.

    Returns:
      `SpectralDensity`; all NaN where a product was.

    Raises:
      ArgumentError: an argument out of its range, or `operator` not shape-preserving.
      TypeError: an `operator` that does not know the tree it works on.

    Cost: num_probes x num_steps products; `num_steps` vectors in float32 or wider, and as many again during a step.
    Compiled and looped as `power_iteration` is.

    >>> import jax, jax.numpy as jnp
    >>> diagonal = jnp.concatenate([jnp.zeros(60), jnp.full(20, 4.0)])
    >>> result = spectral_density(Operator(lambda v: diagonal * v, diagonal), jax.random.key(0), num_steps=8)
    >>> width = result.grid[1] - result.grid[0]
    >>> round(float(result.density.sum() * width), 4), round(float((result.density * width)[result.grid > 2].sum()), 2)
    (1.0, 0.25)

    Source: Lin, Saad and Yang, Approximating spectral densities of large matrices, SIAM Review 2016; Ghorbani,
    Krishnan and Xiao, An investigation into neural net optimization via Hessian eigenvalue density, ICML 2019.
    """
    like = like_of("spectral_density(operator=...)", operator)
    _check.not_empty("spectral_density(operator=...).like", like)
    errors.integer("spectral_density(num_probes=...)", num_probes, low=1)
    errors.integer("spectral_density(num_steps=...)", num_steps, low=1)
    errors.integer("spectral_density(num_points=...)", num_points, low=2)
    if bandwidth is not None:
        errors.positive("spectral_density(bandwidth=...)", bandwidth)
    keys, packing = jax.random.split(key, num_probes), _basis.Packing.of(like)
    probes = [_quadrature(operator, _signs(key_probe, packing), num_steps) for key_probe in keys]
    nodes, weights, is_set, products, asymmetries, scales = map(jnp.stack, zip(*probes, strict=True))
    # A probe with a broken product is not one with fewer nodes.
    is_broken = ~jnp.isfinite(scales).all()
    nodes = _tree.nan_where(jnp.broadcast_to(is_broken, nodes.shape), nodes)
    lowest, highest = jnp.min(jnp.where(is_set, nodes, jnp.inf)), jnp.max(jnp.where(is_set, nodes, -jnp.inf))
    if bandwidth is None:
        eps, size = jnp.finfo(nodes.dtype).eps, jnp.maximum(jnp.abs(lowest), jnp.abs(highest))
        # Of a multiple of the identity there is no width; any will do that its size makes visible.
        is_wide = highest - lowest > _krylov.ROUNDING * eps * size
        width = jnp.where(is_wide, highest - lowest, jnp.where(size == 0, 1, size)) / num_steps
        # Cells near the spacing of floats would have centers that coincide.
        width = jnp.maximum(width, 2 * num_points * eps * size)
    else:
        width = jnp.asarray(bandwidth, nodes.dtype)
    # Relative to the middle, where floats are dense: a spectrum may be narrow and far from 0.
    middle = lowest + (highest - lowest) / 2
    margin = MARGIN * width
    edges = jnp.linspace(lowest - middle - margin, highest - middle + margin, num_points + 1)
    cells = jax.vmap(lambda nodes, weights: _cell_masses(edges, nodes - middle, weights, width))(nodes, weights)
    # Squares of masses, which have no unit, stay in range whatever the size of the eigenvalues.
    sem = jnp.std(cells, 0, ddof=1) / jnp.sqrt(num_probes) if num_probes > 1 else jnp.full(num_points, jnp.inf)
    widths = jnp.diff(edges)
    return SpectralDensity(
        grid=middle + (edges[1:] + edges[:-1]) / 2,
        density=cells.mean(0) / widths,
        sem=sem / widths,
        bandwidth=width,
        nodes=_tree.nan_where(~is_set, nodes),
        weights=weights,
        num_matvecs=products.sum(dtype=jnp.int32),
        asymmetry=asymmetries.max(),
    )


def _quadrature(operator: Operator, start: PyTree, num_steps: int) -> tuple[jax.Array, ...]:
    """Nodes and weights from one start, which are set, products taken, asymmetry, scale; the space itself is let go."""
    space = _krylov.krylov_space(operator, start, num_steps)
    ritz = _krylov.ritz_pairs(space, 0.0)
    return ritz.values, ritz.components[0] ** 2, ritz.is_set, space.num_matvecs, space.asymmetry, space.scale


@functools.partial(jax.jit, static_argnums=1)
def _signs(key: jax.Array, packing: _basis.Packing) -> PyTree:
    return _tree.random_signs(key, packing.like())


def _cell_masses(edges: jax.Array, nodes: jax.Array, weights: jax.Array, width: jax.Array) -> jax.Array:
    """The mass between neighbouring edges of Gaussians around the nodes, (num_points,)."""
    below = (edges[:-1, None] - nodes[None, :]) / width
    above = (edges[1:, None] - nodes[None, :]) / width
    # On the right of a node, 1 - small - (1 - smaller) has no digit left: mirror it.
    is_right = below > 0
    lower, upper = jnp.where(is_right, -above, below), jnp.where(is_right, -below, above)
    mass = jax.scipy.special.ndtr(upper) - jax.scipy.special.ndtr(lower)
    return jnp.sum(weights[None, :] * mass, axis=1)
