"""The networks: parameter counts, shapes, BatchNorm behaviour, derivatives, names."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from hero_jax import models
from hero_jax.models import resnet as resnet_module
from hero_jax.models import vit


def count(variables):
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "expected"),
    [
        ("resnet8", 10, (32, 32, 3), 78_042),
        ("resnet20", 10, (32, 32, 3), 272_474),
        ("resnet32", 10, (32, 32, 3), 466_906),
        ("resnet56", 10, (32, 32, 3), 855_770),
        ("resnet20", 100, (32, 32, 3), 272_474 + 90 * 65),
        ("mobilenet_v2", 10, (32, 32, 3), 2_296_922),
        ("mobilenet_v2", 100, (18, 25, 3), 2_296_922 + 90 * 1281),
        ("vgg19_bn", 10, (32, 32, 3), 20_040_522),
        ("vgg19_bn", 10, (9, 8, 1), 20_040_522 - 2 * 9 * 64),
        ("wide_resnet", 10, (32, 32, 3), 2_748_890),
        ("resnet18", 1000, (224, 224, 3), 11_689_512),
        ("resnet50", 1000, (224, 224, 3), 25_557_032),
        ("resnet50", 10, (65, 33, 3), 25_557_032 - 990 * 2049),
        ("vit_tiny", 10, (32, 32, 3), 2_693_194),
        ("vit_tiny", 7, (8, 12, 1), 2_693_194 - 2 * 16 * 192 - (64 - 6) * 192 - 3 * 193),
        ("vit_large", 1000, (224, 224, 3), 304_324_584),
        ("mlp", 10, (8, 8, 1), 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
    ],
)
def test_parameter_counts(name, num_classes, shape, expected):
    model = models.create(name, num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *shape)))
    assert count(variables) == expected
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, *shape)))
    assert logits.shape == (2, num_classes)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("mobilenet_v2", 32, {"conv1": 32, "stage2_block2": 32, "stage3_block1": 16, "stage4_block1": 8}),
        ("mobilenet_v2", 32, {"stage3_block1/conv1": 32, "stage3_block1/conv2": 16, "stage5_block3": 8, "conv2": 4}),
        ("vgg19_bn", 32, {"conv1_2": 32, "conv2_1": 16, "conv3_4": 8, "conv4_1": 4, "conv5_4": 2}),
        ("vgg19_bn", 8, {"conv4_1": 1, "conv5_4": 1}),
        ("wide_resnet", 32, {"stage1_block2": 32, "stage2_block1/conv1": 16, "stage3_block1": 8}),
        ("resnet18", 64, {"conv": 32, "stage1_block1": 16, "stage2_block1/conv1": 8, "stage4_block2": 2}),
        ("resnet50", 64, {"conv": 32, "stage2_block1/conv1": 16, "stage2_block1/conv2": 8, "stage4_block3": 2}),
        ("vit_tiny", 32, {"patches": 8}),
        ("vit_large", 224, {"patches": 14}),
    ],
)
def test_downsampling(name, size, expected):
    model = models.create(name, 10)
    outputs = functools.partial(model.init_with_output, capture_intermediates=True, mutable=True)
    _, variables = jax.eval_shape(outputs, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    for path, width in expected.items():
        module = functools.reduce(lambda node, key: node[key], path.split("/"), variables["intermediates"])
        assert module["__call__"][0].shape[1:3] == (width, width), path


@pytest.fixture(scope="module")
def resnet():
    model = resnet_module.CifarResNet(blocks=1, num_classes=3)
    x = jax.random.normal(jax.random.key(1), (4, 12, 10, 3))
    return model, jax.jit(model.init)(jax.random.key(0), x), x


def test_resnet_trains_with_batch_statistics_and_evaluates_with_running_ones(resnet):
    model, variables, x = resnet
    train, mutated = model.apply(variables, x, train=True, mutable=["batch_stats"])
    test = model.apply(variables, x, train=False)
    assert not np.allclose(train, test)
    before, after = variables["batch_stats"]["bn"]["mean"], mutated["batch_stats"]["bn"]["mean"]
    kernel = variables["params"]["conv"]["kernel"]
    features = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * features.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    # Each image alone, under running statistics.
    np.testing.assert_allclose(model.apply(variables, x[:1], train=False), test[:1], rtol=1e-4, atol=1e-5)


def test_shortcuts_are_projections_where_the_shape_changes(resnet):
    _, variables, _ = resnet
    shortcuts = [name for name, block in variables["params"].items() if "shortcut_conv" in block]
    assert sorted(shortcuts) == ["stage2_block1", "stage3_block1"]
    assert variables["params"]["stage2_block1"]["shortcut_conv"]["kernel"].shape == (1, 1, 16, 32)


@pytest.mark.parametrize("name", models.MODELS)
def test_bfloat16_computes_low_and_keeps_float32_parameters_and_statistics(name):
    model = models.create(name, 3, dtype=jnp.bfloat16)
    x = jnp.zeros((2, 16, 16, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    logits, mutated = jax.eval_shape(train, variables, x)
    assert logits.dtype == jax.eval_shape(model.apply, variables, x).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(mutated)} <= {jnp.dtype("float32")}


# Each kind of network with BatchNorm, small.
SMALL = {
    "MobileNetV2": functools.partial(models.MobileNetV2, 3, ((2, 6, 2, 2),)),
    "VGG": functools.partial(models.VGG, 3, ((4, 2),)),
    "WideResNet": functools.partial(models.WideResNet, 1, 1, 3),
    "ImageNetResNet": functools.partial(models.ImageNetResNet, (1,), False, 3),
    "bottlenecks": functools.partial(models.ImageNetResNet, (1,), True, 3),
}


@pytest.mark.parametrize("kind", SMALL)
def test_axis_name_shares_the_statistics_of_batch_norm(x64, kind):
    @jax.jit
    def outputs():
        x = jax.random.normal(jax.random.key(1), (6, 9, 8, 2), jnp.float64)
        parts = x.reshape(2, 3, *x.shape[1:])
        variables = SMALL[kind]().init(jax.random.key(0), x)

        def train(x, axis_name=None):
            return SMALL[kind](axis_name=axis_name).apply(variables, x, train=True, mutable=["batch_stats"])

        shared = jax.vmap(functools.partial(train, axis_name="parts"), axis_name="parts")(parts)
        return train(x), shared, jax.vmap(train)(parts), SMALL[kind]().apply(variables, x)

    (logits, statistics), (shared, shared_statistics), (alone, _), test = outputs()
    np.testing.assert_allclose(shared.reshape(6, 3), logits, rtol=1e-9, atol=1e-10)
    for found, expected in zip(jax.tree.leaves(shared_statistics), jax.tree.leaves(statistics), strict=True):
        np.testing.assert_allclose(found, np.stack([expected, expected]), rtol=1e-9, atol=1e-10)
    assert np.abs(alone.reshape(6, 3) - logits).max() > 1e-3
    # The running statistics are those of the initialisation still.
    assert np.abs(test - logits).max() > 1e-3


def curvature_problem(model, shape):
    """A cross-entropy in float64, as a function of the parameters, with a point and a direction of norm 1."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], shape, jnp.float64)
    labels = jnp.arange(shape[0]) % 3
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), jax.jit(model.init)(keys[1], x))
    params, unravel = ravel_pytree(variables["params"])

    def loss_fn(params):
        logits, _ = model.apply(variables | {"params": unravel(params)}, x, train=True, mutable=["batch_stats"])
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    v = jax.random.normal(keys[2], params.shape, jnp.float64)
    return loss_fn, params, v / jnp.linalg.norm(v)


