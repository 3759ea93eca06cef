"""MobileNetV2 (Sandler et al., CVPR 2018) for small images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hero_jax.models import _layers

__all__ = ["InvertedResidual", "MobileNetV2", "mobilenet_v2"]

# Expansion, width, blocks and stride of each stage: table 2 of the paper, but for a stride of 1 in the second.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(_layers.Block):
    """`f(x) + shortcut(x)`, or f(x) where the stride is not 1.

    f is a 1x1 convolution to `expansion` times the channels of x, a 3x3 depthwise one with the stride and a linear 1x1
    one to `width`. BatchNorm follows each, and a relu the first two. The shortcut is the identity, or a 1x1 convolution
    with BatchNorm where the number of channels changes.
    """

    expansion: int = 6

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = self.layers(train)
        hidden = self.expansion * x.shape[-1]

        y = nn.relu(norm(name="bn1")(conv(hidden, (1, 1), name="conv1")(x)))
        # An input reaches 9 outputs, not 9 * hidden: the fan-out is what Flax, which ignores groups, has as the fan-in.
        depthwise = conv(
            hidden,
            (3, 3),
            self.stride,
            padding=1,
            feature_group_count=hidden,
            kernel_init=nn.initializers.he_normal(),
            name="conv2",
        )
        y = nn.relu(norm(name="bn2")(depthwise(y)))
        y = norm(name="bn3")(conv(self.width, (1, 1), name="conv3")(y))
        return _layers.shortcut(x, y, conv, norm) + y if self.stride == 1 else y


class MobileNetV2(nn.Module):
    """Inverted residuals with linear bottlenecks: `conv 3x3 - stages - conv 1x1 - mean - Dense(num_classes)`.

    BatchNorm and relu follow the first and the last convolution, of widths 32 and 1280. A stage is (expansion, width,
    blocks, stride of the first block). For small images as in the pytorch-cifar repository, the network and its second
    stage start with stride 1. It departs from the paper in relu for relu6, a projection shortcut where a block of
    stride 1 changes the number of channels, and a 1x1 convolution in the first block too, whose expansion is 1. The
    mean is over all that is left of the image, which may be of any size.

    Call `apply(variables, images, train=...)` with float images (N, H, W, C); gives logits (N, num_classes).
    `train`, `axis_name` and `dtype` are those of `CifarResNet`: BatchNorm by the statistics of the batch with
    `train=True` (`batch_stats` must be mutable), of the whole batch with `axis_name`, and by the running ones with
    `train=False`; computation in `dtype` with float32 parameters.

    Source: Sandler, Howard, Zhu, Zhmoginov, Chen, MobileNetV2: inverted residuals and linear bottlenecks, CVPR 2018,
    section 4 and table 2.
    """

    num_classes: int = 10
    stages: Sequence[tuple[int, int, int, int]] = _STAGES
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        conv = _layers.conv(self.dtype)
        norm = _layers.batch_norm(train, self.dtype, self.axis_name)

        x = nn.relu(norm(name="bn1")(conv(32, (3, 3), padding=1, name="conv1")(x)))
        for stage, (expansion, width, blocks, first_stride) in enumerate(self.stages):
            for block in range(blocks):
                stride = first_stride if block == 0 else 1
                name = f"stage{stage + 1}_block{block + 1}"
                make_block = partial(InvertedResidual, expansion=expansion, name=name)
                x = make_block(width, stride, self.dtype, self.axis_name)(x, train=train)
        x = nn.relu(norm(name="bn2")(conv(1280, (1, 1), name="conv2")(x)))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def mobilenet_v2(num_classes: int = 10, **options: Any) -> MobileNetV2:
    """Builds the `MobileNetV2` for CIFAR: 2,296,922 parameters with 10 classes."""
    return MobileNetV2(num_classes, **options)
