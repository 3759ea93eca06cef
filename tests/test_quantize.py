"""The quantizer: grids by hand, a loop in NumPy and qwix as oracles, identities, invariances, edges and errors."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from hero_jax.quantize import (
    GRANULARITIES,
    GRIDS,
    PRESETS,
    QuantizedArray,
    QuantSpec,
    _grid,
    dequantize,
    fake_quantize,
    named,
    quantize,
    quantize_and_evaluate,
    rounding_noise,
)

SPECS = [
    QuantSpec(granularity, grid) for granularity in ("tensor", "channel") for grid in ("narrow", "full", "stretched")
]
MATRIX_BITS = (2, 3, 4, 5, 6, 7, 8, 12, 16)


def kinds(rules=("max", "percentile", "mse"), group_size=2):
    """Every granularity x grid x range rule."""
    return [
        QuantSpec(
            granularity,
            "full" if grid == "asymmetric" else grid,
            symmetric=grid != "asymmetric",
            range_rule=rule,
            percentile=90.0 if rule == "percentile" else None,
            group_size=group_size if granularity == "group" else None,
        )
        for granularity in GRANULARITIES
        for grid in (*GRIDS, "asymmetric")
        for rule in rules
    ]


# Every grid with every granularity, and every range rule with each of these: one rule for each of the 12.
PAIRS = [spec for i, spec in enumerate(kinds()) if i % 3 == (i // 12 + i // 3) % 3]


def name_of(spec):
    return spec.name


def weights(shape=(6, 4), seed=0, dtype=jnp.float32):
    """Normal weights. Most tests share their shapes, so that few operations are compiled."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def blocks(shape, spec):
    """Index of the entries that share a scale, for each scale."""
    everything = (slice(None),)
    if len(shape) < 2 or spec.granularity == "tensor":
        yield everything * len(shape)
        return
    for o in range(shape[-1]):
        if spec.granularity == "channel":
            yield (..., o)
            continue
        size = min(spec.group_size, shape[-2])
        for position in np.ndindex(shape[:-2]):
            for start in range(0, shape[-2], size):
                yield (*position, slice(start, start + size), o)


def reference_of_range(w, low, high, bits, spec):
    """w_hat of the entries w for ranges [low, high] of shape (n, 1). Scale and zero point are float32."""
    half = 2 ** (bits - 1)
    lowest, highest = (1 - half if spec.grid == "narrow" else -half), half - 1
    if spec.symmetric:
        steps = {"narrow": half - 1, "full": half, "stretched": half - 0.5}[spec.grid]
        scale, zero_point = (high / steps).astype(np.float32), 0
    else:
        scale = ((high - low) / (2 * half - 1)).astype(np.float32)
        zero_point = np.round(np.float32(-half) - (low / scale).astype(np.float32))
    codes = np.round(w / scale.astype(w.dtype) + zero_point)
    return scale.astype(w.dtype) * (np.clip(codes, lowest, highest) - zero_point)


def reference(w, bits, spec):
    """The docstring of `QuantSpec` in loops, in the type of w; no channel may be zero."""
    w = np.asarray(w)
    result = np.full_like(w, np.nan)
    for block in blocks(w.shape, spec):
        x = w[block].ravel()
        if spec.range_rule == "percentile":
            p = spec.percentile / 100
            high = np.quantile(np.abs(x) if spec.symmetric else x, p)
            low = -high if spec.symmetric else np.quantile(x, 1 - p)
        else:
            high = np.abs(x).max() if spec.symmetric else x.max()
            low = -high if spec.symmetric else x.min()
        low, high = min(low, 0), max(high, 0)
        fractions = np.ones((1, 1), w.dtype)
        if spec.range_rule == "mse":
            fractions = np.arange(1, (100 if spec.symmetric else 80) + 1, dtype=w.dtype)[:, None] / 80
        found = reference_of_range(x, low * fractions, high * fractions, bits, spec)
        best = np.sum((found - x) ** 2, axis=1).argmin()
        result[block] = found[best].reshape(w[block].shape)
    return result