def test_vision_transformer_has_three_derivatives(x64):
    model = models.VisionTransformer(3, patch=2, width=12, depth=1, heads=3)
    loss_fn, params, v = curvature_problem(model, (5, 6, 4, 2))

    @jax.jit
    def derivatives(params):
        def with_product(params):
            return jax.jvp(jax.value_and_grad(loss_fn), (params,), (v,))

        ((loss, grads), (_, product)), (_, (_, third)) = jax.jvp(with_product, (params,), (v,))
        return loss, grads, product, third

    _, grads, product, third = derivatives(params)
    after, before = derivatives(params + 1e-4 * v), derivatives(params - 1e-4 * v)
    differences = [(x - y) / 2e-4 for x, y in zip(after, before, strict=True)]
    for found, expected in zip((grads @ v, product, third), differences, strict=False):
        assert np.linalg.norm(found) > 1e-4
        np.testing.assert_allclose(found, expected, atol=1e-6 * float(np.linalg.norm(found)))


@pytest.mark.parametrize("kind", ["VGG", "ImageNetResNet"])
def test_hessian_products_through_max_pools(x64, kind):
    loss_fn, params, v = curvature_problem(SMALL[kind](), (4, 9, 8, 2))
    grad_fn = jax.grad(loss_fn)

    @jax.jit
    def products(params):
        return jax.jvp(grad_fn, (params,), (v,))[1], jax.grad(lambda params: grad_fn(params) @ v)(params)

    forward, reverse = products(params)
    np.testing.assert_allclose(forward, reverse, atol=1e-10 * float(np.linalg.norm(reverse)))
    assert np.linalg.norm(reverse) > 1e-3


