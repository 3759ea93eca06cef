"""Steps that see a Linen network run, and optimised rounding: identities, independent formulas, brute force."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import hero_jax
from hero_jax.quantize import QuantSpec, dequantize, fake_quantize, linen, quantize, rounding


class Net(nn.Module):
    """Every kind of layer: strided, grouped and depthwise convolutions, BatchNorm with and without a layer before."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.8)
        x = nn.relu(norm(name="bn1")(nn.Conv(6, (3, 3), strides=2, padding=1, use_bias=False, name="conv1")(x)))
        x = nn.relu(norm(name="bn2", epsilon=1e-3)(nn.Conv(4, (3, 2), feature_group_count=2, name="grouped")(x)))
        x = nn.Conv(4, (3, 3), feature_group_count=4, padding="VALID", name="depthwise")(x)
        x = norm(name="bn3")(nn.relu(x))
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.fixture(scope="module")
def network():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 10, 10, 3)), jnp.float32)
    net = Net()
    variables = jax.jit(net.init)(jax.random.key(1), x)
    variables = jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.random(a.shape), jnp.float32), variables)
    return net.apply, variables, x


def patches(x, kernel, stride, padding):
    """The inputs of every position in the order of the kernel's axes, by plain slicing."""
    height, width = kernel
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    rows = range(0, x.shape[1] - height + 1, stride)
    columns = range(0, x.shape[2] - width + 1, stride)
    return np.stack([x[:, i : i + height, j : j + width].reshape(len(x), -1) for i in rows for j in columns], 1)


