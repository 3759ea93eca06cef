"""The quantizer: grids by hand, qwix as oracle, invariances, edges and errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from hero_jax.quantize import QuantSpec, fake_quantize, quantize_and_evaluate

SPECS = [
    QuantSpec(granularity, grid) for granularity in ("tensor", "channel") for grid in ("narrow", "full", "stretched")
]


def weights(shape=(7, 5), seed=0, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


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
        w = weights((24, 5))
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
        w = weights((50, 3)).at[4, 1].set(0.0)
        result = fake_quantize(w, bits, spec)
        assert result[4, 1] == 0
        absmax = jnp.abs(w).max(axis=0, keepdims=True) if spec.granularity == "channel" else jnp.abs(w).max()
        half = 2 ** (bits - 1)
        steps = {"narrow": half - 1, "full": half, "stretched": half - 0.5}[spec.grid]
        # Half a step inside the range; a whole one where the top of the full grid clips.
        limit = np.where(w > (half - 1) * absmax / steps, 1.0, 0.5) * absmax / steps
        assert (np.abs(result - w) <= limit * (1 + 1e-3 * bits)).all()
        for channel in range(3):
            assert len(np.unique(result[:, channel])) <= 2**bits

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    def test_a_grid_point_of_the_narrow_grid_is_a_fixed_point(self, bits):
        once = fake_quantize(weights((40, 3)), bits)
        np.testing.assert_allclose(fake_quantize(once, bits), once, rtol=3e-7)

    def test_is_odd_and_scales_with_the_weights_on_the_narrow_grid(self):
        w = weights()
        np.testing.assert_array_equal(fake_quantize(-w, 3), -fake_quantize(w, 3))
        np.testing.assert_array_equal(fake_quantize(4.0 * w, 3), 4.0 * fake_quantize(w, 3))

    def test_more_bits_err_less(self):
        w = weights((200, 4))
        errors = [float(jnp.linalg.norm(fake_quantize(w, b) - w)) for b in (2, 3, 4, 6, 8, 12)]
        assert all(a > b for a, b in itertools.pairwise(errors))

    @pytest.mark.parametrize("bits", [2, 3])
    def test_stretched_grid_errs_less_than_the_narrow_one_on_normal_weights(self, bits):
        w = weights((500, 40))
        narrow, stretched = (
            float(jnp.sqrt(jnp.mean((fake_quantize(w, bits, QuantSpec("channel", grid)) - w) ** 2)))
            for grid in ("narrow", "stretched")
        )
        assert stretched < 0.9 * narrow


class TestContracts:
    def test_only_kernels_by_default_and_the_mask_otherwise(self):
        params = {"kernel": weights(), "scale": weights((5,)), "bias": weights((5,), 1)}
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
        w = weights((6, 2)).astype(jnp.float64)
        result = fake_quantize(w, 4)
        assert result.dtype == jnp.float64
        # A top weight is 7 float32 scales, which differs from the float64 weight in the eighth digit.
        scale = (jnp.abs(w).max(axis=0) / 7).astype(jnp.float32).astype(jnp.float64)
        np.testing.assert_array_equal(jnp.abs(result).max(axis=0), 7 * scale)

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
        (
            lambda: quantize_and_evaluate(jnp.sum, weights(), bits=8),
            TypeError,
            "must be a sequence .* got 8",
        ),
        (lambda: QuantSpec(grid="narow"), ValueError, r"`QuantSpec\(grid=...\)` .* Did you mean 'narrow'"),
        (lambda: QuantSpec(granularity="row"), ValueError, r"`QuantSpec\(granularity=...\)` must be one of"),
        (lambda: quantize_and_evaluate(jnp.sum, weights(), bits=()), ValueError, "at least one bit width"),
        (lambda: quantize_and_evaluate(jnp.sum, weights(), bits=(8, 1)), ValueError, r"integer in 2..16; got 1"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
