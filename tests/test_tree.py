"""Reductions over joined leaves, as on a GPU: the same numbers, and no leaf gathered that is split over devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import hero_jax
from hero_jax import _pool, _tree

SPLIT = PartitionSpec("data")


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Takes the branch for GPUs on the CPU."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))


def mesh_of(axis_type=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(axis_type,))


def trees(scale=1.0):
    """Two trees of leaves of several shapes, one of them empty."""
    shapes = {"kernel": (3, 2, 8, 16), "bias": (16,), "head": (16, 8), "none": (0, 8), "scalar": ()}
    keys = jax.random.split(jax.random.key(0), 2 * len(shapes)).reshape(2, -1)
    return [
        {name: scale * jax.random.normal(k, shape) for k, (name, shape) in zip(row, shapes.items(), strict=True)}
        for row in keys
    ]


def text_on_gpu(function, *args):
    """The program for a GPU, as it is handed to the compiler."""
    return function.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def joins(program):
    """Whether the compiler is told to take joined leaves; both ways are in the text, behind a constant."""
    assert "concatenate" in program
    (constant,) = set(re.findall(r"dense<(true|false)> : tensor<i1>", program))
    return constant == "true"


def reduced(a, b):
    return _tree.norm(a), _tree.largest(b), _tree.dot(a, b), _tree.normalize(a), _tree.peak_scaled(b)


@pytest.mark.parametrize("dtypes", [("float32",) * 2, ("float16",) * 2, ("bfloat16", "float32")])
def test_joined_leaves_give_the_same_numbers(as_on_gpu, dtypes):
    a, b = (jax.tree.map(lambda x, t=t: x.astype(t), tree) for tree, t in zip(trees(), dtypes, strict=True))
    a["bias"], b["head"] = a["bias"].astype("bfloat16"), b["head"].astype("float16")
    joined = jax.jit(reduced)
    assert "concatenate" in joined.lower(a, b).as_text()
    for x, y in zip(*map(jax.tree.leaves, (joined(a, b), reduced(a, b))), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=2e-6)


@pytest.mark.parametrize(
    ("entries", "dtype", "expected"),
    [
        ((0.0, 0.0), "float32", 0.0),
        ((3e4, 4e4), "float16", 5e4),
        ((3e30, 4e30), "float32", 5e30),
        ((3e-30, 4e-30), "float32", 5e-30),
        ((np.inf, 1.0), "float32", np.inf),
        ((np.nan, 1.0), "float32", np.nan),
        ((np.nan, np.inf), "float32", np.nan),
    ],
)
def test_joined_norm_neither_over_nor_underflows(as_on_gpu, entries, dtype, expected):
    tree = [jnp.asarray([x, 0.0], dtype) for x in entries]
    length = jax.jit(_tree.norm)(tree)
    np.testing.assert_allclose(length, expected, rtol=1e-3 if dtype == "float16" else 1e-6)
    np.testing.assert_allclose(length, _tree.norm(tree), rtol=1e-6)


def test_joined_leaves_under_transformations(as_on_gpu):
    a, b = trees()
    stacked = jax.tree.map(lambda x, y: jnp.stack([x, 2 * y]), a, b)
    lengths = jax.jit(jax.vmap(_tree.norm))(stacked)
    np.testing.assert_allclose(lengths, [_tree.norm(a), 2 * _tree.norm(b)], rtol=1e-6)
    _, slope = jax.jit(lambda a, b: jax.jvp(_tree.norm, (a,), (b,)))(a, b)
    np.testing.assert_allclose(slope, _tree.dot(a, b) / _tree.norm(a), rtol=1e-5)
    gradient = jax.jit(jax.grad(_tree.norm))(a)
    for x, y in zip(*map(jax.tree.leaves, (gradient, _tree.normalize(a)[0])), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_leaves_are_joined_on_one_gpu_and_nowhere_else():
    a, _ = trees()
    program = jax.jit(_tree.norm)
    assert joins(text_on_gpu(program, a))
    assert "concatenate" not in program.lower(a).as_text()  # on this CPU
    assert joins(text_on_gpu(jax.jit(jax.vmap(_tree.norm)), jax.tree.map(lambda x: x[None], a)))
    assert "concatenate" not in text_on_gpu(program, [a["kernel"]])  # one leaf


def test_leaves_of_a_program_for_several_devices_are_not_joined():
    a, _ = trees()
    a = {"kernel": a["kernel"][:, 0, :], "head": a["head"]}
    whole = jax.jit(_tree.norm)
    for kind in (AxisType.Auto, AxisType.Explicit):
        placed = jax.device_put(a, NamedSharding(mesh_of(kind), PartitionSpec(None, "data")))
        assert "concatenate" not in text_on_gpu(whole, placed)
    sharding = NamedSharding(mesh_of(), PartitionSpec(None, "data"))
    # Types say nothing of these two.
    assert not joins(text_on_gpu(jax.jit(_tree.norm, in_shardings=sharding), a))

    @jax.jit
    def constrained(tree):
        return _tree.norm(jax.lax.with_sharding_constraint(tree, sharding))

    assert "concatenate" not in (text := text_on_gpu(constrained, a)) or not joins(text)


@pytest.mark.parametrize("check_vma", [True, False])
def test_leaves_are_joined_where_every_axis_is_manual(check_vma):
    a = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(8)}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    norm = jax.jit(_tree.norm)

    def local(tree):
        return norm(tree)[None]

    def mapped(**options):
        split = PartitionSpec(("data", "model") if "axis_names" not in options else "data")
        return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=check_vma, **options)

    assert joins(text_on_gpu(jax.jit(mapped()), a))
    assert "concatenate" not in text_on_gpu(jax.jit(mapped(axis_names={"data"})), a)

    # The same function within and outside: each is lowered for where it is.
    both = text_on_gpu(jax.jit(lambda tree: (mapped()(tree), norm(tree)), in_shardings=NamedSharding(mesh, SPLIT)), a)
    assert set(re.findall(r"dense<(true|false)> : tensor<i1>", both)) == {"true", "false"}


def test_operations_one_by_one_join_nothing(as_on_gpu):
    a, b = jax.device_put(trees(8.0)[0]["head"], NamedSharding(mesh_of(), SPLIT)), jnp.ones(3)
    with jax.disable_jit():
        np.testing.assert_allclose(_tree.norm([a, b]), np.sqrt(np.sum(np.square(a)) + 3), rtol=1e-6)
    assert not isinstance(_tree.norm([a, b]), jax.core.Tracer)


def moved(program):
    """Collectives of a compiled program that move leaves; sums over devices are no such."""
    return re.findall(r"(all-gather|all-to-all|collective-permute)(?:-start)?\(", program)


@pytest.mark.parametrize("how", ["arguments", "in_shardings"])
@pytest.mark.parametrize("name", ["sam", "hero"])
def test_step_with_split_parameters_gathers_none(as_on_gpu, monkeypatch, name, how):
    tx = {"sam": hero_jax.sam(0.1), "hero": hero_jax.hero(0.1, 1.0)}[name]
    params = {"hidden": jnp.ones((16, 24)), "bias": jnp.ones(24), "head": jnp.ones((24, 16))}
    sharding = NamedSharding(mesh_of(), SPLIT)

    def step(params):
        grad_fn = jax.grad(lambda p: sum(jnp.sum(jnp.cosh(x)) for x in jax.tree.leaves(p)))
        return tx.update(grad_fn(params), tx.init(params), params, grad_fn=grad_fn)[0]

    def compiled():
        if how == "arguments":
            return jax.jit(step).lower(jax.device_put(params, sharding)).compile().as_text()
        return jax.jit(step, in_shardings=sharding, out_shardings=sharding).lower(params).compile().as_text()

    assert not moved(compiled())
    # What it would be otherwise.
    monkeypatch.setattr(_pool, "pooled", lambda reduction, *trees: reduction(*_pool.joined(*trees)))
    step = functools.wraps(step)(lambda params, step=step: step(params))
    assert moved(compiled())
