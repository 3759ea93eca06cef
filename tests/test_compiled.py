"""What `benchmarks.compiled` counts, in a program written for the purpose."""

import importlib.util

import pytest

from benchmarks import compiled

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
  %w = (f32[4]{0}, s32[]) while(%f.1), condition=%condition, body=%body
  ROOT %out = f32[4]{0} bitcast(%w)
}
"""


def test_counts():
    assert compiled.counts(PROGRAM) == {
        "kernels": 5,  # conv, gemm, f.1, in_loop, less
        "convolutions": 1,
        "copies": 1,
        "collectives": {"all-reduce": 1, "all-gather": 1},
    }


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is not None, reason="The compiler is here.")
def test_missing_compiler_names_its_package():
    with pytest.raises(ValueError, match=r"`target` h100 needs .*: pip install jax-cuda13-plugin==\d"):
        compiled.mesh_of("h100")


def test_step_is_lowered_without_being_run():
    arguments = compiled.Arguments(model="mlp", batch_size=8, image_size=8, split_params=True)
    mesh = compiled.Mesh(compiled.jax.devices()[:4], ("data",))
    lowered = compiled.lower(arguments, "sam", mesh)
    assert "num_partitions = 4" in lowered.as_text()
