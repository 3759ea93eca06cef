"""CIFAR residual networks (He et al., CVPR 2016, section 4.2) with projection shortcuts."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

# He initialisation by fan-out, as the reference implementations of CIFAR ResNets use.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _batch_norm(train: bool, dtype: jnp.dtype | None, axis_name: str | None) -> partial[nn.BatchNorm]:
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype, axis_name=axis_name)


class ResidualBlock(nn.Module):
    """`relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`, both convolutions 3x3.

    The shortcut is the identity, or a 1x1 convolution with BatchNorm where the shape changes.
    """

    width: int
    stride: int = 1
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, kernel_init=_he_normal, dtype=self.dtype)
        norm = _batch_norm(train, self.dtype, self.axis_name)

        y = conv(self.width, (3, 3), self.stride, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.width, (3, 3), 1, padding=1, name="conv2")(y)
        y = norm(name="bn2")(y)
        if x.shape != y.shape:
            x = conv(self.width, (1, 1), self.stride, name="shortcut_conv")(x)
            x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """Residual network of depth `6 * blocks + 2` for small images: widths 16, 32, 64.

    Call `apply(variables, images, train=...)` with float images (N, H, W, C); gives logits (N, num_classes).
    With `train=True` BatchNorm normalises with the statistics of the batch and the collection `batch_stats` must be
    mutable; with `train=False` it uses the running ones. Under `vmap`, `pmap` and `shard_map` these are the statistics
    of the device's own part of the batch, or with `axis_name`, the name of the mapped axis, those of the whole batch.
    `dtype` is the compute type, parameters stay float32.

    Source: He, Zhang, Ren, Sun, Deep residual learning, CVPR 2016, section 4.2, with 1x1 convolution shortcuts.
    """

    blocks: int
    num_classes: int = 10
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, kernel_init=_he_normal, dtype=self.dtype)
        x = conv(16, (3, 3), padding=1, name="conv")(x)
        x = nn.relu(_batch_norm(train, self.dtype, self.axis_name)(name="bn")(x))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                x = ResidualBlock(width, stride, self.dtype, self.axis_name, name=name)(x, train=train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def resnet20(num_classes: int = 10, **options: Any) -> CifarResNet:
    """Builds the `CifarResNet` of depth 20: 272,474 parameters with 10 classes."""
    return CifarResNet(3, num_classes, **options)


def resnet32(num_classes: int = 10, **options: Any) -> CifarResNet:
    """Builds the `CifarResNet` of depth 32: 466,906 parameters with 10 classes."""
    return CifarResNet(5, num_classes, **options)


def resnet56(num_classes: int = 10, **options: Any) -> CifarResNet:
    """Builds the `CifarResNet` of depth 56: 855,770 parameters with 10 classes."""
    return CifarResNet(9, num_classes, **options)
