"""What a quantized network is worth: rows against NumPy, sizes by hand, the classifier on one device and on eight."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hero_jax.evaluate import Spread, aggregate, classifier
from hero_jax.quantize import (
    PRESETS,
    QuantizedScore,
    QuantSpec,
    fake_quantize,
    named,
    quantize,
    quantize_and_evaluate,
)
from hero_jax.quantize import weights as weights_module


def weights(shape=(7, 5), seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


class TestEvaluate:
    def test_rows(self):
        params = {"kernel": weights((6, 4)), "bias": jnp.ones(4)}
        seen = []

        def eval_fn(p):
            seen.append(p)
            return {"norm": jnp.linalg.norm(p["kernel"]), "bias": p["bias"].sum()}

        spec = QuantSpec("tensor", "stretched")
        rows = quantize_and_evaluate(eval_fn, params, bits=(4, 2), spec=spec)
        assert [row.bits for row in rows] == [None, 4, 2]
        assert [row.fraction for row in rows] == [0.0, 24 / 28, 24 / 28]
        assert {row.spec for row in rows} == {"tensor-stretched"}
        np.testing.assert_array_equal(seen[0]["kernel"], params["kernel"])
        for row, bits in zip(rows[1:], (4, 2), strict=True):
            expected = jnp.linalg.norm(fake_quantize(params["kernel"], bits, spec))
            np.testing.assert_allclose(row.metrics["norm"], expected, rtol=1e-6)
            assert row.metrics["bias"] == 4.0
            assert isinstance(row.metrics["norm"], float)

    def test_compiles_once_for_the_sweep(self):
        traces = []

        @jax.jit
        def forward(w, x):
            traces.append(1)
            return jnp.mean(x @ w)

        x = jnp.ones((3, 7))
        rows = quantize_and_evaluate(lambda w: forward(w, x), weights(), bits=(8, 6, 4, 3, 2))
        assert len(rows) == 6
        assert list(rows[0].metrics) == ["value"]
        assert len(traces) == 1

    def test_bits_may_be_any_iterable(self):
        for bits in ((b for b in (8, 4)), np.array([8, 4])):
            assert [row.bits for row in quantize_and_evaluate(jnp.sum, weights(), bits=bits)] == [None, 8, 4]

    def test_mask(self):
        params = {"a": weights(), "b": weights((3, 2))}
        rows = quantize_and_evaluate(lambda p: p["b"].sum(), params, bits=(2,), mask={"a": True, "b": False})
        assert rows[0].metrics == rows[1].metrics
        assert rows[1].fraction == 35 / 41

    def test_bits_may_be_trees(self):
        params = {"a": weights((6, 4)), "b": weights((3, 2)), "bias": weights((2,))}
        trees = [{"a": 8, "b": 2, "bias": 4}, {"a": 4, "b": 4, "bias": 16}]
        rows = quantize_and_evaluate(lambda p: jnp.sum(p["b"]), params, bits=[*trees, 3])
        # (24 * 8 + 6 * 2) / 30, over the weights that are quantized only
        assert [row.bits for row in rows] == [None, 6.8, 4, 3]
        assert isinstance(rows[2].bits, int)
        for row, tree in zip(rows[1:], [*trees, 3], strict=True):
            np.testing.assert_allclose(row.metrics["value"], fake_quantize(params, tree)["b"].sum(), rtol=1e-5)

    def test_overrides_count_in_the_mean_and_the_fraction(self):
        params = {"a": weights((6, 4)), "b": weights((3, 2)), "c": weights((5, 2))}
        spec = QuantSpec(overrides=(("b", 8), ("c", None)))
        rows = quantize_and_evaluate(lambda p: jnp.sum(p["c"]), params, bits=(3,), spec=spec)
        assert rows[1].bits == (24 * 3 + 6 * 8) / 30
        assert rows[1].fraction == 30 / 40
        assert rows[1].drop == {"value": 0.0}
        assert rows[1].spec == "channel-narrow+b@8+c@full"

    def test_drop_and_flipped(self):
        w = weights((6, 4))

        def eval_fn(p):
            return {"accuracy": p[0, 0], "predictions": jnp.argmax(p, axis=-1), "loss": -p[1, 1]}

        rows = quantize_and_evaluate(eval_fn, w, bits=(8, 2))
        assert rows[0].drop == {"accuracy": 0.0, "loss": 0.0}
        assert rows[0].flipped == 0
        for row, bits in zip(rows[1:], (8, 2), strict=True):
            w_hat = np.asarray(fake_quantize(w, bits))
            np.testing.assert_allclose(row.drop["accuracy"], w[0, 0] - w_hat[0, 0], atol=1e-6)
            np.testing.assert_allclose(row.drop["loss"], w_hat[1, 1] - w[1, 1], atol=1e-6)
            assert set(row.metrics) == {"accuracy", "loss"}
            assert row.flipped == np.mean(w_hat.argmax(-1) != np.asarray(w).argmax(-1))
        assert rows[2].flipped > 0
        assert quantize_and_evaluate(jnp.sum, w, bits=(2,))[1].flipped is None

    @pytest.mark.parametrize("spec", [PRESETS["narrow"], named("tensor-asymmetric")], ids=lambda s: s.name)
    def test_sqnr(self, spec):
        params = {"a": 3 * weights((6, 4)), "b": weights((3, 2)), "bias": 100 * weights((2,))}
        rows = quantize_and_evaluate(lambda p: jnp.sum(p["b"]), params, bits=(8, 3, 2), spec=spec)
        assert rows[0].sqnr_db == math.inf
        for row, bits in zip(rows[1:], (8, 3, 2), strict=True):
            w_hat = fake_quantize(params, bits, spec)
            pairs = [(np.asarray(params[k], np.float64), np.asarray(w_hat[k], np.float64)) for k in ("a", "b")]
            ratio = sum((w**2).sum() for w, _ in pairs) / sum(((q - w) ** 2).sum() for w, q in pairs)
            np.testing.assert_allclose(row.sqnr_db, 10 * np.log10(ratio), rtol=1e-5)

    def test_sqnr_of_exact_and_of_zero_weights(self):
        assert quantize_and_evaluate(jnp.sum, jnp.array([[3.0], [-1.0]]), bits=(3,))[1].sqnr_db == math.inf
        assert math.isnan(quantize_and_evaluate(jnp.sum, jnp.zeros((2, 2)), bits=(3,))[1].sqnr_db)

    def test_sizes_by_hand(self):
        params = {"a": weights((7, 5)), "bias": weights((5,)).astype(jnp.bfloat16)}
        full, three = quantize_and_evaluate(lambda p: jnp.sum(p["a"]), params, bits=(3,))
        assert full.ideal_bytes == full.stored_bytes == 35 * 4 + 5 * 2
        assert three.ideal_bytes == 35 * 3 / 8 + 10
        assert three.stored_bytes == 14 + 5 * 4 + 10  # 105 bits are 14 bytes; one float32 scale a column

    @pytest.mark.parametrize("name", ["tensor-narrow", "channel-asymmetric", "group2-stretched", "group2-asymmetric"])
    def test_stored_bytes_are_those_of_the_tensors(self, name):
        params = {"a": weights((3, 3, 6, 5)), "b": weights((1, 7)), "bias": weights((5,))}
        spec = named(name)
        for bits in (3, 8, 9):
            row = quantize_and_evaluate(lambda p: jnp.sum(p["b"]), params, bits=(bits,), spec=spec)[1]
            q = quantize(params, bits, spec)
            size = params["bias"].nbytes
            for leaf in (q["a"], q["b"]):
                is_one = (np.asarray(leaf.codes, np.int64).reshape(-1, 1) >> np.arange(bits)) & 1
                size += np.packbits(is_one).nbytes + leaf.scale.nbytes
                size += 0 if leaf.zero_point is None else leaf.zero_point.nbytes
            assert row.stored_bytes == size
            assert row.ideal_bytes == (270 + 7) * bits / 8 + 20

    def test_not_finite_weights_are_named(self):
        for bad in (jnp.nan, jnp.inf):
            params = {"a": weights(), "layer": {"kernel": weights((3, 2)).at[1, 1].set(bad)}}
            with pytest.raises(ValueError, match=r"`params` must be finite; 'layer/kernel' has a NaN or an infinity"):
                quantize_and_evaluate(jnp.sum, params)

    def test_report(self):
        calls = []
        quantize_and_evaluate(jnp.sum, weights(), bits=(8, 2), report=lambda *x: calls.append(x))
        assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def test_quantizer(self):
        w, calls = weights(), []

        def quantizer(params, bits):
            calls.append(bits)
            return jax.tree.map(lambda x: x + bits, params)

        rows = quantize_and_evaluate(jnp.mean, w, bits=(4, 2), quantizer=quantizer)
        assert calls == [4, 2]
        np.testing.assert_allclose(rows[1].metrics["value"], w.mean() + 4, rtol=1e-5)
        np.testing.assert_allclose(rows[2].drop["value"], -2, rtol=1e-5)
        np.testing.assert_allclose(rows[2].sqnr_db, 10 * np.log10(np.sum(np.square(w)) / (35 * 4)), rtol=1e-5)
        assert rows[1].ideal_bytes == 35 * 4 / 8

    def test_quantizing_compiles_once_for_the_sweep(self, monkeypatch):
        calls, original = [], weights_module.on_plan
        monkeypatch.setattr(weights_module, "on_plan", lambda *args: calls.append(1) or original(*args))
        params = {"a": weights(), "b": weights((3, 2))}
        quantize_and_evaluate(lambda p: p["a"].sum(), params, bits=(8, 4, {"a": 3, "b": 5}, 2))
        assert len(calls) == 1

    def test_leaf_that_is_a_python_number(self):
        params = {"kernel": weights(), "temperature": 2.0}
        rows = quantize_and_evaluate(lambda p: p["kernel"].sum() * p["temperature"], params, bits=(4,))
        assert rows[1].fraction == 35 / 36

    def test_bits_of_empty_leaves(self):
        params = {"empty": jnp.zeros((0, 3)), "bias": jnp.ones(3)}
        rows = quantize_and_evaluate(lambda p: p["bias"].sum(), params, bits=(4,))
        assert (rows[1].bits, rows[1].fraction) == (4, 0.0)

    @pytest.mark.parametrize(
        ("options", "kind", "message"),
        [
            ({"bits": 8}, TypeError, r"`quantize_and_evaluate\(bits=...\)` must be a sequence .*; got 8"),
            ({"bits": {"a": 8}}, TypeError, r"must be a sequence of bit widths; got \{'a': 8\}"),
            ({"bits": ()}, ValueError, "must name at least one bit width; got none"),
            ({"bits": (8, 1)}, ValueError, r"`quantize_and_evaluate\(bits=...\)` must be an integer in 2..16; got 1"),
            ({"spec": "qwix"}, TypeError, r"`quantize_and_evaluate\(spec=...\)` must be a QuantSpec; got 'qwix'"),
            ({"mask": False}, ValueError, r"`quantize_and_evaluate\(mask=...\)` must select at least one leaf"),
            (
                {"eval_fn": lambda w: {"a": w}},
                TypeError,
                r"`eval_fn\(...\)\['a'\]` must be a real scalar; got an array",
            ),
            ({"eval_fn": lambda w: w}, TypeError, r"`eval_fn\(...\)\['value'\]` must be a real scalar"),
        ],
    )
    def test_errors(self, options, kind, message):
        with pytest.raises(kind, match=message):
            quantize_and_evaluate(**({"eval_fn": jnp.sum, "params": weights()} | options))


class TestAggregate:
    ROWS = staticmethod(lambda seed: quantize_and_evaluate(jnp.sum, weights((3, 2), seed), bits=(8, 2)))

    def test_mean_and_sample_deviation(self):
        runs = [self.ROWS(seed) for seed in range(3)]
        spreads = aggregate(runs, lambda row: row.metrics["value"])
        values = np.array([[row.metrics["value"] for row in rows] for rows in runs])
        for i, spread in enumerate(spreads):
            assert isinstance(spread, Spread)
            np.testing.assert_allclose(spread[:2], (values[:, i].mean(), values[:, i].std(ddof=1)), rtol=1e-6)
            assert spread.n == 3
        assert len(spreads) == 3

    def test_one_run_has_no_deviation(self):
        spreads = aggregate([self.ROWS(0)], lambda row: row.drop["value"])
        assert (spreads[0].mean, spreads[0].n) == (0.0, 1)
        assert all(math.isnan(spread.std) for spread in spreads)

    def test_errors(self):
        with pytest.raises(ValueError, match="must have at least one run; got none"):
            aggregate([], lambda row: 0.0)
        rows = self.ROWS(0)
        for other in (rows[:2], [*rows[:2], rows[2]._replace(bits=3)], [*rows[:2], rows[2]._replace(spec="x")]):
            with pytest.raises(ValueError, match="must have the same bit widths and specification in every run"):
                aggregate([rows, other], lambda row: 0.0)
        assert isinstance(rows[0], QuantizedScore)


def problem(size, seed=0):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(size, 6)).astype(np.float32)
    labels = rng.integers(0, 4, size)
    return rng.normal(size=(6, 4)).astype(np.float32), inputs, labels


def expected(w, inputs, labels):
    """Accuracy, mean cross-entropy and predictions in NumPy."""
    logits = np.asarray(inputs, np.float64) @ np.asarray(w, np.float64)
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    predictions = logits.argmax(axis=1)
    return {"accuracy": np.mean(predictions == labels), "loss": losses.mean(), "predictions": predictions}


def assert_same(found, wanted):
    assert set(found) == {"accuracy", "loss", "predictions"}
    assert isinstance(found["accuracy"], float)
    np.testing.assert_allclose(found["accuracy"], wanted["accuracy"], rtol=1e-12)
    np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-6)
    np.testing.assert_array_equal(found["predictions"], wanted["predictions"])


def linear(w, x):
    return x @ w


class TestClassifier:
    @pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (13, 4), (3, 500), (7, 7), (9, 1)])
    def test_equals_numpy(self, size, batch_size):
        w, inputs, labels = problem(size)
        evaluate = classifier(linear, batch_size=batch_size)
        assert_same(evaluate(w, inputs, labels), expected(w, inputs, labels))
        assert_same(evaluate(w, jnp.asarray(inputs), jnp.asarray(labels)), expected(w, inputs, labels))

    def test_compiles_once_and_never_sees_a_smaller_batch(self):
        w, inputs, labels = problem(13)
        shapes = []

        def apply_fn(w, x):
            shapes.append(x.shape)
            return x @ w

        evaluate = classifier(apply_fn, batch_size=5)
        for factor in (1.0, 2.0):
            assert_same(evaluate(w * factor, inputs, labels), expected(w * factor, inputs, labels))
        assert shapes == [(5, 6)]

    def test_what_fills_up_the_last_batch_does_not_count(self):
        w, inputs, labels = problem(5)
        inputs[-1] = 0
        inputs[-1, 0], w[0] = 30.0, [9, 0, 0, 0]  # repeated by the filling; wrong, with an enormous loss
        labels[-1] = 2
        assert_same(classifier(linear, batch_size=4)(w, inputs, labels), expected(w, inputs, labels))

    def test_loss_of_bfloat16_logits_is_wide(self):
        w, inputs, labels = problem(300)
        found = classifier(lambda w, x: (x @ w).astype(jnp.bfloat16), batch_size=64)(w, inputs, labels)
        logits = np.asarray((jnp.asarray(inputs) @ w).astype(jnp.bfloat16), np.float32)
        wanted = expected(np.eye(4), logits, labels)
        np.testing.assert_allclose(found["loss"], wanted["loss"], rtol=1e-5)
        np.testing.assert_array_equal(found["predictions"], wanted["predictions"])  # argmax: the first of equals
        assert found["accuracy"] == wanted["accuracy"]

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
    def test_type_of_labels_does_not_matter(self, dtype):
        w, inputs, labels = problem(9)
        assert_same(classifier(linear, batch_size=4)(w, inputs, labels.astype(dtype)), expected(w, inputs, labels))

    def test_report(self):
        calls = []
        classifier(linear, batch_size=4)(*problem(10), report=lambda *x: calls.append(x))
        assert calls == [(4, 10), (8, 10), (10, 10)]

    def test_in_a_sweep(self):
        w, inputs, labels = problem(30)
        evaluate = classifier(linear, batch_size=8)
        rows = quantize_and_evaluate(lambda w: evaluate(w, inputs, labels), jnp.asarray(w), bits=(8, 2))
        for row, bits in zip(rows, (None, 8, 2), strict=True):
            wanted = expected(w if bits is None else fake_quantize(w, bits), inputs, labels)
            np.testing.assert_allclose(row.metrics["accuracy"], wanted["accuracy"], rtol=1e-12)
            assert row.flipped == np.mean(wanted["predictions"] != expected(w, inputs, labels)["predictions"])
        assert rows[2].flipped > 0

    @pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8])
    @pytest.mark.parametrize("place", [0, 5, 9])
    @pytest.mark.parametrize("label", [-1, 4, 100])
    def test_label_that_is_no_class_is_refused_by_value_and_place(self, label, place, dtype):
        """Cross-entropy takes -1 for the last class, silently. The last batch is filled up with copies of its end."""
        w, inputs, labels = problem(10)
        labels = labels.astype(dtype)
        if label == -1 and dtype == np.uint8:
            label = 255
        labels[place] = label
        assert np.asarray(w).shape[1] == 4
        with pytest.raises(ValueError, match=rf"`labels` must be in 0..3; at {place} it is {label}\."):
            classifier(linear, batch_size=4)(w, inputs, labels)

    @pytest.mark.parametrize(
        ("call", "kind", "message"),
        [
            (lambda: classifier(linear, batch_size=0), ValueError, r"`classifier\(batch_size=...\)` .* >= 1; got 0"),
            (lambda: classifier(linear, batch_size=2.0), TypeError, r"`classifier\(batch_size=...\)` .* >= 1; got 2.0"),
            (
                lambda: classifier(linear)(np.ones((6, 4)), np.ones((3, 6)), np.ones(2, int)),
                ValueError,
                "`inputs` and `labels` must be as many, and some; got 3 and 2",
            ),
            (
                lambda: classifier(linear)(np.ones((6, 4)), np.ones((0, 6)), np.ones(0, int)),
                ValueError,
                "must be as many, and some; got 0 and 0",
            ),
            (
                lambda: classifier(linear)(np.ones((6, 4)), np.ones((2, 6)), np.ones(2)),
                TypeError,
                "`labels` must be integers; got float",
            ),
        ],
    )
    def test_errors(self, call, kind, message):
        with pytest.raises(kind, match=message):
            call()


class TestShardedClassifier:
    @pytest.fixture
    def mesh(self):
        return jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "model"))

    # Whole batches, a partial one, and a data set smaller than the batch that the shards do not divide.
    @pytest.mark.parametrize("size", [32, 37, 5])
    @pytest.mark.parametrize("spec", [("data", "model"), "data", None])
    def test_equals_one_device(self, mesh, spec, size):
        w, inputs, labels = problem(size)
        shapes = []

        def apply_fn(w, x):
            shapes.append(x.shape[0])
            return x @ w

        evaluate = classifier(apply_fn, batch_size=16, sharding=NamedSharding(mesh, PartitionSpec(spec)))
        assert_same(evaluate(w, inputs, labels), expected(w, inputs, labels))
        shards = {"data": 4, None: 1}.get(spec, 8)
        assert shapes == [16 if size > 16 else -(-size // shards) * shards]

    def test_weights_on_other_devices_are_copied(self, mesh):
        w, inputs, labels = problem(10)
        evaluate = classifier(linear, batch_size=8, sharding=NamedSharding(mesh, PartitionSpec(("data", "model"))))
        half = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        for placed in (
            jax.device_put(w, jax.devices()[5]),
            jax.device_put(w, NamedSharding(half, PartitionSpec("data"))),
            jax.device_put(w, NamedSharding(mesh, PartitionSpec("model", "data"))),
            jnp.asarray(w),
        ):
            assert_same(evaluate(placed, inputs, labels), expected(w, inputs, labels))
        on_device = jax.device_put((inputs, labels), jax.devices()[3])
        assert_same(evaluate(w, *on_device), expected(w, inputs, labels))

    def test_weights_sharded_over_the_same_devices_stay_where_they_are(self, mesh):
        w, inputs, labels = problem(16)
        sharding = NamedSharding(mesh, PartitionSpec("model", "data"))
        placed = jax.device_put(w, sharding)
        seen = []

        def apply_fn(w, x):
            jax.debug.inspect_array_sharding(w, callback=seen.append)
            return x @ w

        evaluate = classifier(apply_fn, batch_size=8, sharding=NamedSharding(mesh, PartitionSpec("data")))
        assert_same(evaluate(placed, inputs, labels), expected(w, inputs, labels))
        assert seen[0].is_equivalent_to(sharding, 2)

    def test_sweep(self, mesh):
        w, inputs, labels = problem(37)
        sharded = classifier(linear, batch_size=16, sharding=NamedSharding(mesh, PartitionSpec("data")))
        rows = quantize_and_evaluate(lambda w: sharded(w, inputs, labels), jnp.asarray(w), bits=(3,))
        one = quantize_and_evaluate(
            lambda w: classifier(linear, batch_size=16)(w, inputs, labels), jnp.asarray(w), bits=(3,)
        )
        for a, b in zip(rows, one, strict=True):
            assert (a.metrics["accuracy"], a.flipped, a.sqnr_db) == (b.metrics["accuracy"], b.flipped, b.sqnr_db)

    def test_batch_that_the_shards_do_not_divide(self, mesh):
        evaluate = classifier(linear, batch_size=10, sharding=NamedSharding(mesh, PartitionSpec("data")))
        with pytest.raises(ValueError, match=r"`classifier\(batch_size=...\)` must be divided by the 4 shards; got 10"):
            evaluate(*problem(20))


class TestResultsThatDiffer:
    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ({"a": 1.0}, {"b": 1.0}, r"got a, then b\."),
            ({"a": 1.0}, {"a": 1.0, "b": 2.0}, r"got a, then a, b\."),
            ({"a": 1.0, "b": 2.0}, {"a": 1.0}, r"got a, b, then a\."),
            ({"a": 1.0}, 1.0, r"got a, then value\."),
            # Each would count as flipped.
            ({"a": 1.0}, {"a": 1.0, "predictions": np.arange(3)}, r"got a, then a, predictions of shape \(3,\)\."),
            ({"a": 1.0, "predictions": np.arange(3)}, {"a": 1.0}, r"got a, predictions of shape \(3,\), then a\."),
            (
                {"predictions": np.arange(3)},
                {"predictions": np.arange(1)},
                r"\(3,\), then predictions of shape \(1,\)\.",
            ),
        ],
    )
    def test_results_that_differ_are_refused(self, first, second, message):
        results = itertools.chain([first], itertools.repeat(second))
        with pytest.raises(ValueError, match=r"must return the same metrics in every call; .*" + message):
            quantize_and_evaluate(lambda w: next(results), weights((2, 2)), bits=(4,))

    def test_a_metric_that_stops_being_a_scalar_is_refused(self):
        results = iter([{"a": 1.0}, {"a": jnp.ones(2)}])
        with pytest.raises(
            TypeError, match=r"`eval_fn\(...\)\['a'\]` must be a real scalar; got an array of shape \(2,\)"
        ):
            quantize_and_evaluate(lambda w: next(results), weights((2, 2)), bits=(4,))

    def test_the_order_of_metrics_does_not_matter(self):
        results = iter([{"a": 1.0, "b": 2.0}, {"b": 4.0, "a": 3.0}])
        row = quantize_and_evaluate(lambda w: next(results), weights((2, 2)), bits=(4,))[1]
        assert row.drop == {"a": -2.0, "b": -2.0}
