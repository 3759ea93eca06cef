"""Layers of every kind under the steps of `linen`: what is linear in its kernel, what is refused, what is left out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from hero_jax.quantize import QuantSpec, fake_quantize, linen, rounding


def images(shape=(9, 6, 6, 4), seed=0):
    return jax.random.normal(jax.random.key(seed), shape) + 0.5


class Before(nn.Module):
    """A layer and a BatchNorm after it."""

    layer: nn.Module
    axis: int | tuple[int, ...] = -1

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True, axis=self.axis, name="bn")(self.layer(x))


def prepared(net, x, seed=1):
    """The variables of a network, every one away from where it starts."""
    rng = np.random.default_rng(seed)
    variables = net.init(jax.random.key(seed), x)
    return jax.tree.map(lambda a: jnp.asarray(a + 0.3 * rng.random(a.shape), a.dtype), variables)


def outputs_of(apply, variables, x, layer):
    state = apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1]
    for key in layer.split("/"):
        state = state.get("intermediates", state)[key]
    return state["__call__"][0]


def with_kernel(variables, layer, kernel):
    """The variables with one kernel changed."""

    def leaf(path, x):
        return kernel if jax.tree_util.keystr(path, simple=True, separator="/") == f"{layer}/kernel" else x

    return variables | {"params": jax.tree_util.tree_map_with_path(leaf, variables["params"])}


# Layer, number of its kernel's output axes. No two axes of a kernel are alike.
LAYERS = {
    "transposed": (nn.ConvTranspose(5, (3, 2), strides=(2, 2)), 1),
    "transposed_circular": (nn.ConvTranspose(5, (3, 3), strides=(1, 2), padding="CIRCULAR"), 1),
    "transposed_dilated": (nn.ConvTranspose(5, (2, 3), kernel_dilation=(2, 1), padding="VALID", use_bias=False), 1),
    "heads": (nn.DenseGeneral((2, 5)), 2),
    "heads_bare": (nn.DenseGeneral((2, 5), use_bias=False), 2),
    "two_inputs": (nn.DenseGeneral(7, axis=(-2, -1)), 1),
    "first_axis": (nn.DenseGeneral((3, 5), axis=(1,)), 2),
    "dense": (nn.Dense(40), 1),
    "conv": (nn.Conv(6, (3, 2), strides=2, feature_group_count=2), 1),
}


class TestLinearLayers:
    @pytest.mark.parametrize("name", LAYERS)
    def test_folding_keeps_the_function(self, name):
        net, x = Before(LAYERS[name][0]), images()
        variables = prepared(net, x)
        pairs = linen.batch_norm_pairs(net.apply, variables, x)
        assert pairs == {"layer": ("bn", 1e-5)}
        assert pairs.left_out == {}
        folded = linen.fold_batch_norm(variables, pairs)
        assert jax.tree.structure(folded) == jax.tree.structure(variables)
        np.testing.assert_allclose(net.apply(folded, x), net.apply(variables, x), rtol=1e-4, atol=1e-5)
        before, after = (v["params"]["layer"]["kernel"] for v in (variables, folded))
        scale, var = variables["params"]["bn"]["scale"], variables["batch_stats"]["bn"]["var"]
        np.testing.assert_allclose(after, before * (scale / jnp.sqrt(var + 1e-5)), rtol=1e-6)

    @pytest.mark.parametrize("name", LAYERS)
    def test_grams_give_the_mean_squared_change_of_the_outputs(self, name):
        layer, axes = LAYERS[name]
        net, x = Before(layer), images()
        variables = prepared(net, x)
        grams = linen.input_grams(net.apply, variables, [x[:4], x[4:]])
        assert list(grams) == ["layer/kernel"]
        kernel, gram = variables["params"]["layer"]["kernel"], grams["layer/kernel"]
        changed = fake_quantize(kernel, 3)
        before, after = (
            outputs_of(net.apply, with_kernel(variables, "layer", k), x, "layer") for k in (kernel, changed)
        )
        change = np.asarray(after - before, np.float64)
        expected = (change**2).sum(tuple(range(change.ndim - axes, change.ndim))).mean()
        np.testing.assert_allclose(rounding.output_error(kernel, changed, gram), expected, rtol=1e-4)
        found = rounding.optimized({"kernel": kernel}, 3, {"kernel": gram})["kernel"]
        errors = [
            float(jnp.sum((outputs_of(net.apply, with_kernel(variables, "layer", k), x, "layer") - before) ** 2))
            for k in (changed, found)
        ]
        assert errors[1] < errors[0]

    @pytest.mark.parametrize("name", LAYERS)
    def test_bias_correction_leaves_no_mean_error(self, name):
        net, x = Before(LAYERS[name][0]), images()
        variables = prepared(net, x)
        # The (heads, head_dim) biases have two axes: they are rounded too.
        quantized = fake_quantize(variables["params"], 2)
        correct = linen.bias_correction(
            net.apply, variables, [x[:4], x[4:]], linen.batch_norm_pairs(net.apply, variables, x)
        )
        assert correct.left_out == {}
        # What the BatchNorm gives is the layer's outputs, shifted and scaled.
        exact = net.apply(variables, x)
        rest = tuple(range(exact.ndim - (LAYERS[name][1] if name != "heads_bare" else 1)))
        errors = [
            np.abs((net.apply(v, x) - exact).mean(rest)).max()
            for v in (variables | {"params": quantized}, correct(quantized))
        ]
        assert errors[0] > 0.01
        assert errors[1] < 1e-5

    @pytest.mark.parametrize("name", LAYERS)
    def test_activations_are_rounded(self, name):
        net, x = Before(LAYERS[name][0]), images()
        variables = prepared(net, x)
        ranges = linen.activation_ranges(net.apply, variables, [x])
        assert list(ranges) == ["layer"]
        assert ranges.left_out == {}
        outputs = outputs_of(net.apply, variables, x, "layer")
        np.testing.assert_allclose(ranges["layer"], (outputs.min(), outputs.max()), rtol=1e-5)
        plain = Before(LAYERS[name][0])
        rounded = linen.quantized_activations(plain.apply, ranges, 3)(variables, x)
        # Of each channel of the BatchNorm at most 2^3 values.
        assert max(len(np.unique(np.asarray(rounded[..., i]))) for i in range(rounded.shape[-1])) <= 8


class Block(nn.Module):
    """Half of a transformer's block, with layers that have no calibration."""

    @nn.compact
    def __call__(self, x):
        x = nn.Embed(6, 8, name="positions")(jnp.arange(x.shape[1]))[None] + x
        y = nn.MultiHeadDotProductAttention(2, qkv_features=6, name="attention")(nn.LayerNorm(name="norm")(x))
        return nn.Einsum((8, 3), "ntd,dk->ntk", name="einsum")(x + y)