def scales_of(q):
    """Scale and zero point of a QuantizedArray, in the shape of its codes."""
    shape = q.codes.shape
    zeros = np.zeros_like(q.scale) if q.zero_point is None else q.zero_point

    def expand(x):
        x = np.asarray(x, np.float64)
        for axis, (full, n) in enumerate(zip(shape, x.shape, strict=True)):
            x = np.repeat(x, full // n, axis=axis)
        return x

    return expand(q.scale), expand(zeros)


class TestKnownAnswers:
    @pytest.mark.parametrize(
        ("grid", "bits", "expected"),
        [
            # max |w| = 6; scale 6 / 1, codes -1..1
            ("narrow", 2, [0.0, 6.0, -6.0, 0.0, 0.0]),
            # scale 6 / 3, codes -3..3
            ("narrow", 3, [2.0, 6.0, -4.0, 0.0, 2.0]),
            # scale 6 / 2, codes -2..1: the largest is clipped
            ("full", 2, [0.0, 3.0, -3.0, 0.0, 3.0]),
            # scale 6 / 1.5, codes -2..1
            ("stretched", 2, [0.0, 4.0, -4.0, 0.0, 4.0]),
            # scale 6 / 3.5, codes -4..3
            ("stretched", 3, [12 / 7, 36 / 7, -36 / 7, 0.0, 12 / 7]),
        ],
    )
    def test_grid_by_hand(self, grid, bits, expected):
        w = jnp.array([[1.4], [6.0], [-4.4], [0.0], [2.2]])
        result = fake_quantize(w, bits, QuantSpec("tensor", grid))
        np.testing.assert_allclose(result[:, 0], expected, rtol=1e-6)

    def test_rounds_half_to_even(self):
        w = jnp.array([[0.5], [1.5], [2.5], [-0.5], [-2.5], [7.0]])
        np.testing.assert_array_equal(fake_quantize(w, 4)[:, 0], [0, 2, 2, 0, -2, 7])

    def test_channel_is_the_last_axis(self):
        w = weights((3, 3, 2, 4)) * jnp.array([1.0, 10.0, 0.1, 3.0])
        together = fake_quantize(w, 3, QuantSpec("channel"))
        for i in range(4):
            alone = fake_quantize(w[..., i : i + 1], 3, QuantSpec("tensor"))
            np.testing.assert_array_equal(together[..., i : i + 1], alone)
        assert not np.allclose(together, fake_quantize(w, 3, QuantSpec("tensor")))

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("granularity", ["tensor", "channel"])
    def test_stretched_grid_equals_qwix(self, bits, granularity):
        w = weights((24, 6))
        axes = (1,) if granularity == "channel" else ()
        quantized = qwix.quantize(w, f"int{bits}", channelwise_axes=axes)
        expected = qwix.dequantize(quantized)
        np.testing.assert_allclose(
            fake_quantize(w, bits, QuantSpec(granularity, "stretched")), expected, rtol=1e-6, atol=1e-7
        )


class TestIdentities:
    @pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
    @pytest.mark.parametrize("bits", [2, 3, 5, 8, 16])
    def test_error_levels_and_zero(self, spec, bits):
        w = weights((24, 6)).at[4, 1].set(0.0)
        result = fake_quantize(w, bits, spec)
        assert result[4, 1] == 0
        w, result = np.asarray(w), np.asarray(result)
        absmax = np.abs(w).max(axis=0, keepdims=True) if spec.granularity == "channel" else np.abs(w).max()
        half = 2 ** (bits - 1)
        steps = {"narrow": half - 1, "full": half, "stretched": half - 0.5}[spec.grid]
        # Half a step inside the range; a whole one where the top of the full grid clips.
        limit = np.where(w > (half - 1) * absmax / steps, 1.0, 0.5) * absmax / steps
        assert (np.abs(result - w) <= limit * (1 + 1e-3 * bits)).all()
        for channel in range(6):
            assert len(np.unique(result[:, channel])) <= 2**bits

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_a_grid_point_of_the_narrow_grid_is_a_fixed_point(self, bits):
        once = fake_quantize(weights((24, 6)), bits)
        np.testing.assert_allclose(fake_quantize(once, bits), once, rtol=3e-7)

    def test_is_odd_and_scales_with_the_weights_on_the_narrow_grid(self):
        w = weights()
        np.testing.assert_array_equal(fake_quantize(-w, 3), -fake_quantize(w, 3))
        np.testing.assert_array_equal(fake_quantize(4.0 * w, 3), 4.0 * fake_quantize(w, 3))

    def test_more_bits_err_less(self):
        w = weights((24, 6))
        errors = [np.linalg.norm(fake_quantize(w, b) - w) for b in (2, 3, 4, 6, 8, 12)]
        assert all(a > b for a, b in itertools.pairwise(errors))

    @pytest.mark.parametrize("bits", [2, 3])
    def test_stretched_grid_errs_less_than_the_narrow_one_on_normal_weights(self, bits):
        w = weights((500, 40))
        narrow, stretched = (
            np.sqrt(np.mean((fake_quantize(w, bits, QuantSpec("channel", grid)) - w) ** 2))
            for grid in ("narrow", "stretched")
        )
        assert stretched < 0.9 * narrow


class TestReference:
    @pytest.mark.parametrize("spec", [*PAIRS, QuantSpec("group", group_size=7)], ids=name_of)
    def test_equals_the_loops(self, x64, spec):
        # Float64: float32 ties (w / scale within an ulp of a half) do not occur, so that every code must be the same.
        rng = np.random.default_rng(3)
        shapes = {"matrix": (6, 5), "conv": (3, 3, 6, 2), "depthwise": (3, 3, 1, 5)}
        params = {name: rng.normal(0.1, 0.7, shape) for name, shape in shapes.items()}
        quantized = jax.jit(lambda params, bits: fake_quantize(params, bits, spec))
        for bits in MATRIX_BITS:
            result = quantized(params, bits)
            for name, w in params.items():
                np.testing.assert_allclose(result[name], reference(w, bits, spec), rtol=1e-12, err_msg=f"{name} {bits}")

    @pytest.mark.parametrize("spec", kinds(rules=("max",)), ids=name_of)
    def test_equals_the_loops_in_float32(self, spec):
        # XLA divides by a broadcast scale by multiplying with its reciprocal, an ulp from the quotient: codes agree but
        # where w / scale is a half to a few ulps. On the stretched grid every largest weight is such a tie.
        w = np.asarray(weights((6, 40)) + 0.1)
        for bits in (2, 4, 8):
            q = quantize(w, bits, spec)
            expected, (scale, zero_point) = reference(w, bits, spec), scales_of(q)
            position = np.asarray(w, np.float64) / scale + zero_point
            is_tie = np.abs(np.abs(position - np.floor(position)) - 0.5) < 1e-6 * (1 + np.abs(position))
            result = fake_quantize(w, bits, spec)
            np.testing.assert_allclose(result[~is_tie], expected[~is_tie], rtol=1e-6)
            assert (np.abs(result - expected)[is_tie] <= 1.001 * scale[is_tie]).all()
            if spec.grid != "stretched":
                assert is_tie.mean() < 0.01

    def test_blocks_are_a_partition(self):
        for spec in (*kinds(rules=("max",)), QuantSpec("group", group_size=7)):
            count, counts = np.zeros((3, 3, 6, 2)), []
            for block in blocks(count.shape, spec):
                count[block] += 1
                counts.append(count[block].size)
            np.testing.assert_array_equal(count, 1)
            size = {"tensor": 108, "channel": 54, "group": min(spec.group_size or 1, 6)}[spec.granularity]
            assert counts == [size] * (108 // size)

    def test_specifications_differ(self):
        # Else the comparison above might compare nothing.
        w = np.random.default_rng(3).normal(0.1, 0.7, (6, 5))
        results = [reference(w, 3, spec) for spec in kinds()]
        for (i, a), (j, b) in itertools.combinations(enumerate(results), 2):
            assert not np.allclose(a, b), (i, j)


class TestAsymmetric:
    SPEC = PRESETS["asymmetric"]

    def test_by_hand_at_2_bits(self):
        # lo = -1, hi = 0.5: scale 0.5, zero point -2 + 2 = 0, codes -2..1
        w = jnp.array([[-1.0], [0.5], [0.2], [-0.3], [-0.6]])
        np.testing.assert_array_equal(fake_quantize(w, 2, self.SPEC)[:, 0], [-1.0, 0.5, 0.0, -0.5, -0.5])
        q = quantize(w, 2, self.SPEC)
        np.testing.assert_array_equal(q.codes[:, 0], [-2, 1, 0, -1, -1])
        assert (q.scale.item(), q.zero_point.item()) == (0.5, 0)

    def test_range_of_one_sign_reaches_to_zero(self):
        # lo = 0, hi = 3: scale 1, zero point -2; and its mirror image: zero point -2 + 3 = 1
        w = jnp.array([[3.0, -3.0], [1.2, -1.2], [2.6, -2.6]])
        q = quantize(w, 2, self.SPEC)
        np.testing.assert_array_equal(q.zero_point, [[-2, 1]])
        np.testing.assert_array_equal(q.codes, [[1, -2], [-1, 0], [1, -2]])
        np.testing.assert_array_equal(dequantize(q), [[3.0, -3.0], [1.0, -1.0], [3.0, -3.0]])

    def test_zero_point_rounds(self):
        # lo = -1, hi = 2: scale 1, zero point -1. lo = -1.2, hi = 1.8: scale 1, zero point round(-0.8) = -1.
        q = quantize(jnp.array([[-1.0, -1.2], [2.0, 1.8]]), 2, self.SPEC)
        np.testing.assert_array_equal(q.zero_point, [[-1, -1]])
        np.testing.assert_allclose(dequantize(q), [[-1.0, -1.0], [2.0, 2.0]], rtol=1e-6)


class TestQwix:
    """Bit for bit, both eager."""

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_preset(self, bits):
        w = weights((24, 6))
        for axes, spec in (((1,), PRESETS["qwix"]), ((), QuantSpec("tensor", "stretched"))):
            theirs = qwix.quantize(w, f"int{bits}", channelwise_axes=axes)
            ours = quantize(w, bits, spec)
            np.testing.assert_array_equal(ours.scale, theirs.scale)
            np.testing.assert_array_equal(ours.codes, theirs.qvalue.astype(jnp.int8))
            np.testing.assert_array_equal(fake_quantize(w, bits, spec), qwix.dequantize(theirs))

    @pytest.mark.parametrize(("bits", "dtype"), [(4, jnp.int4), (8, jnp.int8)])
    def test_asymmetric(self, bits, dtype):
        w = weights((24, 6)) + 0.3
        for axes, spec in (((1,), PRESETS["asymmetric"]), ((), QuantSpec("tensor", "full", symmetric=False))):
            theirs = qwix.quantize(w, dtype, channelwise_axes=axes, calibration_method="minmax")
            ours = quantize(w, bits, spec)
            np.testing.assert_array_equal(ours.codes, theirs.qvalue.astype(jnp.int8))
            np.testing.assert_array_equal(ours.zero_point, theirs.zero_point.astype(jnp.int8))
            np.testing.assert_array_equal(fake_quantize(w, bits, spec), qwix.dequantize(theirs))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_groups(self, bits):
        w = weights((24, 6))
        spec = QuantSpec("group", "stretched", group_size=4)
        theirs = qwix.quantize(w, f"int{bits}", channelwise_axes=(1,), tiled_axes={0: 4})
        ours = quantize(w, bits, spec)
        np.testing.assert_array_equal(ours.scale, theirs.scale)
        # The largest weight of a group is a tie of the stretched grid, L - 1/2 steps, which qwix's reciprocal may break
        # the other way; the other codes are the same.
        is_largest = np.abs(w) == np.abs(w).reshape(6, 4, 6).max(axis=1).repeat(4, axis=0)
        codes = np.asarray(theirs.qvalue.astype(jnp.int8))
        np.testing.assert_array_equal(ours.codes[~is_largest], codes[~is_largest])
        assert (np.abs(ours.codes - codes) <= 1).all()
        assert is_largest.sum() == 36

    def test_asymmetric_groups(self):
        w = weights((24, 6)) + 0.3
        theirs = qwix.quantize(w, jnp.int8, channelwise_axes=(1,), tiled_axes={0: 4}, calibration_method="minmax")
        spec = QuantSpec("group", "full", symmetric=False, group_size=4)
        np.testing.assert_array_equal(quantize(w, 8, spec).codes, theirs.qvalue)
        np.testing.assert_array_equal(fake_quantize(w, 8, spec), qwix.dequantize(theirs))


class TestGridPoints:
    @pytest.mark.parametrize(
        "spec", [*kinds(rules=("max",)), *(s for s in PAIRS if s.range_rule == "mse")], ids=name_of
    )
    @pytest.mark.parametrize("bits", [2, 5])
    def test_codes_zero_half_a_step_and_same_scale(self, spec, bits):
        w = weights().at[3, 1].set(0.0)
        q = quantize(w, bits, spec)
        half = 2 ** (bits - 1)
        lowest, highest = (1 - half if spec.grid == "narrow" else -half), half - 1
        assert q.codes.min() >= lowest
        assert q.codes.max() <= highest
        scale, zero_point = scales_of(q)
        w_hat = np.asarray(dequantize(q))
        # Zero is a code, and decodes to zero exactly.
        assert ((zero_point >= lowest) & (zero_point <= highest)).all()
        assert w_hat[3, 1] == 0
        # Half a step inside the range, its end outside.
        low, high = scale * (lowest - zero_point), scale * (highest - zero_point)
        error = np.abs(w_hat - np.clip(w, low, high))
        assert (error <= scale / 2 * (1 + 1e-5)).all()
        is_above, is_below = np.asarray(w) > high + scale / 2, np.asarray(w) < low - scale / 2
        np.testing.assert_allclose(w_hat[is_above], high[is_above], rtol=1e-6)
        np.testing.assert_allclose(w_hat[is_below], low[is_below], rtol=1e-6)
        # Encoded again with the same scale, every code stays.
        zeros = jnp.zeros_like(q.scale) if q.zero_point is None else q.zero_point
        again = _grid.encode(dequantize(q), q.scale, zeros, bits, spec)
        np.testing.assert_array_equal(again, q.codes)

    @pytest.mark.parametrize("spec", kinds(rules=("max",)), ids=name_of)
    def test_fixed_point_where_the_range_is_reproduced(self, spec):
        # Narrow and asymmetric grids hold both ends of the range, the full one its lower end: there quantizing twice is
        # quantizing once, to the rounding of the scale. The stretched grid has no code at +-m.
        w = weights() + 0.1
        if spec.grid == "full" and spec.symmetric:
            w = jnp.concatenate([w, -w], axis=0)[:, :2].at[::2].set(-3.0)  # the largest of each group of two
        for bits in (2, 3, 8):
            once = fake_quantize(w, bits, spec)
            twice = fake_quantize(once, bits, spec)
            if spec.grid == "stretched":
                assert not np.allclose(twice, once, rtol=1e-3)
            else:
                np.testing.assert_allclose(twice, once, rtol=1e-6)

    def test_full_grid_that_clips_its_largest_weight_is_no_fixed_point(self):
        w, spec = jnp.array([[2.0], [-0.3]]), QuantSpec("channel", "full")
        once = fake_quantize(w, 3, spec)
        np.testing.assert_array_equal(once[:, 0], [1.5, -0.5])
        assert not np.allclose(fake_quantize(once, 3, spec), once)

    @pytest.mark.parametrize(("bits", "dtype"), [(2, jnp.int8), (8, jnp.int8), (9, jnp.int16), (16, jnp.int16)])
    @pytest.mark.parametrize("spec", [PRESETS["qwix"], PRESETS["asymmetric"]], ids=name_of)
    def test_type_and_extent_of_codes(self, bits, dtype, spec):
        q = quantize(weights((300, 2)), bits, spec)
        assert isinstance(q, QuantizedArray)
        assert (q.codes.dtype, q.scale.dtype, q.bits, q.dtype) == (dtype, jnp.float32, bits, "float32")
        assert q.scale.shape == (1, 2)
        assert 0.8 * 2 ** (bits - 1) - 1 < q.codes.max() <= 2 ** (bits - 1) - 1
        assert -(2 ** (bits - 1)) <= q.codes.min() < 1 - 0.8 * 2 ** (bits - 1)
        if not spec.symmetric:
            assert (q.zero_point.dtype, q.zero_point.shape) == (dtype, (1, 2))
            assert (q.codes.min(), q.codes.max()) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @pytest.mark.parametrize("spec", [*kinds(rules=("max",)), PRESETS["mse"], named("tensor-narrow-p90")], ids=name_of)
    def test_dequantize_of_quantize_equals_fake_quantize_bit_for_bit(self, spec):
        w = {"kernel": weights(), "bias": weights((4,), 1)}
        eager = dequantize(quantize(w, 4, spec))
        expected = fake_quantize(w, 4, spec)
        np.testing.assert_array_equal(eager["kernel"], expected["kernel"])
        assert eager["bias"] is w["bias"]
        compiled = jax.jit(lambda w: (dequantize(quantize(w, 4, spec)), fake_quantize(w, 4, spec)))(w)
        np.testing.assert_array_equal(compiled[0]["kernel"], compiled[1]["kernel"])

    def test_quantize_keeps_narrow_types_and_is_a_pytree(self):
        q = quantize({"k": weights(dtype=jnp.bfloat16)}, 4, PRESETS["asymmetric"])
        assert dequantize(q)["k"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(
            dequantize(q)["k"], fake_quantize(weights(dtype=jnp.bfloat16), 4, named("asymmetric"))
        )
        assert [x.dtype for x in jax.tree.leaves(q)] == [jnp.int8, jnp.float32, jnp.int8]
        compiled = jax.jit(dequantize)(q)["k"].astype(jnp.float32)
        np.testing.assert_allclose(compiled, dequantize(q)["k"].astype(jnp.float32), rtol=0.01)


class TestRanges:
    def test_percentile_by_hand(self):
        # The 75th percentile of |w| = 1, 2, 3, 4, 100 is 4: scale 4 at 2 bits, and 100 is clipped.
        w = jnp.array([[1.0], [-2.0], [3.0], [4.0], [-100.0]])
        result = fake_quantize(w, 2, named("channel-narrow-p75"))
        np.testing.assert_array_equal(result[:, 0], [0, 0, 4, 4, -4])

    def test_asymmetric_percentile_cuts_both_ends(self):
        # The 25th and the 75th percentiles are -1 and 2: scale 1, zero point -1.
        w = jnp.array([[-50.0], [-1.0], [0.4], [2.0], [90.0]])
        result = fake_quantize(w, 2, named("tensor-asymmetric-p75"))
        np.testing.assert_allclose(result[:, 0], [-1, -1, 0, 2, 2], rtol=1e-6)

    @pytest.mark.parametrize("spec", kinds(rules=("percentile",)), ids=name_of)
    def test_percentile_100_is_max(self, spec):
        w = weights()
        grid = spec.grid if spec.symmetric else "asymmetric"
        granularity = "group2" if spec.granularity == "group" else spec.granularity
        whole, largest = named(f"{granularity}-{grid}-p100"), named(f"{granularity}-{grid}")
        np.testing.assert_array_equal(fake_quantize(w, 3, whole), fake_quantize(w, 3, largest))
        assert not np.allclose(fake_quantize(w, 3, spec), fake_quantize(w, 3, largest))

    @pytest.mark.parametrize("spec", kinds(rules=("mse",), group_size=60)[4:], ids=name_of)
    def test_mse_is_never_worse_than_max(self, spec):
        w = jax.random.normal(jax.random.key(0), (120, 4)) * jnp.array([1.0, 0.01, 30.0, 2.0])
        w = jnp.where(jnp.arange(4) == 3, w**3, w)  # one channel with heavy tails
        largest = named(spec.name.removesuffix("-mse"))

        @jax.jit
        def errors(bits):
            return [jnp.square(fake_quantize(w, bits, s) - w) for s in (spec, largest)]

        for bits in (2, 3, 4, 6, 8):
            mse, top = ([float(np.sum(e[i])) for i in blocks(w.shape, spec)] for e in errors(bits))
            assert all(a <= b * (1 + 1e-5) for a, b in zip(mse, top, strict=True))
            if bits <= 4 and spec.grid == "narrow":
                assert all(a < 0.95 * b for a, b in zip(mse, top, strict=True))

    def test_mse_may_widen_a_symmetric_range_only(self):
        # The full grid of "max" ends at 3/4 of its largest weight: a wider range holds it.
        w = jnp.array([[1.0], [1.0], [1.0], [-0.1]])
        full, wide = (
            quantize(w, 3, QuantSpec("channel", "full", range_rule=rule)).scale.item() for rule in ("max", "mse")
        )
        assert wide > full
        shrunk = QuantSpec("channel", "full", symmetric=False, range_rule="mse")
        scales = [quantize(weights((24, 6)), 3, spec).scale for spec in (shrunk, PRESETS["asymmetric"])]
        assert (scales[0] < scales[1]).all()


class TestStraightThrough:
    def grads(self, w, bits, spec):
        weighting = jnp.arange(1.0, 1.0 + w.size).reshape(w.shape)

        def total(w):
            return jnp.sum(weighting * fake_quantize(w, bits, spec, straight_through=True))

        return jax.grad(total)(w) / weighting

    @pytest.mark.parametrize("bits", [2, 4])
    @pytest.mark.parametrize("spec", [PRESETS["narrow"], PRESETS["asymmetric"], QuantSpec("tensor")], ids=name_of)
    def test_one_inside_the_range(self, spec, bits):
        # The ends of the range are inside: nothing is clipped on these grids. scale * (1 / scale) is 1 nearly.
        np.testing.assert_allclose(self.grads(weights(), bits, spec), 1, rtol=3e-7)

    def test_zero_where_the_full_grid_clips(self):
        # Scale 2, codes -2..1: 4 is code 2 and clipped, 2.5 is rounded to code 1 and -4 is code -2.
        w = jnp.array([[4.0], [2.5], [-4.0], [0.3]])
        np.testing.assert_array_equal(self.grads(w, 2, QuantSpec("channel", "full"))[:, 0], [0, 1, 1, 1])

    def test_zero_where_a_percentile_clips(self):
        w = jnp.array([[1.0], [-2.0], [3.0], [4.0], [-100.0]])
        np.testing.assert_array_equal(self.grads(w, 3, named("channel-narrow-p75"))[:, 0], [1, 1, 1, 1, 0])

    def test_without_it_only_the_scale_has_a_derivative(self):
        w = jnp.array([[1.0], [-6.0], [2.5]])
        # Codes 0, -3, 1 of scale 6 / 3 = -w[1] / 3: d (sum w_hat) / d w[1] = -2 / -3
        gradient = jax.grad(lambda w: fake_quantize(w, 3).sum())(w)
        np.testing.assert_allclose(gradient[:, 0], [0, 2 / 3, 0], rtol=1e-6)

    def test_values_do_not_change(self):
        w = weights()
        for spec in PRESETS.values():
            np.testing.assert_array_equal(fake_quantize(w, 3, spec, straight_through=True), fake_quantize(w, 3, spec))

    def test_keeps_the_type_and_passes_other_leaves_through(self):
        params = {"kernel": weights(dtype=jnp.bfloat16) / 3, "bias": jnp.ones(4)}

        def total(p):
            leaves = jax.tree.leaves(fake_quantize(p, 8, straight_through=True))
            return sum(jnp.sum(x.astype(jnp.float32)) for x in leaves)

        gradient = jax.grad(total)(params)
        assert gradient["kernel"].dtype == jnp.bfloat16
        np.testing.assert_array_equal(gradient["bias"], 1)


class TestRoundingNoise:
    @pytest.mark.parametrize("spec", kinds(("max", "percentile")), ids=name_of)
    def test_is_uniform_over_a_bin_of_the_grid(self, x64, spec):
        w = weights((8, 4), dtype=jnp.float64)
        keys = jax.random.split(jax.random.key(0), 2000)
        u = jax.vmap(lambda key: rounding_noise(w, 3, key, spec=spec))(keys) / scales_of(quantize(w, 3, spec))[0]
        assert u.min() > -0.5 - 1e-6  # the scale is float32
        assert u.max() < 0.5 + 1e-6
        n = u.size
        assert abs(u.mean()) < 4 / np.sqrt(12 * n)
        # The variance of u^2 is 1/80 - 1/144.
        np.testing.assert_allclose((u**2).mean(), 1 / 12, atol=4 * np.sqrt((1 / 80 - 1 / 144) / n))
        correlation = np.corrcoef(u.reshape(2000, -1).T) - np.eye(w.size)
        assert np.abs(correlation).max() < 5 / np.sqrt(2000)

    def test_more_bits_less_noise_of_the_same_draw(self):
        w, key = weights(), jax.random.key(1)
        u = [rounding_noise(w, bits, key) for bits in (2, 3)]
        np.testing.assert_allclose(u[0], 3 * u[1], rtol=1e-6)
        assert not np.allclose(u[0], rounding_noise(w, 2, jax.random.key(2)))

    def test_leaves_that_are_not_rounded_get_none(self):
        params = {"a": weights(), "b": weights(seed=1), "bias": jnp.ones(3, jnp.bfloat16)}
        u = rounding_noise(params, 4, jax.random.key(0), mask={"a": False, "b": True, "bias": False})
        assert {name: bool(jnp.any(x != 0)) for name, x in u.items()} == {"a": False, "b": True, "bias": False}
        assert u["bias"].dtype == jnp.bfloat16
        # Leaves of one shape have draws of their own.
        u = rounding_noise({"a": params["a"], "b": params["a"]}, 4, jax.random.key(0))
        assert not np.allclose(u["a"], u["b"])

    def test_traced_bits_under_jit(self):
        w, key = weights(), jax.random.key(0)
        compiled = jax.jit(lambda bits: rounding_noise(w, bits, key))(4)
        np.testing.assert_allclose(compiled, rounding_noise(w, 4, key), rtol=1e-6)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"`rounding_noise\(bits=...\).*1"):
            rounding_noise(weights(), 1, jax.random.key(0))


class TestLeaves:
    PARAMS = {  # noqa: RUF012
        "conv": {"kernel": weights((3, 3, 2, 4)), "bias": weights((4,), 1)},
        "head": {"kernel": weights(seed=2), "bias": weights((4,), 3)},
    }

    def changed(self, result):
        return {
            "/".join(k.key for k in path)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(self.PARAMS), strict=True
            )
            if a is not b
        }

    def test_patterns(self):
        for leaves, expected in (
            ((), {"conv/kernel", "head/kernel"}),
            (("conv/*",), {"conv/kernel", "conv/bias"}),
            (("*/bias", "head/k*"), {"conv/bias", "head/bias", "head/kernel"}),
        ):
            assert self.changed(fake_quantize(self.PARAMS, 2, QuantSpec(leaves=leaves))) == expected

    def test_patterns_distinguish_case(self):
        with pytest.raises(ValueError, match="matches no leaf"):
            fake_quantize(self.PARAMS, 2, QuantSpec(leaves=("Conv/*",)))

    def test_overrides_and_the_last_match_counts(self):
        for overrides, widths in (
            ((("head/*", 8),), (3, 8)),
            ((("*", 6), ("head/*", 8)), (6, 8)),
            ((("head/*", 8), ("*", 6)), (6, 6)),
            ((("head/*", None),), (3, None)),
            ((("*", None), ("conv/*", 5)), (5, None)),
        ):
            result = fake_quantize(self.PARAMS, 3, QuantSpec(overrides=overrides))
            for layer, bits in zip(("conv", "head"), widths, strict=True):
                w = self.PARAMS[layer]["kernel"]
                np.testing.assert_array_equal(result[layer]["kernel"], w if bits is None else fake_quantize(w, bits))
            assert result["conv"]["bias"] is self.PARAMS["conv"]["bias"]

    def test_overrides_with_a_mask(self):
        mask = {"conv": False, "head": True}
        result = fake_quantize(self.PARAMS, 3, QuantSpec(overrides=(("*/kernel", 8),)), mask=mask)
        assert self.changed(result) == {"head/kernel", "head/bias"}
        np.testing.assert_array_equal(result["head"]["kernel"], fake_quantize(self.PARAMS["head"]["kernel"], 8))

    def test_bits_a_leaf(self):
        expected = {"conv": 5, "head": 2}
        whole = {"conv": {"kernel": 5, "bias": 9}, "head": {"kernel": 2, "bias": 9}}
        traced = jax.jit(lambda bits: fake_quantize(self.PARAMS, bits))
        for bits in (expected, whole):
            for result in (fake_quantize(self.PARAMS, bits), dequantize(quantize(self.PARAMS, bits)), traced(bits)):
                for layer, width in expected.items():
                    np.testing.assert_allclose(
                        result[layer]["kernel"], fake_quantize(self.PARAMS[layer]["kernel"], width), rtol=1e-6
                    )
                    np.testing.assert_array_equal(result[layer]["bias"], self.PARAMS[layer]["bias"])

    def test_bits_of_leaves_that_are_not_quantized_are_ignored(self):
        for ignored in (0, 1, 32, 64):
            bits = {"conv": {"kernel": 5, "bias": ignored}, "head": {"kernel": 2, "bias": ignored}}
            result = fake_quantize(self.PARAMS, bits)
            np.testing.assert_array_equal(result["head"]["kernel"], fake_quantize(self.PARAMS["head"]["kernel"], 2))

    def test_bits_a_leaf_out_of_range_names_leaf_and_range(self):
        for bits in (1, 17, 99):
            with pytest.raises(ValueError, match=rf"\['conv/kernel'\]` must be an integer in 2..16; got {bits}"):
                fake_quantize(self.PARAMS, {"conv": bits, "head": 4})

    def test_scalars_and_vectors_have_one_scale(self):
        for spec in (*PRESETS.values(), QuantSpec("group", group_size=2)):
            params = {"scalar": jnp.float32(-2.3), "vector": weights((4,))}
            result = fake_quantize(params, 4, spec, mask=True)
            q = quantize(params, 4, spec, mask=True)
            assert (q["scalar"].scale.shape, q["vector"].scale.shape) == ((), (1,))
            np.testing.assert_array_equal(dequantize(q)["vector"], result["vector"])
            np.testing.assert_allclose(result["scalar"], -2.3, rtol=0.08)
            whole = fake_quantize(params["vector"][:, None], 4, spec if spec.group_size is None else QuantSpec())
            np.testing.assert_allclose(result["vector"], whole[:, 0], rtol=1e-6)


class TestStacked:
    """Layers of a scan, as if each were quantized alone."""

    LAYERS = {  # noqa: RUF012
        "kernel": weights((3, 6, 4)) * jnp.array([1.0, 10.0, 0.1])[:, None, None],
        "heads": weights((3, 2, 6, 4), 1) + 0.2,
        "bias": weights((3, 4), 2),
    }
    HEAD = weights((4, 2), 3)
    PARAMS = {"layers": LAYERS, "head": HEAD}  # noqa: RUF012

    @pytest.mark.parametrize(
        "spec", [*kinds(rules=("max",)), *(s for s in PAIRS if s.range_rule != "max")], ids=name_of
    )
    def test_equals_each_layer_alone_bit_for_bit(self, spec):
        # The search of the "mse" rule takes seconds to compile.
        layers = self.LAYERS if spec.range_rule == "max" else {"kernel": self.LAYERS["kernel"]}
        params, stacked = {"layers": layers, "head": self.HEAD}, dataclasses.replace(spec, stacked=("layers/*",))
        together, codes = (function(params, 3, stacked) for function in (fake_quantize, quantize))
        jax.tree.map(np.testing.assert_array_equal, dequantize(codes), together)
        for i in range(3):
            layer = jax.tree.map(lambda x, i=i: x[i], layers)
            found = jax.tree.map(lambda x, i=i: x[i], codes["layers"])
            jax.tree.map(np.testing.assert_array_equal, found, quantize(layer, 3, spec))
        np.testing.assert_array_equal(together["head"], fake_quantize(self.HEAD, 3, spec))
        # Biases, (L, O), are no kernels.
        assert spec.range_rule != "max" or together["layers"]["bias"] is self.LAYERS["bias"]

    @pytest.mark.parametrize(
        ("spec", "kernel", "heads", "bias"),
        [
            (QuantSpec("tensor"), (3, 1, 1), (3, 1, 1, 1), (3, 1)),
            (QuantSpec("channel"), (3, 1, 4), (3, 1, 1, 4), (3, 1)),
            (QuantSpec("group", group_size=2), (3, 3, 4), (3, 2, 3, 4), (3, 1)),
        ],
        ids=str,
    )
    def test_shapes_of_scales(self, spec, kernel, heads, bias):
        spec = dataclasses.replace(spec, stacked=("layers/*",), leaves=("layers/*",))
        codes = quantize(self.PARAMS, 3, spec)["layers"]
        assert {name: q.scale.shape for name, q in codes.items()} == {"kernel": kernel, "heads": heads, "bias": bias}

    def test_each_layer_has_the_signal_to_noise_ratio_of_its_own(self):
        kernel = {"layers": {"kernel": self.LAYERS["kernel"]}}

        def ratios(spec):
            w, w_hat = (x["layers"]["kernel"] for x in (kernel, fake_quantize(kernel, 4, spec)))
            return 10 * np.log10(np.sum(w**2, (1, 2)) / np.sum((w_hat - w) ** 2, (1, 2)))

        # Scales that layers share are those of the largest.
        shared = ratios(QuantSpec())
        assert shared[0] < 5
        assert shared[2] < 1
        alone = ratios(QuantSpec(stacked=("*",)))
        expected = [
            10 * np.log10(np.sum(w**2) / np.sum((fake_quantize(w, 4) - w) ** 2)) for w in kernel["layers"]["kernel"]
        ]
        np.testing.assert_allclose(alone, expected, rtol=1e-5)
        assert (alone > 18).all()

    def test_under_jit_and_in_the_noise(self):
        spec = QuantSpec("tensor", stacked=("layers/*",))
        compiled = jax.jit(lambda bits: fake_quantize(self.PARAMS, bits, spec))(4)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), compiled, fake_quantize(self.PARAMS, 4, spec)
        )
        u = rounding_noise(self.PARAMS, 4, jax.random.key(0), spec=spec)["layers"]["kernel"]
        scale = quantize(self.PARAMS, 4, spec)["layers"]["kernel"].scale[:, 0, 0]
        largest = np.abs(u).max((1, 2))
        assert (largest <= scale / 2).all()
        assert (largest > 0.8 * scale / 2).all()

    def test_sizes_count_the_scales_of_every_layer(self):
        sizes = {}
        for name, spec in (("shared", QuantSpec()), ("own", QuantSpec(stacked=("layers/*",)))):
            params = {"layers": {"kernel": self.LAYERS["kernel"]}}
            q = quantize(params, 4, spec)
            sizes[name] = quantize_and_evaluate(lambda p: 0.0, params, (4,), spec)[1].stored_bytes
            assert sizes[name] == 3 * 6 * 4 / 2 + 4 * q["layers"]["kernel"].scale.size
        assert sizes["own"] - sizes["shared"] == 2 * 4 * 4

    def test_stacks_without_layers_and_of_scalars(self):
        params = {"none": jnp.zeros((0, 4, 2)), "empty": jnp.zeros((3, 0, 2)), "scalars": jnp.array([-2.3, 0.7])}
        for spec in (QuantSpec("tensor"), QuantSpec(), QuantSpec("group", "full", symmetric=False, group_size=2)):
            q = quantize(params, 4, dataclasses.replace(spec, stacked=("*",)), mask=True)
            assert {name: x.shape for name, x in dequantize(q).items()} == {n: x.shape for n, x in params.items()}
            assert q["scalars"].scale.shape == (2,)
            np.testing.assert_allclose(dequantize(q)["scalars"], params["scalars"], rtol=0.08)
        with pytest.raises(
            ValueError, match=r"`QuantSpec\(stacked=...\)` .* first axis counts layers; 'x' has no axis"
        ):
            fake_quantize({"x": jnp.float32(1), "w": weights()}, 4, QuantSpec(stacked=("x",)))


