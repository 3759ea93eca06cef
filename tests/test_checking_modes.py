"""Every public function under JAX's own checking modes: one table of functions, one of modes."""

import contextlib
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hero_jax
from hero_jax import (
    Examples,
    MeanLoss,
    Operator,
    Stream,
    curvature,
    evaluate,
    landscape,
    parallel,
    perturbations,
    quantize,
    sharpness,
    spectrum,
)
from hero_jax.quantize import allocation, rounding, sensitivity

KEY = jax.random.key(0)


@contextlib.contextmanager
def strict(x64=False):
    """What looks at values, ranks and types, together: each names itself in its error."""
    with (
        jax.debug_nans(True),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.enable_x64(x64),
    ):
        yield


@contextlib.contextmanager
def checking_leaks():
    """JAX looks for leaked tracers among all objects: those that are here before the test are left out."""
    gc.collect()
    gc.freeze()
    with jax.checking_leaks():
        yield


@pytest.fixture(autouse=True, scope="module")
def thawed():
    """What was left out is collected again after all tests, not after each, where the next would go through it."""
    yield
    gc.unfreeze()


# What is looked at, and the type of the parameters. In float32 with 64 bits allowed nothing may widen.
MODES = {
    "strict x64": (lambda: strict(x64=True), jnp.float32),
    "strict bfloat16": (strict, jnp.bfloat16),
    "disable_jit": (jax.disable_jit, jnp.float32),
}


def params_of(dtype):
    return {"kernel": jnp.linspace(-1, 2, 6).reshape(3, 2).astype(dtype), "bias": jnp.array([0.5, -0.3], dtype)}


def batch_of(dtype):
    x = jnp.sin(jnp.arange(12.0)).reshape(4, 3).astype(dtype)
    return {"x": x, "y": jnp.cos(jnp.arange(8.0)).reshape(4, 2).astype(dtype)}


def model_fn(params, batch):
    return jnp.tanh(batch["x"] @ params["kernel"] + jnp.broadcast_to(params["bias"], (len(batch["x"]), 2)))


def output_loss_fn(outputs, batch):
    return jnp.mean((outputs - batch["y"]) ** 2)


def loss_fn(params, batch):
    return output_loss_fn(model_fn(params, batch), batch)


def losses_fn(params, batch):
    return jnp.mean((model_fn(params, batch) - batch["y"]) ** 2, axis=1)


def step(tx, dtype):
    params, batch = params_of(dtype), batch_of(dtype)
    grad_fn = jax.grad(lambda p: loss_fn(p, batch))

    @jax.jit
    def update(state, params):
        return tx.update(grad_fn(params), state, params, grad_fn=grad_fn)

    first, state = update(tx.init(params), params)
    return first, update(state, params)


def grad_difference(_):
    """In float32 alone: 16 bits are refused."""
    params, batch = params_of(jnp.float32), batch_of(jnp.float32)
    return curvature.grad_difference(jax.grad(lambda p: loss_fn(p, batch)), params, params)


def operator_of(dtype, data=None, **options):
    return curvature.hessian_operator(loss_fn, params_of(dtype), data or batch_of(dtype), **options)


def halves(dtype):
    batch = batch_of(dtype)
    return [jax.tree.map(lambda x: x[:3], batch), jax.tree.map(lambda x: x[3:], batch)]


def mean_loss_of(dtype):
    return MeanLoss(loss_fn, Stream(halves(dtype)))


def diagonal_operator(dtype):
    return Operator(lambda v: jnp.array([3.0, 2.0, 1.0], v.dtype) * v, jnp.zeros(3, dtype))


def short_lanczos(dtype):
    # A start in an invariant space: the places that are not filled are NaN.
    found = spectrum.lanczos(diagonal_operator(dtype), jnp.array([1.0, 0.0, 0.0], dtype))
    assert np.isnan(np.asarray(found.eigenvalues)[1])
    return found.eigenvalues[:1]


def short_density(dtype):
    identity = Operator(lambda v: v, jnp.zeros(3, dtype))
    return spectrum.spectral_density(identity, KEY, num_probes=2, num_steps=3, num_points=8).density


def few_products(dtype):
    found = spectrum.top_eigenpairs(diagonal_operator(dtype), KEY, k=3, max_matvecs=1)
    assert np.isnan(np.asarray(found.eigenvalues)[1])
    return found.eigenvalues[:1]


def zeros(dtype):
    return Operator(lambda v: 0 * v, jnp.zeros(3, dtype))


def classified(dtype):
    classify = evaluate.classifier(lambda w, x: x @ w["kernel"], batch_size=3)
    found = classify(params_of(dtype), batch_of(dtype)["x"], np.array([0, 1, 1, 0], np.uint8))
    return found["loss"], found["accuracy"]


def sensitivities(dtype):
    traces = spectrum.layer_traces(operator_of(dtype), KEY, num_probes=3).mean
    rows = sensitivity.sensitivities(mean_loss_of(dtype), params_of(dtype), 3, traces, operator=operator_of(dtype))
    costs = sensitivity.predicted_costs(params_of(dtype), traces, (3, 4))
    return [rows[0].increase, costs["kernel"][3]]