@pytest.fixture(scope="module")
def block():
    x = images((7, 6, 8))
    return Block().apply, prepared(Block(), x), x


class TestAttention:
    def test_every_projection_is_calibrated(self, block):
        apply, variables, x = block
        grams = linen.input_grams(apply, variables, [x])
        shapes = {path: gram.shape for path, gram in grams.items()}
        inner = {f"attention/{name}/kernel": (1, 8, 8) for name in ("query", "key", "value")}
        assert shapes == inner | {"attention/out/kernel": (1, 6, 6)}
        out = outputs_of(apply, variables, x, "attention/out")
        kernel = variables["params"]["attention"]["out"]["kernel"]
        changed = rounding.optimized(variables["params"], 3, grams)["attention"]["out"]["kernel"]
        change = outputs_of(apply, with_kernel(variables, "attention/out", changed), x, "attention/out") - out
        expected = jnp.sum(change**2, -1).mean()
        found = rounding.output_error(kernel, changed, grams["attention/out/kernel"])
        np.testing.assert_allclose(found, expected, rtol=1e-4)

    def test_what_is_left_out_is_named(self, block):
        apply, variables, x = block
        unseen = "not the kernel of a layer that was seen"
        biases = {f"attention/{name}/bias": unseen for name in ("query", "key", "value")}
        other = {"positions/embedding": unseen}
        einsum = {"einsum/kernel": "nn.Einsum is not supported"}
        assert linen.input_grams(apply, variables, [x]).left_out == biases | other | einsum
        assert linen.bias_correction(apply, variables, [x]).left_out == other | einsum
        ranges = linen.activation_ranges(apply, variables, [x])
        assert ranges.left_out == other
        assert set(ranges) == {*(f"attention/{name}" for name in ("query", "key", "value", "out")), "einsum"}
        # Together with what is covered, it is what is quantized.
        quantized = fake_quantize(variables["params"], 2)
        changed = jax.tree.map(lambda a, b: bool((a != b).any()), variables["params"], quantized)
        paths = {
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, is_changed in jax.tree_util.tree_leaves_with_path(changed)
            if is_changed
        }
        grams = linen.input_grams(apply, variables, [x])
        assert paths == {*grams, *grams.left_out}

    def test_corrected_biases_of_heads(self, block):
        apply, variables, x = block
        quantized = fake_quantize(variables["params"], 2, QuantSpec(leaves=("*query/*",)))
        corrected = linen.bias_correction(apply, variables, [x])(quantized)
        query, exact = (
            outputs_of(apply, v, x, "attention/query") for v in (variables | {"params": corrected["params"]}, variables)
        )
        bias = corrected["params"]["attention"]["query"]["bias"]
        assert bias.shape == (2, 3)
        np.testing.assert_allclose((query - exact).mean((0, 1)), 0, atol=1e-5)
        # A mean over heads as well would leave these.
        moved = bias - variables["params"]["attention"]["query"]["bias"]
        assert np.abs(moved - moved.mean(0)).max() > 0.01

    @pytest.mark.parametrize(
        "options",
        [{"jax_numpy_rank_promotion": "raise", "jax_debug_nans": True}, {"jax_disable_jit": True}],
        ids=["strict", "disable_jit"],
    )
    def test_under_the_checks_of_jax(self, block, options):
        apply, variables, x = block
        before = {name: getattr(jax.config, name) for name in options}
        for name, value in options.items():
            jax.config.update(name, value)
        try:
            grams = linen.input_grams(apply, variables, [x])
            rounded = rounding.optimized(variables["params"], 3, grams, num_sweeps=1)
            corrected = linen.bias_correction(apply, variables, [x])(rounded)
            ranges = linen.activation_ranges(apply, variables, [x])
            found = linen.quantized_activations(apply, ranges, 8)(variables | corrected, x)
            net, x = Before(nn.Dense(5)), images((11, 4))
            alone = prepared(net, x)
            linen.fold_batch_norm(alone, linen.batch_norm_pairs(net.apply, alone, x))
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
        assert np.isfinite(found).all()

    def test_results_are_pytrees_and_say_what_they_lack(self, block):
        apply, variables, x = block
        grams = linen.input_grams(apply, variables, [x])
        doubled = jax.jit(lambda grams: jax.tree.map(lambda g: 2 * g, grams))(grams)
        assert doubled.left_out == grams.left_out
        np.testing.assert_array_equal(doubled["attention/out/kernel"], 2 * grams["attention/out/kernel"])
        assert "left_out={'attention/key/bias': " in repr(grams)