class TestNames:
    @pytest.mark.parametrize("spec", kinds(group_size=32), ids=name_of)
    def test_round_trip(self, spec):
        assert named(spec.name) == spec
        assert named(spec.name).name == spec.name

    @pytest.mark.parametrize("percentile", [99, 100, np.float32(99.5), np.float64(99.9)])
    def test_round_trip_of_any_real_percentile(self, percentile):
        spec = QuantSpec(range_rule="percentile", percentile=percentile)
        assert named(spec.name) == spec
        assert named(spec.name).name == spec.name

    def test_pairs_are_all_there(self):
        fields = [(s.granularity, (s.grid, s.symmetric), s.range_rule) for s in PAIRS]
        for a, b, count in ((0, 1, 12), (0, 2, 9), (1, 2, 12)):
            assert len({(f[a], f[b]) for f in fields}) == count
        assert len(fields) == 12

    def test_are_unique(self):
        specs = [*kinds(), *kinds(group_size=3)[-12:], *(QuantSpec(leaves=x) for x in (("a",), ("a", "b"), ("b", "a")))]
        specs += [QuantSpec(overrides=(("a", 8),)), QuantSpec(overrides=(("a", None),)), QuantSpec(leaves=("a,b",))]
        specs += [QuantSpec(stacked=("a",)), QuantSpec(stacked=("a", "b")), QuantSpec(stacked=("a,b",))]
        assert len({s.name for s in specs}) == len(specs)

    def test_presets(self):
        names = {"narrow": "channel-narrow", "qwix": "channel-stretched", "mse": "channel-narrow-mse"}
        assert {k: v.name for k, v in PRESETS.items()} == names | {"asymmetric": "channel-asymmetric"}
        assert all(named(k) == v for k, v in PRESETS.items())
        assert PRESETS["narrow"] == QuantSpec()

    @pytest.mark.parametrize(
        "name", ["", "channel", "group-narrow", "group0-narrow", "channel-narrow-max", "Narrow", "p99"]
    )
    def test_unknown(self, name):
        with pytest.raises(ValueError, match=r"`spec` must be one of narrow, qwix, .* or GRANULARITY-GRID.*; got '"):
            named(name)

    def test_is_static(self):
        assert hash(QuantSpec(leaves=("a",))) == hash(QuantSpec(leaves=("a",)))
        quantized = jax.jit(fake_quantize, static_argnums=(1, 2))
        np.testing.assert_allclose(
            quantized(weights(), 3, PRESETS["qwix"])[0], fake_quantize(weights(), 3, PRESETS["qwix"])[0], rtol=1e-6
        )


