"""`quantize.onnx`: files that onnxruntime runs, against the network with the weights of `dequantize`."""

import dataclasses
import os
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime
import optax
import pytest
from flax import nnx
from flax.core import freeze
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits

from hero_jax import models, quantize
from hero_jax.errors import ArgumentError
from hero_jax.quantize import QuantSpec, _onnx, allocation, named, rounding
from hero_jax.quantize import linen as quantize_linen
from hero_jax.quantize.onnx import inspect, save

KEY = jax.random.key(3)
NETWORKS = {
    "mlp": models.MLP(hidden=(24, 16)),
    "resnet": models.CifarResNet(blocks=1),
    "mobilenet": models.MobileNetV2(stages=((1, 8, 1, 1), (2, 8, 2, 2))),
    "vgg": models.VGG(stages=((8, 1), (12, 2))),
    "vit": models.VisionTransformer(width=24, depth=1, heads=2),
}
MATRIX = {"kernel": jax.random.normal(KEY, (6, 4)), "bias": jnp.arange(4.0)}


def linear(params, x):
    return x @ params["kernel"] + params["bias"]


def beyond(bits):
    """A kernel as integers, one of whose zero points is no code of so many bits."""
    q = quantize.quantize(MATRIX["kernel"], bits, named("asymmetric"))
    return dataclasses.replace(q, zero_point=q.zero_point.at[0, 1].set(2 ** (bits + 1)))


def smallest_of_two(x):
    """An operation that jax2onnx does not know."""
    return jax.lax.reduce_window(x, jnp.inf, jax.lax.min, (1, 2), (1, 1), "VALID")


def run(path, *inputs, is_optimized=True):
    """The outputs of a file in a session with default options, or of the nodes as they are in the file."""
    options = onnxruntime.SessionOptions()
    if not is_optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(os.fspath(path), options)
    given = {x.name: np.asarray(value) for x, value in zip(session.get_inputs(), inputs, strict=True)}
    outputs = session.run(None, given)
    return outputs[0] if len(outputs) == 1 else outputs


def operators(path):
    """What onnxruntime makes of a file: the operators that it runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = f"{path}.optimized", 3
    onnxruntime.InferenceSession(path, options)
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def agree(outputs, expected):
    """Within float32's rounding of sums in another order, in units of the largest output."""
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return (data.images[..., None] / 16).astype(np.float32), data.target


@pytest.fixture(scope="module", params=NETWORKS)
def trained(request, digits):
    """A network, its function in evaluation mode, variables after some steps on digits, and other images of them."""
    model, (images, labels) = NETWORKS[request.param], digits
    variables = model.init(KEY, images[:1])
    params, stats = variables["params"], {name: x for name, x in variables.items() if name != "params"}
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, stats, state, x, y):
        def loss(params):
            logits, new = model.apply({"params": params, **stats}, x, train=True, mutable=list(stats))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), new

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state

    state = tx.init(params)
    for chosen in np.tile(np.arange(1200), 4).reshape(80, 60):
        params, stats, state = step(params, stats, state, images[chosen], labels[chosen])
    return model.apply, {"params": params, **stats}, (images[1200:], labels[1200:])


def test_what_agrees():
    with pytest.raises(AssertionError):
        agree(np.array([1.0, 0.5]), np.array([1.0, 0.50001]))
    agree(np.array([1.0, 0.5]), np.array([1.0, 0.500001]))


