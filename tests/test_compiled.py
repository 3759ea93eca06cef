"""What `benchmarks.compiled` counts, in a program written for the purpose."""

import importlib.util

import jax
import numpy as np
import pytest

from benchmarks import compiled
from experiments import data
from experiments.training import compiled as training

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %add.1 = f32[4]{0} add(%p, %p)
}

%body (s: (f32[4], s32[])) -> (f32[4], s32[]) {
  %s = (f32[4]{0}, s32[]) parameter(0)
  %x = f32[4]{0} get-tuple-element(%s), index=0
  %in_loop = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %t = (f32[4]{0}, s32[]) tuple(%in_loop, %x)
}

%condition (s.1: (f32[4], s32[])) -> pred[] {
  %s.1 = (f32[4]{0}, s32[]) parameter(0)
  ROOT %less = pred[] fusion(%s.1), kind=kLoop, calls=%fused
}

ENTRY %main (a: f32[4], /*index=1*/b: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0), metadata={op_name="call(a)"}
  %c = f32[] constant(1)
  %copy.1 = f32[4]{0} copy(%a)
  %conv = (f32[4]{0}, u8[0]{0}) custom-call(%a, %a), custom_call_target="__cudnn$convForward"
  %gemm = f32[4]{0} custom-call(%a), custom_call_target="__cublas$gemm"
  %y = f32[4]{0} get-tuple-element(%conv), index=0
  %f.1 = (f32[4]{0}, f32[4]{0}) fusion(%y), kind=kInput, calls=%fused
  %start = f32[4]{0} all-reduce-start(%y), to_apply=%fused
  %done = f32[4]{0} all-reduce-done(%start)
  %gather = f32[32]{0} all-gather(%done), dimensions={0}
  %scatter = f32[1]{0} reduce-scatter(%done), dimensions={0}, to_apply=%fused
  %w = (f32[4]{0}, s32[]) while(%f.1), condition=%condition, body=%body
  ROOT %out = f32[4]{0} bitcast(%w)
}
"""


def test_counts():
    assert compiled.counts(PROGRAM) == {
        "kernels": 5,  # conv, gemm, f.1, in_loop, less
        "convolutions": 1,
        "copies": 1,
        "collectives": {
            "all-reduce": {"count": 1, "bytes": 16},
            "all-gather": {"count": 1, "bytes": 128},  # what it gives, on each device
            "reduce-scatter": {"count": 1, "bytes": 16},  # what it takes
        },
    }


def test_a_start_is_counted_by_what_it_gives():
    """Its type has what it takes too; that of an all-reduce has not."""
    assert compiled.counts("""