class TestInvariance:
    @pytest.mark.parametrize("spec", [*PRESETS.values(), named("group2-full-p90")], ids=name_of)
    def test_vmap_over_stacked_weights_and_jit(self, spec):
        w = weights((3, 6, 4))
        quantized = jax.jit(lambda w: fake_quantize(w, 3, spec))
        stacked = jax.vmap(quantized)(w)
        # Scales of each matrix, not of the stack. The largest weight of the stretched grid is a tie that may break
        # either way.
        for i in range(3):
            alone = quantized(w[i])
            is_same = np.isclose(stacked[i], alone, rtol=1e-5)
            assert is_same[np.abs(w[i]) < np.abs(w[i]).max(axis=0)].all()
        assert not np.allclose(stacked, fake_quantize(w, 3, spec)) or spec.granularity == "group"

    @pytest.mark.parametrize("spec", [PRESETS["asymmetric"], PRESETS["mse"], named("group2-full-p90")], ids=name_of)
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
    def test_type(self, x64, dtype, spec):
        w = weights().astype(dtype)
        result = fake_quantize(w, 4, spec)
        assert result.dtype == dtype
        # Arithmetic is wide, and only the result is rounded to the type.
        wide = w.astype(jnp.promote_types(dtype, jnp.float32))
        np.testing.assert_array_equal(result, fake_quantize(wide, 4, spec).astype(dtype))

    def test_numpy_leaves(self):
        w = np.asarray(weights())
        np.testing.assert_array_equal(fake_quantize(w, 3), fake_quantize(jnp.asarray(w), 3))


