"""Averages over probes, judged by their own standard error over many keys, and by cases without any error."""

import functools

import jax
import jax.numpy as jnp
import matfree.stochtrace
import numpy as np
import pytest

from hero_jax import curvature, spectrum
from tests import problems

PARAMS = {"bias": jnp.zeros(2), "kernel": jnp.zeros((4, 3))}  # flat in this order
SLICES = {"bias": slice(0, 2), "kernel": slice(2, 14)}
ESTIMATORS = ("trace", "layer_traces", "diagonal", "frobenius_norm")
# Decaying from 60 to below 1: a few eigenvalues dominate; the signs are mixed.
DECAY = [60.0 * 0.6**i * (1 if i % 3 else -1) for i in range(14)]


def symmetric(dtype=jnp.float64):
    return jnp.asarray(problems.symmetric(DECAY, seed=3)[0], dtype)


def tree(vector):
    return {"bias": vector[:2], "kernel": vector[2:].reshape(4, 3)}


def product(matrix, v):
    return tree(matrix @ jnp.concatenate([v["bias"], v["kernel"].ravel()]))


def dense(matrix):
    return jax.tree_util.Partial(product, jnp.asarray(matrix))


def params64():
    return jax.tree.map(lambda x: jnp.zeros(x.shape), PARAMS)


def truth_of(name, matrix):
    matrix = np.asarray(matrix)
    diagonal = np.diag(matrix)
    return {
        "trace": np.trace(matrix),
        "diagonal": tree(diagonal),
        "layer_traces": {k: diagonal[s].sum() for k, s in SLICES.items()},
        "frobenius_norm": np.linalg.norm(matrix),
    }[name]


def variance_of(name, matrix):
    """Of one probe of random signs."""
    matrix = np.asarray(matrix)
    off = matrix - np.diag(np.diag(matrix))
    square = matrix @ matrix
    off_square = square - np.diag(np.diag(square))

    def form(block):
        # z_i^T (H z)_i = z^T (P H + H P) / 2 z, of variance 2 ||off-diagonal part||_F^2.
        keep = np.zeros(14)
        keep[block] = 1
        return 2 * np.sum(((keep[:, None] * off + off * keep) / 2) ** 2)

    return {
        "trace": 2 * np.sum(off**2),
        "diagonal": tree(np.sum(off**2, axis=1)),
        "layer_traces": {k: form(s) for k, s in SLICES.items()},
        # Delta method: var(x^(1/2)) = var(x) / (4 x).
        "frobenius_norm": 2 * np.sum(off_square**2) / (4 * np.sum(matrix**2)),
    }[name]


def call(estimator, matvec=lambda v: v, like=jnp.ones(3), **options):
    """With an operator and a key unless `options` have others."""
    return estimator(**{"operator": problems.operator(matvec, like), "key": jax.random.key(0), **options})


@functools.cache
def many(name, num_probes=60, **options):
    """The estimates of 300 keys. (Called under x64.)"""
    keys = jax.random.split(jax.random.key(11), 300)
    estimate = functools.partial(
        getattr(spectrum, name), problems.operator(dense(symmetric()), params64()), num_probes=num_probes
    )
    return jax.jit(jax.vmap(lambda key: estimate(key, **options)))(keys)


def assert_calibrated(result, truth):
    """z = (estimate - truth) / sem has mean 0, mean square 1 (a sem wrong by a fifth fails) and no outliers."""
    for mean, sem, true in zip(*map(jax.tree.leaves, (result.mean, result.sem, truth)), strict=True):
        z = (np.asarray(mean) - np.asarray(true)) / np.asarray(sem)
        z = z.reshape(len(z), -1)
        assert (np.abs(z.mean(0)) < 4 / np.sqrt(len(z))).all()
        assert (np.mean(z**2, 0) > 0.72).all()
        assert (np.mean(z**2, 0) < 1.38).all()
        assert (np.mean(np.abs(z) < 3, 0) > 0.97).all()


def test_the_check_itself_fails_on_wrong_errors(x64):
    result, truth = many("trace"), truth_of("trace", symmetric())
    assert_calibrated(result, truth)
    for wrong in (
        result._replace(sem=result.sem * 1.25),
        result._replace(sem=result.sem / 1.25),
        result._replace(mean=result.mean + 0.4 * result.sem),
    ):
        with pytest.raises(AssertionError):
            assert_calibrated(wrong, truth)