class TestBatchNorm:
    def test_pairs_are_those_that_follow_immediately(self, network):
        apply, variables, x = network
        pairs = linen.batch_norm_pairs(apply, variables, jax.ShapeDtypeStruct(x.shape, x.dtype))
        assert pairs == {"conv1": ("bn1", 1e-5), "grouped": ("bn2", 1e-3)}

    def test_folding_keeps_the_function_and_moves_the_factor(self, network):
        apply, variables, x = network
        folded = linen.fold_batch_norm(variables, linen.batch_norm_pairs(apply, variables, x))
        assert jax.tree.structure(folded) == jax.tree.structure(variables)
        np.testing.assert_allclose(apply(folded, x), apply(variables, x), rtol=1e-4, atol=1e-5)
        factor = variables["params"]["bn2"]["scale"] / jnp.sqrt(variables["batch_stats"]["bn2"]["var"] + 1e-3)
        before, after = (v["params"]["grouped"] for v in (variables, folded))
        np.testing.assert_allclose(after["kernel"], before["kernel"] * factor, rtol=1e-6)
        np.testing.assert_allclose(after["bias"], before["bias"] * factor, rtol=1e-6)
        assert not np.allclose(before["kernel"], after["kernel"], rtol=0.01)
        np.testing.assert_array_equal(folded["params"]["head"]["kernel"], variables["params"]["head"]["kernel"])
        np.testing.assert_array_equal(folded["params"]["bn3"]["scale"], variables["params"]["bn3"]["scale"])

    def test_reestimated_statistics_are_those_of_all_the_data(self, network):
        apply, variables, x = network

        @jax.jit
        def update(stats, x):
            new = variables | {"batch_stats": stats}
            return apply(new, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        found = linen.reestimate_batch_stats(update, variables["batch_stats"], [x[:4], x[4:]])
        outputs = nn.Conv(6, (3, 3), strides=2, padding=1, use_bias=False).apply(
            {"params": variables["params"]["conv1"]}, x
        )
        np.testing.assert_allclose(found["bn1"]["mean"], outputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["bn1"]["var"], outputs.var((0, 1, 2)), rtol=1e-4)
        assert jax.tree.structure(found) == jax.tree.structure(variables["batch_stats"])

    def test_errors(self, network):
        _, variables, _ = network
        with pytest.raises(ValueError, match=r"it has no 'conv9/kernel'"):
            linen.fold_batch_norm(variables, {"conv9": linen.BatchNormPair("bn1", 1e-5)})
        with pytest.raises(ValueError, match="at least one batch"):
            linen.reestimate_batch_stats(lambda s, x: s, variables["batch_stats"], [])


class TestActivations:
    def test_ranges_hold_all_outputs_and_zero(self, network):
        apply, variables, x = network
        ranges = linen.activation_ranges(apply, variables, [x[:5], x[5:]])
        assert set(ranges) == {"conv1", "grouped", "depthwise", "head"}
        logits = apply(variables, x)
        np.testing.assert_allclose(ranges["head"], (min(0, logits.min()), max(0, logits.max())), rtol=1e-5)

    def test_quantized_outputs_are_on_the_grid_and_approach_the_exact_ones(self, network):
        apply, variables, x = network
        ranges = linen.activation_ranges(apply, variables, [x])
        exact = apply(variables, x)
        errors = []
        for bits in (3, 5, 8):
            logits = jax.jit(linen.quantized_activations(apply, ranges, bits))(variables, x)
            assert len(np.unique(np.asarray(logits))) <= 2**bits
            errors.append(float(jnp.abs(logits - exact).max()))
        assert errors[0] > errors[1] > errors[2] > 0
        assert errors[2] < 0.05 * float(jnp.abs(exact).max())
        # Only what has a range is rounded: the head alone errs by half a step at most.
        low, high = ranges["head"]
        logits = linen.quantized_activations(apply, {"head": ranges["head"]}, 4)(variables, x)
        assert jnp.abs(logits - exact).max() <= 0.5001 * (high - low) / 15

    def test_inputs_and_batch_norms_against_the_formula(self):
        """A Dense, its BatchNorm, a relu and another Dense, by hand."""

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.BatchNorm(use_running_average=True, name="norm")(nn.Dense(6, name="first")(x))
                return nn.Dense(3, name="second")(inputs=nn.relu(x))

        x = jax.random.normal(jax.random.key(0), (20, 4))
        variables = jax.tree.map(lambda a: a + 0.3, Net().init(jax.random.key(1), x))
        pairs = linen.batch_norm_pairs(Net().apply, variables, x)
        ranges = linen.activation_ranges(Net().apply, variables, [x[:9], x[9:]], pairs=pairs, inputs=True)
        assert set(ranges) == {"first:inputs", "norm", "second:inputs", "second"}
        assert ranges.left_out == {}

        first, second = (variables["params"][name] for name in ("first", "second"))
        norm, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]

        def forward(x, rounded):
            y = rounded("first:inputs", x) @ first["kernel"] + first["bias"]
            y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
            y = rounded("second:inputs", np.maximum(rounded("norm", y), 0))
            return rounded("second", y @ second["kernel"] + second["bias"])

        seen = {}
        forward(x, lambda key, y: seen.setdefault(key, y))
        for key, y in seen.items():
            np.testing.assert_allclose(ranges[key], (min(0, y.min()), max(0, y.max())), rtol=1e-5)
        given = {key: ranges[key] for key in ("first:inputs", "norm", "second:inputs")}

        def nearest_level(key, y):
            if key not in given:
                return y
            low, high = (float(end) for end in given[key])
            step = (high - low) / 15
            levels = (np.arange(16) - np.round(-low / step)) * step
            return levels[np.abs(np.asarray(y)[..., None] - levels).argmin(-1)]

        found = linen.quantized_activations(Net().apply, given, 4)(variables, x)
        np.testing.assert_allclose(found, forward(x, nearest_level), rtol=1e-4, atol=1e-5)

    def test_inputs_of_integers_have_no_range(self):
        net, x = nn.Dense(3), jnp.arange(6).reshape(2, 3)
        variables = net.init(jax.random.key(0), x)
        assert set(linen.activation_ranges(net.apply, variables, [x], inputs=True)) == {""}
        assert set(linen.activation_ranges(net.apply, variables, [1.0 * x], inputs=True)) == {"", ":inputs"}

    def test_errors(self, network):
        apply, variables, x = network
        with pytest.raises(ValueError, match="at least one batch"):
            linen.activation_ranges(apply, variables, [])
        with pytest.raises(ValueError, match="must be a Linen network with a Conv or a Dense"):
            linen.activation_ranges(lambda v, x: x, variables, [x])
        with pytest.raises(TypeError, match="must not be compiled"):
            linen.activation_ranges(jax.jit(apply), variables, [x])
        with pytest.raises(TypeError, match="must not be compiled"):
            linen.batch_norm_pairs(jax.jit(apply), variables, x)
        with pytest.raises(ValueError, match=r"`quantized_activations\(bits=...\)` .* got 1"):
            linen.quantized_activations(apply, {}, 1)