class TestEdges:
    @pytest.mark.parametrize("spec", PAIRS, ids=name_of)
    def test_zeros_constants_and_empty_leaves(self, spec):
        params = {
            "zeros": jnp.zeros((4, 2)),
            "positive": jnp.full((4, 2), 1.5),
            "negative": jnp.full((4, 2), -1.5),
            "single": jnp.full((1, 1), -0.3),
            "no_inputs": jnp.zeros((0, 3)),
            "no_outputs": jnp.zeros((4, 0)),
        }
        q = jax.jit(lambda p: quantize(p, 4, spec))(params)
        result = dequantize(q)
        np.testing.assert_array_equal(result["zeros"], 0)
        clips = spec.symmetric and spec.grid != "narrow" and spec.range_rule != "mse"
        rtol = 0.13 if clips else 0.02 if spec.range_rule == "mse" else 1e-6
        for name in ("positive", "negative", "single"):
            np.testing.assert_allclose(result[name], params[name], rtol=rtol)
        assert (result["no_inputs"].shape, result["no_outputs"].shape) == ((0, 3), (4, 0))
        assert q["no_inputs"].codes.dtype == jnp.int8

    @pytest.mark.parametrize("spec", PAIRS, ids=name_of)
    def test_nan_and_infinity_stay_in_their_channel_or_group(self, spec):
        both = jax.jit(lambda w: (fake_quantize(w, 4, spec), dequantize(quantize(w, 4, spec))))
        for bad in (np.nan, np.inf, -np.inf):
            w = weights().at[3, 1].set(bad)
            is_hit = np.zeros((6, 4), bool)
            for block in blocks(w.shape, spec):
                is_hit[block] = not np.isfinite(np.asarray(w)[block]).all()
            for how, result in zip(("fake_quantize", "dequantize of quantize"), both(w), strict=True):
                np.testing.assert_array_equal(np.isnan(result), is_hit, err_msg=f"{how} {bad}")
                assert np.isfinite(result[~is_hit]).all()

    @pytest.mark.parametrize("name", ["channel-narrow-p80", "channel-asymmetric-p80"])
    def test_infinity_beyond_the_percentile_is_not_clipped(self, name):
        w = weights((24, 6)).at[3, 1].set(jnp.inf)
        result = fake_quantize(w, 4, named(name))
        assert np.isnan(result[:, 1]).all()
        assert np.isfinite(np.delete(np.asarray(result), 1, axis=1)).all()

    @pytest.mark.parametrize("spec", PRESETS.values(), ids=name_of)
    @pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
    def test_scales_with_the_weights(self, spec, factor):
        w = weights()
        np.testing.assert_array_equal(fake_quantize(w * factor, 4, spec), fake_quantize(w, 4, spec) * factor)

    def test_squared_errors_of_the_mse_rule_do_not_underflow(self):
        w, factor, spec = weights(), 2.0**-80, PRESETS["mse"]
        np.testing.assert_array_equal(fake_quantize(w * factor, 4, spec), fake_quantize(w, 4, spec) * factor)

    @pytest.mark.parametrize("spec", PRESETS.values(), ids=name_of)
    def test_tiny_weights_stay_finite_and_small(self, spec):
        for exponent in (-45, -42, -38, -35):
            w = np.asarray(weights()) * np.float32(10.0**exponent)
            result = fake_quantize(w, 16, spec)
            assert np.isfinite(result).all()
            assert np.abs(result).max() <= 1.5 * np.abs(w).max()
            np.testing.assert_array_equal(dequantize(quantize(w, 16, spec)), result)


