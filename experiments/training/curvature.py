"""The top Hessian eigenvalue and the Hessian norm at one point, along training and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from hero_jax import spectrum
from hero_jax.curvature import Operator

PyTree = Any
# Of the Hutchinson estimate of the norm.
NORM_PROBES = 10


def measure(
    operator: Operator, keys: Sequence[jax.Array], max_products: int, *, k: int = 1, v0: PyTree = None
) -> tuple[dict[str, Any], PyTree]:
    """The eigenvalue of largest magnitude and the Frobenius norm, with their errors, as JSON values; the eigenvectors.

    Args:
      keys: of the start vectors, and of the probes of the norm.
      max_products: for the eigenvalue.
      k: eigenvectors to follow: with a second one its overtaking the first is seen.
      v0: start vectors, along a new first axis; None: random ones.
    """
    pairs = spectrum.top_eigenpairs(operator, keys[0], k=k, v0=v0, max_matvecs=max_products)
    norm = spectrum.frobenius_norm(operator, keys[1], num_probes=NORM_PROBES)
    return {
        "eigenvalue": float(pairs.eigenvalues[0]),
        "eigenvalue_residual": float(pairs.residuals[0]),
        "eigenvalue_converged": bool(pairs.converged[0]),
        "eigenvalue_products": int(pairs.num_matvecs),
        "hessian_norm": float(norm.mean),
        "hessian_norm_sem": float(norm.sem),
    }, pairs.eigenvectors
