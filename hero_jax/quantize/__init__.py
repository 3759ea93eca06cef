"""Post-training quantization of weights: simulated, as integers, evaluated, tied to curvature, and on disk.

spec         QuantSpec, named, PRESETS: what decides a quantized weight
weights      fake_quantize, quantize, dequantize, rounding_noise
scores       quantize_and_evaluate: what a network is worth at each bit width
rounding     optimized, quantized: up or down, whichever changes a layer's outputs least
linen        activations, BatchNorm folding and re-estimation, bias correction (needs flax; import it by name)
sensitivity  each layer quantized alone against what the Hessian predicts
allocation   bit widths of layers under a budget
files        save, load (safetensors), to_qwix, from_qwix
onnx         save, inspect: files for other programs to run
"""

from hero_jax.quantize import allocation, files, onnx, rounding, sensitivity
from hero_jax.quantize.files import from_qwix, load, save, to_qwix
from hero_jax.quantize.scores import QuantizedScore, quantize_and_evaluate
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
from hero_jax.quantize.weights import QuantizedArray, dequantize, fake_quantize, quantize, rounding_noise

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
    "allocation",
    "dequantize",
    "fake_quantize",
    "files",
    "from_qwix",
    "load",
    "named",
    "onnx",
    "quantize",
    "quantize_and_evaluate",
    "rounding",
    "rounding_noise",
    "save",
    "sensitivity",
    "to_qwix",
]