ENTRY %main (a: bf16[4], b: f32[3]) -> f32[3] {
  %a = bf16[4]{0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %gather = (bf16[4]{0}, bf16[32]{0}) all-gather-start(%a), dimensions={0}
  %gathered = bf16[32]{0} all-gather-done(%gather)
  %sum = (bf16[4]{0}, f32[3]{0}) all-reduce-start(%a, %b), to_apply=%add
  %sums = (bf16[4]{0}, f32[3]{0}) all-reduce-done(%sum)
  ROOT %out = f32[3]{0} get-tuple-element(%sums), index=1
}
""")["collectives"] == {"all-gather": {"count": 1, "bytes": 64}, "all-reduce": {"count": 1, "bytes": 20}}


def test_floors():
    """A millisecond of each on a v5e: an all-reduce sends twice what it reduces, a gather what it gives."""
    collectives = {"all-reduce": {"count": 3, "bytes": 90_000_000}, "all-gather": {"count": 1, "bytes": 20_000_000}}
    row = {"gigaflops": 197.0, "moved_mib": 819e6 / 2**20, "collectives": collectives}
    assert compiled.floors("TPU v5 lite", row) == pytest.approx({"arithmetic": 1, "memory": 1, "links": 1})
    assert compiled.floors("NVIDIA H100 80GB HBM3", row) is None
    assert compiled.floors("TPU v5", row | {"gigaflops": None}) is None


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="XLA's compiler for it is absent.")
def test_steps_for_eight_gpus():
    """Kernels, memory and collectives of HERO beside SGD, whose gradient is reduced at once."""
    arguments = compiled.Arguments(
        target="h100x8", dataset="fashion_mnist", model="mlp", batch_size=4096, methods=("hero",), parallel="shard_map"
    )
    sgd, hero = compiled.measure(arguments, compiled.devices_of("h100x8"))
    assert sgd["kernels"] < hero["kernels"] <= 3.5 * sgd["kernels"]
    # With a batch beside which the 4 MiB that cuBLAS may ask for (jax 0.12) do not count.
    assert hero["temporary_mib"] <= 1.7 * sgd["temporary_mib"]
    # The loss goes with the gradient.
    assert {name: of_kind["count"] for name, of_kind in sgd["collectives"].items()} == {"all-reduce": 1}
    assert {name: of_kind["count"] for name, of_kind in hero["collectives"].items()} == {"all-reduce": 3}
    assert (sgd["gradients"], hero["gradients"]) == (pytest.approx(1, rel=1e-3), pytest.approx(3, rel=1e-3))


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="The compiler is here.")
def test_missing_compiler_names_its_package():
    with pytest.raises(ValueError, match=r"`target` h100x8 needs .*: pip install jax-cuda13-plugin==\d"):
        compiled.devices_of("h100x8")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="The compiler is here.")
def test_missing_compiler_of_tpus_names_its_package():
    with pytest.raises(ValueError, match=r"`target` v6e:16x16 needs .*: pip install jax\[tpu\]==\d"):
        compiled.devices_of("v6e:16x16")


@pytest.mark.parametrize("target", ["h100x4", "h200:1x1x8", "v5e", "v5e:", "v5e:16by16", "gpu:1"])
def test_a_target_that_is_none(target):
    with pytest.raises(ValueError, match=rf"`target` must be one of h100, .*, or like .*; got '{target}'"):
        compiled.devices_of(target)


@pytest.mark.parametrize("dataset", compiled.SHAPES)
def test_shapes_are_those_of_the_data_set(dataset):
    arguments = compiled.Arguments(dataset=dataset, model="mlp", batch_size=8)
    shapes = compiled.shapes_of(dataset)
    lowered, _ = compiled.lower(arguments, "sgd", jax.devices()[:1])
    images, labels = lowered.args_info[0][1:3]
    is_streamed = isinstance(shapes.train, data.Stream)
    assert images.shape == ((8,) if is_streamed else (shapes.train.size,)) + shapes.train.shape
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


@pytest.mark.parametrize(
    ("options", "per_gradient", "more"),
    [
        ({"parallel": "pmap"}, 1, 0.02),
        ({"parallel": "shard_map"}, 1, 0.02),
        # XLA's partitioner reduces the two terms of the product of some leaves apart.
        ({}, 1, 0.06),
        ({"shard_params": True}, 2, 0.06),
        # XLA:CPU reduces over all devices at once, and gathers in the halves.
        ({"shard_params": True, "shard_devices": 2}, 2, 0.06),
    ],
)
def test_collectives_are_one_for_each_gradient(options, per_gradient, more):
    """And one to gather split parameters in each pass: that of SGD, and no other."""
    arguments = compiled.Arguments(dataset="fashion_mnist", model="mlp", batch_size=8, **options)
    for method, gradients in (("sgd", 1), ("sam", 2), ("hero", 3)):
        lowered, of_parameters = compiled.lower(arguments, method, jax.devices()[:4])
        counted = compiled.counts(lowered.compile().as_text())["collectives"]
        moved = sum(of_kind["bytes"] for of_kind in counted.values()) / of_parameters
        assert moved == pytest.approx(per_gradient * gradients, rel=more)


def test_the_program_is_that_of_the_step():
    """What is lowered takes and gives what the step does, on devices of every layout."""
    for options in ({"parallel": "pmap"}, {"parallel": "shard_map"}, {"parallel": "jit", "shard_params": True}):
        arguments = compiled.Arguments(dataset="fashion_mnist", model="mlp", batch_size=8, **options)
        config, devices = arguments.config("hero", 4), jax.devices()[:4]
        trainer = training.build(config, compiled.shapes_of("fashion_mnist"), devices)
        state = trainer.init(0)
        lowered, of_parameters = compiled.lower(arguments, "hero", devices)
        assert of_parameters == sum(x.nbytes for x in jax.tree.leaves(state.params))
        outputs = trainer.layout.replicate(compiled.shapes_of("fashion_mnist").train)
        found = trainer.step(state, *outputs, np.arange(8, dtype=np.int32))
        assert jax.tree.map(np.shape, found) == jax.tree.map(lambda x: x.shape, lowered.out_info)
