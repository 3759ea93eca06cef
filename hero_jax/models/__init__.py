"""Flax Linen networks: a model is a pure function of a parameter tree.

>>> import jax, jax.numpy as jnp
>>> model = create("resnet20", num_classes=10)
>>> variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
>>> sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
272474
"""

from typing import Any

from flax import linen as nn

from hero_jax import errors
from hero_jax.models.mlp import MLP, mlp
from hero_jax.models.mobilenet import MobileNetV2, mobilenet_v2
from hero_jax.models.resnet import (
    CifarResNet,
    ImageNetResNet,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
    resnet56,
)
from hero_jax.models.vgg import VGG, vgg19_bn
from hero_jax.models.vit import VisionTransformer, vit_large, vit_tiny
from hero_jax.models.wide_resnet import WideResNet, wide_resnet

__all__ = [
    "MLP",
    "MODELS",
    "VGG",
    "CifarResNet",
    "ImageNetResNet",
    "MobileNetV2",
    "VisionTransformer",
    "WideResNet",
    "create",
    "mlp",
    "mobilenet_v2",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet50",
    "resnet56",
    "vgg19_bn",
    "vit_large",
    "vit_tiny",
    "wide_resnet",
]

MODELS = {
    "mlp": mlp,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "mobilenet_v2": mobilenet_v2,
    "vgg19_bn": vgg19_bn,
    "wide_resnet": wide_resnet,
    "vit_tiny": vit_tiny,
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vit_large": vit_large,
}


def create(name: str, num_classes: int, **options: Any) -> nn.Module:
    """Builds a model by name: `MODELS[name](num_classes=num_classes, **options)`.

    Args:
      name: a key of `MODELS`.
      num_classes: size of the output.
      **options: fields of the model, such as `dtype` (the type of computation; parameters stay float32), or
        `axis_name` (the mapped axis whose devices share the statistics of BatchNorm; of no effect on a model without).

    Returns:
      A Linen module, called as `model.apply(variables, images, train=...)`.

    Raises:
      ArgumentError: unknown `name` (suggests the nearest), `num_classes` < 1.
    """
    errors.one_of("create(name=...)", name, MODELS)
    errors.integer("create(num_classes=...)", num_classes, low=1)
    return MODELS[name](num_classes=num_classes, **options)