@pytest.mark.parametrize(
    ("name", "options"),
    [("trace", {}), ("trace", {"sketch_size": 3}), ("layer_traces", {}), ("diagonal", {}), ("frobenius_norm", {})],
)
def test_errors_are_calibrated(x64, name, options):
    result = many(name, **options)
    assert_calibrated(result, truth_of(name, symmetric()))
    assert (result.num_probes == 60).all()
    assert (result.num_matvecs == 60 + 2 * options.get("sketch_size", 0)).all()
    assert result.converged.all()  # no tolerance was given, and the mean is finite
    if not options:
        expected = jax.tree.map(lambda v: np.sqrt(v / 60), variance_of(name, symmetric()))
        for sem, closed_form in zip(jax.tree.leaves(result.sem), jax.tree.leaves(expected), strict=True):
            mean_square = np.sqrt(np.mean(np.square(sem), 0))
            np.testing.assert_allclose(mean_square, closed_form, rtol=0.06)


def test_hutch_has_the_smaller_error_for_the_same_products(x64):
    # 60 products each.
    plain, sketched = many("trace"), many("trace", num_probes=44, sketch_size=8)
    assert (plain.num_matvecs == 60).all()
    assert (sketched.num_matvecs == 60).all()
    assert np.median(sketched.sem) < 0.1 * np.median(plain.sem)
    assert_calibrated(sketched, truth_of("trace", symmetric()))


@pytest.mark.parametrize("sketch_size", [4, 14])
def test_sketch_of_the_rank_or_more_is_exact(x64, sketch_size):
    for rank in (3, 4):
        matrix, _ = problems.symmetric([5.0, -2.0, 1.0, 0.5][:rank] + [0.0] * (14 - rank))
        result = spectrum.trace(
            problems.operator(dense(matrix), params64()),
            jax.random.key(0),
            num_probes=12,
            sketch_size=sketch_size,
            rtol=1e-6,
        )
        np.testing.assert_allclose(result.mean, np.trace(matrix), rtol=1e-11)
        assert result.sem < 1e-11
        assert result.num_probes == 10
        assert result.num_matvecs == 10 + 2 * sketch_size
        assert result.converged


def test_sketch_of_the_whole_space_is_exact(x64):
    result = spectrum.trace(
        problems.operator(dense(symmetric()), params64()), jax.random.key(0), num_probes=12, sketch_size=14
    )
    np.testing.assert_allclose(result.mean, np.trace(symmetric()), rtol=1e-11)
    assert result.sem < 1e-10


@pytest.mark.parametrize("name", ESTIMATORS)
def test_diagonal_matrix_has_no_error(x64, name):
    matrix = jnp.diag(jnp.linspace(-2.0, 5.0, 14))
    estimate = functools.partial(
        getattr(spectrum, name), problems.operator(dense(matrix), params64()), jax.random.key(0)
    )
    result = estimate(num_probes=50, rtol=1e-9)
    for mean, true in zip(jax.tree.leaves(result.mean), jax.tree.leaves(truth_of(name, matrix)), strict=True):
        np.testing.assert_allclose(mean, true, rtol=1e-12)
    assert all((x < 1e-12).all() for x in jax.tree.leaves(result.sem))
    # Not before ten.
    assert result.num_probes == 10
    assert result.converged
    # Without a tolerance all are taken.
    assert estimate(num_probes=50).converged
    assert estimate(num_probes=50).num_probes == 50


@pytest.mark.parametrize("name", ESTIMATORS)
def test_tolerance_stops_early(x64, name):
    # Far from zero diagonally, so that every estimate has a small relative error.
    matrix = symmetric() + 40 * jnp.eye(14)
    estimate = functools.partial(
        getattr(spectrum, name), problems.operator(dense(matrix), params64()), jax.random.key(2)
    )

    def relative(result):
        sem, mean = (np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(t))) for t in (result.sem, result.mean))
        return sem / mean

    result = estimate(num_probes=1000, rtol=0.02)
    assert result.converged
    assert 10 < result.num_probes < 1000
    assert relative(result) <= 0.02
    # It is the first time that the tolerance was met.
    before = estimate(num_probes=int(result.num_probes) - 1, rtol=0.02)
    assert not before.converged
    assert relative(before) > 0.02
    assert before.num_probes == result.num_probes - 1
    assert not estimate(num_probes=1, rtol=0.02).converged


