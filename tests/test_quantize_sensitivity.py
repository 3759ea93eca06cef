"""Sensitivities on quadratics of known Hessian, correlations against SciPy, allocations against brute force."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from hero_jax import ArgumentError, Operator, curvature, spectrum
from hero_jax.quantize import QuantSpec, allocation, fake_quantize, sensitivity, weights

SHAPES = {"conv": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (5, 3)}, "mid": {"kernel": (2, 3, 2)}}
KERNELS = ["conv/kernel", "head/kernel", "mid/kernel"]


def tree(seed, draw="normal"):
    draw = getattr(np.random.default_rng(seed), draw)
    return jax.tree.map(lambda shape: jnp.asarray(draw(size=shape)), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def quadratic(minimum, diagonal):
    def loss_fn(params):
        terms = jax.tree.map(lambda h, w, m: jnp.sum(h * (w - m) ** 2), diagonal, params, minimum)
        return 7.0 + sum(jax.tree.leaves(terms)) / 2

    return loss_fn, lambda v: jax.tree.map(jnp.multiply, diagonal, v)


def is_none(x):
    return x is None


def sums(diagonal):
    return jax.tree.map(jnp.sum, diagonal)


def same_in_a_leaf(values):
    return jax.tree.map(lambda value, shape: jnp.full(shape, value), values, SHAPES)


CURVATURES = {"conv": {"kernel": 3.0, "bias": 50.0}, "head": {"kernel": 0.25}, "mid": {"kernel": -2.0}}


@pytest.mark.usefixtures("x64")
class TestSensitivities:
    @pytest.mark.parametrize("bits", [2, 3, 8])
    def test_the_hessian_form_is_the_increase_at_a_minimum(self, bits):
        params, diagonal = tree(0), tree(1, "random")
        loss_fn, matvec = quadratic(params, diagonal)
        rows = sensitivity.sensitivities(loss_fn, params, bits, sums(diagonal), operator=matvec)
        assert [row.layer for row in rows] == KERNELS
        for row in rows:
            np.testing.assert_allclose(row.by_hessian, row.increase, rtol=1e-9)
            # The entries of a leaf have different curvatures: the trace is no substitute.
            assert abs(row.by_trace / row.increase - 1) > 1e-3

    def test_neither_form_has_the_gradient_term(self):
        params, minimum, diagonal = tree(0), tree(5), tree(1, "random")
        loss_fn, matvec = quadratic(minimum, diagonal)
        quantized, gradient = fake_quantize(params, 2), jax.grad(loss_fn)(params)
        for row in sensitivity.sensitivities(loss_fn, params, 2, sums(diagonal), operator=matvec):
            layer = row.layer.split("/")[0]
            error = quantized[layer]["kernel"] - params[layer]["kernel"]
            first_order = jnp.vdot(gradient[layer]["kernel"], error)
            assert abs(first_order) > 0.01
            np.testing.assert_allclose(row.by_hessian + first_order, row.increase, rtol=1e-9)

    def test_the_trace_form_is_exact_for_multiples_of_the_identity(self):
        params, diagonal = tree(0), same_in_a_leaf(CURVATURES)
        loss_fn, matvec = quadratic(params, diagonal)
        rows = sensitivity.sensitivities(loss_fn, params, 3, sums(diagonal), operator=matvec)
        assert [row.size for row in rows] == [12, 15, 12]
        for row in rows:
            np.testing.assert_allclose(row.by_trace, row.increase, rtol=1e-9)
            np.testing.assert_allclose(row.by_hessian, row.increase, rtol=1e-9)
        assert rows[2].by_trace < 0

    def test_each_leaf_alone(self):
        params, quantized = tree(0), fake_quantize(tree(0), 2)
        seen = []

        def loss_fn(candidate):
            seen.append(candidate)
            return 0.0

        rows = sensitivity.sensitivities(loss_fn, params, 2, sums(params))
        assert all(row.by_hessian is None for row in rows)
        assert len(seen) == 4
        jax.tree.map(np.testing.assert_array_equal, seen[0], params)
        for row, candidate in zip(rows, seen[1:], strict=True):
            for layer, leaves in SHAPES.items():
                for name in leaves:
                    is_this = row.layer == f"{layer}/{name}"
                    expected = (quantized if is_this else params)[layer][name]
                    np.testing.assert_allclose(candidate[layer][name], expected, rtol=1e-14)
                    if is_this:
                        assert np.any(expected != params[layer][name])
                        np.testing.assert_allclose(row.error_energy, jnp.sum((expected - params[layer][name]) ** 2))

    def test_a_block_excludes_the_products_with_other_leaves(self):
        params = tree(0)

        def loss_fn(p, batch):
            return jnp.mean(batch) * sum(jnp.sum(w**2) for w in jax.tree.leaves(p)) ** 2 / 4

        operator = curvature.hessian_operator(loss_fn, params, jnp.ones((3, 1)))
        traces = spectrum.layer_traces(operator, jax.random.key(0), num_probes=3).mean
        quantized = fake_quantize(params, 2)
        rows = sensitivity.sensitivities(lambda p: loss_fn(p, jnp.ones(1)), params, 2, traces, operator=operator)
        square = sum(jnp.sum(w**2) for w in jax.tree.leaves(params))
        for row in rows:
            layer = row.layer.split("/")[0]
            w, d = params[layer]["kernel"], quantized[layer]["kernel"] - params[layer]["kernel"]
            expected = (square * jnp.sum(d**2) + 2 * jnp.vdot(w, d) ** 2) / 2
            np.testing.assert_allclose(row.by_hessian, expected, rtol=1e-9)

    def test_restricted_operator_and_its_traces_need_no_mask_again(self):
        """What is not quantized is None in both."""
        params, diagonal = tree(0), tree(1, "random")
        loss_fn, matvec = quadratic(params, diagonal)
        mask = jax.tree.map(lambda x: x.ndim > 1, params)

        def restricted(vector):
            filled = jax.tree.map(lambda v, w: jnp.zeros_like(w) if v is None else v, vector, params, is_leaf=is_none)
            return curvature.restrict(matvec(filled), mask)

        operator = Operator(restricted, curvature.restrict(params, mask))
        traces = spectrum.layer_traces(operator, jax.random.key(0), num_probes=2).mean
        assert traces["conv"]["bias"] is None
        found = sensitivity.sensitivities(loss_fn, params, 3, traces, operator=operator)
        expected = sensitivity.sensitivities(loss_fn, params, 3, sums(diagonal), operator=matvec)
        for row, wanted in zip(found, expected, strict=True):
            assert row.layer == wanted.layer
            np.testing.assert_allclose(row[2:], wanted[2:], rtol=1e-9)
        assert sensitivity.predicted_costs(params, traces, (3,)) == sensitivity.predicted_costs(
            params, sums(diagonal), (3,)
        )
        head = Operator(lambda v: v, {**jax.tree.map(lambda _: None, params), "head": params["head"]})
        with pytest.raises(
            ValueError, match=r"`sensitivities\(operator=...\)` must have every leaf .* no 'conv/kernel'"
        ):
            sensitivity.sensitivities(loss_fn, params, 3, traces, operator=head)

    def test_traces_of_another_structure(self):
        params = {"a": jnp.ones((2, 3)), "n": None, "c": jnp.ones((3, 2))}
        found = sensitivity.predicted_costs(
            params, {"a": 1.0, "n": None, "c": None}, (3,), mask={"a": True, "n": None, "c": False}
        )
        assert list(found) == ["a"]
        for traces in ({"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, {"a": 1.0}):
            with pytest.raises(
                ArgumentError, match=r"`predicted_costs\(traces=...\)` must have the structure of `params`"
            ):
                sensitivity.predicted_costs(params, traces, (3,))


class TestSensitivityOptions:
    def test_mask_and_overrides(self):
        params = tree(0)
        spec = QuantSpec("tensor", overrides=(("head/*", 8), ("mid/*", None)))
        rows = sensitivity.sensitivities(lambda p: 0.0, params, 2, sums(params), spec=spec)
        assert [(row.layer, row.bits) for row in rows] == [("conv/kernel", 2), ("head/kernel", 8)]
        channel = sensitivity.sensitivities(lambda p: 0.0, params, 2, sums(params))
        assert rows[0].error_energy > channel[0].error_energy > 0
        mask = {"conv": {"kernel": False, "bias": True}, "head": False, "mid": True}
        rows = sensitivity.sensitivities(lambda p: 0.0, params, 2, sums(params), mask=mask)
        assert [row.layer for row in rows] == ["conv/bias", "mid/kernel"]

    def test_one_program_quantizes_all_leaves_at_all_widths(self, monkeypatch):
        params = {f"layer{i}": jnp.arange(6.0).reshape(2, 3) + i for i in range(5)}
        traced, on_plan = [], weights.on_plan
        monkeypatch.setattr(weights, "on_plan", lambda *given: traced.append(given) or on_plan(*given))
        sensitivity._quantized.clear_cache()
        for bits in (2, 3, 4):
            sensitivity.sensitivities(lambda p: 0.0, params, bits, sums(params))
        sensitivity.predicted_costs(params, sums(params), (5, 6))
        assert len(traced) == 1

    def test_products_are_traced_once(self):
        traced = []

        def matvec(v):
            traced.append(0)
            return v

        rows = sensitivity.sensitivities(lambda p: 0.0, tree(0), 2, sums(tree(0)), operator=matvec)
        assert len(traced) == 1
        np.testing.assert_allclose([r.by_hessian for r in rows], [r.error_energy / 2 for r in rows], rtol=1e-6)

    def test_a_weight_that_is_not_finite_spoils_its_own_leaf_only(self):
        params = tree(0)
        params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(jnp.nan)
        params["conv"]["bias"] = jnp.full(4, jnp.inf)
        rows = sensitivity.sensitivities(lambda p: 0.0, params, 2, sums(tree(0)), operator=lambda v: v)
        assert [math.isnan(row.error_energy) for row in rows] == [False, True, False]
        assert [math.isnan(row.by_hessian) for row in rows] == [False, True, False]

    def test_an_empty_leaf(self):
        params = {"a": jnp.ones((2, 2)) * 0.3, "b": jnp.zeros((0, 2))}
        rows = sensitivity.sensitivities(lambda p: 0.0, params, 2, {"a": 1.0, "b": 0.0}, operator=lambda v: v)
        assert rows[1][1:] == (0, 2, 0.0, 0.0, 0.0, 0.0)

    def test_bfloat16(self):
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), tree(0))
        rows = sensitivity.sensitivities(lambda p: 0.0, params, 2, sums(params), operator=lambda v: v)
        np.testing.assert_allclose([r.by_hessian for r in rows], [r.error_energy / 2 for r in rows], rtol=1e-6)
        assert rows[0].error_energy > 0

    def test_report(self):
        calls = []
        sensitivity.sensitivities(lambda p: 0.0, tree(0), 2, sums(tree(0)), report=lambda *x: calls.append(x))
        assert calls == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]

    def test_errors(self):
        params = tree(0)
        traces = sums(params)
        call = sensitivity.sensitivities
        with pytest.raises(TypeError, match=r"sensitivities\(bits=...\)` must be an integer in 2..16; got \(2, 3\)"):
            call(lambda p: 0.0, params, (2, 3), traces)
        with pytest.raises(ValueError, match=r"must be an integer in 2..16; got 17"):
            call(lambda p: 0.0, params, 17, traces)
        with pytest.raises(ValueError, match=r"sensitivities\(traces=...\)` must have the structure of `params`"):
            call(lambda p: 0.0, params, 2, {"conv": traces["conv"]})
        with pytest.raises(ValueError, match=r"at params\['conv'\]\['bias'\] it is \(4,\)"):
            call(lambda p: 0.0, params, 2, params)
        with pytest.raises(TypeError, match=r"traces=...\)\['conv/bias'\]` must be a real scalar; got 1j"):
            call(lambda p: 0.0, params, 2, jax.tree.map(lambda _: 1j, traces))
        with pytest.raises(
            TypeError, match=r"mean_loss\(params\)` must be a real scalar; got an array of shape \(2,\)"
        ):
            call(lambda p: jnp.ones(2), params, 2, traces)
        with pytest.raises(ValueError, match=r"operator\(v\)` must have the structure of `v`"):
            call(lambda p: 0.0, params, 2, traces, operator=lambda v: v["conv"])
        with pytest.raises(ValueError, match=r"sensitivities\(mask=...\)"):
            call(lambda p: 0.0, params, 2, traces, mask={"conv": True})


class TestCorrelation:
    @pytest.mark.parametrize("seed", range(5))
    def test_equals_scipy_with_ties(self, seed):
        rng = np.random.default_rng(seed)
        x = rng.integers(0, 5, 20).astype(float)
        y = x + rng.integers(-3, 4, 20)
        result = sensitivity.correlation(x, list(y))
        np.testing.assert_allclose(result.pearson, scipy.stats.pearsonr(x, y)[0], rtol=1e-12)
        np.testing.assert_allclose(result.spearman, scipy.stats.spearmanr(x, y)[0], rtol=1e-12)
        assert result.n == 20

    def test_by_hand(self):
        # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
        assert sensitivity.correlation([1, 5, 5, 100], [1, 2, 3, 4]).spearman == pytest.approx(math.sqrt(0.9))
        assert sensitivity.correlation([1e-300, 2e-300], [3e300, 1e300]) == (-1.0, -1.0, 2)

    @pytest.mark.parametrize("ys", [[0.1, 0.1, 0.1], [1.0, math.nan, 2.0]])
    def test_undefined_is_nan(self, ys):
        for pair in ([1.0, 2.0, 4.0], ys), (ys, [1.0, 2.0, 4.0]):
            result = sensitivity.correlation(*pair)
            assert math.isnan(result.pearson)
            assert math.isnan(result.spearman)

    @pytest.mark.parametrize(("xs", "ys"), [([1.0], [2.0]), ([], []), ([1.0, 2.0], [1.0, 2.0, 3.0])])
    def test_errors(self, xs, ys):
        with pytest.raises(ValueError, match=r"must be two lists of n >= 2 numbers"):
            sensitivity.correlation(xs, ys)


class TestPredictedCosts:
    def test_equals_the_trace_form(self):
        params, traces = tree(0), CURVATURES
        costs = sensitivity.predicted_costs(params, traces, (2, 3, 6))
        assert list(costs) == KERNELS
        for bits in (2, 3, 6):
            for row in sensitivity.sensitivities(lambda p: 0.0, params, bits, traces):
                assert costs[row.layer][bits] == max(row.by_trace, 0.0)
        assert costs["conv/kernel"][2] > costs["conv/kernel"][3] > costs["conv/kernel"][6] > 0

    def test_a_negative_trace_costs_nothing_and_nan_stays(self):
        traces = {"conv": {"kernel": math.nan, "bias": 0.0}, "head": {"kernel": 1.0}, "mid": {"kernel": -2.0}}
        costs = sensitivity.predicted_costs(tree(0), traces, (2,))
        assert costs["mid/kernel"] == {2: 0.0}
        assert math.isnan(costs["conv/kernel"][2])
        with pytest.raises(ValueError, match=r"\['conv/kernel'\]\[2\]` must be finite; got nan"):
            allocation.allocate_bits(costs, dict.fromkeys(costs, 10), mean_bits=3)

    def test_spec_mask_and_overrides(self):
        params, traces = tree(0), same_sign(CURVATURES)
        spec = QuantSpec("tensor", overrides=(("head/*", 8), ("mid/*", None)))
        costs = sensitivity.predicted_costs(params, traces, (2, 4), spec=spec)
        assert {layer: list(row) for layer, row in costs.items()} == {"conv/kernel": [2, 4], "head/kernel": [8]}
        assert costs["conv/kernel"][2] > sensitivity.predicted_costs(params, traces, (2,))["conv/kernel"][2]
        mask = {"conv": {"kernel": False, "bias": True}, "head": False, "mid": False}
        assert list(sensitivity.predicted_costs(params, traces, (2,), mask=mask)) == ["conv/bias"]

    def test_errors(self):
        with pytest.raises(ValueError, match=r"predicted_costs\(bits=...\)` must name at least one bit width"):
            sensitivity.predicted_costs(tree(0), CURVATURES, ())
        with pytest.raises(ValueError, match=r"must be an integer in 2..16; got 1"):
            sensitivity.predicted_costs(tree(0), CURVATURES, (1, 2))
        with pytest.raises(ValueError, match=r"predicted_costs\(traces=...\)` must have the structure"):
            sensitivity.predicted_costs(tree(0), {"conv": 1.0})


def same_sign(values):
    return jax.tree.map(abs, values)


WIDTHS = (2, 3, 4, 8)


def problem(seed, scale=1.0, num_layers=6, largest=40):
    rng = np.random.default_rng(seed)
    sizes = {f"layer{i}": int(n) for i, n in enumerate(rng.integers(1, largest, num_layers))}
    decades = 10 ** rng.uniform(-3, 3, num_layers)
    costs = {
        layer: {b: float(scale * decade * 4.0**-b * rng.uniform(0.5, 2)) for b in WIDTHS}
        for layer, decade in zip(sizes, decades, strict=True)
    }
    return costs, sizes


def brute_force(costs, sizes, capacity):
    """(least cost, fewest bits of those that cost it) of all allocations of `capacity` bits at most."""
    rows = []
    for widths in itertools.product(*(row for row in costs.values())):
        bits = sum(n * b for n, b in zip(sizes.values(), widths, strict=True))
        if bits <= capacity:
            rows.append((math.fsum(row[b] for row, b in zip(costs.values(), widths, strict=True)), bits))
    best = min(cost for cost, _ in rows)
    return best, min(bits for cost, bits in rows if cost <= best + 1e-12 * abs(best))


def check_against_brute_force(costs, sizes, capacity, **budget):
    result = allocation.allocate_bits(costs, sizes, **budget)
    cost, bits = brute_force(costs, sizes, capacity)
    assert list(result.bits) == list(costs)
    assert sum(sizes[layer] * b for layer, b in result.bits.items()) == bits
    np.testing.assert_allclose(result.cost, cost, rtol=1e-9)
    np.testing.assert_allclose(result.cost, sum(costs[layer][b] for layer, b in result.bits.items()), rtol=1e-12)
    assert result.num_bytes == bits / 8
    assert result.mean_bits == bits / sum(sizes.values())


class TestAllocateBits:
    @pytest.mark.parametrize("scale", [1e-8, 1.0, 1e4])
    @pytest.mark.parametrize("seed", range(10))
    def test_equals_brute_force(self, seed, scale):
        costs, sizes = problem(seed, scale)
        entries = sum(sizes.values())
        mean = float(np.random.default_rng(seed).uniform(2, 8))
        check_against_brute_force(costs, sizes, math.floor(Fraction(mean) * entries), mean_bits=mean)
        num_bytes = float(np.random.default_rng(seed + 100).uniform(entries / 4, entries))
        check_against_brute_force(costs, sizes, math.floor(Fraction(num_bytes) * 8), num_bytes=num_bytes)

    @pytest.mark.parametrize("seed", range(10))
    def test_equals_brute_force_for_integer_costs_that_tie(self, seed):
        rng = np.random.default_rng(seed)
        sizes = {str(i): int(n) for i, n in enumerate(rng.integers(1, 6, 6))}
        # Any sign, not monotonous: measured increases are neither.
        costs = {layer: {b: float(rng.integers(-3, 4)) for b in WIDTHS} for layer in sizes}
        for mean in (2.5, 4.0, 8.0):
            check_against_brute_force(costs, sizes, math.floor(mean * sum(sizes.values())), mean_bits=mean)

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_brute_force_where_some_costs_are_out_of_the_question(self, seed):
        costs, sizes = problem(seed, 1e-8)
        costs["layer2"][2] = 1e8
        costs["layer4"][2] = costs["layer4"][3] = 3e3
        capacity = 5 * sum(sizes.values())
        check_against_brute_force(costs, sizes, capacity, mean_bits=5)

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_brute_force_for_large_layers(self, seed):
        costs, sizes = problem(seed, largest=10**8)
        capacity = 4 * sum(sizes.values())
        check_against_brute_force(costs, sizes, capacity, mean_bits=4)

    @pytest.mark.parametrize("seed", range(5))
    def test_equals_dynamic_programming_for_many_layers(self, seed):
        costs, sizes = problem(seed, num_layers=25)
        least = {0: 0.0}
        for layer, n in sizes.items():
            grown = {}
            for (bits, cost), (b, more) in itertools.product(least.items(), costs[layer].items()):
                total = bits + n * b
                grown[total] = min(grown.get(total, math.inf), cost + more)
            least = grown
        for mean in (2.7, 4.1, 6.3):
            result = allocation.allocate_bits(costs, sizes, mean_bits=mean)
            best = min(cost for bits, cost in least.items() if bits <= mean * sum(sizes.values()))
            np.testing.assert_allclose(result.cost, best, rtol=1e-9)

    @pytest.mark.parametrize("largest", [7, 10**8])
    def test_a_budget_that_is_met_exactly_is_used_and_one_bit_less_is_not(self, largest):
        rng = np.random.default_rng(3)
        sizes = {str(i): int(n) for i, n in enumerate(rng.integers(largest // 2, largest, 7))}
        costs = {layer: {2: 3.0 * n, 4: 0.5 * n, 8: 0.0} for layer, n in sizes.items()}
        entries = sum(sizes.values())
        # Everything at 8 bits, and everything but one layer at 8 bits.
        for total in (8 * entries, 8 * entries - 4 * min(sizes.values())):
            for budget in {"mean_bits": total / entries}, {"num_bytes": total / 8}:
                assert allocation.allocate_bits(costs, sizes, **budget).num_bytes == total / 8
            assert allocation.allocate_bits(costs, sizes, num_bytes=(total - 1) / 8).num_bytes < total / 8

    def test_ties_take_the_fewest_bits(self):
        costs = {"a": {2: 1.0, 4: 1.0, 8: 1.0}, "b": {2: 5.0, 4: 2.0, 8: 2.0}}
        result = allocation.allocate_bits(costs, {"a": 10, "b": 30}, mean_bits=8)
        assert result == ({"a": 2, "b": 4}, 3.0, 3.5, 17.5)
        # Two that cost 1 beyond the least, of different sizes: the smaller layer is raised.
        costs = {"a": {2: 1.0, 4: 0.0}, "b": {2: 1.0, 4: 0.0}}
        assert allocation.allocate_bits(costs, {"a": 30, "b": 20}, mean_bits=3.5).bits == {"a": 2, "b": 4}
        # 0.1 + 0.2 is not 0.3 in floating point, but a tie.
        costs = {"a": {2: 0.1, 4: 0.3, 8: 0.0}, "b": {2: 0.2, 4: 0.0, 8: 0.0}}
        assert allocation.allocate_bits(costs, {"a": 10, "b": 10}, mean_bits=4.5).bits == {"a": 2, "b": 4}

    def test_a_single_layer_and_a_fixed_one(self):
        costs = {"a": {2: 3.0, 4: 2.0, 8: 1.0}}
        assert allocation.allocate_bits(costs, {"a": 10}, mean_bits=7.9) == ({"a": 4}, 2.0, 4.0, 5.0)
        costs = {"a": {2: 3.0, 4: 2.0, 8: 1.0}, "first": {6: 9.0}}
        result = allocation.allocate_bits(costs, {"first": 10, "a": 10}, mean_bits=5)
        assert result.bits == {"a": 4, "first": 6}

    def test_takes_numpy_and_jax_scalars(self):
        costs = {"a": {np.int64(2): jnp.float32(3), 4: np.float32(2)}}
        result = allocation.allocate_bits(costs, {"a": np.int64(10)}, mean_bits=np.float64(4))
        assert result == ({"a": 4}, 2.0, 4.0, 5.0)
        assert type(result.cost) is float

    def test_an_empty_layer_and_an_enormous_budget(self):
        result = allocation.allocate_bits({"a": {2: 1.0, 4: 0.0}}, {"a": 0}, mean_bits=3)
        assert result == ({"a": 4}, 0.0, 0.0, 0.0)
        assert allocation.allocate_bits({"a": {2: 1.0, 4: 0.0}}, {"a": 9}, num_bytes=1e308).bits == {"a": 4}

    def test_errors(self):
        costs, sizes = {"a": {2: 1.0, 4: 0.5}, "b": {2: 1.0, 4: 0.5}}, {"a": 10, "b": 30}
        call = allocation.allocate_bits
        with pytest.raises(ValueError, match=r"mean_bits=...\)` must be at least 2.0, .* \(a mean of 2.0 bits\)"):
            call(costs, sizes, mean_bits=1.9)
        with pytest.raises(
            ValueError, match=r"num_bytes=...\)` must be at least 10.0, .* \(a mean of 2.0 bits\); got 9.9"
        ):
            call(costs, sizes, num_bytes=9.9)
        for budgets in {}, {"mean_bits": 3, "num_bytes": 20}:
            with pytest.raises(TypeError, match=r"must have one of mean_bits and num_bytes"):
                call(costs, sizes, **budgets)
        with pytest.raises(ValueError, match=r"mean_bits=...\)` must be positive and finite; got nan"):
            call(costs, sizes, mean_bits=math.nan)
        for bad in math.nan, math.inf, -math.inf:
            with pytest.raises(ValueError, match=r"\['b'\]\[4\]` must be finite; got"):
                call({**costs, "b": {2: 1.0, 4: bad}}, sizes, mean_bits=3)
        with pytest.raises(ValueError, match=r"\['b'\]` must have every bit width; it has no \[8\]"):
            call({"a": {2: 1.0, 4: 0.5, 8: 0.1}, "b": costs["b"]}, sizes, mean_bits=3)
        with pytest.raises(ValueError, match=r"\['b'\]` must have every bit width; it has no \[2, 4\]"):
            call({**costs, "b": {}}, sizes, mean_bits=3)
        with pytest.raises(ValueError, match=r"must name the same layers, .* got 2 and 1, \['b'\] in one only"):
            call(costs, {"a": 10}, mean_bits=3)
        with pytest.raises(ValueError, match=r"must name the same layers, one at least"):
            call({}, {}, mean_bits=3)
        with pytest.raises(TypeError, match=r"sizes=...\)\['a'\]` must be an integer >= 0; got 2.5"):
            call(costs, {"a": 2.5, "b": 3}, mean_bits=3)
        with pytest.raises(ValueError, match=r"costs=...\)\['a'\]` must be an integer in 2..16; got 32"):
            call({"a": {32: 1.0}}, {"a": 3}, mean_bits=3)


class TestEndToEnd:
    def test_an_allocation_is_what_fake_quantize_takes(self):
        params, traces = tree(0), same_sign(CURVATURES)
        costs = sensitivity.predicted_costs(params, traces)
        chosen = allocation.allocate_bits(costs, {"conv/kernel": 12, "head/kernel": 15, "mid/kernel": 12}, mean_bits=4)
        assert len(set(chosen.bits.values())) > 1
        bits = allocation.bits_tree(params, chosen.bits)
        assert bits["conv"]["bias"] == 32
        kernels = [bits[layer]["kernel"] for layer in SHAPES]
        assert kernels == list(chosen.bits.values())
        assert sum(n * b for n, b in zip((12, 15, 12), kernels, strict=True)) / 39 == chosen.mean_bits <= 4
        quantized = fake_quantize(params, bits)
        for layer in SHAPES:
            alone = fake_quantize(params[layer]["kernel"], bits[layer]["kernel"])
            np.testing.assert_array_equal(quantized[layer]["kernel"], alone)
        np.testing.assert_array_equal(quantized["conv"]["bias"], params["conv"]["bias"])

    def test_overrides_stay_in_the_allocation(self):
        params, spec = tree(0), QuantSpec(overrides=(("head/*", 8),))
        costs = sensitivity.predicted_costs(params, same_sign(CURVATURES), (2, 4), spec=spec)
        sizes = {"conv/kernel": 12, "head/kernel": 15, "mid/kernel": 12}
        chosen = allocation.allocate_bits(costs, sizes, mean_bits=5)
        assert chosen.bits["head/kernel"] == 8
        assert 4.3 < chosen.mean_bits <= 5
        fake_quantize(params, allocation.bits_tree(params, chosen.bits), spec)

    def test_bits_of_the_type_where_none_is_given(self, x64):
        del x64
        params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(2, jnp.float64)}
        assert allocation.bits_tree(params, {"a": np.int64(3)}) == {"a": 3, "b": 16, "c": 64}
        with pytest.raises(ValueError, match=r"fake_quantize\(bits=...\)\['a'\]` must be an integer in 2..16; got 64"):
            fake_quantize(params, allocation.bits_tree(params, {}))

    def test_errors(self):
        with pytest.raises(ValueError, match=r"got 'conv/kernels'. Did you mean 'conv/kernel'"):
            allocation.bits_tree(tree(0), {"conv/kernels": 3})
        with pytest.raises(ValueError, match=r"\['conv/kernel'\]` must be an integer in 2..16; got 1"):
            allocation.bits_tree(tree(0), {"conv/kernel": 1})
