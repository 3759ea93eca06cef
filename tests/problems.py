"""Small problems that tests share: no leaf is square, no value is zero, one or symmetric unless that is the point."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments import data
from hero_jax import Examples, Operator, Stream


def random_like(key, tree):
    """Standard normal tree with the shapes and types of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return structure.unflatten(
        [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)],
    )


def random_images(size):
    """A data set of random images (size, 8, 8, 3), which are cropped and flipped, for training and for testing."""
    rng = np.random.default_rng(0)
    split = data.Split(rng.integers(0, 256, (size, 8, 8, 3), np.uint8), np.arange(size, dtype=np.int32) % 10)
    return data.Dataset(split, split, 10, data.Pixels(255.0, (0.5,) * 3, (0.25,) * 3, augment=True))


def last_step(run):
    """The step of the last checkpoint in a run folder, -1 where there is none."""
    return max((int(p.name) for p in run.glob("checkpoint/*") if p.name.isdigit()), default=-1)


def operator(matvec, like):
    """An operator on trees like `like`; `matvec` itself where it is one."""
    return matvec if isinstance(matvec, Operator) else Operator(matvec, like)


def given(batch=None, *, batches=None, weight_fn=None, **options):
    """The data of a curvature product: a batch, whole or with options, or batches instead."""
    if batches is not None:
        return Stream(batches, weight_fn=weight_fn)
    return Examples(batch, weight_fn=weight_fn, **options) if options or weight_fn is not None else batch


def convnet_params(dtype=jnp.float64):
    """A strided convolution, a channel-wise scale (a vector, as in BatchNorm) and a dense head; 2 input channels."""
    shapes = {
        "conv": {"kernel": (3, 2, 2, 5), "bias": (5,)},
        "norm": {"scale": (5,)},
        "head": [(5, 3), (3,)],
    }
    zeros = jax.tree.map(lambda s: jnp.zeros(s, dtype), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return jax.tree.map(lambda x: 0.4 * x + 0.1, random_like(jax.random.key(1), zeros))


def convnet_batch(size=8, dtype=jnp.float64):
    """Images (size, 7, 6, 2) and labels in 0..2."""
    key_x, key_y = jax.random.split(jax.random.key(2))
    return jax.random.normal(key_x, (size, 7, 6, 2), dtype), jax.random.randint(key_y, (size,), 0, 3)


def convnet_loss(params, batch):
    """Mean cross-entropy of a smooth convolutional network: its third derivative is nowhere zero."""
    images, labels = batch
    x = jax.lax.conv_general_dilated(
        images, params["conv"]["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.tanh(x + params["conv"]["bias"])
    x = x * params["norm"]["scale"] / jnp.sqrt(jnp.mean(x**2) + 0.1)
    kernel, bias = params["head"]
    logits = x.mean(axis=(1, 2)) @ kernel + bias
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def separable_loss(params, batch):
    """As `convnet_loss` without the batch-wide normaliser: the mean over devices is then the mean over the batch."""
    images, labels = batch
    x = jax.lax.conv_general_dilated(
        images, params["conv"]["kernel"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.tanh(x + params["conv"]["bias"]) * params["norm"]["scale"]
    kernel, bias = params["head"]
    logits = x.mean(axis=(1, 2)) @ kernel + bias
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def dense_params(dtype=jnp.float64):
    """Two dense layers, the first with a bias: little to compile."""
    zeros = {"kernel": jnp.zeros((3, 4), dtype), "bias": jnp.zeros(4, dtype), "head": jnp.zeros((4, 2), dtype)}
    return random_like(jax.random.key(0), zeros)


def dense_loss(rows=slice(None), dtype=jnp.float64):
    """The mean loss of some of 8 examples: its third derivative is nowhere zero, its slope grows and falls."""
    rng = np.random.default_rng(1)
    x, y = (jnp.asarray(rng.normal(size=(8, n)), dtype)[rows] for n in (3, 2))

    def loss_fn(params):
        hidden = jnp.tanh(x @ params["kernel"] + params["bias"])
        return jnp.mean(jnp.sin(hidden @ params["head"] - y))

    return loss_fn


def two_layers(size, dtype=jnp.float64):
    """Parameters of a network of two layers, and a batch of `size` examples."""
    rng = np.random.default_rng(0)
    params = {"hidden": rng.normal(size=(3, 4)), "bias": rng.normal(size=4), "head": rng.normal(size=(4, 2))}
    batch = rng.normal(size=(size, 3)), rng.normal(size=(size, 2))
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, batch))


def two_layers_loss(params, batch):
    """Its third derivative is nowhere zero; the mean over devices is the mean over the batch."""
    x, y = batch
    x = jnp.tanh(x @ params["hidden"] + params["bias"])
    return jnp.mean(jnp.cosh(x @ params["head"] - y))


def kernels_mask(params):
    """The default R, written out."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


@jax.custom_vjp
def smooth(x):
    """tanh with a rule of its own, as fused kernels have."""
    return jnp.tanh(x)


@jax.custom_vjp
def smooth_slope(x, g):
    """The backward pass of `smoother`, with a rule of its own."""
    return (1 - jnp.tanh(x) ** 2) * g


@jax.custom_vjp
def smoother(x):
    """tanh whose backward function is a custom_vjp as well."""
    return jnp.tanh(x)


def _slope_backward(residuals, cotangent):
    x, g = residuals
    slope = 1 - jnp.tanh(x) ** 2
    return -2 * jnp.tanh(x) * slope * g * cotangent, slope * cotangent


smooth.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: ((1 - jnp.tanh(x) ** 2) * g,))
smooth_slope.defvjp(lambda x, g: (smooth_slope(x, g), (x, g)), _slope_backward)
smoother.defvjp(lambda x: (jnp.tanh(x), x), lambda x, g: (smooth_slope(x, g),))


def symmetric(eigenvalues, seed=0, dtype=np.float64):
    """A dense symmetric matrix with the given spectrum, and its orthonormal eigenvectors as columns."""
    eigenvalues = np.asarray(eigenvalues, dtype)
    n = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))
    return (basis * eigenvalues) @ basis.T, basis


def quadratic(dtype=jnp.float64):
    """L = w^T A w / 2 + b^T w on a tree with a (4, 3) kernel and a vector of 2; A indefinite and dense."""
    matrix, _ = symmetric(np.linspace(-2.0, 5.0, 14), seed=3)
    matrix = jnp.asarray(matrix, dtype)
    linear = jnp.linspace(-1.0, 2.0, 14, dtype=dtype)
    params = {"kernel": jnp.linspace(0.5, 2.0, 12, dtype=dtype).reshape(4, 3), "bias": jnp.array([0.7, -1.1], dtype)}

    def loss_fn(params):
        flat = jax.flatten_util.ravel_pytree(params)[0]
        return flat @ matrix @ flat / 2 + linear @ flat

    return loss_fn, params, matrix


def assert_close(actual, expected, rtol=1e-10):
    """Trees agree to `rtol` relative to the largest entry of each leaf; also compares structure, shapes and types."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))
