"""VGG networks (Simonyan and Zisserman, ICLR 2015) with BatchNorm, for small images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hero_jax.models import _layers

__all__ = ["VGG", "vgg19_bn"]


class VGG(nn.Module):
    """Stages of 3x3 convolutions: `layers` times `conv - bn - relu` of a width, then a 2x2 max pool with stride 2.

    A stage is (width, layers). After the last, the mean over what is left of the image, one pixel of 32 x 32, and
    `Dense(num_classes)` in place of the paper's three dense layers. The convolutions have a bias, as in the paper,
    although the mean that BatchNorm subtracts takes it out again: with `train=True` the loss is flat in it. Max pools
    round an odd size up, so that an image may be of any size.

    Call `apply(variables, images, train=...)` with float images (N, H, W, C); gives logits (N, num_classes).
    `train`, `axis_name` and `dtype` are those of `CifarResNet`: BatchNorm by the statistics of the batch with
    `train=True` (`batch_stats` must be mutable), of the whole batch with `axis_name`, and by the running ones with
    `train=False`; computation in `dtype` with float32 parameters.

    Source: Simonyan, Zisserman, Very deep convolutional networks for large-scale image recognition, ICLR 2015,
    section 2 and table 1; BatchNorm and the single dense layer from the pytorch-cifar repository.
    """

    num_classes: int = 10
    stages: Sequence[tuple[int, int]] = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        conv = _layers.conv(self.dtype)
        norm = _layers.batch_norm(train, self.dtype, self.axis_name)

        for stage, (width, layers) in enumerate(self.stages):
            for layer in range(layers):
                place = f"{stage + 1}_{layer + 1}"
                x = conv(width, (3, 3), padding=1, use_bias=True, name=f"conv{place}")(x)
                x = nn.relu(norm(name=f"bn{place}")(x))
            # By name: jax2onnx takes them so.
            x = nn.max_pool(x, window_shape=(2, 2), strides=(2, 2), padding="SAME")
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def vgg19_bn(num_classes: int = 10, **options: Any) -> VGG:
    """Builds the `VGG` of 16 convolutions for CIFAR: 20,040,522 parameters with 10 classes."""
    return VGG(num_classes, **options)