class TestContracts:
    def test_only_kernels_by_default_and_the_mask_otherwise(self):
        params = {"kernel": weights(), "scale": weights((4,)), "bias": weights((4,), 1)}
        result = fake_quantize(params, 2)
        assert result["scale"] is params["scale"]
        assert not np.allclose(result["kernel"], params["kernel"])
        result = fake_quantize(params, 2, mask={"kernel": False, "scale": True, "bias": False})
        assert result["kernel"] is params["kernel"]
        assert len(np.unique(result["scale"])) <= 3  # a vector has one scale, whatever the granularity

    def test_traced_bits_compile_once(self):
        traces = []

        @jax.jit
        def quantized(w, bits):
            traces.append(1)
            return fake_quantize(w, bits)

        w = weights()
        for bits in (2, 3, 8, 16):
            np.testing.assert_allclose(quantized(w, bits), fake_quantize(w, bits), rtol=1e-6)
        assert len(traces) == 1

    def test_vmap_over_bits(self):
        w = weights()
        together = jax.vmap(lambda b: fake_quantize(w, b))(jnp.array([2, 5]))
        np.testing.assert_allclose(together[1], fake_quantize(w, 5), rtol=1e-6)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
    def test_keeps_the_type(self, dtype):
        w = weights(dtype=dtype)
        result = fake_quantize(w, 3)
        assert result.dtype == dtype
        exact = fake_quantize(w.astype(jnp.float32), 3)
        np.testing.assert_allclose(result.astype(jnp.float32), exact, rtol=0.01)

    def test_float64_uses_a_float32_scale(self, x64):
        w = weights(dtype=jnp.float64)
        result = fake_quantize(w, 4)
        assert result.dtype == jnp.float64
        # A top weight is 7 float32 scales, which differs from the float64 weight in the eighth digit.
        scale = (np.abs(w).max(axis=0) / 7).astype(np.float32).astype(np.float64)
        np.testing.assert_array_equal(np.abs(result).max(axis=0), 7 * scale)

    @pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16])
    def test_type_of_bits_does_not_matter(self, dtype):
        w = weights()
        for bits in (8, 12, 16):
            np.testing.assert_array_equal(fake_quantize(w, dtype(bits)), fake_quantize(w, bits))

    def test_traced_bits_out_of_range_give_nan(self):
        quantized = jax.jit(lambda bits: fake_quantize(weights(), bits))
        for bits in (0, 1, 17, 40):
            assert np.isnan(quantized(bits)).all()

    def test_constants_zeros_single_elements_and_empty_leaves(self):
        params = {
            "zeros": jnp.zeros((3, 2)),
            "constant": jnp.full((3, 2), -1.5),
            "single": jnp.full((1, 1), 0.3),
            "empty": jnp.zeros((0, 2)),
            "tiny": jnp.full((2, 2), 1e-45),
        }
        result = fake_quantize(params, 2)
        np.testing.assert_array_equal(result["zeros"], 0)
        np.testing.assert_allclose(result["constant"], -1.5)
        np.testing.assert_allclose(result["single"], 0.3, rtol=1e-6)
        assert result["empty"].shape == (0, 2)
        assert np.isfinite(result["tiny"]).all()

    def test_nan_stays_in_its_channel(self):
        result = fake_quantize(weights().at[2, 1].set(jnp.nan), 4)
        assert np.isnan(result[:, 1]).all()
        assert np.isfinite(np.delete(np.asarray(result), 1, axis=1)).all()


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"symmetric": 1}, TypeError, r"`QuantSpec\(symmetric=...\)` must be True or False; got 1"),
        ({"range_rule": "maximum"}, ValueError, r"`QuantSpec\(range_rule=...\)` must be one of 'max'"),
        ({"symmetric": False}, ValueError, r"\(grid=...\)` must be 'full' where symmetric is False; got 'narrow'"),
        ({"range_rule": "percentile"}, ValueError, r"\(percentile=...\)` must be given with range_rule='percentile'"),
        ({"percentile": 99.0}, ValueError, r"must be left out without range_rule='percentile'; got 99.0 and 'max'"),
        ({"range_rule": "percentile", "percentile": "99"}, TypeError, r"\(percentile=...\)` must be a real scalar"),
        ({"range_rule": "percentile", "percentile": True}, TypeError, r"\(percentile=...\)` must be a real scalar"),
        ({"range_rule": "percentile", "percentile": 50}, ValueError, r"must be in \(50, 100\]; got 50"),
        ({"range_rule": "percentile", "percentile": 100.1}, ValueError, r"must be in \(50, 100\]; got 100.1"),
        ({"range_rule": "percentile", "percentile": float("nan")}, ValueError, r"must be in \(50, 100\]; got nan"),
        ({"granularity": "group"}, ValueError, r"\(group_size=...\)` must be given with granularity='group'; got None"),
        ({"group_size": 4}, ValueError, r"must be left out without granularity='group'; got 4 and 'channel'"),
        ({"granularity": "group", "group_size": 0}, ValueError, r"\(group_size=...\)` must be an integer >= 1; got 0"),
        (
            {"granularity": "group", "group_size": 4.0},
            TypeError,
            r"\(group_size=...\)` must be an integer >= 1; got 4.0",
        ),
        ({"leaves": "conv/*"}, TypeError, r"\(leaves=...\)` must be a tuple of patterns; got 'conv/\*'"),
        ({"leaves": (1,)}, TypeError, r"\(leaves=...\)` must be a tuple of patterns; got \(1,\)"),
        ({"stacked": "layers/*"}, TypeError, r"\(stacked=...\)` must be a tuple of patterns; got 'layers/\*'"),
        ({"stacked": (("layers/*", 1),)}, TypeError, r"\(stacked=...\)` must be a tuple of patterns; got \(\("),
        ({"overrides": {"a": 8}}, TypeError, r"\(overrides=...\)` must be a tuple of pairs .*; got \{'a': 8\}"),
        ({"overrides": ("a", 8)}, TypeError, r"\(overrides=...\)` must be a tuple of pairs .*; got 'a'"),
        ({"overrides": ((1, 8),)}, TypeError, r"must be a tuple of pairs .*; got \(1, 8\)"),
        ({"overrides": (("a", 1),)}, ValueError, r"\(overrides=...\)\['a'\]` must be an integer in 2..16; got 1"),
        ({"overrides": (("a", 17),)}, ValueError, r"\(overrides=...\)\['a'\]` must be an integer in 2..16; got 17"),
        ({"overrides": (("a", 8.0),)}, TypeError, r"\(overrides=...\)\['a'\]` must be an integer in 2..16; got 8.0"),
    ],
)
def test_specification_errors(options, kind, message):
    with pytest.raises(kind, match=message):
        QuantSpec(**options)


