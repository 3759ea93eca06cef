"""The spectral density against the exact density of matrices of prescribed spectrum, smoothed alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from hero_jax import curvature, spectrum
from tests import problems

N = 20
EIGENVALUES = np.concatenate([np.linspace(-1.0, 1.3, 14), [2.0, 2.2, 2.5, 4.0, 4.1, 7.0]])
OPTIONS = {"num_probes": 10, "num_points": 60}


def product(matrix, v):
    return matrix @ v


def dense(matrix):
    return jax.tree_util.Partial(product, jnp.asarray(matrix))


def solve(matrix, seed=0, **options):
    return spectrum.spectral_density(
        problems.operator(dense(matrix), jnp.zeros(len(matrix))), jax.random.key(seed), **{**OPTIONS, **options}
    )


def width(result):
    return float(result.grid[1] - result.grid[0])


def cell_averages(grid, nodes, weights, bandwidth):
    """The mixture of Gaussians, averaged over each cell of the grid."""
    grid = np.asarray(grid, np.float64)
    edges = np.concatenate([grid, grid[-1:] + (grid[1] - grid[0])]) - (grid[1] - grid[0]) / 2
    below = scipy.special.ndtr((edges[:, None] - np.asarray(nodes)) / float(bandwidth)) @ np.asarray(weights)
    return np.diff(below) / np.diff(edges)


def exact(result, eigenvalues):
    return cell_averages(result.grid, eigenvalues, np.full(len(eigenvalues), 1 / len(eigenvalues)), result.bandwidth)


@functools.cache
def many():
    """Twenty keys with as many steps as dimensions, where a probe's quadrature is exact. (Called under x64.)"""
    matrix, _ = problems.symmetric(EIGENVALUES)
    return [solve(matrix, seed, num_steps=N, bandwidth=0.3) for seed in range(20)]


def z_scores(results, eigenvalues):
    """(keys, cells), where the exact density is not negligible."""
    truth = exact(results[0], eigenvalues)
    return np.stack([(np.asarray(r.density) - truth) / np.asarray(r.sem) for r in results])[:, truth > 0.02]


def assert_calibrated(z):
    """Student's t of 9 degrees of freedom: mean 0, mean square 9/7; cells of one key hang together."""
    assert abs(z.mean()) < 0.35
    assert 0.8 < np.mean(z**2) < 2.0
    assert np.mean(np.abs(z) < 2.26) > 0.88


def test_the_check_itself_fails_on_wrong_bands(x64):
    z = z_scores(many(), EIGENVALUES)
    assert z.shape[1] > 20
    assert_calibrated(z)
    for wrong in (z / 2, z * 1.5, z + 0.7):
        with pytest.raises(AssertionError):
            assert_calibrated(wrong)


def test_band_covers_the_exact_density(x64):
    assert_calibrated(z_scores(many(), EIGENVALUES))
    mean = np.mean([r.density for r in many()], axis=0)
    error = np.sqrt(np.mean(np.square([r.sem for r in many()]), axis=0) / len(many()))
    truth = exact(many()[0], EIGENVALUES)
    assert (np.abs(mean - truth) < 5 * error + 1e-6).all()
    assert np.abs(mean - truth).max() < 0.1 * truth.max()


def test_moments_of_the_nodes(x64):
    matrix, _ = problems.symmetric(EIGENVALUES)
    for steps in (N, 4):
        result = solve(matrix, num_steps=steps, num_probes=40)
        for power in (1, 2, 3):
            samples = np.sum(np.asarray(result.weights) * np.asarray(result.nodes) ** power, axis=1)
            assert samples.std() > 0
            error = samples.std(ddof=1) / np.sqrt(40)
            assert abs(samples.mean() - np.mean(EIGENVALUES**power)) < 4 * error
    # Smoothing keeps the mean, and adds the bandwidth's square to the second moment (and the cell's, over 12).
    cell = width(result)
    first = np.sum(result.grid * result.density) * cell
    np.testing.assert_allclose(first, np.sum(result.weights * result.nodes) / 40, atol=1e-5)
    second = np.sum(result.grid**2 * result.density) * cell
    np.testing.assert_allclose(
        second, np.sum(result.weights * result.nodes**2) / 40 + result.bandwidth**2 - cell**2 / 12, rtol=1e-2
    )


@pytest.mark.parametrize("bandwidth", [1e-6, 1e-2, 0.3, 50.0, None])
def test_integral_is_one_for_every_bandwidth(x64, bandwidth):
    result = solve(problems.symmetric(EIGENVALUES)[0], num_steps=4, bandwidth=bandwidth)
    np.testing.assert_allclose(result.density.sum() * width(result), 1, atol=1e-5)
    assert (result.density >= -1e-15).all()
    np.testing.assert_allclose(np.diff(result.grid), width(result), rtol=1e-9)
    assert result.grid.shape == result.density.shape == result.sem.shape == (60,)
    if bandwidth is not None:
        assert result.bandwidth == bandwidth
    # The grid's cells reach five bandwidths beyond the nodes.
    left, right = result.grid[0] - width(result) / 2, result.grid[-1] + width(result) / 2
    np.testing.assert_allclose(left, result.nodes.min() - 5 * result.bandwidth, rtol=1e-9)
    np.testing.assert_allclose(right, result.nodes.max() + 5 * result.bandwidth, rtol=1e-9)