@pytest.mark.parametrize("name", ESTIMATORS)
def test_one_probe_has_an_infinite_error(x64, name):
    result = getattr(spectrum, name)(problems.operator(dense(symmetric()), params64()), jax.random.key(0), num_probes=1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(result.mean))
    assert all(np.isinf(x).all() for x in jax.tree.leaves(result.sem))


def test_layer_traces_add_up_to_the_trace_and_diagonals_to_layers(x64):
    results = {
        name: getattr(spectrum, name)(
            problems.operator(dense(symmetric()), params64()), jax.random.key(3), num_probes=20
        )
        for name in ("trace", "layer_traces", "diagonal")
    }
    layers = results["layer_traces"].mean
    np.testing.assert_allclose(layers["bias"] + layers["kernel"], results["trace"].mean, rtol=1e-12)
    for name, entries in results["diagonal"].mean.items():
        np.testing.assert_allclose(entries.sum(), layers[name], rtol=1e-12)
    assert layers["bias"].shape == ()
    assert results["diagonal"].sem["kernel"].shape == (4, 3)


def test_moments_are_the_three_estimates_of_the_same_probes(x64):
    options = {"num_probes": 20}
    operator = problems.operator(dense(symmetric()), params64())
    together = spectrum.moments(operator, jax.random.key(3), **options)
    for name in ("trace", "layer_traces", "frobenius_norm"):
        alone = getattr(spectrum, name)(operator, jax.random.key(3), **options)
        problems.assert_close(jax.tree.leaves(getattr(together, name)), jax.tree.leaves(alone), rtol=1e-12)
    for arguments, message in (
        ({"num_probes": 0}, r"`moments\(num_probes=...\)` must be an integer >= 1; got 0"),
        ({"like": {}}, r"`Operator\(like=...\)` must have at least one array"),
        ({"matvec": lambda v: v[:1]}, r"`operator\(z\)` must have the shapes of `z`"),
    ):
        with pytest.raises(ValueError, match=message):
            call(spectrum.moments, **arguments)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_sample_standard_deviation(x64, name):
    # The samples themselves, from the operator's side.
    probes, matrix = [], symmetric()

    def host_product(v):
        probes.append(np.concatenate([np.asarray(v["bias"]), np.asarray(v["kernel"]).ravel()]))
        return product(matrix, v)

    operator = curvature.HostOperator(host_product, params64())
    result = getattr(spectrum, name)(operator, jax.random.key(0), num_probes=15)
    z = np.stack(probes)
    assert z.shape == (15, 14)
    np.testing.assert_array_equal(np.abs(z), 1)
    assert len(np.unique(z, axis=0)) > 13
    entries = z * (z @ matrix)
    samples = {
        "trace": entries.sum(1),
        "diagonal": {"bias": entries[:, :2], "kernel": entries[:, 2:].reshape(15, 4, 3)},
        "layer_traces": {k: entries[:, s].sum(1) for k, s in SLICES.items()},
        "frobenius_norm": np.sum((z @ matrix) ** 2, 1),
    }[name]
    mean = jax.tree.map(lambda x: np.mean(x, 0), samples)
    sem = jax.tree.map(lambda x: np.std(x, 0, ddof=1) / np.sqrt(15), samples)
    if name == "frobenius_norm":
        mean, sem = np.sqrt(mean), sem / (2 * np.sqrt(mean))
    problems.assert_close(result.mean, mean, rtol=1e-12)
    problems.assert_close(result.sem, sem, rtol=1e-11)


@pytest.mark.parametrize(("name", "other"), [("trace", "trace"), ("diagonal", "diagonal")])
def test_agrees_with_matfree(x64, name, other):
    matrix = symmetric()
    sampler = matfree.stochtrace.sampler_signs(jnp.zeros(14), num=6000)
    integrand = getattr(matfree.stochtrace, f"monte_carlo_{other}")()
    estimator = matfree.stochtrace.estimator_monte_carlo_mean_and_sem(integrand, sampler)
    mean, sem = estimator(lambda v: matrix @ v, jax.random.key(1))
    ours = many(name)
    flat = np.concatenate([np.asarray(x).reshape(300, -1) for x in jax.tree.leaves(ours.mean)], axis=1)
    error = np.sqrt(np.square(sem) + np.var(flat, 0) / 300)
    assert (np.abs(flat.mean(0) - mean) < 4 * error).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_zero_operator(name):
    result = getattr(spectrum, name)(
        problems.operator(dense(jnp.zeros((14, 14))), PARAMS), jax.random.key(0), num_probes=20, rtol=0.1
    )
    assert all((x == 0).all() for x in jax.tree.leaves((result.mean, result.sem)))
    assert result.converged
    assert result.num_probes == 10