class TestLeftOut:
    def test_batch_axes_and_transposed_kernels(self):
        x = images((5, 3, 4))
        net = Before(nn.DenseGeneral(6, axis=-1, batch_dims=(0,)))
        variables = prepared(net, x)
        grams = linen.input_grams(net.apply, variables, [x])
        assert (dict(grams), set(grams.left_out)) == ({}, {"layer/kernel", "layer/bias"})
        assert grams.left_out["layer/kernel"] == "nn.DenseGeneral with batch_dims: each has inputs of its own"
        folded = linen.fold_batch_norm(variables, linen.batch_norm_pairs(net.apply, variables, x))
        np.testing.assert_allclose(net.apply(folded, x), net.apply(variables, x), rtol=1e-4, atol=1e-5)
        quantized = fake_quantize(variables["params"], 2)
        corrected = linen.bias_correction(net.apply, variables, [x])(quantized)
        exact = outputs_of(net.apply, variables, x, "layer")
        errors = [
            np.abs((outputs_of(net.apply, v, x, "layer") - exact).mean(1)).max()
            for v in (variables | {"params": quantized}, corrected)
        ]
        assert errors[0] > 0.01
        assert errors[1] < 1e-5

        x = images()
        net = Before(nn.ConvTranspose(4, (3, 3), transpose_kernel=True))
        variables = prepared(net, x)
        why = "nn.ConvTranspose with transpose_kernel: its last axis counts inputs"
        pairs = linen.batch_norm_pairs(net.apply, variables, x)
        assert (dict(pairs), pairs.left_out) == ({}, {"layer/kernel": why})
        grams = linen.input_grams(net.apply, variables, [x])
        assert (dict(grams), grams.left_out) == ({}, {"layer/kernel": why})

    @pytest.mark.parametrize("layer", [nn.Einsum((4, 5), "nhwc,cd->nhwd"), nn.ConvLocal(5, (2, 2))])
    def test_layers_that_are_not_supported(self, layer):
        net, x = Before(layer), images()
        variables = prepared(net, x)
        why = {"layer/kernel": f"nn.{type(layer).__name__} is not supported"}
        pairs = linen.batch_norm_pairs(net.apply, variables, x)
        assert (dict(pairs), pairs.left_out) == ({}, why)
        assert linen.input_grams(net.apply, variables, [x]).left_out["layer/kernel"] == why["layer/kernel"]
        assert list(linen.activation_ranges(net.apply, variables, [x])) == ["layer"]

    def test_batch_norm_of_another_axis(self):
        # As many positions as channels: only the axis tells them apart.
        x = images((9, 5, 4))
        net = Before(nn.Dense(5), axis=1)
        pairs = linen.batch_norm_pairs(net.apply, prepared(net, x), x)
        why = "its BatchNorm 'bn' has another axis than the last"
        assert (dict(pairs), pairs.left_out) == ({}, {"layer/kernel": why})
        assert set(linen.batch_norm_pairs(Before(nn.Dense(5), axis=2).apply, prepared(net, x), x)) == {"layer"}

    def test_a_subclass_of_batch_norm(self):
        class Centered(nn.BatchNorm):
            pass

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Centered(True, name="bn")(nn.Dense(5, name="layer")(x))

        x = images((9, 4))
        pairs = linen.batch_norm_pairs(Net().apply, prepared(Net(), x), x)
        assert dict(pairs) == {}
        assert pairs.left_out["layer/kernel"].startswith("its BatchNorm 'bn' is a Centered, which may not use")

    def test_layers_inside_jit_or_remat(self):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.BatchNorm(True, name="bn")(nn.Dense(5, name="layer")(x))

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.remat(Block)(name="block")(x)

        x = images((9, 4))
        variables = prepared(Net(), x)
        pairs = linen.batch_norm_pairs(Net().apply, variables, x)
        assert dict(pairs) == {}
        assert "is inside jit, nn.scan or nn.remat" in pairs.left_out["block/layer/kernel"]
        for function in (linen.input_grams, linen.bias_correction, linen.activation_ranges):
            with pytest.raises(
                ValueError, match=r"`apply_fn` must call its layers itself; 'block/layer' is inside jit"
            ):
                function(Net().apply, variables, [x])


