"""Vision transformers (Dosovitskiy et al., ICLR 2021) for small images and for those of ImageNet."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from hero_jax.errors import ArgumentError

__all__ = ["EncoderBlock", "VisionTransformer", "vit_large", "vit_tiny"]


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`softmax(q k' / sqrt(d)) v` for each image and head: all (N, tokens, heads, d).

    The softmax is taken in float32, or in float64 where the inputs are that (`jax.nn.dot_product_attention` would round
    it to float32), and written out, since fused kernels have no second derivative.
    """
    logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) / q.shape[-1] ** 0.5
    weights = jax.nn.softmax(logits.astype(jnp.promote_types(logits.dtype, jnp.float32)))
    return jnp.einsum("nhqk,nkhd->nqhd", weights.astype(v.dtype), v)


class EncoderBlock(nn.Module):
    """`y = x + attention(norm(x))`, then `y + mlp(norm(y))`: self-attention and two dense layers with a GELU between.

    The hidden layer is of four times the width of x, (N, tokens, width).
    """

    heads: int
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype)
        norm = partial(nn.LayerNorm, dtype=self.dtype)
        n, tokens, width = x.shape

        y = dense(3 * width, name="qkv")(norm(name="norm1")(x))
        q, k, v = jnp.moveaxis(y.reshape(n, tokens, 3, self.heads, width // self.heads), 2, 0)
        x = x + dense(width, name="out")(_attention(q, k, v).reshape(x.shape))
        y = nn.gelu(dense(4 * width, name="mlp1")(norm(name="norm2")(x)), approximate=False)
        return x + dense(width, name="mlp2")(y)


class VisionTransformer(nn.Module):
    """Transformer on the patches of an image: `conv - (+ positions) - depth blocks - LayerNorm - mean - Dense`.

    The convolution maps each `patch` x `patch` square to a token of size `width`; the positions are learned, one for
    each square, so that the parameters belong to one image size. The blocks are `EncoderBlock`s with LayerNorm ahead of
    attention and MLP. The mean over the tokens takes the place of the paper's class token, and there is no dropout.

    Call `apply(variables, images)` with float images (N, H, W, C), H and W multiples of `patch`; gives logits
    (N, num_classes). There is no BatchNorm: `train` changes nothing and is there so that every model is called alike.
    `dtype` is the compute type, parameters stay float32. All is smooth: derivatives of every order exist.

    Raises ArgumentError where `patch` does not divide H and W, or `heads` not `width`.

    Source: Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, section 3.1; mean pooling: Beyer, Zhai,
    Kolesnikov, Better plain ViT baselines for ImageNet-1k, 2022.
    """

    num_classes: int = 10
    patch: int = 4
    width: int = 192
    depth: int = 6
    heads: int = 3
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        n, h, w, _ = x.shape
        if h % self.patch or w % self.patch:
            raise ArgumentError(
                f"`patch` must divide the height and width of the images; got {self.patch} and {h} x {w}."
            )
        if self.width % self.heads:
            raise ArgumentError(f"`heads` must divide `width`; got {self.heads} and {self.width}.")

        square = (self.patch, self.patch)
        x = nn.Conv(self.width, square, square, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(n, -1, self.width)
        positions = self.param("positions", nn.initializers.normal(0.02), x.shape[1:])
        x = x + positions.astype(x.dtype)
        for block in range(self.depth):
            x = EncoderBlock(self.heads, self.dtype, name=f"block{block + 1}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x).mean(axis=1)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def vit_tiny(num_classes: int = 10, *, axis_name: str | None = None, **options: Any) -> VisionTransformer:
    """Builds the `VisionTransformer`: 2,693,194 parameters with 10 classes on 32 x 32 x 3 images.

    Width and heads are those of the ViT-Ti of DeiT (Touvron et al., Training data-efficient image transformers, ICML
    2021, table 1), at half its depth. `axis_name` changes nothing, since there is no BatchNorm.
    """
    del axis_name
    return VisionTransformer(num_classes, **options)


def vit_large(num_classes: int = 1000, *, axis_name: str | None = None, **options: Any) -> VisionTransformer:
    """Builds the `VisionTransformer` ViT-L/16: 304,324,584 parameters with 1,000 classes on 224 x 224 x 3 images.

    Sizes are those of the paper's table 1. `axis_name` changes nothing, since there is no BatchNorm.
    """
    del axis_name
    sizes: dict[str, Any] = {"patch": 16, "width": 1024, "depth": 24, "heads": 16}
    return VisionTransformer(num_classes, **sizes | options)