def test_zero_operator_with_a_sketch():
    result = spectrum.trace(
        problems.operator(dense(jnp.zeros((14, 14))), PARAMS), jax.random.key(0), num_probes=20, sketch_size=3
    )
    assert result.mean == result.sem == 0


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nan_product_stops_and_is_flagged(name):
    operator = problems.operator(lambda v: jax.tree.map(lambda x: x * jnp.nan, v), PARAMS)
    result = getattr(spectrum, name)(operator, jax.random.key(0), num_probes=50, rtol=0.5)
    assert result.num_probes == 1
    assert all(np.isnan(x).all() for x in jax.tree.leaves(result.mean))
    assert not result.converged


def test_nan_in_a_later_product():
    calls, matrix = [], symmetric(jnp.float32)

    def host_product(v):
        calls.append(1)
        return jax.tree.map(lambda x: x * (jnp.nan if len(calls) == 7 else 1.0), product(matrix, v))

    operator = curvature.HostOperator(host_product, PARAMS)
    for name in ESTIMATORS:
        for options in ({}, {"sketch_size": 2}) if name == "trace" else ({},):
            calls.clear()
            result = getattr(spectrum, name)(operator, jax.random.key(0), num_probes=50, rtol=0.5, **options)
            assert result.num_matvecs == len(calls) == 7
            assert all(np.isnan(x).all() for x in jax.tree.leaves((result.mean, result.sem)))
            assert not result.converged


def test_nan_in_the_sketch():
    calls, matrix = [], symmetric(jnp.float32)

    def host_product(v):
        calls.append(1)
        return jax.tree.map(lambda x: x * (jnp.nan if len(calls) == 2 else 1.0), product(matrix, v))

    operator = curvature.HostOperator(host_product, PARAMS)
    result = spectrum.trace(operator, jax.random.key(0), num_probes=20, rtol=0.5, sketch_size=3)
    assert np.isnan(result.mean)
    assert not result.converged
    assert result.num_matvecs == len(calls)


@pytest.mark.parametrize("size", [1e-24, 1e24])
def test_squares_that_leave_float32(size):
    # A squared Hessian entry under- or overflows: neither may be reported as certain.
    matrix = np.asarray(symmetric(jnp.float32))
    for name in ESTIMATORS:
        estimate = functools.partial(getattr(spectrum, name), key=jax.random.key(0), num_probes=20)
        result, expected = (estimate(problems.operator(dense(x), PARAMS)) for x in (np.float32(size) * matrix, matrix))
        for part in ("mean", "sem"):
            scaled = jax.tree.map(lambda x: np.asarray(x, np.float64) / size, getattr(result, part))
            for actual, wanted in zip(jax.tree.leaves(scaled), jax.tree.leaves(getattr(expected, part)), strict=True):
                np.testing.assert_allclose(actual, wanted, rtol=1e-3, err_msg=f"{name} {part}")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_loop_on_the_host_and_on_the_device_agree(x64, name):
    key = jax.random.split(jax.random.key(11), 300)[0]
    host = getattr(spectrum, name)(problems.operator(dense(symmetric()), params64()), key, num_probes=60)
    device = jax.tree.map(lambda x: x[0], many(name))
    problems.assert_close(jax.tree.leaves(device), jax.tree.leaves(host), rtol=1e-9)


def test_keys_differ_and_repeat():
    matrix = dense(symmetric(jnp.float32))
    first, again, other = (
        spectrum.trace(problems.operator(matrix, PARAMS), jax.random.key(i), num_probes=12).mean for i in (0, 0, 1)
    )
    assert first == again != other