class TestTrainedNetworks:
    @pytest.mark.parametrize(
        ("spec", "bits"),
        [*(("narrow", bits) for bits in (2, 4, 5, 8)), *(("asymmetric", bits) for bits in (2, 3, 6, 8))],
    )
    def test_logits_and_accuracy_are_those_of_the_dequantized_network(self, trained, spec, bits, tmp_path):
        apply_fn, variables, (images, labels) = trained
        saved = save(tmp_path / "a.onnx", apply_fn, variables, images[:1], bits=bits, spec=named(spec))
        params = quantize.dequantize(quantize.quantize(variables["params"], bits, named(spec)))
        forward = jax.jit(apply_fn)
        expected = np.asarray(forward({**variables, "params": params}, images))
        logits = run(tmp_path / "a.onnx", images)
        agree(logits, expected)
        accuracy = np.mean(logits.argmax(1) == labels)
        assert accuracy == np.mean(expected.argmax(1) == labels)
        full = np.mean(np.asarray(forward(variables, images)).argmax(1) == labels)
        assert full > 0.5
        assert bits < 5 or accuracy > full - 0.1
        assert saved.opset == (25 if bits == 2 else 21)

    def test_files_shrink_with_the_bits(self, trained, tmp_path):
        apply_fn, variables, (images, _) = trained
        sizes = {}
        for bits, storage in ((None, 4 * 8), (8, 8), (4, 4), (2, 2)):
            saved = save(tmp_path / f"{bits}.onnx", apply_fn, variables, images[:1], bits=bits)
            sizes[bits] = saved.num_bytes
            leaves = jax.tree.leaves(variables["params"])
            wide = [x for x in leaves if x.ndim >= 2]
            if bits is None:
                assert saved.quantized == {}
                assert sum(saved.in_float.values()) == sum(4 * x.size for x in leaves)
                continue
            codes = sum(-(-x.size * storage // 8) for x in wide)
            scales = sum(leaf.num_scales for leaf in saved.quantized.values())
            assert sum(leaf.num_bytes for leaf in saved.quantized.values()) == codes + 4 * scales
            assert scales == sum(x.shape[-1] for x in wide)
            # What the file has besides is the graph and the leaves in floating point, at any width.
            saving = sum(4 * x.size for x in wide) - codes - 4 * scales
            assert abs((sizes[None] - sizes[bits]) - saving) < 700 * len(wide)
        assert sizes[None] > sizes[8] > sizes[4] > sizes[2]

    def test_the_batch_has_any_length(self, trained, tmp_path):
        apply_fn, variables, (images, _) = trained
        save(tmp_path / "a.onnx", apply_fn, variables, images[:2], bits=4)
        whole = run(tmp_path / "a.onnx", images[:5])
        for n in (1, 3):
            agree(run(tmp_path / "a.onnx", images[:n]), whole[:n])


class TestWeights:
    @pytest.mark.parametrize("bits", [2, 3, 4, 7, 8, 12])
    @pytest.mark.parametrize(
        "spec",
        ["narrow", "asymmetric", "tensor-full", "tensor-asymmetric", "group2-narrow", "group3-asymmetric", "mse"],
    )
    def test_they_are_those_of_dequantize_bit_for_bit(self, spec, bits, tmp_path):
        saved = save(tmp_path / "a.onnx", lambda p, x: x @ p["kernel"], MATRIX, jnp.ones((1, 6)), bits=bits,
                     spec=named(spec), mask={"kernel": True, "bias": False})  # fmt: skip
        expected = quantize.dequantize(quantize.quantize(MATRIX["kernel"], bits, named(spec)))
        # A product with the identity is exact.
        np.testing.assert_array_equal(run(tmp_path / "a.onnx", np.eye(6, dtype=np.float32)), expected)
        leaf = saved.quantized["kernel"]
        unsigned, width = "u" * ("asymmetric" in spec), {2: 2, 3: 4, 4: 4, 7: 8, 8: 8, 12: 16}[bits]
        groups = {"tensor": 1, "group2": 12, "group3": 8}.get(spec.split("-")[0], 4)
        assert leaf[:3] == (bits, f"{unsigned}int{width}", groups)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_weights_of_16_bits(self, dtype, tmp_path):
        w = MATRIX["kernel"].astype(dtype)
        save(tmp_path / "a.onnx", lambda w, x: x @ w.astype(jnp.float32), w, jnp.ones((1, 6)), bits=5)
        expected = quantize.dequantize(quantize.quantize(w, 5)).astype(jnp.float32)
        np.testing.assert_array_equal(run(tmp_path / "a.onnx", np.eye(6, dtype=np.float32)), expected)

    def test_a_width_for_every_leaf(self, tmp_path):
        params = {
            name: jax.random.normal(key, (6, 6)) for name, key in zip("abc", jax.random.split(KEY, 3), strict=True)
        }
        apply_fn = lambda p, x: x @ p["a"] @ p["b"] @ p["c"]  # noqa: E731
        bits = allocation.bits_tree(params, {"a": 2, "b": 4, "c": 8})
        saved = save(tmp_path / "a.onnx", apply_fn, params, jnp.ones((1, 6)), bits=bits)
        assert {name: leaf.type for name, leaf in saved.quantized.items()} == {"a": "int2", "b": "int4", "c": "int8"}
        x = jax.random.normal(KEY, (3, 6))
        agree(run(tmp_path / "a.onnx", x), apply_fn(quantize.fake_quantize(params, bits), x))

    def test_an_exception_of_the_spec_stays_in_float(self, tmp_path):
        spec = QuantSpec(overrides=(("a", None), ("b", 6)))
        params = {"a": jnp.eye(6)[::-1], "b": MATRIX["kernel"]}
        saved = save(tmp_path / "a.onnx", lambda p, x: x @ p["a"] @ p["b"], params, jnp.ones((1, 6)), bits=3, spec=spec)
        assert list(saved.quantized) == ["b"]
        assert saved.quantized["b"].bits == 6
        assert saved.in_float == {"a": 144}
        expected = quantize.fake_quantize(params["b"], 6)[::-1]
        np.testing.assert_array_equal(run(tmp_path / "a.onnx", np.eye(6, dtype=np.float32)), expected)

    def test_codes_of_optimized_rounding(self, tmp_path):
        x = jax.random.normal(KEY, (40, 6)) @ jnp.diag(jnp.arange(1.0, 7.0)) + 1
        optimized = rounding.quantized(MATRIX, 3, {"kernel": (x.T @ x / 40)[None]})
        nearest = quantize.quantize(MATRIX, 3)
        assert np.any(optimized["kernel"].codes != nearest["kernel"].codes)
        save(tmp_path / "a.onnx", linear, optimized, x, bits=None)
        agree(run(tmp_path / "a.onnx", x), linear(quantize.dequantize(optimized), x))

    def test_batch_norm_folded_first(self, digits, tmp_path):
        model, images = NETWORKS["resnet"], digits[0][:20]
        variables = model.init(KEY, images[:1])
        variables = jax.tree.map(lambda x: x + 0.1, variables)
        folded = quantize_linen.fold_batch_norm(
            variables, quantize_linen.batch_norm_pairs(model.apply, variables, images)
        )
        save(tmp_path / "a.onnx", lambda v, x: model.apply(v, x), folded, images, bits=4)
        params = quantize.fake_quantize(folded["params"], 4)
        agree(run(tmp_path / "a.onnx", images), model.apply({**folded, "params": params}, images))

    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_a_narrower_integer_may_be_left_out(self, bits, tmp_path):
        saved = save(tmp_path / "a.onnx", linear, MATRIX, jnp.ones((1, 6)), bits=bits, storage=(4, 8))
        assert saved.quantized["kernel"].type == {2: "int4", 4: "int4", 8: "int8"}[bits]
        assert saved.opset == 21
        x = jax.random.normal(KEY, (3, 6))
        agree(run(tmp_path / "a.onnx", x), linear(quantize.fake_quantize(MATRIX, bits), x))


class TestOtherNetworks:
    """Weights that reach their operator in other ways."""

    def check(self, path, apply_fn, variables, x, *, bits=4, spec=QuantSpec()):
        saved = save(path / "a.onnx", apply_fn, variables, x, bits=bits, spec=spec)
        has_params = isinstance(variables, dict) and "params" in variables
        params = quantize.fake_quantize(variables["params"] if has_params else variables, bits, spec)
        agree(run(path / "a.onnx", x), apply_fn({**variables, "params": params} if has_params else params, x))
        return saved

    def test_nnx(self, tmp_path):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
                self.norm = nnx.BatchNorm(8, rngs=rngs)
                self.head = nnx.Linear(8, 5, rngs=rngs)

            def __call__(self, x):
                return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))

        net = Net(nnx.Rngs(0))
        net.eval()
        graph, params, rest = nnx.split(net, nnx.Param, ...)
        x = jax.random.normal(KEY, (3, 6, 6, 3))
        saved = self.check(tmp_path, lambda p, x: nnx.merge(graph, p, rest)(x), params, x)
        assert len(saved.quantized) == 2

    def test_equinox(self, tmp_path):
        eqx = pytest.importorskip("equinox")

        class Net(eqx.Module):
            conv: eqx.nn.Conv2d
            head: eqx.nn.Linear

            def __call__(self, x):
                return self.head(jax.nn.relu(self.conv(x)).mean((1, 2)))

        net = Net(eqx.nn.Conv2d(3, 8, 3, key=KEY), eqx.nn.Linear(8, 5, key=KEY))
        params, rest = eqx.partition(net, eqx.is_array)
        # The bias of an Equinox convolution has three axes.
        saved = self.check(
            tmp_path,
            lambda p, x: jax.vmap(eqx.combine(p, rest))(x),
            params,
            jax.random.normal(KEY, (3, 3, 6, 6)),
            spec=QuantSpec(leaves=("*/weight",)),
        )
        assert list(saved.quantized) == ["conv/weight", "head/weight"]

    @pytest.mark.parametrize("bits", [2, 8])
    def test_two_places_in_two_layouts(self, bits, tmp_path):
        w = jax.random.normal(KEY, (8, 6))
        self.check(tmp_path, lambda w, x: jnp.tanh(x @ w) @ w.T, w, jax.random.normal(KEY, (3, 8)), bits=bits)

    def test_a_product_that_is_no_gemm(self, tmp_path):
        w = jax.random.normal(KEY, (8, 6))
        self.check(tmp_path, lambda w, x: x @ w, w, jax.random.normal(KEY, (3, 4, 8)))

    def test_embedding_with_integers_as_inputs(self, tmp_path):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, tokens):
                embed = nn.Embed(20, 8)
                return embed.attend(nn.Dense(8)(embed(tokens)))

        tokens = jax.random.randint(KEY, (3, 5), 0, 20, jnp.int32)
        self.check(tmp_path, Net().apply, Net().init(KEY, tokens), tokens)

    @pytest.mark.parametrize("spec", ["narrow", "group2-asymmetric"])
    def test_attention_with_kernels_of_three_axes(self, spec, tmp_path):
        net, x = nn.MultiHeadDotProductAttention(2), jax.random.normal(KEY, (3, 5, 8))
        self.check(tmp_path, lambda v, x: net.apply(v, x, x), net.init(KEY, x, x), x, spec=named(spec))

    def test_a_weight_that_is_computed_with_first(self, tmp_path):
        net, x = nn.WeightNorm(nn.Dense(5)), jax.random.normal(KEY, (3, 8))
        variables = net.init(KEY, x)
        self.check(tmp_path, lambda v, x: net.apply(v, x), variables, x)

    def test_a_group_that_a_reshape_would_tear_apart(self, tmp_path):
        """Groups of heads of an attention's kernel: moved, each entry would have a scale of its own."""
        net, x = nn.DenseGeneral((4, 3)), jax.random.normal(KEY, (5, 2, 8))
        variables = net.init(KEY, x)
        saved = self.check(tmp_path, net.apply, variables, x, spec=QuantSpec("group", group_size=2, leaves=("kernel",)))
        assert saved.quantized["kernel"].num_scales == 8 * 2 * 3

    def test_leaves_of_one_axis(self, tmp_path):
        saved = self.check(tmp_path, linear, MATRIX, jnp.ones((3, 6)), spec=QuantSpec(leaves=("*",)))
        assert set(saved.quantized) == {"kernel", "bias"}

    def test_a_collection_with_the_paths_of_the_parameters(self, tmp_path):
        a, b = (jax.random.normal(key, (6, 4)) for key in jax.random.split(KEY))
        variables = {"params": {"aux": {"kernel": a}}, "aux": {"kernel": b}}
        apply_fn = lambda v, x: x @ v["params"]["aux"]["kernel"] + x @ v["aux"]["kernel"]  # noqa: E731
        self.check(tmp_path, apply_fn, variables, jax.random.normal(KEY, (3, 6)))

    def test_frozen_variables(self, tmp_path):
        net, x = nn.Dense(5), jax.random.normal(KEY, (3, 8))
        variables = freeze(net.init(KEY, x))
        saved = save(tmp_path / "a.onnx", net.apply, variables, x, bits=4)
        assert list(saved.quantized) == ["kernel"]

    def test_several_inputs_and_outputs(self, tmp_path):
        apply_fn = lambda p, x, y: (x @ p["kernel"], y + p["bias"])  # noqa: E731
        x, y = jax.random.normal(KEY, (3, 6)), jax.random.normal(KEY, (3, 4))
        save(tmp_path / "a.onnx", apply_fn, MATRIX, (x, y), bits=4)
        outputs = run(tmp_path / "a.onnx", x, y)
        for found, expected in zip(outputs, apply_fn(quantize.fake_quantize(MATRIX, 4), x, y), strict=True):
            agree(found, expected)


