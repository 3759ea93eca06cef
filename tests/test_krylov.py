"""Several eigenpairs and Krylov spaces: matrices of prescribed spectrum, identities of Lanczos, layouts and misuse."""

import functools

import jax
import jax.numpy as jnp
import matfree.decomp
import numpy as np
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree
from jax.sharding import PartitionSpec

from hero_jax import curvature, spectrum
from hero_jax.spectrum import _basis, _krylov
from tests import problems, reference

# One dimension, one k and two basis sizes throughout: each combination of static arguments is compiled once a run.
N, K = 12, 3
REST = [2.0, 1.0, 0.5, -1.0, 0.1, -0.2, 0.3, 0.7, 0.9, -0.4]
SPECTRA = {
    "mixed": [-3.0, -1.7, 4.0, 3.1, *REST[:8]],
    "negative": [-4.0, -3.5, -3.0, -2.2, -2.0, -1.9, -1.3, -1.0, -0.8, -0.6, -0.3, -0.1],
    "tie": [3.0, -3.0, *REST],
    "cluster": [5.0, 5.0 - 1e-4, 5.0 - 1e-2, -4.0, *REST[:8]],
    "decay": [10.0 * 0.4**i * (-1) ** i for i in range(N)],
    "rank one": [5.0] + [0.0] * 11,
    "rank one, negative": [-5.0] + [0.0] * 11,
    "rank two": [-5.0, 3.0] + [0.0] * 10,
    "zero": [0.0] * N,
    "identity": [2.0] * N,
}
RANK = {"magnitude": lambda x: -np.abs(x), "largest": lambda x: -x, "smallest": lambda x: x}


def product(matrix, v):
    return matrix @ v


def dense(matrix):
    """The operator, compiled once for all matrices."""
    return jax.tree_util.Partial(product, jnp.asarray(matrix))


def wanted(eigenvalues, which, k=K):
    eigenvalues = np.asarray(eigenvalues)
    return eigenvalues[np.argsort(RANK[which](eigenvalues), kind="stable")][:k]


def solve(matrix, seed=0, **options):
    options = {"k": K, "rtol": 1e-8, **options}
    return spectrum.top_eigenpairs(
        problems.operator(dense(matrix), jnp.zeros(len(matrix))), jax.random.key(seed), **options
    )


def random_starts(count, n=N, seed=7):
    return jax.random.normal(jax.random.key(seed), (count, n))


def rows(vectors):
    """Stacked trees as the rows of a matrix."""
    return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in jax.tree.leaves(vectors)], axis=1)


def assert_residuals(result, matrix, atol=1e-13):
    """Orthonormal vectors whose residuals are those of the dense matrix, to rounding."""
    values, vectors = np.asarray(result.eigenvalues), rows(result.eigenvectors)
    size = max(np.abs(matrix).max(), 1e-300)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(vectors)), atol=atol)
    lengths = np.linalg.norm(vectors @ matrix.T - values[:, None] * vectors, axis=1)
    np.testing.assert_allclose(np.asarray(result.residuals) * np.abs(values), lengths, atol=N * atol * size)


def assert_eigenpairs(result, matrix, expected, rtol=1e-8):
    """Converged pairs of `matrix` with the `expected` eigenvalues, residuals at most `rtol` or at rounding level."""
    assert result.converged.all()
    assert result.asymmetry < 1e-13
    scale = np.abs(matrix).max()
    # The error of a Rayleigh quotient is of the order of the squared residual, except within a cluster.
    np.testing.assert_allclose(result.eigenvalues, expected, rtol=rtol, atol=1e-14 * N * scale)
    assert_residuals(result, matrix)
    lengths = np.asarray(result.residuals) * np.abs(result.eigenvalues)
    assert (lengths <= np.maximum(rtol * np.abs(expected), 1e-13 * N * scale)).all()