def grams(dtype):
    x = batch_of(dtype)["x"].astype(jnp.float32)
    return {"kernel": (x.T @ x / 4)[None]}


def optimized(dtype):
    w = rounding.optimized(params_of(dtype), 3, grams(dtype))
    error = rounding.output_error(params_of(dtype)["kernel"], w["kernel"], grams(dtype)["kernel"])
    return w, error, quantize.dequantize(rounding.quantized(params_of(dtype), 3, grams(dtype)))


def under_vmap(dtype):
    def local(x):
        return parallel.mean(parallel.vary(x, "data"), "data")

    return jax.vmap(local, axis_name="data")(jnp.ones(2, dtype))


PRESETS = [*quantize.PRESETS.values(), quantize.named("tensor-narrow-p99"), quantize.named("group8-full")]
FUNCTIONS = {
    "hero detached": lambda d: step(hero_jax.hero(0.1, 0.1), d),
    "hero difference": lambda d: step(hero_jax.hero(0.1, 0.1, penalty="difference"), d),
    "hero hvp": lambda d: step(hero_jax.hero(0.1, 0.1, penalty="hvp"), d),
    "hero eigenvalue": lambda d: step(hero_jax.hero(0.1, 0.1, penalty="eigenvalue"), d),
    "hero schedules": lambda d: step(hero_jax.hero(lambda n: jnp.where(n > 0, 0.1, 0.2), lambda n: 0.1), d),
    "hero difference product": lambda _: step(hero_jax.hero(0.1, 0.1, product="difference"), jnp.float32),
    "sam": lambda d: step(hero_jax.sam(0.1), d),
    "sam suppressed": lambda d: step(hero_jax.sam(0.1, suppress=lambda n: jnp.where(n > 0, 0.5, 0.0)), d),
    "sam leaf": lambda d: step(hero_jax.sam(0.1, scope="leaf", perturb_mask={"kernel": False, "bias": True}), d),
    "asam": lambda d: step(hero_jax.sam(0.1, adaptive={"kernel": True, "bias": False}), d),
    "grad_l1": lambda d: step(hero_jax.grad_l1(0.1), d),
    "msam": lambda d: step(hero_jax.msam(optax.sgd(0.1, momentum=0.9), 0.1, adaptive=True), d),
    "msam schedule": lambda d: step(
        hero_jax.msam(optax.sgd(0.1), lambda n: jnp.where(n > 1, 0.1, 0.2), scope="leaf"), d
    ),
    "nso": lambda d: step(hero_jax.nso(0.1, seed=3), d),
    "nso one-sided": lambda d: step(hero_jax.nso(lambda n: jnp.where(n > 1, 0.1, 0.2), seed=KEY, symmetric=False), d),
    "nso rounding": lambda d: step(
        hero_jax.nso(1.0, seed=3, sample=lambda p, key: quantize.rounding_noise(p, 3, key)), d
    ),
    "noise": lambda d: perturbations.noise(params_of(d), 0.1, KEY, mask={"kernel": True, "bias": False}),
    "zero gradient": lambda d: perturbations.ascent(
        params_of(d), jax.tree.map(jnp.zeros_like, params_of(d)), 0.1, adaptive=True
    ),
    "suppressed": lambda d: perturbations.suppressed(
        params_of(d), jax.tree.map(lambda x: x * jnp.asarray(0.5, d), params_of(d)), 0.5
    ),
    "grad_difference": grad_difference,
    "hvp": lambda d: curvature.hvp(loss_fn, params_of(d), params_of(d), batch_of(d)),
    "hessian": lambda d: operator_of(d)(params_of(d)),
    "hessian masked": lambda d: operator_of(d, mask={"kernel": True, "bias": False})(
        curvature.restrict(params_of(d), {"kernel": True, "bias": False})
    ),
    "hessian microbatches": lambda d: operator_of(d, Examples(batch_of(d), microbatch_size=3))(params_of(d)),
    "hessian stream": lambda d: operator_of(d, Stream(halves(d)))(params_of(d)),
    "ggn": lambda d: curvature.ggn_operator(model_fn, output_loss_fn, params_of(d), batch_of(d))(params_of(d)),
    "fisher": lambda d: curvature.empirical_fisher_operator(losses_fn, params_of(d), batch_of(d))(params_of(d)),
    "power_iteration": lambda d: spectrum.power_iteration(diagonal_operator(d), jnp.ones(3, d)),
    "power_iteration zero": lambda d: spectrum.power_iteration(zeros(d), jnp.ones(3, d)),
    "top_eigenpairs": lambda d: spectrum.top_eigenpairs(diagonal_operator(d), KEY, k=2),
    "top_eigenpairs few": few_products,
    "top_eigenpairs zero": lambda d: spectrum.top_eigenpairs(zeros(d), KEY, k=2),
    "top_eigenpairs hessian": lambda d: spectrum.top_eigenpairs(operator_of(d), KEY, k=2, basis_size=4),
    "lanczos": lambda d: spectrum.lanczos(operator_of(d), params_of(d), num_steps=4).components,
    "lanczos short": short_lanczos,
    "trace": lambda d: spectrum.trace(operator_of(d), KEY, num_probes=3),
    "trace sketch": lambda d: spectrum.trace(operator_of(d), KEY, num_probes=12, sketch_size=2, rtol=0.5),
    "layer_traces": lambda d: spectrum.layer_traces(operator_of(d), KEY, num_probes=3),
    "diagonal": lambda d: spectrum.diagonal(operator_of(d), KEY, num_probes=3),
    "frobenius_norm": lambda d: spectrum.frobenius_norm(operator_of(d), KEY, num_probes=3),
    "frobenius_norm zero": lambda d: spectrum.frobenius_norm(zeros(d), KEY, num_probes=3),
    "moments": lambda d: spectrum.moments(operator_of(d), KEY, num_probes=3),
    "spectral_density": lambda d: spectrum.spectral_density(operator_of(d), KEY, num_probes=2, num_steps=4).density,
    "spectral_density short": short_density,
    "mean_loss": lambda d: mean_loss_of(d)(params_of(d)),
    "worst_case": lambda d: sharpness.worst_case(mean_loss_of(d), params_of(d), KEY, rho=0.1, num_steps=2),
    "average_case": lambda d: sharpness.average_case(mean_loss_of(d), params_of(d), KEY, sigma=0.1, num_probes=2),
    "increase_along": lambda d: sharpness.increase_along(mean_loss_of(d), params_of(d), params_of(d)),
    "batch_eigenvalues": lambda d: sharpness.batch_eigenvalues(loss_fn, params_of(d), halves(d), KEY, max_matvecs=9),
    "filter_normalized": lambda d: landscape.filter_normalized(params_of(d), KEY),
    "line": lambda d: landscape.line(mean_loss_of(d), params_of(d), params_of(d), [0.0, 0.1]).values,
    "plane": lambda d: landscape.plane(mean_loss_of(d), params_of(d), (params_of(d),) * 2, [0.0], [0.1]).values,
    "interpolate": lambda d: landscape.interpolate(mean_loss_of(d), params_of(d), params_of(d), [0.0, 1.0]).values,
    "classifier": classified,
    "fake_quantize": lambda d: [quantize.fake_quantize(params_of(d), 3, spec) for spec in PRESETS],
    "straight_through": lambda d: jax.grad(
        lambda p: jnp.sum(quantize.fake_quantize(p, 3, straight_through=True)["kernel"])
    )(params_of(d)),
    "quantize": lambda d: [quantize.dequantize(quantize.quantize(params_of(d), 3, spec)) for spec in PRESETS],
    "rounding_noise": lambda d: quantize.rounding_noise(params_of(d), 3, KEY),
    "quantize_and_evaluate": lambda d: [
        row.metrics for row in quantize.quantize_and_evaluate(mean_loss_of(d), params_of(d), bits=(4, 2))
    ],
    "rounding": optimized,
    "sensitivity": sensitivities,
    "bits_tree": lambda d: allocation.bits_tree(params_of(d), {"kernel": 3}),
    "parallel": under_vmap,
}


