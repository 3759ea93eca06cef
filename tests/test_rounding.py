"""Optimised rounding as integer codes: the weights of `optimized`, saved and read back; layers it must not measure."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hero_jax.quantize import QuantizedArray, dequantize, fake_quantize, linen, load, named, quantize, rounding, save


class Net(nn.Module):
    """Plain, grouped and depthwise convolutions, a dense layer, and a matrix that no layer multiplies by."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="conv")(x))
        x = nn.relu(nn.Conv(6, (3, 2), feature_group_count=2, name="grouped")(x))
        x = nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)
        x = nn.Dense(6, name="head")(x.mean((1, 2)))
        return x @ self.param("table", nn.initializers.normal(), (6, 3))


@pytest.fixture(scope="module")
def network():
    """The parameters, and the matrices of the inputs."""
    x = jax.random.normal(jax.random.key(0), (12, 10, 10, 4)) + 0.5
    variables = Net().init(jax.random.key(1), x)
    return variables["params"], linen.input_grams(Net().apply, variables, [x])


def plain(function):
    return function


class TestCodes:
    @pytest.mark.parametrize(
        ("name", "bits", "compiled"),
        [
            ("channel-narrow", 3, plain),
            ("channel-narrow", 3, jax.jit),
            ("tensor-stretched", 3, jax.jit),
            ("tensor-narrow-mse", 2, jax.jit),
            ("channel-asymmetric", 9, plain),
            ("group2-full", 4, jax.jit),
            ("group2-asymmetric", 3, jax.jit),
        ],
    )
    def test_are_those_of_the_optimized_weights_and_survive_a_file(self, network, name, bits, compiled, tmp_path):
        params, grams = network
        spec = named(name)
        make_weights, make_codes = (
            compiled(functools.partial(function, bits=bits, grams=grams, spec=spec))
            for function in (rounding.optimized, rounding.quantized)
        )
        expected, codes = make_weights(params), make_codes(params)
        jax.tree.map(np.testing.assert_array_equal, dequantize(codes), expected)
        near = quantize(params, bits, spec)
        assert jax.tree.structure(codes) == jax.tree.structure(near)
        for layer in ("conv", "grouped", "depthwise", "head"):
            kernel, nearest = codes[layer]["kernel"], near[layer]["kernel"]
            assert isinstance(kernel, QuantizedArray)
            assert kernel.codes.dtype == (jnp.int8 if bits <= 8 else jnp.int16)
            # A depthwise weight that is a group of its own is on its grid.
            is_exact = layer == "depthwise" and spec.granularity == "group"
            assert np.abs(kernel.codes - nearest.codes).max() == (0 if is_exact else 1)
        # No layer multiplies by the table: it is rounded to nearest.
        jax.tree.map(
            np.testing.assert_array_equal, codes["table"], compiled(lambda w: quantize(w, bits, spec))(params["table"])
        )
        save(tmp_path / "net.safetensors", codes, spec)
        loaded, loaded_spec = load(tmp_path / "net.safetensors")
        assert loaded_spec == spec
        assert jax.tree.structure(loaded) == jax.tree.structure(codes)
        for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(codes), strict=True):
            assert x.dtype == y.dtype
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    def test_bits_by_leaf_masks_and_types(self, network):
        params, grams = network
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        bits = {**dict.fromkeys(params, 3), "head": np.int64(5), "conv": jnp.int32(10)}
        mask = {**jax.tree.map(lambda w: w.ndim > 1, params), "grouped": False}
        codes = rounding.quantized(params, bits, grams, mask=mask, num_sweeps=1)
        widths = [codes[layer]["kernel"].bits for layer in ("conv", "depthwise", "head")]
        assert widths == [10, 3, 5]
        assert {type(width) for width in widths} == {int}
        np.testing.assert_array_equal(codes["grouped"]["kernel"], params["grouped"]["kernel"])
        weights = dequantize(codes)
        assert {w.dtype for w in jax.tree.leaves(weights)} == {jnp.dtype("bfloat16")}
        expected = rounding.optimized(params, bits, grams, mask=mask, num_sweeps=1)
        jax.tree.map(np.testing.assert_array_equal, weights, expected)
        longer = rounding.quantized(params, bits, grams, mask=mask)
        assert (longer["conv"]["kernel"].codes != codes["conv"]["kernel"].codes).any()

    def test_errors(self, network):
        params, grams = network
        with pytest.raises(
            TypeError, match=r"`quantized\(bits=...\)` must be Python integers; .* `optimized` takes it"
        ):
            jax.jit(lambda bits: rounding.quantized(params, bits, grams))(3)
        with pytest.raises(ValueError, match=r"`quantized\(grams=...\)` must have a path that is quantized"):
            rounding.quantized(params, 3, {"conv/bias": jnp.ones((1, 1, 1))})
        with pytest.raises(ValueError, match=r"`quantized\(grams=...\)\['head/kernel'\]` must be \(groups, K, K\)"):
            rounding.quantized(params, 3, {"head/kernel": jnp.ones((1, 5, 5))})
        with pytest.raises(ValueError, match=r"`quantized\(num_sweeps=...\)` must be an integer >= 1; got 0"):
            rounding.quantized(params, 3, grams, num_sweeps=0)


class Standardized(nn.Conv):
    """Its kernel is not the parameter."""

    def param(self, name, *arguments, **options):
        value = super().param(name, *arguments, **options)
        return value - value.mean((0, 1, 2)) if name == "kernel" else value


class TestKernelsNotUsedAsTheyAre:
    def network(self, layer):
        class Outer(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.BatchNorm(True, name="bn")(layer(name="layer")(x))

        x = jax.random.normal(jax.random.key(0), (9, 6, 6, 4)) + 1
        return Outer().apply, Outer().init(jax.random.key(1), x), x

    def test_a_mask_is_refused_by_grams_and_counts_in_biases(self):
        # As many outputs as inputs: the mask would fit the kernel that copies the inputs.
        mask = jax.random.bernoulli(jax.random.key(2), 0.5, (1, 1, 4, 4)).astype(jnp.float32)
        apply, variables, x = self.network(functools.partial(nn.Conv, 4, (1, 1), mask=mask))
        with pytest.raises(ValueError, match=r"must have no nn\.Conv with a mask; 'layer' has one"):
            linen.input_grams(apply, variables, [x])
        quantized = fake_quantize(variables["params"], 2)
        corrected = linen.bias_correction(apply, variables, [x])(quantized)
        before, after = (
            jnp.abs((apply(v, x) - apply(variables, x)).mean((0, 1, 2))).max()
            for v in (variables | {"params": quantized}, corrected)
        )
        assert before > 0.01
        assert after < 1e-6

    def test_a_subclass_is_refused_and_not_folded(self):
        apply, variables, x = self.network(functools.partial(Standardized, 4, (3, 3)))
        message = "must have layers that use their kernels as they are; 'layer' is a Standardized"
        with pytest.raises(ValueError, match=message):
            linen.input_grams(apply, variables, [x])
        with pytest.raises(ValueError, match=message):
            linen.bias_correction(apply, variables, [x])(variables["params"])
        assert linen.batch_norm_pairs(apply, variables, x) == {}
        assert set(linen.activation_ranges(apply, variables, [x])) == {"layer"}