def test_the_check_itself_fails_on_wrong_pairs(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    result = solve(matrix)
    expected = wanted(SPECTRA["mixed"], "magnitude")
    assert_eigenpairs(result, matrix, expected)
    for wrong in (
        result._replace(eigenvalues=result.eigenvalues * (1 + 1e-6)),
        result._replace(residuals=result.residuals + 1e-6),
        result._replace(eigenvectors=result.eigenvectors.at[0, 0].add(1e-4)),
        result._replace(eigenvectors=result.eigenvectors[::-1]),
        result._replace(converged=result.converged.at[1].set(False)),
    ):
        with pytest.raises(AssertionError):
            assert_eigenpairs(wrong, matrix, expected)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("which", RANK)
@pytest.mark.parametrize("basis_size", [5, None])  # 5 restarts again and again
def test_known_spectra(x64, name, which, basis_size):
    expected = wanted(SPECTRA[name], which)
    for seed in range(3):
        matrix, _ = problems.symmetric(SPECTRA[name], seed)
        result = solve(matrix, seed, which=which, basis_size=basis_size, max_matvecs=2000)
        if name == "tie":  # +3 and -3 come in either order
            result = sorted_by(result, which)
        assert_eigenpairs(result, matrix, expected)


def sorted_by(result, which):
    order = np.lexsort((-result.eigenvalues, np.round(RANK[which](np.asarray(result.eigenvalues)), 6)))
    return result._replace(
        eigenvalues=result.eigenvalues[order],
        eigenvectors=result.eigenvectors[order],
        residuals=result.residuals[order],
    )


def test_which_names_three_ends(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    firsts = [float(solve(matrix, which=which).eigenvalues[1]) for which in RANK]
    np.testing.assert_allclose(firsts, [3.1, 3.1, -1.7])
    lasts = [float(solve(matrix, which=which).eigenvalues[2]) for which in RANK]
    np.testing.assert_allclose(lasts, [-3.0, 2.0, -1.0])


@pytest.mark.parametrize(("multiplicity", "basis_size"), [(2, 5), (3, None)])
def test_as_many_starts_as_copies_find_all_of_them(x64, multiplicity, basis_size):
    eigenvalues = [4.0] * multiplicity + [2.0, 1.0, 0.5, -0.95, 0.1, -0.2, 0.3, 0.7, 0.9, -0.4][: N - multiplicity]
    matrix, _ = problems.symmetric(eigenvalues)
    result = solve(matrix, v0=random_starts(multiplicity), basis_size=basis_size, max_matvecs=2000)
    assert_eigenpairs(result, matrix, wanted(eigenvalues, "magnitude"))
    # One start sees one copy, until it has seen the rest of the space.
    alone = solve(matrix, v0=random_starts(1))
    assert_eigenpairs(alone, matrix, [4.0, 2.0, 1.0])


@pytest.mark.parametrize("which", RANK)
def test_start_at_eigenvectors_that_are_not_wanted(x64, which):
    matrix, basis = problems.symmetric(SPECTRA["mixed"])
    expected = wanted(SPECTRA["mixed"], which)
    unwanted = [i for i, x in enumerate(SPECTRA["mixed"]) if x not in expected]
    # A smallest basis too: the confirmation must survive a restart.
    for basis_size in (5, None):
        for i in unwanted[:3]:
            start = jnp.asarray(basis[:, i])[None]
            result = solve(matrix, v0=start, which=which, basis_size=basis_size, max_matvecs=300)
            assert_eigenpairs(result, matrix, expected)


def test_one_pair_from_an_eigenvector_in_many_dimensions():
    # A random direction in n dimensions has a Rayleigh quotient of about trace / n: far below the top.
    diagonal = jnp.zeros(2000).at[0].set(1.0).at[1].set(5.0)
    start = jnp.zeros((1, 2000)).at[0, 0].set(1.0)
    operator = jax.tree_util.Partial(lambda d, v: d * v, diagonal)
    for seed in range(3):
        result = spectrum.top_eigenpairs(problems.operator(operator, diagonal), jax.random.key(seed), k=1, v0=start)
        np.testing.assert_allclose(result.eigenvalues, [5.0], rtol=1e-5)
        assert result.converged.all()


def test_all_eigenpairs(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    result = solve(matrix, k=N, which="smallest")
    assert_eigenpairs(result, matrix, np.sort(SPECTRA["mixed"]))
    assert result.num_matvecs == N


@pytest.mark.parametrize("value", [-2.5, 0.0])
def test_one_dimension(x64, value):
    result = solve(np.array([[value]]), k=1)
    assert_eigenpairs(result, np.array([[value]]), [value])
    assert result.num_matvecs == 1
    assert result.residuals == 0


@pytest.mark.parametrize("seed", range(3))
def test_residuals_before_convergence_and_the_bound_they_give(x64, seed):
    eigenvalues = np.random.default_rng(seed).standard_normal(N)
    matrix, _ = problems.symmetric(eigenvalues, seed)
    for basis_size in (5, None):
        result = solve(matrix, seed, basis_size=basis_size, max_matvecs=6)
        assert result.num_matvecs == 6
        assert not result.converged.all()
        assert_residuals(result, matrix)
        for value, residual in zip(result.eigenvalues, result.residuals, strict=True):
            assert np.abs(eigenvalues - value).min() <= residual * abs(value) * (1 + 1e-9)


def test_tolerance_stops_the_iteration(x64):
    matrix, _ = problems.symmetric(SPECTRA["decay"])
    loose, tight = (solve(matrix, rtol=rtol) for rtol in (1e-1, 1e-8))
    assert loose.num_matvecs < tight.num_matvecs
    assert loose.converged.all()
    assert (loose.residuals <= 1e-1).all()
    assert (loose.residuals > 1e-8).any()


def test_most_products_are_respected_and_counted(x64):
    matrix, calls = jnp.asarray(problems.symmetric(SPECTRA["mixed"])[0]), []

    def host_product(v):
        calls.append(1)
        return matrix @ v

    operator = curvature.HostOperator(host_product, jnp.zeros(N))
    for most in (1, 2, 7):
        calls.clear()
        result = spectrum.top_eigenpairs(operator, jax.random.key(0), k=K, max_matvecs=most, rtol=1e-8)
        assert result.num_matvecs == len(calls) == most
        assert not result.converged.all()
        # Pairs that do not exist yet say so.
        found = min(most, K)
        assert np.isfinite(result.eigenvalues[:found]).all()
        assert np.isnan(result.eigenvalues[found:]).all()
        assert not result.converged[found:].any()
        assert not (np.asarray(result.residuals[found:]) <= 1).any()


def test_counted_over_restarts(x64):
    matrix, calls = jnp.asarray(problems.symmetric(SPECTRA["mixed"])[0]), []

    def host_product(v):
        calls.append(1)
        return matrix @ v

    operator = curvature.HostOperator(host_product, jnp.zeros(N))
    result = spectrum.top_eigenpairs(operator, jax.random.key(0), k=K, basis_size=5, rtol=1e-8)
    assert result.num_matvecs == len(calls) > N


def test_follows_a_changed_matrix_in_fewer_products(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    change, _ = problems.symmetric(SPECTRA["negative"], seed=5)
    before = solve(matrix, rtol=1e-4)
    changed = matrix + 1e-4 * change
    cold = solve(changed, rtol=1e-4)
    warm = solve(changed, rtol=1e-4, v0=before.eigenvectors)
    expected = wanted(np.linalg.eigvalsh(changed), "magnitude")
    assert_eigenpairs(warm, changed, expected, rtol=1e-4)
    assert warm.num_matvecs < cold.num_matvecs


@pytest.mark.parametrize("broken_from", [0, 4])
def test_nan_product_stops_and_is_flagged(x64, broken_from):
    matrix, calls = jnp.asarray(problems.symmetric(SPECTRA["mixed"])[0]), []

    def host_product(v):
        calls.append(1)
        return matrix @ v * (jnp.nan if len(calls) > broken_from else 1)

    operator = curvature.HostOperator(host_product, jnp.zeros(N))
    result = spectrum.top_eigenpairs(operator, jax.random.key(0), k=K)
    assert result.num_matvecs == len(calls) == broken_from + 1
    assert not result.converged.any()
    assert not (result.residuals <= 1).any()
    calls.clear()
    krylov = spectrum.lanczos(operator, jnp.ones(N))
    assert krylov.num_matvecs == len(calls) == broken_from + 1
    assert not krylov.converged.any()


def test_operator_that_is_not_symmetric(x64):
    matrix = np.random.default_rng(0).standard_normal((N, N))
    for basis_size in (5, None):
        result = solve(matrix, basis_size=basis_size, rtol=1e-3)
        assert result.asymmetry > 0.1
        assert not result.converged.any()
    assert_residuals(solve(matrix), matrix)
    krylov = spectrum.lanczos(dense(matrix), jnp.ones(N), num_steps=N)
    # In the whole space it is a property of the matrix alone.
    np.testing.assert_allclose(krylov.asymmetry, np.linalg.norm(matrix - matrix.T) / np.linalg.norm(matrix), rtol=1e-9)
    assert not krylov.converged.any()


@pytest.mark.parametrize("size", [1e-5, 1e-2])
def test_residuals_over_restarts_of_an_operator_that_is_not_symmetric_are_a_bound(x64, size):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        matrix = problems.symmetric(rng.standard_normal(N), seed)[0] + size * rng.standard_normal((N, N))
        result = solve(matrix, seed, basis_size=5, max_matvecs=60, rtol=1e-12)
        values, vectors = np.asarray(result.eigenvalues), rows(result.eigenvectors)
        lengths = np.linalg.norm(vectors @ matrix.T - values[:, None] * vectors, axis=1)
        bounds = np.asarray(result.residuals) * np.abs(values)
        assert (lengths <= bounds * (1 + 1e-6)).all()
        assert (bounds <= 30 * lengths).all()


def test_operator_that_changes_from_call_to_call(x64):
    matrix, calls = jnp.asarray(problems.symmetric(SPECTRA["mixed"])[0]), []

    def host_product(v):
        calls.append(1)
        return (1 + 0.3 * (len(calls) % 2)) * (matrix @ v)

    operator = curvature.HostOperator(host_product, jnp.zeros(N))
    result = spectrum.top_eigenpairs(operator, jax.random.key(0), k=K, max_matvecs=100)
    assert result.asymmetry > 0.02
    assert not result.converged.all()


# --- trees, types, layouts ---


def tree_problem(dtype=jnp.float64):
    """A (4, 2) kernel, a vector of 3, a scalar, and a leaf that the mask leaves out: 12 entries selected."""
    params = {"kernel": jnp.ones((4, 2), dtype), "bias": [jnp.ones(3, dtype), jnp.ones((), dtype)], "norm": jnp.ones(5)}
    return curvature.restrict(params, {"kernel": True, "bias": True, "norm": False})


def tree_operator(matrix, tree):
    _, unravel = ravel_pytree(tree)
    dtype = jax.tree.leaves(tree)[0].dtype
    return jax.tree_util.Partial(
        lambda m, v: jax.tree.map(lambda x: x.astype(dtype), unravel((m @ ravel_pytree(v)[0]).astype(dtype))),
        jnp.asarray(matrix, jnp.promote_types(dtype, jnp.float32)),
    )


def test_types():
    dtype, rtol = jnp.bfloat16, 0.02
    matrix, _ = problems.symmetric(SPECTRA["mixed"], dtype=np.float32)
    params = tree_problem(dtype)
    operator = tree_operator(matrix, params)
    result = spectrum.top_eigenpairs(problems.operator(operator, params), jax.random.key(0), k=K, rtol=rtol)
    krylov = spectrum.lanczos(operator, params, num_steps=5)
    assert jax.tree.structure(krylov.eigenvectors) == jax.tree.structure(params)
    assert {x.dtype for x in jax.tree.leaves((result.eigenvectors, krylov.eigenvectors))} == {jnp.dtype(dtype)}
    for numbers in (result.eigenvalues, result.residuals, krylov.eigenvalues, krylov.components, result.asymmetry):
        assert numbers.dtype == jnp.float32
    np.testing.assert_allclose(result.eigenvalues, [4.0, 3.1, -3.0], rtol=rtol)


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_squares_that_leave_float32(size):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    result = solve(np.float32(size * matrix), basis_size=5, rtol=1e-4)
    assert result.eigenvectors.dtype == result.eigenvalues.dtype == jnp.float32
    assert result.converged.all()
    np.testing.assert_allclose(result.eigenvalues / np.float32(size), [4.0, 3.1, -3.0], rtol=1e-4)
    assert result.asymmetry < 1e-5
    krylov = spectrum.lanczos(dense(np.float32(size * matrix)), jnp.ones(N), num_steps=N)
    np.testing.assert_allclose(krylov.eigenvalues / np.float32(size), np.sort(SPECTRA["mixed"]), atol=1e-4)


def assert_same(result, expected, rtol=1e-8):
    np.testing.assert_allclose(result.eigenvalues, expected.eigenvalues, rtol=rtol)
    np.testing.assert_array_equal(result.num_matvecs, expected.num_matvecs)
    np.testing.assert_array_equal(result.converged, expected.converged)
    overlaps = np.abs(np.sum(rows(result.eigenvectors) * rows(expected.eigenvectors), axis=1))
    np.testing.assert_allclose(overlaps, 1, rtol=1e-6)


def test_vmap_under_jit_equals_the_loop_on_the_host(x64):
    matrices = jnp.asarray(np.stack([problems.symmetric(SPECTRA[name])[0] for name in ("mixed", "decay")]))
    keys = jax.random.split(jax.random.key(0))

    def run(matrix, key):
        return spectrum.top_eigenpairs(
            problems.operator(lambda v: matrix @ v, jnp.zeros(N)), key, k=K, basis_size=5, rtol=1e-6
        )

    alone = [run(*arguments) for arguments in zip(matrices, keys, strict=True)]
    assert alone[0].num_matvecs != alone[1].num_matvecs
    together = jax.jit(jax.vmap(run))(matrices, keys)
    for i in range(2):
        assert_same(jax.tree.map(lambda x, i=i: x[i], together), alone[i])


@pytest.mark.parametrize("check_vma", [True, False])
def test_operator_that_averages_over_devices(x64, check_vma):
    matrices = jnp.asarray(np.stack([problems.symmetric(SPECTRA["mixed"], seed)[0] for seed in range(4)]))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = PartitionSpec
    options = {"k": K, "basis_size": 5, "rtol": 1e-6}

    def run(matrix, key):
        def operator(v):
            return jax.lax.pmean(matrix[0] @ v, "data")

        return spectrum.top_eigenpairs(problems.operator(operator, jnp.zeros(N)), key, **options)

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec(), check_vma=check_vma)
    assert_same(jax.jit(mapped)(matrices, jax.random.key(0)), solve(matrices.mean(0), **options))


def test_partial_is_compiled_once_over_all_calls():
    traces = []

    def traced_product(matrix, v):
        traces.append(1)
        return matrix @ v

    for name in ("mixed", "decay", "tie"):
        matrix = jnp.asarray(problems.symmetric(SPECTRA[name])[0], jnp.float32)
        operator = jax.tree_util.Partial(traced_product, matrix)
        result = spectrum.top_eigenpairs(
            problems.operator(operator, jnp.zeros(N)), jax.random.key(0), k=K, basis_size=5
        )
        expected = wanted(SPECTRA[name], "magnitude")
        np.testing.assert_allclose(np.abs(result.eigenvalues), np.abs(expected), rtol=1e-3)
    assert len(traces) == 1


def test_hessian_of_a_network_on_a_tree_with_a_scalar_and_without_some_leaves(x64):
    # The selected tree has the shapes of `tree_problem`.
    params = problems.random_like(
        jax.random.key(1), {"kernel": jnp.ones((4, 2)), "bias": [jnp.ones(3), jnp.ones(())], "norm": jnp.ones(5)}
    )
    x, y = jax.random.normal(jax.random.key(2), (7, 4)), jnp.linspace(-1, 2, 7)

    def loss_fn(params, batch):
        x, y = batch
        hidden = jnp.tanh(x @ params["kernel"]) @ params["norm"][:2]
        return jnp.mean((params["bias"][1] * hidden + jnp.sin(params["bias"][0]).prod() - y) ** 2)

    mask = {"kernel": True, "bias": True, "norm": False}
    operator = curvature.hessian_operator(loss_fn, params, (x, y), mask=mask)
    kept = curvature.restrict(params, mask)
    result = spectrum.top_eigenpairs(operator, jax.random.key(0), k=K, rtol=1e-6)

    def dense_hessian(kept):
        return reference.dense_hessian(lambda p: loss_fn({**p, "norm": params["norm"]}, (x, y)), kept)

    matrix = np.asarray(jax.jit(dense_hessian)(kept))
    assert jax.tree.map(jnp.shape, result.eigenvectors) == {"kernel": (K, 4, 2), "bias": [(K, 3), (K,)], "norm": None}
    assert_eigenpairs(result, matrix, wanted(np.linalg.eigh(matrix)[0], "magnitude"), rtol=1e-6)


# --- lanczos ---


def test_quadrature_is_exact_to_twice_the_steps(x64):
    m, matrix = 5, problems.symmetric(SPECTRA["mixed"])[0]
    for seed in range(3):
        v0 = np.asarray(random_starts(1, seed=seed)[0]) * 2.5
        result = spectrum.lanczos(dense(matrix), jnp.asarray(v0), num_steps=m)
        assert result.num_matvecs == m
        np.testing.assert_allclose(np.sum(np.square(result.components)), 1, rtol=1e-13)

        def error(power, result=result, v0=v0):
            truth = v0 @ np.linalg.matrix_power(matrix, power) @ v0
            quadrature = (v0 @ v0) * np.sum(np.square(result.components) * np.asarray(result.eigenvalues) ** power)
            return abs(quadrature - truth) / (v0 @ v0 * 4.0**power)

        assert all(error(power) < 1e-13 for power in range(2 * m))
        assert error(2 * m) > 1e-6


def test_function_of_the_operator(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    v0 = np.asarray(random_starts(1)[0]) * 2.5
    for steps, rtol in ((5, 1e-2), (N, 1e-12)):
        result = spectrum.lanczos(dense(matrix), jnp.asarray(v0), num_steps=steps)
        coefficients = result.components * np.exp(result.eigenvalues)
        actual = np.linalg.norm(v0) * coefficients @ result.eigenvectors
        np.testing.assert_allclose(actual, scipy.linalg.expm(matrix) @ v0, atol=rtol * np.exp(4.0) * 10)


def test_ritz_pairs(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    result = spectrum.lanczos(dense(matrix), random_starts(1)[0], num_steps=5, rtol=0.1)
    assert (np.diff(result.eigenvalues) > 0).all()
    assert_residuals(result, matrix)
    np.testing.assert_array_equal(result.converged, result.residuals <= 0.1)
    vectors = np.asarray(result.eigenvectors)
    np.testing.assert_allclose(vectors @ matrix @ vectors.T, np.diag(result.eigenvalues), atol=1e-12)
    start = np.asarray(random_starts(1)[0])
    np.testing.assert_allclose(vectors @ start / np.linalg.norm(start), result.components, atol=1e-12)
    assert len(set(spectrum.lanczos(dense(matrix), random_starts(1)[0], num_steps=5, rtol=9.0).converged.tolist())) == 1


def test_agrees_with_matfree(x64):
    matrix, _ = problems.symmetric(SPECTRA["decay"])
    start = random_starts(1)[0]
    _, tridiagonal, *_ = matfree.decomp.tridiag_sym(5)(lambda v: jnp.asarray(matrix) @ v, start)
    result = spectrum.lanczos(dense(matrix), start, num_steps=5)
    values, vectors = np.linalg.eigh(tridiagonal)
    np.testing.assert_allclose(result.eigenvalues, values, rtol=1e-10)
    np.testing.assert_allclose(result.components**2, vectors[0] ** 2, atol=1e-12)


@pytest.mark.parametrize("dimension", [1, 3])
def test_space_that_is_invariant(x64, dimension):
    matrix, basis = problems.symmetric(SPECTRA["mixed"])
    weights = np.array([0.6, 0.0, 0.0]) if dimension == 1 else np.array([0.6, -1.1, 2.0])
    result = spectrum.lanczos(dense(matrix), jnp.asarray(basis[:, 3:6] @ weights), num_steps=5)
    assert result.num_matvecs == dimension
    order = np.argsort(SPECTRA["mixed"][3 : 3 + dimension])
    np.testing.assert_allclose(result.eigenvalues[:dimension], np.sort(SPECTRA["mixed"][3 : 3 + dimension]), rtol=1e-12)
    np.testing.assert_allclose(
        result.components[:dimension] ** 2, (weights**2 / np.sum(weights**2))[:dimension][order], rtol=1e-10
    )
    assert (result.residuals[:dimension] < 1e-12).all()
    assert result.converged[:dimension].all()
    for padding in (result.eigenvalues[dimension:], result.residuals[dimension:]):
        assert padding.shape == (5 - dimension,)
        assert np.isnan(padding).all()
    np.testing.assert_array_equal(result.components[dimension:], 0)
    np.testing.assert_array_equal(result.eigenvectors[dimension:], 0)
    assert not result.converged[dimension:].any()


def test_lanczos_on_the_zero_operator_and_the_identity(x64):
    for value in (0.0, 2.0):
        result = spectrum.lanczos(dense(value * np.eye(N)), jnp.ones(N), num_steps=5)
        assert result.num_matvecs == 1
        np.testing.assert_allclose(result.eigenvalues[0], value)
        assert result.residuals[0] < 1e-14
        assert result.converged[0]
        assert np.isnan(result.eigenvalues[1:]).all()


def test_more_steps_than_dimensions(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    result = spectrum.lanczos(dense(matrix), jnp.ones(N), num_steps=64)
    assert result.eigenvalues.shape == (N,)
    np.testing.assert_allclose(result.eigenvalues, np.sort(SPECTRA["mixed"]), rtol=1e-10)
    assert result.num_matvecs == N


def test_lanczos_under_jit_and_vmap(x64):
    matrix = jnp.asarray(problems.symmetric(SPECTRA["mixed"])[0])
    _, basis = problems.symmetric(SPECTRA["mixed"])
    starts = jnp.stack([random_starts(1)[0], jnp.asarray(basis[:, 0] + 2 * basis[:, 1])])
    run = functools.partial(spectrum.lanczos, dense(matrix), num_steps=5)
    together = jax.jit(jax.vmap(run))(starts)
    assert together.num_matvecs.tolist() == [5, 2]
    for i, start in enumerate(starts):
        alone = run(start)
        np.testing.assert_allclose(together.eigenvalues[i], alone.eigenvalues, rtol=1e-9)
        np.testing.assert_allclose(together.components[i] ** 2, alone.components**2, atol=1e-12)


# --- errors ---


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"k": 0}, ValueError, r"`top_eigenpairs\(k=...\)` must be an integer in 1..3; got 0"),
        ({"k": 4}, ValueError, r"`top_eigenpairs\(k=...\)` must be an integer in 1..3; got 4"),
        ({"k": 1.5}, TypeError, r"`top_eigenpairs\(k=...\)` must be an integer in 1..3; got 1.5"),
        ({"which": "larges"}, ValueError, r"`top_eigenpairs\(which=...\)` must be one of .* Did you mean 'largest'"),
        ({"rtol": 0.0}, ValueError, r"`top_eigenpairs\(rtol=...\)` must be positive and finite; got 0.0"),
        ({"max_matvecs": 0}, ValueError, r"`top_eigenpairs\(max_matvecs=...\)` must be an integer >= 1; got 0"),
        ({"basis_size": 2}, ValueError, r"`top_eigenpairs\(basis_size=...\)` must be an integer >= 3; got 2"),
        ({"basis_size": "all"}, TypeError, r"`top_eigenpairs\(basis_size=...\)` must be an integer >= 3; got 'all'"),
        ({"v0": jnp.ones(3)}, ValueError, r"`top_eigenpairs\(v0=...\)` must have the shapes of"),
        ({"v0": jnp.ones((2, 4))}, ValueError, r"`top_eigenpairs\(v0=...\)` must have the shapes of .*\(2, 4\)"),
        ({"v0": jnp.ones(())}, ValueError, r"`top_eigenpairs\(v0=...\)` must have the start vectors along a new first"),
        ({"v0": {"a": jnp.ones((1, 3))}}, ValueError, r"`top_eigenpairs\(v0=...\)` must have the structure of"),
        ({"operator": lambda v: v}, TypeError, r"`top_eigenpairs\(operator=...\)` must be an Operator"),
        ({"like": jnp.arange(3)}, TypeError, r"`Operator\(like=...\)` must have floating-point leaves"),
        ({"like": {}}, ValueError, r"`Operator\(like=...\)` must have at least one array"),
        ({"matvec": lambda v: v[:2]}, ValueError, r"`operator\(v\)` must have the shapes of `v`; .* it is \(2,\)"),
    ],
)
def test_errors(arguments, kind, message):
    def call(matvec=lambda v: v, like=jnp.ones(3), **options):
        operator = problems.operator(matvec, like)
        return spectrum.top_eigenpairs(**{"operator": operator, "key": jax.random.key(0), "k": 2, **options})

    with pytest.raises(kind, match=message):
        call(**arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_steps": 0}, ValueError, r"`lanczos\(num_steps=...\)` must be an integer >= 1; got 0"),
        ({"num_steps": 2.5}, TypeError, r"`lanczos\(num_steps=...\)` must be an integer >= 1; got 2.5"),
        ({"rtol": -1.0}, ValueError, r"`lanczos\(rtol=...\)` must be positive and finite; got -1.0"),
        ({"v0": jnp.zeros(3)}, ValueError, r"`lanczos\(v0=...\)` must be finite and not zero; its norm is 0.0"),
        ({"v0": jnp.array([1.0, jnp.inf])}, ValueError, r"`lanczos\(v0=...\)` must be finite and not zero"),
        ({"v0": jnp.arange(3)}, TypeError, "`v0` must have floating-point leaves"),
        ({"v0": {}}, ValueError, "`v0` must have at least one array"),
        ({"operator": lambda v: (v, v)}, ValueError, r"`operator\(v\)` must have the structure of `v`"),
    ],
)
def test_errors_of_lanczos(arguments, kind, message):
    arguments = {"operator": lambda v: v, "v0": jnp.ones(3), **arguments}
    with pytest.raises(kind, match=message):
        spectrum.lanczos(**arguments)


def test_start_vectors_that_are_no_use_are_replaced(x64):
    matrix, _ = problems.symmetric(SPECTRA["mixed"])
    good = random_starts(1)[0]
    for start in ([good, 2 * good], [jnp.zeros(N), good], [good, jnp.full(N, jnp.nan)]):
        result = solve(matrix, v0=jnp.stack(start), basis_size=5, max_matvecs=2000)
        assert_eigenpairs(result, matrix, wanted(SPECTRA["mixed"], "magnitude"))


def test_host_operator_is_refused_inside_a_trace():
    operator = curvature.HostOperator(lambda v: v, jnp.zeros(3))
    with pytest.raises(TypeError, match="A `HostOperator` runs on the host and cannot be traced"):
        jax.jit(lambda key: spectrum.top_eigenpairs(operator, key, k=1))(jax.random.key(0))


@pytest.mark.parametrize("which", RANK)
def test_an_empty_space_has_no_pairs(which):
    space = _krylov.empty(5, _basis.Packing.of(jnp.zeros(7)), jnp.ones((1, 7)))
    for found, expected in zip(_krylov.no_pairs(space, 2), _krylov.ritz_pairs(space, 1e-3, 2, which), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