# Those that read values on the way: they cannot be traced as a whole.
ON_HOST = {
    *("hessian stream", "top_eigenpairs few", "lanczos short", "mean_loss", "worst_case", "average_case"),
    *("increase_along", "line", "plane", "interpolate", "classifier", "quantize_and_evaluate", "sensitivity"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_runs_in_every_mode(name, mode):
    look, dtype = MODES[mode]
    with look():
        found = FUNCTIONS[name](jnp.dtype(dtype))
    for x in jax.tree.leaves(found):
        assert np.isfinite(np.asarray(x, np.float64)).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_leaks_no_tracer(name):
    """Tracing is where they leak: what can be traced as a whole is not compiled."""
    with checking_leaks():
        if name in ON_HOST:
            FUNCTIONS[name](jnp.dtype(jnp.float32))
        else:
            jax.eval_shape(lambda: FUNCTIONS[name](jnp.dtype(jnp.float32)))


@pytest.mark.parametrize("caught_by", [jax.eval_shape, lambda f: f()])
def test_a_leak_is_seen(caught_by):
    kept = []

    def leaks():
        return jax.jit(lambda x: kept.append(jnp.sin(x)) or x)(jnp.ones(2))

    with checking_leaks(), pytest.raises(Exception, match="Leaked"):
        caught_by(leaks)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    "broken",
    [
        lambda: jnp.zeros(2) / jnp.zeros(2),
        lambda: jnp.ones((2, 3)) * jnp.ones(3),
        lambda: jnp.ones(2, jnp.bfloat16) * jnp.ones(2),
    ],
)
def test_strict_does_look(broken, x64):
    with strict(x64), pytest.raises((FloatingPointError, ValueError, TypeError)):
        broken()
