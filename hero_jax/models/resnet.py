"""Residual networks (He et al., CVPR 2016) with projection shortcuts: section 4.2 for CIFAR, table 1 for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hero_jax.models import _layers

__all__ = [
    "BottleneckBlock",
    "CifarResNet",
    "ImageNetResNet",
    "ResidualBlock",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet50",
    "resnet56",
]


class ResidualBlock(_layers.Block):
    """`relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))`, both convolutions 3x3.

    The shortcut is the identity, or a 1x1 convolution with BatchNorm where the shape changes.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = self.layers(train)

        y = conv(self.width, (3, 3), self.stride, padding=1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.width, (3, 3), 1, padding=1, name="conv2")(y)
        y = norm(name="bn2")(y)
        return nn.relu(_layers.shortcut(x, y, conv, norm, self.stride) + y)


class BottleneckBlock(_layers.Block):
    """`relu(f(x) + shortcut(x))`, f the convolutions 1x1, 3x3 (with the stride) and 1x1, the last to `4 * width`.

    BatchNorm follows each, and a relu the first two. The shortcut is that of `ResidualBlock`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = self.layers(train)

        y = nn.relu(norm(name="bn1")(conv(self.width, (1, 1), name="conv1")(x)))
        y = conv(self.width, (3, 3), self.stride, padding=1, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = norm(name="bn3")(conv(4 * self.width, (1, 1), name="conv3")(y))
        return nn.relu(_layers.shortcut(x, y, conv, norm, self.stride) + y)


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
        x = _layers.conv(self.dtype)(16, (3, 3), padding=1, name="conv")(x)
        x = nn.relu(_layers.batch_norm(train, self.dtype, self.axis_name)(name="bn")(x))
        x = _layers.stages(
            ResidualBlock, (16, 32, 64), 3 * (self.blocks,), x, train=train, dtype=self.dtype, axis_name=self.axis_name
        )
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def resnet8(num_classes: int = 10, **options: Any) -> CifarResNet:
    """Builds the `CifarResNet` of depth 8: 78,042 parameters with 10 classes."""
    return CifarResNet(1, num_classes, **options)


def resnet20(num_classes: int = 10, **options: Any) -> CifarResNet:
    """Builds the `CifarResNet` of depth 20: 272,474 parameters with 10 classes."""
    return CifarResNet(3, num_classes, **options)


def resnet32(num_classes: int = 10, **options: Any) -> CifarResNet:
    """Builds the `CifarResNet` of depth 32: 466,906 parameters with 10 classes."""
    return CifarResNet(5, num_classes, **options)


def resnet56(num_classes: int = 10, **options: Any) -> CifarResNet:
    """Builds the `CifarResNet` of depth 56: 855,770 parameters with 10 classes."""
    return CifarResNet(9, num_classes, **options)


class ImageNetResNet(nn.Module):
    """Residual network for large images: `blocks[i]` blocks of width `64 * 2**i` in stage i = 0, 1, ...

    `conv 7x7/2 - bn - relu - max pool 3x3/2`, the stages, each after the first with stride 2 in its first 3x3
    convolution, the mean over the image and `Dense(num_classes)`. The blocks are `ResidualBlock`s, or with `bottleneck`
    `BottleneckBlock`s. The paper has the stride of a bottleneck in the first 1x1 convolution; here it is in the 3x3, as
    in torchvision ("ResNet v1.5"). Every BatchNorm starts at scale 1, those that end a block too.

    Call `apply(variables, images, train=...)` with float images (N, H, W, C); gives logits (N, num_classes).
    `train`, `axis_name` and `dtype` are those of `CifarResNet`: BatchNorm by the statistics of the batch with
    `train=True` (`batch_stats` must be mutable), of the whole batch with `axis_name`, and by the running ones with
    `train=False`; computation in `dtype` with float32 parameters.

    Source: He, Zhang, Ren, Sun, Deep residual learning, CVPR 2016, section 4.1 and table 1, with shortcuts B.
    """

    blocks: Sequence[int]
    bottleneck: bool = False
    num_classes: int = 1000
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        make_block = BottleneckBlock if self.bottleneck else ResidualBlock
        x = _layers.conv(self.dtype)(64, (7, 7), 2, padding=3, name="conv")(x)
        x = nn.relu(_layers.batch_norm(train, self.dtype, self.axis_name)(name="bn")(x))
        # By name: jax2onnx takes them so.
        x = nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        widths = [64 * 2**stage for stage in range(len(self.blocks))]
        x = _layers.stages(make_block, widths, self.blocks, x, train=train, dtype=self.dtype, axis_name=self.axis_name)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def resnet18(num_classes: int = 1000, **options: Any) -> ImageNetResNet:
    """Builds the `ImageNetResNet` of depth 18: 11,689,512 parameters with 1000 classes."""
    return ImageNetResNet((2, 2, 2, 2), False, num_classes, **options)


def resnet50(num_classes: int = 1000, **options: Any) -> ImageNetResNet:
    """Builds the `ImageNetResNet` of depth 50, of bottlenecks: 25,557,032 parameters with 1000 classes."""
    return ImageNetResNet((3, 4, 6, 3), True, num_classes, **options)