class TestProducts:
    """onnxruntime multiplies by the weights of the file, and does not round the inputs."""

    APPLY = {  # noqa: RUF012
        "dense": lambda w, x: nn.Dense(48, use_bias=False).apply({"params": {"kernel": w}}, x),
        "matmul": lambda w, x: x @ w,
        "three axes": lambda w, x: jnp.matmul(jnp.stack([x, 2 * x], 1), w).sum(1),
        "twice": lambda w, x: jnp.tanh(x @ w) @ w.T,
        "left": lambda w, x: (w.T @ x.T).T,
        "tied": lambda w, x: w[jnp.array([2, 5])].sum() + x @ w,
        "branches": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ w.T, lambda y: jnp.tanh(y) @ w.T, x @ w),
    }

    @pytest.mark.parametrize("apply", APPLY)
    @pytest.mark.parametrize("spec", ["tensor-narrow", "channel-asymmetric", "group16-narrow"])
    def test_exact(self, spec, apply, tmp_path):
        apply_fn, w = self.APPLY[apply], jax.random.normal(KEY, (64, 48))
        x = jax.random.normal(jax.random.key(1), (5, 64))
        for bits in (2, 4, 8):
            save(tmp_path / f"{bits}.onnx", apply_fn, w, x, bits=bits, spec=named(spec))
            agree(run(tmp_path / f"{bits}.onnx", x), apply_fn(quantize.fake_quantize(w, bits, named(spec)), x))
            made = operators(tmp_path / f"{bits}.onnx")
            assert not any("NBits" in operator for operator in made), made

    def test_unpacked_at_once(self, tmp_path):
        w, x = jax.random.normal(KEY, (64, 48)), jax.random.normal(jax.random.key(1), (5, 64))
        save(tmp_path / "a.onnx", lambda w, x: x @ w, w, x, bits=2)
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(tmp_path / "a.onnx", options)
        agree(session.run(None, {"input": np.asarray(x)})[0], x @ quantize.fake_quantize(w, 2))

    def test_half_precision(self, tmp_path):
        w, x = jax.random.normal(KEY, (64, 48), jnp.float16), jax.random.normal(KEY, (5, 64), jnp.float16)
        apply_fn = lambda w, x: nn.Dense(48, dtype=jnp.float16).apply({"params": {"kernel": w, "bias": w[0]}}, x)  # noqa: E731
        save(tmp_path / "a.onnx", apply_fn, w, x, bits=4)
        expected = apply_fn(quantize.fake_quantize(w, 4), x).astype(jnp.float32)
        found = run(tmp_path / "a.onnx", x).astype(np.float32)
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-3 * np.abs(expected).max())


