"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016) for small images."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hero_jax.models import _layers

__all__ = ["PreActivationBlock", "WideResNet", "wide_resnet"]


class PreActivationBlock(_layers.Block):
    """`conv(relu(bn(conv(a)))) + shortcut` with a = relu(bn(x)), both convolutions 3x3.

    The shortcut is x, or a 1x1 convolution of a, without BatchNorm, where the shape changes.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv, norm = self.layers(train)

        a = nn.relu(norm(name="bn1")(x))
        y = conv(self.width, (3, 3), self.stride, padding=1, name="conv1")(a)
        y = conv(self.width, (3, 3), padding=1, name="conv2")(nn.relu(norm(name="bn2")(y)))
        if x.shape != y.shape:
            x = conv(self.width, (1, 1), self.stride, name="shortcut_conv")(a)
        return x + y


class WideResNet(nn.Module):
    """Pre-activation residual network of depth `6 * blocks + 4` for small images: widths 16, 32, 64 times `factor`.

    `conv 3x3` to 16 channels, three stages of `PreActivationBlock`s, the second and third with stride 2, `bn - relu`,
    the mean over the image and `Dense(num_classes)`. There is no dropout.

    Call `apply(variables, images, train=...)` with float images (N, H, W, C); gives logits (N, num_classes).
    `train`, `axis_name` and `dtype` are those of `CifarResNet`: BatchNorm by the statistics of the batch with
    `train=True` (`batch_stats` must be mutable), of the whole batch with `axis_name`, and by the running ones with
    `train=False`; computation in `dtype` with float32 parameters.

    Source: Zagoruyko, Komodakis, Wide residual networks, BMVC 2016, section 3 and table 1.
    """

    blocks: int
    factor: int
    num_classes: int = 10
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        x = _layers.conv(self.dtype)(16, (3, 3), padding=1, name="conv")(x)
        widths = [width * self.factor for width in (16, 32, 64)]
        x = _layers.stages(
            PreActivationBlock, widths, 3 * (self.blocks,), x, train=train, dtype=self.dtype, axis_name=self.axis_name
        )
        x = nn.relu(_layers.batch_norm(train, self.dtype, self.axis_name)(name="bn")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def wide_resnet(num_classes: int = 10, **options: Any) -> WideResNet:
    """Builds the `WideResNet` WRN-16-4: 2,748,890 parameters with 10 classes."""
    return WideResNet(2, 4, num_classes, **options)
