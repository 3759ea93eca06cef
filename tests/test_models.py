"""The networks: parameter counts, shapes, BatchNorm behaviour, names."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax import models
from hero_jax.models import resnet as resnet_module


def count(variables):
    return sum(x.size for x in jax.tree.leaves(variables["params"]))


@pytest.mark.parametrize(
    ("name", "num_classes", "shape", "expected"),
    [
        ("resnet20", 10, (32, 32, 3), 272_474),
        ("resnet32", 10, (32, 32, 3), 466_906),
        ("resnet56", 10, (32, 32, 3), 855_770),
        ("resnet20", 100, (32, 32, 3), 272_474 + 90 * 65),
        ("mlp", 10, (8, 8, 1), 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10),
    ],
)
def test_parameter_counts(name, num_classes, shape, expected):
    model = models.create(name, num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *shape)))
    assert count(variables) == expected
    logits = jax.eval_shape(model.apply, variables, jnp.zeros((2, *shape)))
    assert logits.shape == (2, num_classes)


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


def test_bfloat16_computes_low_and_keeps_float32_parameters():
    for model in (models.resnet20(num_classes=3, dtype=jnp.bfloat16), models.mlp(num_classes=3, dtype=jnp.bfloat16)):
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, 8, 8, 3)))
        assert {x.dtype for x in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
        assert jax.eval_shape(model.apply, variables, jnp.zeros((2, 8, 8, 3))).dtype == jnp.bfloat16


def test_mlp_hidden_widths():
    model = models.mlp(num_classes=3, hidden=(7,))
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