def mapped(change):
    """A layer whose parameters another function changes first."""

    class Mapped(nn.Module):
        layer: nn.Module

        @nn.compact
        def __call__(self, x):
            return nn.map_variables(
                lambda layer, x: layer(x),
                "params",
                trans_in_fn=lambda v: jax.tree.map(change, v),
                init=self.is_initializing(),
            )(self.layer, x)

    return Mapped


class Spectral(nn.Module):
    """SpectralNorm, in evaluation mode unless told otherwise."""

    layer: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        return nn.SpectralNorm(self.layer)(x, update_stats=train)


WRAPPERS = {
    "weight_norm": nn.WeightNorm,
    "weight_norm_without_scale": functools.partial(nn.WeightNorm, use_scale=False),
    "weight_norm_of_biases": functools.partial(nn.WeightNorm, variable_filter={"bias"}),
    "spectral_norm": Spectral,
    "twice": mapped(lambda w: 2 * w),
    "clipped": mapped(lambda w: jnp.clip(w, -8, 8)),
    "magnitude": mapped(jnp.abs),
    "rounded": mapped(lambda w: jnp.round(w * 64) / 64),
}


class Wrapped(nn.Module):
    """A plain layer with its BatchNorm, then a wrapped one with its own."""

    wrapper: type

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, name="bn1")(nn.Dense(6, name="plain")(x))
        return nn.BatchNorm(True, name="bn2")(self.wrapper(nn.Dense(8, name="layer"))(x))