@pytest.fixture(scope="module")
def rounded(trained):
    """A trained network with BatchNorm folded, and the ranges of inputs and outputs of its layers."""
    apply_fn, variables, (images, labels) = trained
    pairs = quantize_linen.batch_norm_pairs(apply_fn, variables, images)
    variables = quantize_linen.fold_batch_norm(variables, pairs)
    ranges = quantize_linen.activation_ranges(apply_fn, variables, [images[:300]], pairs=pairs, inputs=True)
    return apply_fn, variables, ranges, images, labels


class TwoLayers(nn.Module):
    """A relu between."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="second")(nn.relu(nn.Dense(6, name="first")(x)))


def simulated(apply_fn, ranges):
    """The network that rounds to 8 bits."""
    return quantize_linen.quantized_activations(apply_fn, ranges, 8)


class TestActivations:
    """8 bits for inputs and outputs of layers, and what onnxruntime makes of the pairs."""

    @pytest.mark.parametrize(("spec", "bits"), [("narrow", 3), ("asymmetric", 8)])
    def test_logits_are_those_of_the_simulated_network(self, rounded, spec, bits, tmp_path):
        apply_fn, variables, ranges, images, labels = rounded
        saved = save(
            tmp_path / "a.onnx", simulated(apply_fn, ranges), variables, images[:1], bits=bits, spec=named(spec)
        )
        assert {leaf.type for leaf in saved.quantized.values()} == {"uint8"}
        params = quantize.fake_quantize(variables["params"], bits, named(spec))
        expected = np.asarray(jax.jit(simulated(apply_fn, saved.activations))({**variables, "params": params}, images))
        exact = np.asarray(jax.jit(apply_fn)({**variables, "params": params}, images))
        size = np.abs(expected).max()

        # As the file says. What differs is an image with a value in the middle between two levels.
        off = np.abs(run(tmp_path / "a.onnx", images, is_optimized=False) - expected).max(1) / size
        assert np.mean(off < 3e-6) > 0.9
        assert off.max() < 0.03

        # With integers: sums are exact, their scales and biases rounded in other places.
        logits = run(tmp_path / "a.onnx", images)
        error, of_rounding = (np.sqrt(np.mean((x - expected) ** 2)) for x in (logits, exact))
        assert 0 < error < of_rounding
        assert np.abs(logits - expected).max() < 0.06 * size
        assert np.mean(logits.argmax(1) == expected.argmax(1)) > 0.97
        assert abs(np.mean(logits.argmax(1) == labels) - np.mean(expected.argmax(1) == labels)) < 0.01

    def test_onnxruntime_computes_with_integers(self, rounded, tmp_path):
        apply_fn, variables, ranges, images, _ = rounded
        saved = save(tmp_path / "a.onnx", simulated(apply_fn, ranges), variables, images[:1], bits=8)
        made = operators(tmp_path / "a.onnx")
        # All but the last layer, whose outputs are those of the network.
        layers = [name for name in saved.quantized if name.endswith("kernel")]
        assert made.count("QLinearConv") + made.count("QGemm") == len(layers) - 1
        assert made.count("Gemm") == 1
        assert not {"Conv", "FusedConv", "BatchNormalization"} & set(made)
        assert "head" in ranges
        assert "head" not in saved.activations
        assert {key for key in ranges if key.endswith(":inputs")} <= set(saved.activations)

    def test_outputs_alone(self, tmp_path):
        """The ranges of `activation_ranges` as they are by default, of a network without relu."""

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dense(4, name="second")(jnp.tanh(nn.Dense(6, name="first")(x)))

        x = jax.random.normal(KEY, (30, 5))
        variables = Net().init(KEY, x)
        ranges = quantize_linen.activation_ranges(Net().apply, variables, [x])
        saved = save(tmp_path / "a.onnx", simulated(Net().apply, ranges), variables, x, bits=4)
        low, high = map(float, ranges["first"])
        assert saved.activations == {"first": (low, high)}
        assert inspect(tmp_path / "a.onnx").activations == saved.activations
        params = quantize.fake_quantize(variables["params"], 4)
        expected, found = simulated(Net().apply, saved.activations)({"params": params}, x), run(tmp_path / "a.onnx", x)
        assert np.mean(np.abs(found - expected).max(1) < 3e-6) > 0.9
        assert np.abs(found - expected).max() < 0.02
        assert np.abs(Net().apply({"params": params}, x) - expected).max() > 1e-4

    def test_a_batch_norm_that_is_not_folded_stays(self, digits, tmp_path):
        apply_fn, images = NETWORKS["resnet"].apply, digits[0][:300]
        variables = jax.tree.map(lambda x: x + 0.1, jax.jit(NETWORKS["resnet"].init)(KEY, images[:1]))
        pairs = quantize_linen.batch_norm_pairs(apply_fn, variables, images)
        ranges = quantize_linen.activation_ranges(apply_fn, variables, [images], pairs=pairs, inputs=True)
        saved = save(tmp_path / "a.onnx", simulated(apply_fn, ranges), variables, images, bits=8)
        made = [node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node]
        assert made.count("BatchNormalization") == len(pairs)
        params = quantize.fake_quantize(variables["params"], 8)
        expected = np.asarray(jax.jit(simulated(apply_fn, saved.activations))({**variables, "params": params}, images))
        found = run(tmp_path / "a.onnx", images)
        assert np.abs(found - expected).max() < 0.06 * np.abs(expected).max()

    def test_attention(self, tmp_path):
        """Kernels of three axes, biases of two: added behind a reshape."""
        net, x = nn.MultiHeadDotProductAttention(2), jax.random.normal(KEY, (30, 5, 8))
        apply_fn = lambda v, x: net.apply(v, x, x)  # noqa: E731
        variables = jax.tree.map(lambda a: a + 0.1, net.init(KEY, x, x))
        ranges = quantize_linen.activation_ranges(apply_fn, variables, [x], inputs=True)
        mask = lambda tree: jax.tree.map(lambda a: a.ndim == 3, tree)  # noqa: E731
        saved = save(tmp_path / "a.onnx", simulated(apply_fn, ranges), variables, x, bits=8, mask=mask)
        assert len(saved.activations) == 7
        params = quantize.fake_quantize(variables["params"], 8, mask=mask)
        expected = simulated(apply_fn, saved.activations)({"params": params}, x)
        found = run(tmp_path / "a.onnx", x)
        assert np.sqrt(np.mean((found - expected) ** 2)) < 0.002 * np.abs(expected).max()

    def check(self, path, net, x, *, bits=8, spec=QuantSpec()):
        """A network with random weights: as the file says, without optimizations."""
        variables = net.init(KEY, x)
        ranges = quantize_linen.activation_ranges(net.apply, variables, [x], inputs=True)
        saved = save(path / "a.onnx", simulated(net.apply, ranges), variables, x, bits=bits, spec=spec)
        params = quantize.fake_quantize(variables["params"], bits, spec)
        expected = simulated(net.apply, saved.activations)({"params": params}, x)
        found = run(path / "a.onnx", x, is_optimized=False)
        off = np.abs(found - expected).reshape(len(x), -1).max(1) / np.abs(expected).max()
        assert np.mean(off < 3e-6) > 0.9
        assert off.max() < 0.03
        return saved

    def test_a_layer_that_is_called_twice(self, tmp_path):
        """Its outputs are rounded in both places, although one of them needs none."""

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                layer = nn.Dense(6, name="layer")
                return layer(jnp.tanh(layer(x)))

        saved = self.check(tmp_path, Net(), jax.random.normal(KEY, (30, 6)))
        assert set(saved.activations) == {"layer", "layer:inputs"}

    def test_an_output_of_the_network_in_the_middle(self, tmp_path):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = nn.Dense(6, name="first")(x)
                y = nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False, epsilon=0, name="norm")(x)
                return x, nn.Dense(3, name="second")(jnp.tanh(y))

        x = jax.random.normal(KEY, (30, 6))
        variables = Net().init(KEY, x)
        for ranges in ({}, {"second:inputs": (-1.0, 1.0)}):
            path, network = tmp_path / f"{len(ranges)}.onnx", simulated(Net().apply, ranges)
            save(path, network if ranges else Net().apply, variables, x, bits=8)
            params = quantize.fake_quantize(variables["params"], 8)
            for found, expected in zip(run(path, x), network({**variables, "params": params}, x), strict=True):
                assert np.abs(found - expected).max() < 0.02

    def test_a_dense_layer_on_three_axes(self, tmp_path):
        """A Reshape stands between the product and the relu."""
        saved = self.check(tmp_path, TwoLayers(), jax.random.normal(KEY, (30, 4, 6)))
        assert "first" in saved.activations
        made = operators(tmp_path / "a.onnx")
        assert made.count("QGemm") >= 1

    @pytest.mark.parametrize("bits", [3, 8])
    def test_scales_by_group(self, bits, tmp_path):
        self.check(tmp_path, TwoLayers(), jax.random.normal(KEY, (30, 8)), bits=bits, spec=named("group2-narrow"))

    def test_what_was_zero_throughout_is_left_out(self, tmp_path):
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                x = jnp.tanh(nn.Dense(6, name="first", kernel_init=nn.initializers.zeros)(x))
                return nn.Dense(3, name="second", bias_init=nn.initializers.ones)(x)

        x, net = jax.random.normal(KEY, (30, 8)), Net()
        ranges = quantize_linen.activation_ranges(net.apply, net.init(KEY, x), [x], inputs=True)
        saved = save(tmp_path / "a.onnx", simulated(net.apply, ranges), net.init(KEY, x), x, bits=8)
        assert set(saved.activations) == {"first:inputs"}
        np.testing.assert_array_equal(run(tmp_path / "a.onnx", x), np.ones((30, 3)))

    def test_refused(self, tmp_path):
        net, x = nn.Dense(4), jnp.ones((2, 6))
        variables = {"params": MATRIX}
        for ranges, message in (
            ({"layer": (0.0, 1.0)}, "must round layers with a kernel .* as it is; 'layer' is none"),
            ({":inputs": (0.0, jnp.nan)}, "must have finite ranges that hold 0; got 0 to nan for ':inputs'"),
            ({":inputs": (0.5, 1.0)}, "must have finite ranges that hold 0; got 0.5 to 1"),
            ({":inputs": 3.0}, r"must have ranges \(lowest, highest\); got 3.0 for ':inputs'"),
        ):
            with pytest.raises(ArgumentError, match=r"`save\(apply_fn=...\)` " + message):
                save(tmp_path / "a.onnx", simulated(net.apply, ranges), variables, x, bits=4)
        with pytest.raises(ArgumentError, match="must round activations to 8 bits, or not at all; got 7"):
            save(tmp_path / "a.onnx", quantize_linen.quantized_activations(net.apply, {}, 7), variables, x, bits=4)
        for bits, storage in ((9, (2, 4, 8, 16)), (4, (4, 16))):
            with pytest.raises(ArgumentError, match=rf"must have 8 bits, .* got {bits} bits at 'kernel'"):
                save(tmp_path / "a.onnx", simulated(net.apply, {":inputs": (0.0, 1.0)}), variables, x, bits=bits,
                     storage=storage)  # fmt: skip
        transposed = nn.ConvTranspose(3, (2, 2))
        x = jnp.ones((1, 4, 4, 2))
        network = simulated(transposed.apply, {":inputs": (0.0, 1.0)})
        with pytest.raises(ArgumentError, match=r"must round layers with a kernel .*; ':inputs' is none"):
            save(tmp_path / "a.onnx", network, transposed.init(KEY, x), x, bits=4)
        assert not list(tmp_path.iterdir())


class TestForm:
    """One DequantizeLinear, by the reference evaluator of onnx, for scales in any layout."""

    @pytest.mark.parametrize("perm", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
    @pytest.mark.parametrize(
        ("shape", "num_scales"), [((1, 1, 1), 1), ((1, 1, 4), 4), ((2, 3, 4), 24), ((2, 1, 4), 8), ((2, 6, 4), 48)]
    )
    def test_any_layout(self, shape, num_scales, perm):
        rng = np.random.default_rng(0)
        codes = rng.integers(-8, 8, (2, 6, 4))
        scale, zeros = rng.uniform(0.5, 2, shape).astype(np.float32), rng.integers(-8, 8, shape)
        weight = _onnx.Weight.of(codes, scale, zeros)
        expected = np.repeat(scale, 6 // shape[1], 1) * (codes - np.repeat(zeros, 6 // shape[1], 1)).astype(np.float32)
        node = onnx.helper.make_node("Transpose", ["x"], ["y"], perm=perm)
        moved = _onnx.Weight(
            _onnx.moved(weight.codes, node, {}), _onnx.moved(weight.index, node, {}), weight.scale, weight.zero_point
        )
        form = _onnx.form(moved)
        assert form.scale.size == num_scales
        options = {name: x for name, x in (("axis", form.axis), ("block_size", form.block or None)) if x is not None}
        node = onnx.helper.make_node("DequantizeLinear", ["c", "s", "z"], ["w"], **options)
        assert form.zero_point is not None
        arrays = {"c": form.codes.astype(np.int8), "s": form.scale, "z": np.asarray(form.zero_point).astype(np.int8)}
        np.testing.assert_array_equal(ReferenceEvaluator(node).run(None, arrays)[0], expected.transpose(perm))

    def test_a_reshape_that_merges_axes_of_the_scales(self):
        weight = _onnx.Weight.of(np.zeros((6, 2, 3), int), np.arange(1.0, 4.0).reshape(1, 1, 3), None)
        node = onnx.helper.make_node("Reshape", ["x", "shape"], ["y"])
        index = _onnx.moved(weight.index, node, {"shape": np.array([0, -1])})
        form = _onnx.form(_onnx.Weight(index, index, weight.scale, None))
        assert (form.axis, form.block) == (1, 0)
        np.testing.assert_array_equal(form.scale, [1, 2, 3, 1, 2, 3])

    @pytest.mark.parametrize(
        ("operator", "axes", "shape"),
        [("Squeeze", [0, 2], (3, 4)), ("Squeeze", None, (3, 4)), ("Unsqueeze", [0, 5], (1, 1, 3, 1, 4, 1)),
         ("Identity", None, (1, 3, 1, 4)), ("Transpose", None, (4, 1, 3, 1))],
    )  # fmt: skip
    def test_moves_are_those_of_onnx(self, operator, axes, shape):
        x = np.arange(12).reshape(1, 3, 1, 4)
        node = onnx.helper.make_node(operator, ["x"] if axes is None else ["x", "axes"], ["y"])
        given = {} if axes is None else {"axes": np.array(axes)}
        moved = _onnx.moved(x, node, given)
        assert moved.shape == shape
        np.testing.assert_array_equal(moved, ReferenceEvaluator(node).run(None, {"x": x, **given})[0])


def test_nodes_are_sorted_behind_what_they_read():
    """An omitted input or output, "", is no value; a graph inside a node reads those of the graph around it."""
    make = onnx.helper.make_node
    inner = onnx.helper.make_graph([make("Relu", ["last"], ["inner"])], "inner", [], [])
    nodes = [
        make("If", ["condition"], ["out"], then_branch=inner, else_branch=inner),
        make("Second", ["first"], ["last", ""]),
        make("First", ["x", ""], ["first"]),
    ]
    graph = onnx.helper.make_graph(nodes, "outer", [], [])
    _onnx.sort(graph)
    assert [node.op_type for node in graph.node] == ["First", "Second", "If"]


class TestInspect:
    @pytest.fixture
    def file(self, tmp_path):
        save(tmp_path / "a.onnx", linear, MATRIX, jnp.ones((1, 6)), bits=3, spec=named("asymmetric"))
        return tmp_path / "a.onnx"

    def test_what_is_listed(self, tmp_path):
        spec = QuantSpec("channel", "full", symmetric=False, overrides=(("kernel", 4),))
        saved = save(tmp_path / "a.onnx", linear, MATRIX, jnp.ones((1, 6)), bits=3, spec=spec)
        found = inspect(tmp_path / "a.onnx")
        assert found.spec == spec
        assert found.quantized == saved.quantized == {"kernel": (4, "uint4", 4, 12 + 16 + 2, (6, 4))}
        assert ("float32", 16) in {(constant.type, constant.num_bytes) for constant in found.others.values()}

    def test_a_changed_byte_is_noticed_wherever_it_is(self, file):
        data = file.read_bytes()
        for i in range(len(data)):
            file.write_bytes(data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :])
            with pytest.raises(ArgumentError, match=r"`inspect\(path=...\)` must be a file of `save`; .*a.onnx"):
                inspect(file)

    @pytest.mark.parametrize("n", [0, 1, 100])
    def test_a_file_cut_short(self, file, n):
        file.write_bytes(file.read_bytes()[:n])
        with pytest.raises(ArgumentError, match=r"it is of something else|it is damaged"):
            inspect(file)

    def test_a_file_of_something_else(self, file):
        model = onnx.load(file)
        del model.metadata_props[:]
        onnx.save(model, file)
        with pytest.raises(ArgumentError, match="it is of something else"):
            inspect(file)

    def test_another_version(self, file):
        model = onnx.load(file)
        next(x for x in model.metadata_props if x.key == "hero_jax.version").value = "9"
        onnx.save(model, file)
        with pytest.raises(ArgumentError, match="it has version '9'; this hero_jax reads '1'"):
            inspect(file)

    def test_the_digest_goes_to_its_place(self, tmp_path):
        """Codes of 48 are the character 0."""
        w = jnp.full((40, 40), 48.0).at[0, 0].set(127.0)
        save(tmp_path / "a.onnx", lambda w, x: x @ w, w, jnp.ones((1, 40)), bits=8, spec=named("tensor-narrow"))
        np.testing.assert_array_equal(run(tmp_path / "a.onnx", np.eye(40, dtype=np.float32)), w)
        assert inspect(tmp_path / "a.onnx").quantized["weights"].num_bytes == 1600 + 4

    def test_without_quantized_weights(self, tmp_path):
        save(tmp_path / "a.onnx", linear, MATRIX, jnp.ones((1, 6)), bits=None)
        assert inspect(tmp_path / "a.onnx")[:2] == (None, {})


class TestRefused:
    """One line, and nothing is written."""

    @pytest.fixture(autouse=True)
    def nothing_written(self, tmp_path):
        yield
        assert not [x for x in tmp_path.iterdir() if x.name != "there"]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"storage": (3,)}, r"`save\(storage=...\)` must be some of \(2, 4, 8, 16\); got \(3,\)"),
            ({"storage": (2,)}, r"must have integers that hold the codes of every leaf; got \(2,\) and 4 bits"),
            ({"bits": 17}, r"bits=...\)` must be an integer in 2..16; got 17"),
            ({"mask": {"kernel": False, "bias": False}}, r"mask=...\)` must select at least one leaf; got none of 2"),
            ({"variables": {**MATRIX, "kernel": MATRIX["kernel"].at[2, 1].set(jnp.nan)}}, "'kernel' has a NaN"),
            ({"variables": {**MATRIX, "bias": jnp.full(4, jnp.inf)}}, "'bias' has a NaN or an infinity"),
            ({"variables": {**MATRIX, "other": jnp.ones((2, 2))}}, "every quantized weight .*; 'other' has no place"),
            ({"bits": None, "mask": {"kernel": True, "bias": False}}, r"`save\(mask=...\)` must be left out"),
            ({"apply_fn": lambda v, x: linear(v["params"], x), "variables": {"params": MATRIX, "batch_stats": {"mean":
             jnp.array([jnp.nan])}}}, "'batch_stats/mean' has a NaN or an infinity"),
            ({"storage": 4}, r"`save\(storage=...\)` must be some of \(2, 4, 8, 16\); got 4"),
            ({"storage": ("4",)}, r"must be some of \(2, 4, 8, 16\); got \('4',\)"),
            ({"variables": {**MATRIX, "empty": jnp.ones((0, 2))}}, "must have entries; 'empty' has none"),
            ({"variables": {"a/b": jnp.eye(2), "a": {"b": jnp.eye(2)}}}, "of different paths; two are 'a/b'"),
            ({"variables": {"kernel": beyond(3), "bias": jnp.ones(4)}, "bits": None, "spec": named("asymmetric")},
             "must have codes and zero points of 3 bits; 'kernel' has others"),
            ({"example": jnp.ones(())}, r"`save\(example=...\)` must have a first axis, the batch"),
            ({"variables": quantize.quantize(MATRIX, 3), "bits": None, "spec": named("asymmetric")},
             r"`save\(spec=...\)` must be what the leaves were made by; 'kernel' has no zero points"),
            ({"apply_fn": lambda p, x: smallest_of_two(linear(p, x))}, "jax2onnx has no 'reduce_window_min'"),
            ({"apply_fn": lambda p, x: linear(p, x)[: x.shape[0] // 2 * 2 - 1].reshape(-1, 2)[:3]},
             r"must be a network that jax2onnx converts"),
        ],
    )  # fmt: skip
    def test_arguments(self, change, message, tmp_path):
        given = {"apply_fn": linear, "variables": MATRIX, "example": jnp.ones((2, 6)), "bits": 4} | change
        with pytest.raises(ArgumentError, match=message) as found:
            save(tmp_path / "a.onnx", **given)
        assert "\n" not in str(found.value)

    def test_an_operation_that_is_not_known_names_its_layer(self, tmp_path):
        class Inner(nn.Module):
            @nn.compact
            def __call__(self, x):
                return smallest_of_two(nn.Dense(3)(x))

        class Net(nn.Module):
            @nn.compact
            def __call__(self, x):
                return Inner(name="odd")(nn.Dense(4)(x))

        x = jnp.ones((2, 6))
        with pytest.raises(ArgumentError, match="jax2onnx has no 'reduce_window_min', which 'Net/odd' calls"):
            save(tmp_path / "a.onnx", Net().apply, Net().init(KEY, x), x, bits=4)

    def test_a_spec_by_its_name(self, tmp_path):
        with pytest.raises(TypeError, match=r"`save\(spec=...\)` must be a QuantSpec; got 'narrow'"):
            save(tmp_path / "a.onnx", linear, MATRIX, jnp.ones((1, 6)), bits=None, spec="narrow")

    def test_weights_of_64_bits(self, tmp_path):
        with jax.enable_x64(True):
            w = jnp.ones((6, 4), jnp.float64)
            with pytest.raises(TypeError, match="must have weights of float32, float16, bfloat16; 'w' has float64"):
                save(tmp_path / "a.onnx", lambda p, x: x @ p["w"], {"w": w}, jnp.ones((2, 6)), bits=4)

    def test_an_error_of_the_network_is_its_own(self, tmp_path):
        with pytest.raises(TypeError, match="dot_general requires contracting dimensions"):
            save(tmp_path / "a.onnx", linear, MATRIX, jnp.ones((2, 5)), bits=4)

    def test_a_path_that_exists(self, tmp_path):
        there = tmp_path / "there"
        there.write_text("mine")
        with pytest.raises(FileExistsError, match=r"must be a new file; there is something at '.*there'"):
            save(there, linear, MATRIX, jnp.ones((1, 6)), bits=4)
        assert there.read_text() == "mine"

    def test_a_link_to_nowhere(self, tmp_path):
        (tmp_path / "there").symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError, match="must be a new file"):
            save(tmp_path / "there", linear, MATRIX, jnp.ones((1, 6)), bits=4)

    def test_a_folder_that_does_not_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"must be in a folder that exists; got '.*nowhere/a.onnx'"):
            save(tmp_path / "nowhere" / "a.onnx", linear, MATRIX, jnp.ones((1, 6)), bits=4)

    @pytest.mark.parametrize("module", ["onnx", "jax2onnx"])
    def test_a_package_that_is_missing(self, module, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf'`save` needs {module}: pip install "hero_jax\[onnx\]"'):
            save(tmp_path / "a.onnx", linear, MATRIX, jnp.ones((1, 6)), bits=4)