class TestBiasCorrection:
    def test_takes_the_mean_error_of_every_layer_away(self, network):
        apply, variables, x = network
        pairs = linen.batch_norm_pairs(apply, variables, x)
        quantized = fake_quantize(variables["params"], 3)
        corrected = linen.bias_correction(apply, variables, [x[:5], x[5:]], pairs)(quantized)
        # The first layer has no bias: its shift is in the mean of the BatchNorm, computed here by hand.
        inputs = patches(x, (3, 3), 2, ((1, 1), (1, 1)))
        change = np.asarray(quantized["conv1"]["kernel"] - variables["params"]["conv1"]["kernel"], np.float64)
        shift = (inputs @ change.reshape(27, 6)).mean((0, 1))
        moved = corrected["batch_stats"]["bn1"]["mean"] - variables["batch_stats"]["bn1"]["mean"]
        np.testing.assert_allclose(moved, shift, rtol=1e-3, atol=1e-6)
        assert not np.allclose(corrected["params"]["grouped"]["bias"], variables["params"]["grouped"]["bias"])
        np.testing.assert_array_equal(corrected["batch_stats"]["bn2"]["mean"], variables["batch_stats"]["bn2"]["mean"])

    def test_a_single_layer_has_no_mean_error_left(self):
        x = jax.random.normal(jax.random.key(0), (40, 5)) + 1
        layer = nn.Dense(3)
        variables = layer.init(jax.random.key(1), x)

        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(3, name="dense")(x)

        variables = {"params": {"dense": variables["params"]}}
        quantized = fake_quantize(variables["params"], 2)
        corrected = linen.bias_correction(Outer().apply, variables, [x])(quantized)
        before, after = (
            Outer().apply(v, x).mean(0) - Outer().apply(variables, x).mean(0)
            for v in ({"params": quantized}, corrected)
        )
        assert jnp.abs(before).max() > 0.01
        np.testing.assert_allclose(after, 0, atol=1e-6)

    def test_takes_parameters_and_not_variables(self):
        variables = nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))
        correct = linen.bias_correction(nn.Dense(2).apply, variables, [jnp.ones((1, 3))])
        with pytest.raises(hero_jax.ArgumentError, match=r"`quantized` must have the leaves .*; it lacks kernel\.$"):
            correct(variables)

    def test_nothing_to_correct(self):
        class Bare(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(2, use_bias=False, name="dense")(x)

        variables = Bare().init(jax.random.key(0), jnp.ones((1, 3)))
        with pytest.raises(ValueError, match="no Conv or Dense has its own bias"):
            linen.bias_correction(Bare().apply, variables, [jnp.ones((1, 3))])(variables["params"])


class TestGrams:
    def test_equal_those_of_plain_patches(self, network):
        apply, variables, x = network
        grams = linen.input_grams(apply, variables, [x[:5], x[5:]])
        inputs = patches(x, (3, 3), 2, ((1, 1), (1, 1))).reshape(-1, 27)
        np.testing.assert_allclose(grams["conv1/kernel"][0], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
        shapes = {path: gram.shape for path, gram in grams.items()}
        assert shapes == {
            "conv1/kernel": (1, 27, 27),
            "grouped/kernel": (2, 18, 18),
            "depthwise/kernel": (4, 9, 9),
            "head/kernel": (1, 4, 4),
        }

    @pytest.mark.parametrize("name", ["conv1", "grouped", "depthwise", "head"])
    def test_objective_is_the_mean_squared_change_of_the_outputs(self, network, name):
        apply, variables, x = network
        kernel = variables["params"][name]["kernel"]
        changed = fake_quantize(kernel, 2)
        seen = {}

        def outputs(variables):
            state = apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1]
            return state["intermediates"][name]["__call__"][0]

        params = variables["params"]
        seen = [
            outputs(variables | {"params": params | {name: params[name] | {"kernel": k}}}) for k in (kernel, changed)
        ]
        change = (seen[1] - seen[0]).reshape(-1, kernel.shape[-1])
        gram = linen.input_grams(apply, variables, [x])[f"{name}/kernel"]
        expected = (change**2).sum(1).mean()
        np.testing.assert_allclose(rounding.output_error(kernel, changed, gram), expected, rtol=1e-3)


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def random_gram(seed, size, groups=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(groups, size, size // 2 + 1)) @ np.ones((size // 2 + 1, 3 * size))
    x = x + 0.5 * rng.normal(size=(groups, size, 3 * size))
    return jnp.asarray(x @ x.transpose(0, 2, 1) / x.shape[-1], jnp.float32)


SPECS = [
    QuantSpec(),
    QuantSpec("tensor", "stretched"),
    QuantSpec("channel", "full"),
    QuantSpec("group", "full", symmetric=False, group_size=2),
    QuantSpec(range_rule="percentile", percentile=90.0),
]


class TestOptimizedRounding:
    @pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
    @pytest.mark.parametrize("bits", [2, 4])
    def test_never_worse_than_nearest_and_each_weight_on_one_of_its_neighbours(self, spec, bits):
        w = {"kernel": normal(0, (8, 5)), "bias": jnp.ones(5)}
        gram = random_gram(1, 8)
        found = rounding.optimized(w, bits, {"kernel": gram}, spec)
        near = fake_quantize(w, bits, spec)
        assert rounding.output_error(w["kernel"], found["kernel"], gram) < rounding.output_error(
            w["kernel"], near["kernel"], gram
        )
        np.testing.assert_array_equal(found["bias"], w["bias"])
        q = quantize(w, bits, spec)["kernel"]
        scale = dequantize(q) * 0 + _step(q, w["kernel"].shape)
        steps = (found["kernel"] - near["kernel"]) / scale
        np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)
        assert np.abs(steps).max() <= 1.001
        inside = np.abs(near["kernel"] - w["kernel"]) <= 0.5001 * scale
        assert (np.abs(found["kernel"] - w["kernel"])[inside] <= 1.0001 * scale[inside]).all()

    def test_no_single_flip_improves_and_small_problems_are_near_the_optimum(self):
        ratios = []
        optimized = jax.jit(lambda w, gram: rounding.optimized({"kernel": w}, 3, {"kernel": gram})["kernel"])
        for seed in range(20):
            w = normal(seed, (7, 1))
            gram = random_gram(100 + seed, 7)
            found = optimized(w, gram)
            scale = float(quantize(w, 3).scale[0, 0])
            low, high = np.floor(np.asarray(w) / scale), np.ceil(np.asarray(w) / scale)
            matrix = np.asarray(gram[0], np.float64)

            def error(codes, w=np.asarray(w, np.float64)[:, 0], scale=scale, matrix=matrix):
                rest = scale * codes - w
                return rest @ matrix @ rest

            codes = np.round(np.asarray(found)[:, 0] / scale)
            best = error(codes)
            for i in range(7):
                other = codes.copy()
                other[i] = low[i, 0] + high[i, 0] - codes[i]
                assert error(other) >= best * (1 - 1e-5)
            every = [error(np.array(c)) for c in itertools.product(*zip(low[:, 0], high[:, 0], strict=True))]
            ratios.append(best / min(every))
        assert np.median(ratios) < 1.3

    def test_an_uncorrelated_input_gives_nearest(self):
        w = normal(0, (3, 3, 2, 4))
        gram = jnp.diag(jnp.arange(1.0, 19.0))[None]
        found = rounding.optimized({"kernel": w}, 3, {"kernel": gram})
        np.testing.assert_allclose(found["kernel"], fake_quantize(w, 3), rtol=1e-6)

    def test_groups_of_a_convolution_are_apart(self):
        w = normal(0, (6, 4))
        grams = random_gram(1, 6, groups=2)
        together = rounding.optimized({"kernel": w}, 3, {"kernel": grams})["kernel"]
        for i in range(2):
            part = w[:, 2 * i : 2 * i + 2]
            alone = rounding.optimized({"kernel": part}, 3, {"kernel": grams[i : i + 1]})["kernel"]
            np.testing.assert_allclose(together[:, 2 * i : 2 * i + 2], alone, rtol=1e-6)

    def test_bits_may_be_traced_and_zero_inputs_do_no_harm(self):
        w = {"kernel": normal(0, (4, 3)).at[:, 1].set(0.0)}
        grams = {"kernel": random_gram(1, 4).at[:, 2].set(0.0).at[:, :, 2].set(0.0)}
        compiled = jax.jit(lambda bits: rounding.optimized(w, bits, grams))
        for bits in (2, 5):
            np.testing.assert_allclose(
                compiled(bits)["kernel"], rounding.optimized(w, bits, grams)["kernel"], rtol=1e-5
            )
        assert (compiled(2)["kernel"][:, 1] == 0).all()
        assert np.isfinite(compiled(2)["kernel"]).all()

    def test_lowers_the_error_of_a_network(self, network):
        apply, variables, x = network
        params = variables["params"]
        grams = linen.input_grams(apply, variables, [x])
        exact = apply(variables, x)
        near, found = fake_quantize(params, 3), rounding.optimized(params, 3, grams)
        errors = [float(jnp.linalg.norm(apply(variables | {"params": p}, x) - exact)) for p in (near, found)]
        assert errors[1] < errors[0]

    @pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec("tensor"), SPECS[3]], ids=lambda s: s.name)
    def test_stacked_layers_are_as_if_alone(self, spec):
        w = {"kernel": normal(0, (3, 8, 5)) * jnp.array([1.0, 10.0, 0.1])[:, None, None]}
        grams = jnp.stack([random_gram(i, 8) for i in range(3)])
        stacked = dataclasses.replace(spec, stacked=("kernel",))
        together = rounding.quantized(w, 3, {"kernel": grams}, stacked)["kernel"]
        for i in range(3):
            alone = rounding.quantized({"kernel": w["kernel"][i]}, 3, {"kernel": grams[i]}, spec)["kernel"]
            np.testing.assert_array_equal(together.codes[i], alone.codes)
            np.testing.assert_array_equal(together.scale[i], alone.scale)
        near = quantize(w, 3, stacked)["kernel"]
        np.testing.assert_array_equal(together.scale, near.scale)
        assert (together.codes != near.codes).any((1, 2)).all()

    @pytest.mark.parametrize(("shape", "axes"), [((6, 2, 4), 1), ((2, 3, 4), 2), ((2, 2, 5, 3), 2)])
    def test_the_size_of_the_matrix_tells_the_inputs_of_a_kernel(self, shape, axes):
        w, inputs = normal(0, shape), int(np.prod(shape[:axes]))
        gram = random_gram(1, inputs)
        found = rounding.optimized({"kernel": w}, 3, {"kernel": gram})["kernel"]
        near = fake_quantize(w, 3)
        # The change of the outputs, multiplied out. Each output alone is a kernel of its own.
        errors = []
        for w_hat in (near, found):
            change = np.asarray(w_hat - w, np.float64).reshape(inputs, -1)
            errors.append(np.sum(change * (np.asarray(gram[0], np.float64) @ change)))
            np.testing.assert_allclose(rounding.output_error(w, w_hat, gram), errors[-1], rtol=1e-4)
        assert errors[1] < 0.9 * errors[0]
        scale = quantize(w, 3).scale.reshape(shape[-1])
        flat = found.reshape(inputs, -1)
        for o in (0, flat.shape[1] - 1):
            column = w.reshape(inputs, -1)[:, o : o + 1]
            position = np.asarray(column / scale[o % shape[-1]])
            codes = np.asarray(flat[:, o : o + 1] / scale[o % shape[-1]])
            assert (np.abs(codes - position) < 1.001).all()
        # A change of one weight alone improves none of them.
        best = errors[1]
        for index in np.ndindex(*shape):
            step, q = float(scale[index[-1]]), float(w[index]) / float(scale[index[-1]])
            other = np.asarray(found, np.float64)
            other[index] = step * (np.floor(q) + np.ceil(q)) - other[index]
            change = (other - np.asarray(w, np.float64)).reshape(inputs, -1)
            if abs(q) <= 3:
                assert np.sum(change * (np.asarray(gram[0], np.float64) @ change)) >= best * (1 - 1e-5)

    @pytest.mark.parametrize(
        ("grams", "message"),
        [
            ({"other": jnp.eye(3)[None]}, "must have a path that is quantized"),
            ({"kernel": jnp.eye(3)}, r"must be \(groups, K, K\) with K = 4 .* got \(3, 3\)"),
            ({"kernel": jnp.ones((2, 4, 4))}, "groups that divide the output channels"),
            ({"kernel": jnp.ones((0, 4, 4))}, "groups that divide the output channels"),
        ],
    )
    def test_errors(self, grams, message):
        with pytest.raises(ValueError, match=message):
            rounding.optimized({"kernel": jnp.ones((4, 3))}, 3, grams)

    @pytest.mark.parametrize(
        ("shape", "gram", "spec", "message"),
        [
            (
                (2, 3, 4),
                (1, 4, 4),
                QuantSpec(),
                r"must be \(groups, K, K\) with K = 6 or 2 and groups .* got \(1, 4, 4\)",
            ),
            # Groups are of the last axis: with one axis of inputs of two there are none.
            ((2, 4, 4), (2, 2, 2), QuantSpec(), r"with K = 8 or 2 and groups .* got \(2, 2, 2\)"),
            ((2, 4, 3), (1, 4, 4), QuantSpec(stacked=("kernel",)), r"must be \(2, groups, K, K\) with K = 4 and"),
            ((2, 4, 3), (3, 1, 4, 4), QuantSpec(stacked=("kernel",)), r"must be \(2, groups, K, K\) .* \(3, 1, 4, 4\)"),
        ],
    )
    def test_matrices_that_do_not_fit(self, shape, gram, spec, message):
        with pytest.raises(ValueError, match=message):
            rounding.optimized({"kernel": jnp.ones(shape)}, 3, {"kernel": jnp.ones(gram)}, spec)


