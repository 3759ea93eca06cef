"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

__all__ = ["MLP", "mlp"]


class MLP(nn.Module):
    """ReLU network on flattened inputs: `Dense - relu` for each hidden width, then `Dense(num_classes)`.

    Call `apply(variables, x)` with x (N, ...); gives logits (N, num_classes). There is no BatchNorm: `train` changes
    nothing and is there so that every model is called alike.
    """

    num_classes: int = 10
    hidden: Sequence[int] = (128, 128)
    dtype: jnp.dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden):
            x = nn.relu(
                nn.Dense(width, kernel_init=nn.initializers.he_normal(), dtype=self.dtype, name=f"dense{i + 1}")(x)
            )
        return nn.Dense(self.num_classes, dtype=self.dtype, name="head")(x)


def mlp(
    num_classes: int = 10, *, hidden: Sequence[int] = (128, 128), axis_name: str | None = None, **options: Any
) -> MLP:
    """Builds the `MLP`; `axis_name` changes nothing, since there is no BatchNorm."""
    del axis_name
    # A module with a list in it has no hash, which jit needs of its static arguments.
    return MLP(num_classes, hidden=tuple(hidden), **options)