class TestKernelsThatOthersChange:
    @pytest.mark.parametrize("name", WRAPPERS)
    def test_are_not_folded_and_refused_by_name(self, name):
        net, x = Wrapped(WRAPPERS[name]), images((11, 5))
        # As it starts: a normalised kernel is what its normalisation returns.
        for variables in (net.init(jax.random.key(1), x), prepared(net, x)):
            pairs = linen.batch_norm_pairs(net.apply, variables, x)
            assert pairs == {"plain": ("bn1", 1e-5)}
            assert "nn.WeightNorm, nn.SpectralNorm or the like changes it" in pairs.left_out["layer/kernel"]
            folded = linen.fold_batch_norm(variables, pairs)
            # Some keys have a "/" in them.
            assert jax.tree.structure(folded) == jax.tree.structure(variables)
            np.testing.assert_allclose(net.apply(folded, x), net.apply(variables, x), rtol=1e-4, atol=1e-5)
        message = r"`apply_fn` must have layers that use their kernels as they are; 'layer' has another '(kernel|bias)'"
        for function in (linen.input_grams, linen.bias_correction):
            with pytest.raises(ValueError, match=message):
                function(net.apply, variables, [x])
        assert set(linen.activation_ranges(net.apply, variables, [x])) == {"plain", "layer"}

    def test_a_map_that_changes_nothing_and_another_type_are_no_reason(self):
        x = images((11, 5))
        for net in (Wrapped(mapped(lambda w: 1.0 * w)), Wrapped(mapped(lambda w: w.astype(jnp.bfloat16)))):
            variables = prepared(net, x)
            assert set(linen.batch_norm_pairs(net.apply, variables, x)) == {"plain", "layer"}
            assert set(linen.input_grams(net.apply, variables, [x])) == {"plain/kernel", "layer/kernel"}

        def apply(variables, x):
            return net.apply(jax.tree.map(lambda a: a.astype(jnp.bfloat16), variables), x)

        assert set(linen.batch_norm_pairs(apply, variables, x)) == {"plain", "layer"}

    def test_a_function_that_changes_the_variables(self):
        net, x = Before(nn.Dense(5)), images((11, 4))
        variables = prepared(net, x)
        pruned = lambda v, x: net.apply(jax.tree.map(lambda a: jnp.where(jnp.abs(a) > 0.1, a, 0), v), x)  # noqa: E731
        assert linen.batch_norm_pairs(pruned, variables, x) == {}
        # Below another key than that of the network.
        moved = lambda v, x: net.apply({**v, "params": v["params"]["net"]}, x)  # noqa: E731
        with pytest.raises(ValueError, match="'layer' has another 'kernel' than `variables`"):
            linen.input_grams(moved, variables | {"params": {"net": variables["params"]}}, [x])

    def test_another_arithmetic(self):
        def coarse(x, y, *arguments, **options):
            return jax.lax.dot_general(x, jnp.round(y), *arguments, **options)

        x = images((11, 4))
        for layer in (nn.Dense(5, dot_general=coarse), nn.Dense(5, dot_general_cls=lambda: coarse)):
            net = Before(layer)
            variables = prepared(net, x)
            assert linen.batch_norm_pairs(net.apply, variables, x) == {}
            with pytest.raises(ValueError, match=r"'layer' has a dot_general(_cls)? of its own, which may not"):
                linen.input_grams(net.apply, variables, [x])
        net = Before(nn.Dense(5, dot_general=jax.lax.dot_general))
        assert set(linen.batch_norm_pairs(net.apply, variables, x)) == {"layer"}

    def test_a_shared_scope_is_no_reason(self):
        class Outer(nn.Module):
            def setup(self):
                self.dense, self.other = nn.Dense(5), nn.Dense(3)
                nn.share_scope(self, self.dense)

            def __call__(self, x):
                return self.other(self.dense(x))

        x = images((11, 4))
        variables = prepared(Outer(), x)
        assert set(linen.input_grams(Outer().apply, variables, [x])) == {"kernel", "other/kernel"}

    def test_boxes_around_parameters(self):
        init = nn.with_partitioning(nn.initializers.normal(), ("inputs", "outputs"))
        net, x = Before(nn.Dense(5, kernel_init=init)), images((11, 4))
        variables = net.init(jax.random.key(1), x)
        folded = linen.fold_batch_norm(variables, linen.batch_norm_pairs(net.apply, variables, x))
        assert jax.tree.structure(folded) == jax.tree.structure(variables)
        assert (folded["params"]["layer"]["kernel"].value != variables["params"]["layer"]["kernel"].value).any()
        np.testing.assert_allclose(net.apply(folded, x), net.apply(variables, x), rtol=1e-4, atol=1e-5)
        assert set(linen.input_grams(net.apply, variables, [x])) == {"layer/kernel"}

    def test_shapes_are_enough_to_find_pairs(self):
        net, x = Wrapped(nn.WeightNorm), images((11, 5))
        shapes = jax.eval_shape(net.init, jax.random.key(0), x)
        assert linen.batch_norm_pairs(net.apply, shapes, jax.ShapeDtypeStruct(x.shape, x.dtype)) == {
            "plain": ("bn1", 1e-5)
        }


class TestStatistics:
    def test_those_of_spectral_norm_stay(self):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, train=False):
                x = Spectral(nn.Dense(4, name="layer"))(x, train)
                return nn.BatchNorm(not train, momentum=0.8, name="bn")(x)

        x = images((40, 5))
        variables = prepared(Net(), x)
        stats = variables["batch_stats"]

        def update(stats, x):
            new = variables | {"batch_stats": stats}
            return Net().apply(new, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]

        found = linen.reestimate_batch_stats(update, stats, [x[:10], x[10:]])
        assert jax.tree.structure(found) == jax.tree.structure(stats)
        others = [{name: s for name, s in tree.items() if name != "bn"} for tree in (found, stats)]
        assert jax.tree.leaves(others[0])
        jax.tree.map(np.testing.assert_array_equal, *others)
        outputs = outputs_of(Net().apply, variables, x, "Spectral_0")
        np.testing.assert_allclose(found["bn"]["mean"], outputs.mean(0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["bn"]["var"], outputs.var(0), rtol=1e-4)
