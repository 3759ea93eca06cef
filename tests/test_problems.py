"""The helpers of the tests fail when they should."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import problems


@pytest.mark.parametrize(
    "other",
    [
        {"a": jnp.array([1.0, 2.0 + 1e-4]), "b": jnp.ones(3)},
        {"a": jnp.array([1.0, 2.0]), "b": jnp.ones((3, 1))},
        {"a": jnp.array([1.0, jnp.nan]), "b": jnp.ones(3)},
        {"a": jnp.array([1.0, 2.0])},
    ],
)
def test_assert_close_sees_a_difference(other):
    tree = {"a": jnp.array([1.0, 2.0]), "b": jnp.ones(3)}
    problems.assert_close(tree, tree)
    with pytest.raises(AssertionError):
        problems.assert_close(other, tree, rtol=1e-5)


def test_symmetric_has_the_spectrum_that_was_asked_for():
    matrix, basis = problems.symmetric([3.0, -1.0, 0.5], seed=4)
    np.testing.assert_allclose(np.sort(np.linalg.eigvalsh(matrix)), [-1.0, 0.5, 3.0])
    np.testing.assert_allclose(matrix @ basis, basis * np.array([3.0, -1.0, 0.5]), atol=1e-12)