def test_density_and_band_are_those_of_nodes_and_weights(x64):
    result = solve(problems.symmetric(EIGENVALUES)[0], num_steps=4)
    assert result.nodes.shape == result.weights.shape == (10, 4)
    probes = np.stack(
        [
            cell_averages(result.grid, nodes, weights, result.bandwidth)
            for nodes, weights in zip(result.nodes, result.weights, strict=True)
        ]
    )
    np.testing.assert_allclose(result.density, probes.mean(0), atol=1e-13)
    np.testing.assert_allclose(result.sem, probes.std(0, ddof=1) / np.sqrt(10), atol=1e-13)
    assert (result.sem > 1e-3).any()


def test_default_bandwidth(x64):
    matrix, _ = problems.symmetric(EIGENVALUES)
    for steps in (4, N):
        result = solve(matrix, num_steps=steps)
        np.testing.assert_allclose(result.bandwidth, (result.nodes.max() - result.nodes.min()) / steps, rtol=1e-12)


def test_each_row_of_weights_sums_to_one(x64):
    for steps in (4, N):
        result = solve(problems.symmetric(EIGENVALUES)[0], num_steps=steps)
        np.testing.assert_allclose(result.weights.sum(1), 1, rtol=1e-12)
        assert (result.weights >= 0).all()
        assert len(np.unique(np.round(result.weights[:, 0], 9))) == 10
        assert result.num_matvecs == 10 * steps
        assert result.asymmetry < 1e-14


def test_more_steps_than_dimensions(x64):
    result = solve(problems.symmetric(EIGENVALUES)[0], num_steps=64)
    assert result.nodes.shape == (10, N)
    assert result.num_matvecs == 10 * N
    np.testing.assert_allclose(result.nodes, np.tile(EIGENVALUES, (10, 1)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("eigenvalues", "dimension"),
    [
        ([0.0] * N, 1),
        ([2.5] * N, 1),
        ([-2.5] * N, 1),
        ([1e-12] * N, 1),
        ([5.0] + [0.0] * (N - 1), 2),
        ([5.0, -3.0] + [1.0] * (N - 2), 3),
    ],
)
def test_krylov_space_that_ends(x64, eigenvalues, dimension):
    matrix, _ = problems.symmetric(eigenvalues)
    result = solve(matrix, num_steps=N)
    assert np.isfinite(result.density).all()
    assert np.isfinite(result.sem).all()
    np.testing.assert_allclose(result.density.sum() * width(result), 1, atol=1e-5)
    np.testing.assert_allclose(result.weights.sum(1), 1, rtol=1e-10)
    # Rounding may take one more step, to a node without weight.
    assert 10 * dimension <= result.num_matvecs <= 10 * dimension + 5
    assert np.isnan(result.nodes[:, dimension + 1 :]).all()
    np.testing.assert_array_equal(result.weights == 0, np.isnan(result.nodes))
    distinct = np.unique(eigenvalues)
    nodes, weights = np.asarray(result.nodes), np.asarray(result.weights)
    at = [np.isclose(nodes, value, rtol=1e-9, atol=1e-12 * np.abs(distinct).max()) for value in distinct]
    np.testing.assert_allclose(weights[~np.any(at, axis=0)], 0, atol=1e-12)
    assert result.bandwidth > 0
    # The mass at each eigenvalue is its multiplicity m / N, with a variance of at most 2 min(m, N - m) / N^2 a probe.
    for i, value in enumerate(distinct):
        mass = np.sum(weights * at[i], axis=1)
        multiplicity = np.sum(np.isclose(eigenvalues, value, atol=0))
        error = np.sqrt(2 * min(multiplicity, N - multiplicity) / 10) / N
        assert abs(mass.mean() - multiplicity / N) < 4 * error + 1e-12


@pytest.mark.parametrize("spread", [3e-5, 1e-6])
@pytest.mark.parametrize("bandwidth", [None, 1e-9])
def test_spectrum_that_is_narrow_for_its_distance_from_zero(spread, bandwidth):
    diagonal = 1 + spread * jnp.linspace(0, 1, 200)
    operator = jax.tree_util.Partial(jnp.multiply, diagonal)
    options = {"num_probes": 2, "num_steps": 16, "bandwidth": bandwidth}
    result = spectrum.spectral_density(problems.operator(operator, diagonal), jax.random.key(0), **options)
    assert np.isfinite(result.density).all()
    assert np.isfinite(result.sem).all()
    if bandwidth is None:
        # The points of the grid stay apart, and their mean distance is the width of a cell.
        assert (np.diff(result.grid) > 0).all()
        cell = float(result.grid[-1] - result.grid[0]) / (len(result.grid) - 1)
        np.testing.assert_allclose(result.density.sum() * cell, 1, rtol=1e-2)


def test_one_probe_has_no_band(x64):
    result = solve(problems.symmetric(EIGENVALUES)[0], num_steps=4, num_probes=1)
    assert np.isinf(result.sem).all()
    np.testing.assert_allclose(result.density.sum() * width(result), 1, atol=1e-5)


@pytest.mark.parametrize("broken", [1, 3, 6])
def test_nan_product_is_nan_everywhere(broken):
    # The third product of the first probe, or the second of the second.
    matrix, calls = jnp.asarray(problems.symmetric(EIGENVALUES, dtype=np.float32)[0]), []

    def host_product(v):
        calls.append(1)
        return matrix @ v * (jnp.nan if len(calls) == broken else 1.0)

    operator = curvature.HostOperator(host_product, jnp.zeros(N))
    result = spectrum.spectral_density(operator, jax.random.key(0), num_probes=3, num_steps=4, num_points=60)
    assert np.isnan(result.asymmetry)
    assert np.isnan(result.density).all()
    assert np.isnan(result.sem).all()


def test_operator_that_is_not_symmetric(x64):
    matrix = np.random.default_rng(0).standard_normal((N, N))
    assert solve(matrix, num_steps=4).asymmetry > 0.1


def test_jit_and_keys(x64):
    matrix = jnp.asarray(problems.symmetric(EIGENVALUES)[0])
    options = {"num_probes": 2, "num_steps": 4, "num_points": 60}

    @jax.jit
    def run(matrix, key):
        return spectrum.spectral_density(problems.operator(lambda v: matrix @ v, jnp.zeros(N)), key, **options)

    host = solve(matrix, **options)
    device = run(matrix, jax.random.key(0))
    assert device.asymmetry < 1e-14
    problems.assert_close(device._replace(asymmetry=host.asymmetry), host, rtol=1e-9)
    other = run(matrix, jax.random.key(1))
    assert np.abs(other.density - host.density).max() > 1e-3
    assert np.abs(host.nodes[0] - host.nodes[1]).max() > 1e-3  # probes are independent


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_squares_that_leave_float32(size):
    matrix = problems.symmetric(EIGENVALUES, dtype=np.float32)[0]
    result, expected = (solve(np.float32(scale) * matrix, num_steps=4) for scale in (size, 1.0))
    assert result.density.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(result.nodes, np.float64) / size, expected.nodes, atol=1e-4)
    np.testing.assert_allclose(np.asarray(result.density, np.float64) * size, expected.density, atol=1e-3)
    np.testing.assert_allclose(np.asarray(result.sem, np.float64) * size, expected.sem, atol=1e-3)


