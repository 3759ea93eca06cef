"""What hero_jax takes from the parts of JAX that move between its versions: names are imported from here."""

from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.extend.core import Primitive, jaxprs_in_params
from jax.interpreters import mlir

__all__ = ["Primitive", "ShapedArray", "Tracer", "eval_jaxpr", "jaxprs_in_params", "mlir"]