def test_types_and_masked_trees():
    params = curvature.restrict(
        {"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(2), "s": jnp.ones((), jnp.bfloat16)},
        {"w": True, "b": False, "s": True},
    )

    def matvec(v):
        assert v["b"] is None
        return {"w": 2 * v["w"], "b": None, "s": -3 * v["s"]}

    operator = problems.operator(matvec, params)
    for name in ESTIMATORS:
        result = getattr(spectrum, name)(operator, jax.random.key(0), num_probes=10)
        assert {x.dtype for x in jax.tree.leaves((result.mean, result.sem))} == {jnp.dtype(jnp.float32)}
    layers = spectrum.layer_traces(operator, jax.random.key(0), num_probes=10).mean
    assert layers == {"w": 24.0, "b": None, "s": -3.0}
    np.testing.assert_array_equal(spectrum.trace(operator, jax.random.key(0), num_probes=10).mean, 21.0)


@pytest.mark.parametrize("check_vma", [True, False])
def test_operator_that_averages_over_devices(x64, check_vma):
    matrices = jnp.stack([symmetric() * (1 + i) for i in range(4)])
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = jax.sharding.PartitionSpec

    def run(matrix, key):
        def operator(v):
            return jax.lax.pmean(product(matrix[0], v), "data")

        return spectrum.trace(problems.operator(operator, params64()), key, num_probes=12, sketch_size=3)

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(spec("data"), spec()), out_specs=spec(), check_vma=check_vma)
    expected = spectrum.trace(
        problems.operator(dense(2.5 * symmetric()), params64()), jax.random.key(0), num_probes=12, sketch_size=3
    )
    problems.assert_close(jax.jit(mapped)(matrices, jax.random.key(0)), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"num_probes": 0}, ValueError, r"`{}\(num_probes=...\)` must be an integer >= 1; got 0"),
        ({"num_probes": 2.5}, TypeError, r"`{}\(num_probes=...\)` must be an integer >= 1; got 2.5"),
        ({"rtol": -0.1}, ValueError, r"`{}\(rtol=...\)` must be non-negative and finite; got -0.1"),
        ({"rtol": "0.1"}, TypeError, r"`{}\(rtol=...\)` must be a real scalar; got '0.1'"),
        ({"rtol": lambda count: 0.1}, TypeError, r"`{}\(rtol=...\)` must be a real scalar"),
        ({"operator": lambda v: v}, TypeError, r"`{}\(operator=...\)` must be an Operator"),
        ({"like": jnp.arange(3)}, TypeError, r"`Operator\(like=...\)` must have floating-point leaves"),
        ({"like": {}}, ValueError, r"`Operator\(like=...\)` must have at least one array"),
        (
            {"like": jnp.zeros((3, 0))},
            ValueError,
            r"`{}\(operator=...\).like` must have at least one entry; got only empty leaves",
        ),
        ({"matvec": lambda v: v[:2]}, ValueError, r"`operator\(z\)` must have the shapes of `z`; .* it is \(2,\)"),
    ],
)
def test_errors(name, arguments, kind, message):
    with pytest.raises(kind, match=message.format(name)):
        call(getattr(spectrum, name), **arguments)


@pytest.mark.parametrize("sketch_size", [-1, 4])
def test_errors_of_the_sketch(sketch_size):
    message = rf"`trace\(sketch_size=...\)` must be an integer in 0..3; got {sketch_size}"
    with pytest.raises(ValueError, match=message):
        spectrum.trace(problems.operator(lambda v: v, jnp.ones(3)), jax.random.key(0), sketch_size=sketch_size)
    with pytest.raises(ValueError, match=r"`operator\(z\)` must have the shapes of `z`"):
        spectrum.trace(problems.operator(lambda v: v[:2], jnp.ones(3)), jax.random.key(0), sketch_size=1)


@pytest.mark.parametrize("estimator", [spectrum.trace, spectrum.frobenius_norm, spectrum.layer_traces])
def test_rtol_of_zero_asks_for_no_error_at_all(estimator):
    """It stops where the samples agree exactly; None takes every probe, and a finished estimate has converged."""
    diagonal = problems.operator(lambda v: jnp.array([3.0, -1.0, 2.0]) * v, jnp.zeros(3))
    exact = estimator(diagonal, jax.random.key(0), num_probes=50, rtol=0.0)
    assert exact.converged
    assert exact.num_probes == 10
    matrix, _ = problems.symmetric([1.0, 2.0, 5.0], dtype=np.float32)
    dense = problems.operator(lambda v: jnp.asarray(matrix) @ v, jnp.zeros(3))
    never = estimator(dense, jax.random.key(0), num_probes=50, rtol=0.0)
    assert not never.converged
    assert never.num_probes == 50
    finished = estimator(dense, jax.random.key(0), num_probes=50)
    assert finished.converged
    assert finished.num_probes == 50
    np.testing.assert_array_equal(jax.tree.leaves(finished.mean), jax.tree.leaves(never.mean))


def test_broken_product_is_not_converged_without_rtol():
    broken = problems.operator(lambda v: jnp.full(3, jnp.nan), jnp.zeros(3))
    assert not spectrum.trace(broken, jax.random.key(0), num_probes=5).converged
