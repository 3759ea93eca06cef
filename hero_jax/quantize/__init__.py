"""Post-training quantization of weights: simulated, as integers, evaluated, tied to curvature, and on disk.

spec         QuantSpec, named, PRESETS: what decides a quantized weight
weights      fake_quantize, quantize, dequantize
evaluate     quantize_and_evaluate, classifier, aggregate
"""

from hero_jax.quantize.evaluate import QuantizedScore, Spread, aggregate, classifier, quantize_and_evaluate
from hero_jax.quantize.spec import (
    GRANULARITIES,
    GRIDS,
    MAX_BITS,
    MIN_BITS,
    PRESETS,
    RANGE_RULES,
    QuantSpec,
    named,
)
from hero_jax.quantize.weights import QuantizedArray, dequantize, fake_quantize, quantize

__all__ = [
    "GRANULARITIES",
    "GRIDS",
    "MAX_BITS",
    "MIN_BITS",
    "PRESETS",
    "RANGE_RULES",
    "QuantSpec",
    "QuantizedArray",
    "QuantizedScore",
    "Spread",
    "aggregate",
    "classifier",
    "dequantize",
    "fake_quantize",
    "named",
    "quantize",
    "quantize_and_evaluate",
]