def test_tree_in_bfloat16():
    params = {"a": jnp.zeros((4, 3), jnp.bfloat16), "b": None, "c": jnp.zeros((), jnp.bfloat16)}

    def matvec(v):
        return jax.tree.map(lambda x, s: (s * x).astype(jnp.bfloat16), v, {"a": 2.0, "b": None, "c": -1.0})

    result = spectrum.spectral_density(
        problems.operator(matvec, params), jax.random.key(0), num_probes=2, num_steps=4, num_points=60
    )
    assert result.density.dtype == jnp.float32
    np.testing.assert_allclose(result.nodes[:, :2], [[-1.0, 2.0]] * 2, rtol=1e-2)
    np.testing.assert_allclose(result.weights[:, :2], [[1 / 13, 12 / 13]] * 2, rtol=1e-2)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_probes": 0}, ValueError, r"`spectral_density\(num_probes=...\)` must be an integer >= 1; got 0"),
        ({"num_steps": 0}, ValueError, r"`spectral_density\(num_steps=...\)` must be an integer >= 1; got 0"),
        ({"num_steps": 1.5}, TypeError, r"`spectral_density\(num_steps=...\)` must be an integer >= 1; got 1.5"),
        ({"num_points": 1}, ValueError, r"`spectral_density\(num_points=...\)` must be an integer >= 2; got 1"),
        ({"bandwidth": 0.0}, ValueError, r"`spectral_density\(bandwidth=...\)` must be positive and finite; got 0.0"),
        ({"bandwidth": "wide"}, TypeError, r"`spectral_density\(bandwidth=...\)` must be a real scalar; got 'wide'"),
        ({"operator": lambda v: v}, TypeError, r"`spectral_density\(operator=...\)` must be an Operator"),
        ({"like": jnp.arange(3)}, TypeError, r"`Operator\(like=...\)` must have floating-point leaves"),
        (
            {"like": jnp.zeros((3, 0))},
            ValueError,
            r"`spectral_density\(operator=...\).like` must have at least one entry; got only empty leaves",
        ),
        ({"matvec": lambda v: v[:2]}, ValueError, r"`operator\(v\)` must have the shapes of `v`; .* it is \(2,\)"),
    ],
)
def test_errors(arguments, kind, message):
    def call(matvec=lambda v: v, like=jnp.ones(3), **options):
        operator = problems.operator(matvec, like)
        return spectrum.spectral_density(**{"operator": operator, "key": jax.random.key(0), **options})

    with pytest.raises(kind, match=message):
        call(**arguments)