def _step(q, shape):
    repeats = [n // m for n, m in zip(shape, q.scale.shape, strict=True)]
    scale = q.scale
    for axis, n in enumerate(repeats):
        scale = jnp.repeat(scale, n, axis)
    return np.asarray(scale)


class Twice(nn.Module):
    """A layer that is called twice."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(5, name="dense")
        return layer(10.0 * layer(inputs=x))


class Shared(nn.Module):
    """Two layers before one BatchNorm, and one layer before two."""

    @nn.compact
    def __call__(self, x):
        norm, layer = nn.BatchNorm(True, name="bn"), nn.Dense(4, name="both")
        y = norm(nn.Dense(4, name="a")(x)) + norm(nn.Dense(4, name="b")(x))
        return y + nn.BatchNorm(True, name="one")(layer(x)) + nn.BatchNorm(True, name="two")(layer(2 * x))


class Remat(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat(nn.Dense)(3, name="dense")(x)


class TestSharedAndWrappedModules:
    def test_all_calls_of_a_layer_count(self):
        x = normal(0, (9, 5))
        variables = Twice().init(jax.random.key(1), x)
        kernel, bias = (variables["params"]["dense"][name] for name in ("kernel", "bias"))
        inputs = jnp.concatenate([x, 10 * (x @ kernel + bias)])
        gram = linen.input_grams(Twice().apply, variables, [x])["dense/kernel"][0]
        np.testing.assert_allclose(gram, inputs.T @ inputs / 18, rtol=1e-4)
        quantized = fake_quantize(variables["params"], 2)
        corrected = linen.bias_correction(Twice().apply, variables, [x])(quantized)
        shift = (inputs @ (quantized["dense"]["kernel"] - kernel)).mean(0)
        np.testing.assert_allclose(bias - corrected["params"]["dense"]["bias"], shift, rtol=1e-3, atol=1e-5)

    def test_a_network_that_is_one_layer(self):
        x = normal(0, (9, 5))
        variables = nn.Dense(2).init(jax.random.key(1), x)
        assert set(linen.input_grams(nn.Dense(2).apply, variables, [x])) == {"kernel"}

    def test_shared_batch_norms_are_no_pairs(self):
        x = jnp.ones((3, 4))
        variables = Shared().init(jax.random.key(0), x)
        assert linen.batch_norm_pairs(Shared().apply, variables, x) == {}
        pair = linen.BatchNormPair("bn", 1e-5)
        with pytest.raises(ValueError, match="must not name a BatchNorm twice; it does 'bn'"):
            linen.fold_batch_norm(variables, {"a": pair, "b": pair})

    def test_layers_inside_transformations_are_refused(self):
        x = jnp.ones((3, 4))
        variables = Remat().init(jax.random.key(0), x)
        with pytest.raises(ValueError, match=r"'dense' is inside jit, nn\.scan or nn\.remat"):
            linen.activation_ranges(Remat().apply, variables, [x])
        inner = jax.jit(nn.Dense(2).apply)
        variables = nn.Dense(2).init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="is inside jit"):
            linen.quantized_activations(lambda v, x: inner(v, x), {}, 4)(variables, x)

    def test_stacked_layers_are_not_folded(self):
        params = {"dense": {"kernel": jnp.ones((5, 5, 5))}, "bn": {"scale": jnp.ones((5, 5))}}
        stats = {"bn": {"mean": jnp.zeros((5, 5)), "var": jnp.ones((5, 5))}}
        with pytest.raises(ValueError, match=r"not stacked; 'bn' has statistics of shape \(5, 5\)"):
            linen.fold_batch_norm({"params": params, "batch_stats": stats}, {"dense": linen.BatchNormPair("bn", 1e-5)})

    def test_reestimation_is_exact_far_from_one_and_refuses_evaluation_mode(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, train=False):
                return nn.BatchNorm(not train, momentum=0.99, name="bn")(x)

        x = 4000.0 * normal(0, (50, 3)) + 9000
        stats = Net().init(jax.random.key(1), x)["batch_stats"]
        params = Net().init(jax.random.key(1), x)["params"]

        def update(stats, x, train=True):
            variables = {"params": params, "batch_stats": stats}
            return Net().apply(variables, x, train=train, mutable=["batch_stats"])[1]["batch_stats"]

        found = linen.reestimate_batch_stats(update, stats, [x])
        np.testing.assert_allclose(found["bn"]["var"], np.var(np.asarray(x, np.float64), axis=0), rtol=1e-3)
        with pytest.raises(ValueError, match="must move the statistics"):
            linen.reestimate_batch_stats(functools.partial(update, train=False), stats, [x])

    def test_more_sweeps_do_not_hurt(self):
        w = {"kernel": normal(11, (12, 3))}
        grams = {"kernel": random_gram(1, 12)}
        errors = [
            float(
                rounding.output_error(
                    w["kernel"], rounding.optimized(w, 3, grams, num_sweeps=n)["kernel"], grams["kernel"]
                )
            )
            for n in (1, 2, 8)
        ]
        assert errors[0] > errors[1] >= errors[2]
