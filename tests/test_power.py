"""Power iteration on matrices of prescribed spectrum and on a network's Hessian."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import curvature, spectrum
from tests import problems, reference


def dense(matrix):
    """As a Partial, which is compiled once for all matrices of a size."""
    return jax.tree_util.Partial(jnp.matmul, jnp.asarray(matrix))


def random_start(n, seed=0):
    return jax.random.normal(jax.random.key(seed), (n,))


@pytest.mark.parametrize(
    ("eigenvalues", "dominant"),
    [
        ([4.0, 1.0, -2.0, 0.5], 4.0),
        ([1.0, -5.0, 3.0], -5.0),
        ([3.0, 3.0, 1.0], 3.0),  # a repeated eigenvalue is no tie of magnitudes
        ([0.0, 0.0, 7.0, 0.0], 7.0),  # rank one
        ([-2.5], -2.5),
        ([1e-12, 5e-12], 5e-12),
        ([1e8, 3e8, -2e8], 3e8),
    ],
)
def test_finds_the_largest_magnitude_and_keeps_its_sign(x64, eigenvalues, dominant):
    matrix, _ = problems.symmetric(eigenvalues)
    result = spectrum.power_iteration(dense(matrix), random_start(len(eigenvalues)), max_iters=2000, rtol=1e-9)
    assert result.converged
    np.testing.assert_allclose(result.eigenvalue, dominant, rtol=1e-12)
    v = np.asarray(result.eigenvector)
    np.testing.assert_allclose(np.linalg.norm(v), 1)
    measured = np.linalg.norm(matrix @ v - result.eigenvalue * v) / abs(result.eigenvalue)
    np.testing.assert_allclose(result.residual, measured, rtol=1e-3, atol=1e-15)


@pytest.mark.parametrize("seed", range(5))
def test_residual_bounds_the_distance_to_the_spectrum(x64, seed):
    eigenvalues = np.random.default_rng(seed).standard_normal(12)
    matrix, _ = problems.symmetric(eigenvalues, seed)
    result = spectrum.power_iteration(dense(matrix), random_start(12, seed), max_iters=4, rtol=1e-12)
    assert not result.converged
    distance = np.abs(eigenvalues - result.eigenvalue).min()
    assert distance <= result.residual * abs(result.eigenvalue) * (1 + 1e-10)


def test_tied_magnitudes_do_not_converge(x64):
    for start in (random_start(3), jnp.ones(3)):
        result = spectrum.power_iteration(dense(jnp.diag(jnp.array([3.0, -3.0, 1.0]))), start)
        assert not result.converged
        assert result.residual > 0.1
        assert result.num_matvecs == 100


def test_zero_operator_is_zero_and_converged():
    result = spectrum.power_iteration(lambda v: jax.tree.map(jnp.zeros_like, v), {"a": jnp.ones((2, 3))})
    assert result.eigenvalue == 0
    assert result.residual == 0
    assert result.converged
    assert result.num_matvecs == 1


def test_nan_product_stops_and_is_flagged():
    result = spectrum.power_iteration(lambda v: v * jnp.nan, jnp.ones(3))
    assert not result.converged
    assert np.isnan(result.eigenvalue)
    assert result.num_matvecs == 1


def test_counts_products_and_stops_at_the_tolerance():
    calls = []

    def matvec(v):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.array([1.0, 2.0, -5.0]) * v

    result = spectrum.power_iteration(matvec, jnp.ones(3), rtol=1e-2)
    jax.effects_barrier()
    assert result.num_matvecs == len(calls)
    assert 2 < len(calls) < 20
    assert spectrum.power_iteration(matvec, jnp.ones(3), max_iters=2).num_matvecs == 2


def test_hessian_of_a_network_on_a_tree(x64):
    params, batch = problems.convnet_params(), problems.convnet_batch()
    result = jax.jit(
        lambda v: spectrum.power_iteration(
            lambda u: curvature.hvp(problems.convnet_loss, params, u, batch), v, max_iters=3000, rtol=1e-7
        )
    )(problems.random_like(jax.random.key(0), params))
    hessian = jax.jit(lambda p: reference.dense_hessian(lambda q: problems.convnet_loss(q, batch), p))(params)
    eigenvalues, eigenvectors = np.linalg.eigh(hessian)
    top = np.argmax(np.abs(eigenvalues))
    assert result.converged
    np.testing.assert_allclose(result.eigenvalue, eigenvalues[top], rtol=1e-8)
    overlap = ravel_pytree(result.eigenvector)[0] @ eigenvectors[:, top]
    np.testing.assert_allclose(abs(overlap), 1, rtol=1e-8)
    assert jax.tree.structure(result.eigenvector) == jax.tree.structure(params)


def test_vmap_over_starts_equals_a_loop(x64):
    matrix, _ = problems.symmetric([4.0, 3.0, -2.0, 0.5])
    starts = jax.random.normal(jax.random.key(0), (3, 4))

    def run(v):
        return spectrum.power_iteration(dense(matrix), v, rtol=1e-6)

    together = jax.vmap(run)(starts)
    for i, start in enumerate(starts):
        alone = run(start)
        problems.assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, rtol=1e-9)
    assert len(set(together.num_matvecs.tolist())) > 1


def test_loop_on_the_host_and_on_the_device_agree(x64):
    matrix, _ = problems.symmetric([4.0, 3.0, -2.0, 0.5])
    start = random_start(4)

    def run(matrix, start):
        return spectrum.power_iteration(lambda v: matrix @ v, start, rtol=1e-6)

    host = run(jnp.asarray(matrix), start)
    problems.assert_close(jax.jit(run)(matrix, start), host)
    # The operator alone is traced.
    problems.assert_close(jax.jit(lambda m: run(m, start))(matrix), host)


def test_partial_is_compiled_once_over_all_calls():
    traces = []

    def product(diagonal, v):
        traces.append(1)
        return diagonal * v

    for dominant in (5.0, -7.0, 9.0):
        matvec = jax.tree_util.Partial(product, jnp.array([1.0, dominant, 2.0]))
        result = spectrum.power_iteration(matvec, jnp.ones(3), rtol=1e-4)
        np.testing.assert_allclose(result.eigenvalue, dominant, rtol=1e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_squares_that_leave_float32(size):
    result = spectrum.power_iteration(lambda v: size * jnp.array([1.0, 5.0, 2.0]) * v, jnp.ones(3))
    assert result.converged
    assert result.num_matvecs > 3
    np.testing.assert_allclose(result.eigenvalue, 5 * size, rtol=1e-5)


def test_nothing_is_kept_of_a_plain_function_after_the_call():
    kept = []
    for seed in range(3):
        matrix = jax.random.normal(jax.random.key(seed), (5, 5))
        spectrum.power_iteration(lambda v, matrix=matrix: (matrix + matrix.T) @ v, jnp.ones(5), max_iters=3)
        kept.append(weakref.ref(matrix))
        del matrix
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_operator_that_averages_over_devices(x64):
    matrices = jnp.asarray(np.stack([problems.symmetric([4.0, 3.0, -2.0, 0.5], seed)[0] for seed in range(4)]))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = jax.sharding.PartitionSpec

    def run(matrix, start):
        return spectrum.power_iteration(lambda v: jax.lax.pmean(matrix[0] @ v, "data"), start, max_iters=500, rtol=1e-6)

    result = jax.shard_map(run, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec())(matrices, random_start(4))
    expected = spectrum.power_iteration(dense(matrices.mean(0)), random_start(4), max_iters=500, rtol=1e-6)
    problems.assert_close(result, expected, rtol=1e-8)


@pytest.mark.parametrize(("dtype", "rtol"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_types(dtype, rtol):
    diagonal = jnp.array([1.0, -4.0, 2.0], dtype)
    result = spectrum.power_iteration(lambda v: diagonal * v, jnp.ones(3, dtype), rtol=max(rtol, 1e-3))
    assert result.eigenvector.dtype == dtype
    assert result.eigenvalue.dtype == jnp.float32
    np.testing.assert_allclose(result.eigenvalue, -4.0, rtol=rtol)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"max_iters": 0}, ValueError, r"`power_iteration\(max_iters=...\)` must be an integer >= 1; got 0"),
        ({"max_iters": 1.5}, TypeError, r"`power_iteration\(max_iters=...\)` must be an integer >= 1; got 1.5"),
        ({"rtol": 0.0}, ValueError, r"`power_iteration\(rtol=...\)` must be positive and finite; got 0.0"),
        ({"v0": jnp.zeros(3)}, ValueError, r"`power_iteration\(v0=...\)` must be finite and not zero; its norm is 0.0"),
        ({"v0": jnp.array([1.0, jnp.nan])}, ValueError, r"must be finite and not zero; its norm is nan"),
        ({"v0": jnp.arange(3)}, TypeError, "`v0` must have floating-point leaves"),
        ({"v0": {}}, ValueError, "`v0` must have at least one array"),
        ({"operator": lambda v: v[:2]}, ValueError, r"`operator\(v0\)` must have the shapes of `v0`; .* it is \(2,\)"),
    ],
)
def test_errors(arguments, kind, message):
    arguments = {"operator": lambda v: v, "v0": jnp.ones(3), **arguments}
    with pytest.raises(kind, match=message):
        spectrum.power_iteration(**arguments)