def test_vision_transformer_sees_positions_and_ignores_train_and_axis_name():
    model = models.VisionTransformer(3, patch=2, width=12, depth=1, heads=3)
    x = jax.random.normal(jax.random.key(1), (1, 4, 6, 2))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    assert variables["params"]["positions"].shape == (6, 12)
    apply = jax.jit(model.apply)
    swapped = jnp.concatenate([x[:, 2:], x[:, :2]], axis=1)
    assert not np.allclose(apply(variables, x), apply(variables, swapped), atol=1e-4)
    # Without positions the mean over the tokens knows no order.
    variables["params"]["positions"] *= 0
    logits = apply(variables, x)
    np.testing.assert_allclose(apply(variables, swapped), logits, rtol=1e-4, atol=1e-6)
    # The train flag and a mapped axis change nothing.
    named = models.vit_tiny(3, axis_name="parts", patch=2, width=12, depth=1, heads=3)
    np.testing.assert_array_equal(jax.jit(functools.partial(named.apply, train=True))(variables, x), logits)


def test_attention_is_that_of_jax_and_in_float64_exact(x64):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 3, 4), jnp.float64)
    single = [x.astype(jnp.float32) for x in (q, k, v)]
    expected = jax.nn.dot_product_attention(*single)
    np.testing.assert_allclose(vit._attention(*single), expected, rtol=1e-5, atol=1e-6)
    # One image and head in the open.
    weights = np.exp(q[1, :, 2] @ k[1, :, 2].T / 2)
    expected = weights @ v[1, :, 2] / weights.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(vit._attention(q, k, v)[1, :, 2], expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, r"`patch` must divide the height and width of the images; got 5 and 8 x 10"),
        ({"patch": 2, "heads": 5}, r"`heads` must divide `width`; got 5 and 192"),
    ],
)
def test_vision_transformer_errors(options, message):
    model = models.vit_tiny(3, **options)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 10, 3)))


def test_mlp_hidden_widths():
    model = models.mlp(num_classes=3, hidden=[7])
    assert hash(model) == hash(models.mlp(num_classes=3, hidden=(7,)))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 5)))
    assert jax.tree.map(jnp.shape, variables["params"]) == {
        "dense1": {"kernel": (5, 7), "bias": (7,)},
        "head": {"kernel": (7, 3), "bias": (3,)},
    }


@pytest.mark.parametrize(
    ("name", "num_classes", "message"),
    [
        ("resnet-20", 10, r"`create\(name=...\)` must be one of 'mlp'.*got 'resnet-20'. Did you mean 'resnet20'"),
        ("mlp", 0, r"`create\(num_classes=...\)` must be an integer >= 1; got 0"),
    ],
)
def test_errors(name, num_classes, message):
    with pytest.raises(ValueError, match=message):
        models.create(name, num_classes)


def test_importing_the_library_does_not_import_flax():
    code = "import hero_jax, sys; assert 'flax' not in sys.modules; hero_jax.models; assert 'flax' in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)
