"""Layers that the convolutional networks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

# He initialisation by fan-out, as the reference implementations of residual networks use.
_he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(dtype: jnp.dtype | None) -> partial[nn.Conv]:
    """Returns `nn.Conv` without bias, with He initialisation by fan-out."""
    return partial(nn.Conv, use_bias=False, kernel_init=_he_normal, dtype=dtype)


def batch_norm(train: bool, dtype: jnp.dtype | None, axis_name: str | None) -> partial[nn.BatchNorm]:
    """Returns `nn.BatchNorm` by the statistics of the batch (`train=True`) or the running ones, with momentum 0.9."""
    return partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=dtype, axis_name=axis_name)


class Block(nn.Module):
    """What the blocks of residual networks have in common: a width, a stride, and how they compute.

    `dtype` and `axis_name` are those of `CifarResNet`.
    """

    width: int
    stride: int = 1
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    def layers(self, train: bool) -> tuple[partial[nn.Conv], partial[nn.BatchNorm]]:
        """Returns `conv` and `batch_norm` for this block."""
        return conv(self.dtype), batch_norm(train, self.dtype, self.axis_name)


def stages(
    make_block: Callable[..., nn.Module],
    widths: Sequence[int],
    depths: Sequence[int],
    x: jax.Array,
    *,
    train: bool,
    dtype: jnp.dtype | None,
    axis_name: str | None,
) -> jax.Array:
    """Returns x after `depths[i]` blocks of `widths[i]` for each stage i; all but the first begin with stride 2.

    To be called in the network, whose layers `stage1_block1`, `stage1_block2`, ... they become.
    """
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            name = f"stage{stage + 1}_block{block + 1}"
            x = make_block(width, stride, dtype, axis_name, name=name)(x, train=train)
    return x


def shortcut(
    x: jax.Array, y: jax.Array, conv: partial[nn.Conv], norm: partial[nn.BatchNorm], stride: int = 1
) -> jax.Array:
    """Returns the input `x` of a block, or if its output `y` has another shape, `bn(conv(x))` with a 1x1 convolution.

    To be called in the block, whose layers `shortcut_conv` and `shortcut_bn` become.
    """
    if x.shape == y.shape:
        return x
    return norm(name="shortcut_bn")(conv(y.shape[-1], (1, 1), stride, name="shortcut_conv")(x))