def tree():
    return {"conv": {"kernel": weights((3, 3, 6, 4)), "bias": weights((4,))}, "head": weights((4, 2))}


@pytest.mark.parametrize("function", [fake_quantize, quantize])
@pytest.mark.parametrize(
    ("bits", "options", "kind", "message"),
    [
        (
            4,
            {"spec": QuantSpec(leaves=("foo/*",))},
            ValueError,
            r"leaves=.* matches no leaf: 'foo/\*'; of 3, .*'conv/bias'",
        ),
        (4, {"spec": QuantSpec(leaves=("head", "x"))}, ValueError, r"leaves=.* matches no leaf: 'x'"),
        (4, {"spec": QuantSpec(overrides=(("foo", 8),))}, ValueError, r"overrides=.* no selected leaf: 'foo'; of 3"),
        (4, {"spec": QuantSpec(overrides=(("*/bias", 8),))}, ValueError, r"no selected leaf: '\*/bias'"),
        (
            4,
            {"spec": QuantSpec(leaves=("head",), overrides=(("conv/*", None),))},
            ValueError,
            r"no selected leaf: 'conv/\*'",
        ),
        (4, {"spec": QuantSpec(overrides=(("*", None),))}, ValueError, "leaves nothing to quantize of 3 leaves"),
        (4, {"spec": QuantSpec(leaves=("head",)), "mask": True}, ValueError, r"\(mask=...\)` and .* both name leaves"),
        (
            4,
            {"spec": QuantSpec("group", group_size=4)},
            ValueError,
            r"must divide .*; got 4 for 'conv/kernel' of shape \(3, 3, 6, 4\)",
        ),
        (4, {"spec": QuantSpec(stacked=("layers/*",))}, ValueError, r"stacked=.* matches no leaf: 'layers/\*'; of 3"),
        (
            4,
            {"spec": QuantSpec("group", group_size=4, stacked=("conv/kernel",))},
            ValueError,
            r"must divide .*; got 4 for 'conv/kernel' of shape \(3, 3, 6, 4\)",
        ),
        (4, {"mask": {"conv": 1, "head": True}}, TypeError, r"\(mask=...\)` must hold Python bools"),
        (4, {"mask": {"conv": True}}, ValueError, r"\(mask=...\)` must have the structure of `params`"),
        (4, {"mask": False}, ValueError, r"\(mask=...\)` must select at least one leaf"),
        (4, {"spec": None}, TypeError, r"\(spec=...\)` must be a QuantSpec; got None"),
        ({"conv": 4}, {}, ValueError, r"\(bits=...\)` must have the structure of `params`"),
        ({"conv": 4, "tail": 4}, {}, ValueError, r"\(bits=...\)` must have the structure of `params`"),
        ({"conv": 4, "head": 4.0}, {}, TypeError, r"\(bits=...\)\['head'\]` must be an integer"),
        ({"conv": 4, "head": 17}, {}, ValueError, r"\(bits=...\)\['head'\]` must be an integer in 2..16; got 17"),
        (None, {}, ValueError, r"\(bits=...\)` must have the structure of `params`"),
        ("4", {}, TypeError, r"\(bits=...\)` must be an integer in 2..16; got '4'"),
        (jnp.array([4, 4]), {}, TypeError, r"\(bits=...\)` must be an integer in 2..16; got an array of shape \(2,\)"),
    ],
)
def test_call_errors(function, bits, options, kind, message):
    with pytest.raises(kind, match=message):
        function(tree(), bits, **options)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fake_quantize({}, 4), ValueError, "`params` must have at least one array"),
        (lambda: quantize({"k": jnp.ones((2, 2), int)}, 4), TypeError, "`params` must have floating-point leaves"),
        (
            lambda: fake_quantize(weights(), 4, straight_through=1),
            TypeError,
            r"`fake_quantize\(straight_through=...\)` must be True or False; got 1",
        ),
        (
            lambda: jax.jit(lambda b: quantize(weights(), b))(4),
            TypeError,
            r"`quantize\(bits=...\)` must be Python integers; got a traced one: `fake_quantize` takes it",
        ),
    ],
)
def test_other_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda: fake_quantize(weights(), 1),
            ValueError,
            r"`fake_quantize\(bits=...\)` .* in 2..16; got 1",
        ),
        (
            lambda: fake_quantize(weights(), 17),
            ValueError,
            r"`fake_quantize\(bits=...\)` .* in 2..16; got 17",
        ),
        (
            lambda: fake_quantize(weights(), 4.0),
            TypeError,
            r"`fake_quantize\(bits=...\)` .* in 2..16; got 4.0",
        ),
        (
            lambda: fake_quantize(weights(), True),
            TypeError,
            r"`fake_quantize\(bits=...\)` .* in 2..16; got True",
        ),
        (lambda: fake_quantize(weights(), jnp.array(40)), ValueError, r"must be an integer in 2..16; got 40"),
        (
            lambda: fake_quantize(weights((3,)), 4),
            ValueError,
            r"`fake_quantize\(mask=...\)` must select .* got none of 1",
        ),
        (lambda: fake_quantize(jnp.ones((2, 2), int), 4), TypeError, "`params` must have floating-point leaves"),
        (lambda: fake_quantize(weights(), 4, "channel-narrow"), TypeError, "must be a QuantSpec; got 'channel-narrow'"),
        (lambda: jax.jit(lambda b: fake_quantize(weights(), b))(4.0), TypeError, "must be an integer in 2..16"),
        (lambda: QuantSpec(grid="narow"), ValueError, r"`QuantSpec\(grid=...\)` .* Did you mean 'narrow'"),
        (lambda: QuantSpec(granularity="row"), ValueError, r"`QuantSpec\(granularity=...\)` must be one of"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
