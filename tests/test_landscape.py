"""Lines, planes and segments through weights against NumPy and closed forms; `experiments.landscape` on saved runs."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import data, train
from experiments import landscape as command
from experiments.analysis import curvature, plots
from experiments.config import resolve
from experiments.measure import landscape as measuring
from experiments.measure.landscape import LandscapeConfig
from experiments.measure.saved import Saved
from experiments.storage import runs
from experiments.training import compiled
from hero_jax import landscape, models
from hero_jax.evaluate import classifier
from tests import problems

KEY = jax.random.key(0)


def convnet_tree(dtype=jnp.float32, seed=1):
    """Leaves of the shapes a network has: a convolution, a depthwise one, a dense kernel, biases, a stack, a scale."""
    shapes = {
        "conv": {"kernel": (3, 2, 4, 6), "bias": (6,)},
        "depthwise": {"kernel": (3, 3, 1, 5)},
        "dense": [(7, 3), (3,)],
        "stacked": {"kernel": (2, 4, 6)},
        "temperature": (),
    }
    rng = np.random.default_rng(seed)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(0.3 * rng.standard_normal(s) + 0.1, dtype), shapes, is_leaf=is_shape)


def filters_of(x, axis=-1):
    """(filters, entries), by NumPy."""
    x = np.moveaxis(np.asarray(x, np.float64), axis, 0)
    return x.reshape(len(x), -1)


# --- filter_normalized ---


@pytest.mark.parametrize("axis", [-1, 0])
def test_filters_have_the_norms_of_the_weights(x64, axis):
    params = convnet_tree(jnp.float64)
    direction = landscape.filter_normalized(params, KEY, channel_axis=axis)
    for d, w in zip(jax.tree.leaves(direction), jax.tree.leaves(params), strict=True):
        assert (d.shape, d.dtype) == (w.shape, w.dtype)
        if w.ndim < 2:
            assert not d.any()
            continue
        norms = [np.linalg.norm(filters_of(x, axis), axis=1) for x in (d, w)]
        np.testing.assert_allclose(*norms, rtol=1e-12)
        # The other axis has other norms: the option is not ignored.
        others = [np.linalg.norm(filters_of(x, -1 - axis), axis=1) for x in (d, w)]
        assert not np.allclose(*others, rtol=1e-5)


def test_same_key_gives_parallel_filters_to_networks_of_the_same_shapes(x64):
    first, second = (convnet_tree(jnp.float64, seed) for seed in (1, 2))
    d1, d2 = (landscape.filter_normalized(params, KEY) for params in (first, second))
    for x, y in zip(jax.tree.leaves(d1), jax.tree.leaves(d2), strict=True):
        if x.ndim >= 2:
            a, b = filters_of(x), filters_of(y)
            cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
            np.testing.assert_allclose(cosines, 1, rtol=1e-12)
            assert not np.allclose(a, b)


def test_direction_depends_on_the_key_alone():
    params = convnet_tree()
    first, again, other = (landscape.filter_normalized(params, jax.random.key(i)) for i in (0, 0, 1))
    problems.assert_close(first, again, rtol=0)
    kernel, other_kernel = (filters_of(x["conv"]["kernel"]) for x in (first, other))
    cosines = (kernel * other_kernel).sum(1) / np.linalg.norm(kernel, axis=1) / np.linalg.norm(other_kernel, axis=1)
    # Of two random directions in 24 dimensions.
    assert np.abs(cosines).max() < 0.8


def test_entries_are_normal_before_they_are_normalized():
    w = jnp.full((4000, 2), 0.5)
    z = np.asarray(landscape.filter_normalized(w, KEY)) / 0.5
    # The norm of 4000 normal entries is that of as many ones, to 1 %.
    moments = z.mean(), z.var(), (z**4).mean()
    np.testing.assert_allclose(moments, (0, 1, 3), atol=0.25)


def test_zero_filters_and_empty_leaves_give_zeros():
    params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]]), "none": jnp.zeros((0, 3))}
    direction = landscape.filter_normalized(params, KEY)
    np.testing.assert_allclose(np.linalg.norm(direction["kernel"], axis=0), [5, 0], rtol=1e-6)
    assert direction["none"].shape == (0, 3)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_neither_overflow_nor_underflow(size):
    w = size * jnp.array([[3.0, 1.0], [4.0, 2.0]])
    norms = np.linalg.norm(np.asarray(landscape.filter_normalized(w, KEY), np.float64), axis=0)
    np.testing.assert_allclose(norms / size, [5, 5**0.5], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_leaves_have_float32_norms(dtype):
    # The squares of 1000 entries of 20 overflow float16, and a bfloat16 sum stops growing at 256 equal terms.
    w = jnp.full((1000, 3), 20.0, dtype)
    direction = landscape.filter_normalized({"kernel": w, "bias": jnp.ones(3, dtype)}, KEY)
    assert {x.dtype for x in jax.tree.leaves(direction)} == {jnp.dtype(jnp.float32)}
    norms = np.linalg.norm(np.asarray(direction["kernel"], np.float64), axis=0)
    np.testing.assert_allclose(norms, 20 * 1000**0.5, rtol=1e-5)


def test_rescaled_layers_have_the_same_picture(x64):
    # relu(x (c A)) (B / c) is relu(x A) B.
    x = jax.random.normal(jax.random.key(2), (20, 4))
    params = {"a": jax.random.normal(jax.random.key(3), (4, 6)), "b": jax.random.normal(jax.random.key(4), (6, 3))}
    scaled = {"a": 8 * params["a"], "b": params["b"] / 8}

    @jax.jit
    def loss_fn(params):
        return jnp.mean(jax.nn.relu(x @ params["a"]) @ params["b"]) ** 2

    steps = np.linspace(-1, 1, 7)
    first, second = (
        landscape.line(loss_fn, p, landscape.filter_normalized(p, KEY), steps).values for p in (params, scaled)
    )
    np.testing.assert_allclose(first, second, rtol=1e-10)


# --- line, plane, interpolate ---


def test_line_of_a_quadratic(x64):
    loss_fn, params, matrix = problems.quadratic()
    direction = problems.random_like(jax.random.key(5), params)
    steps = [0.7, -1.3, 0.0, 2.1]
    found = landscape.line(loss_fn, params, direction, steps)
    d = jax.flatten_util.ravel_pytree(direction)[0]
    slope, curvature = d @ jax.flatten_util.ravel_pytree(jax.grad(loss_fn)(params))[0], d @ matrix @ d
    expected = [float(loss_fn(params) + a * slope + a**2 * curvature / 2) for a in steps]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.steps, steps)
    assert found.values[2] == loss_fn(params)
    assert found.finite.all()


def test_plane_of_a_quadratic(x64):
    loss_fn, params, matrix = problems.quadratic()
    directions = [problems.random_like(jax.random.key(i), params) for i in (5, 6)]
    a, b = [0.3, -1.1], [0.0, 0.9, -2.0]
    found = landscape.plane(loss_fn, params, directions, a, b)
    d1, d2 = (jax.flatten_util.ravel_pytree(d)[0] for d in directions)
    gradient = jax.flatten_util.ravel_pytree(jax.grad(loss_fn)(params))[0]
    expected = np.empty((2, 3))
    for i, j in np.ndindex(2, 3):
        move = a[i] * d1 + b[j] * d2
        expected[i, j] = loss_fn(params) + gradient @ move + move @ matrix @ move / 2
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.a, a)
    np.testing.assert_array_equal(found.b, b)
    line = landscape.line(loss_fn, params, directions[0], a)
    np.testing.assert_array_equal(found.values[:, 0], line.values)


def test_segment_of_a_quadratic(x64):
    loss_fn, first, _ = problems.quadratic()
    second = problems.random_like(jax.random.key(5), first)
    steps = [-0.25, 0, 0.4, 1, 1.25]
    found = landscape.interpolate(loss_fn, first, second, steps)
    expected = [loss_fn(jax.tree.map(lambda x, y, t=t: (1 - t) * x + t * y, first, second)) for t in steps]
    np.testing.assert_allclose(found.values, expected, rtol=1e-12)


def test_ends_of_a_segment_are_the_networks_themselves():
    first, second = jnp.array([0.1, 1e-9, 3.0]), jnp.array([1e8, 0.7, -0.3])
    seen = []
    landscape.interpolate(lambda w: (seen.append(w), 0.0)[1], first, second, [0, 1])
    np.testing.assert_array_equal(seen[0], first)
    np.testing.assert_array_equal(seen[1], second)


def test_metrics_may_be_any_tree_of_scalars():
    def loss_fn(w):
        return {"train": {"loss": w[0] * 2, "count": 3}, "test": (float(w[1]),)}

    found = landscape.line(loss_fn, jnp.array([1.0, 2.0]), jnp.array([1.0, 0.5]), [0, 1])
    np.testing.assert_array_equal(found.values["train"]["loss"], [2, 4])
    np.testing.assert_array_equal(found.values["train"]["count"], [3, 3])
    np.testing.assert_array_equal(found.values["test"][0], [2, 2.5])
    assert {x.dtype for x in jax.tree.leaves(found.values)} == {np.dtype(np.float64)}


def test_function_that_loops_on_the_host_agrees_with_a_jitted_one():
    inputs = np.asarray(jax.random.normal(jax.random.key(2), (23, 5)))
    labels = np.arange(23) % 3
    params = jax.random.normal(jax.random.key(3), (5, 3))
    direction = landscape.filter_normalized(params, KEY)
    evaluate = classifier(lambda w, x: x @ w, batch_size=8)

    @jax.jit
    def loss_fn(w, inputs, labels):
        return -jnp.take_along_axis(jax.nn.log_softmax(inputs @ w), labels[:, None], axis=1).mean()

    steps = np.linspace(-1, 1, 5)
    on_host = landscape.line(lambda w: evaluate(w, inputs, labels)["loss"], params, direction, steps)
    compiled = landscape.line(lambda w: loss_fn(w, inputs, labels), params, direction, steps)
    np.testing.assert_allclose(on_host.values, compiled.values, rtol=1e-5)


def test_compiles_once(monkeypatch):
    traces, moved, cast_like = [], [], landscape._tree.cast_like
    monkeypatch.setattr(landscape._tree, "cast_like", lambda *given: moved.append(given) or cast_like(*given))

    @jax.jit
    def loss_fn(params):
        traces.append(params)
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(params))

    params = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)}
    directions = [landscape.filter_normalized(params, jax.random.key(i)) for i in range(2)]
    landscape._moved.clear_cache()
    landscape.line(loss_fn, params, directions[0], [0, 1, 0.5])
    landscape.line(loss_fn, params, directions[1], np.float32([2]))
    assert len(moved) == 1
    landscape.plane(loss_fn, params, directions, [0, 1], [0.1, -1])
    assert len(moved) == 2
    landscape.interpolate(loss_fn, params, params, [0, 1])
    # At the weights themselves as anywhere else.
    loss_fn(params)
    assert len(traces) == 1


def test_bfloat16_weights_move_in_float32():
    w, d = jnp.array([[1.0, 256.0]], jnp.bfloat16), jnp.array([[1.0, 1.0]])
    found = landscape.plane(lambda w: w[0, 1], w, (d, d), [0.0, 0.6], [0.0, 0.6])
    # 256 + 0.6 rounds to 256, 256 + 1.2 to 258; moved twice in bfloat16 it would stay.
    np.testing.assert_array_equal(found.values, [[256, 256], [256, 258]])
    seen = []
    landscape.line(lambda w: (seen.append(w.dtype), 0.0)[1], w, d, [1.0])
    assert seen == [jnp.bfloat16]


def test_values_that_are_not_finite_stay_and_are_flagged():
    def loss_fn(w):
        return {"log": jnp.log(w), "square": w**2}

    found = landscape.line(loss_fn, jnp.array(1.0), jnp.array(1.0), [-2, -1, 0])
    np.testing.assert_array_equal(found.values["log"], [np.nan, -np.inf, 0])
    np.testing.assert_array_equal(found.values["square"], [1, 0, 1])
    np.testing.assert_array_equal(found.finite, [False, False, True])
    plane = landscape.plane(loss_fn, jnp.array(1.0), (jnp.array(1.0), jnp.array(0.0)), [-2, 0], [0, 1, 2])
    np.testing.assert_array_equal(plane.finite, [[False] * 3, [True] * 3])


def test_every_evaluation_is_reported():
    calls = []
    w = jnp.array([[1.0, 2.0]])
    landscape.plane(jnp.sum, w, (w, w), [0, 1], [0, 1, 2], report=lambda *call: calls.append(call))
    assert calls == [(done, 6) for done in range(7)]


def test_weights_split_over_devices_stay_split():
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.random.normal(jax.random.key(2), (16, 3))
    w = jax.device_put(whole, sharding)
    seen = []
    direction = landscape.filter_normalized(w, KEY)
    found = landscape.line(lambda w: (seen.append(w.sharding), jnp.sum(w**2))[1], w, direction, [0.5])
    assert seen[0].is_equivalent_to(sharding, 2)
    expected = landscape.line(lambda w: jnp.sum(w**2), whole, landscape.filter_normalized(whole, KEY), [0.5])
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5)


# --- barrier ---


def test_barrier_of_a_double_well():
    # Wells of depth 0 and -1 at w = -1 and 1: (w^2 - 1)^2 - (w + 1) / 2, whose last term is the line of the ends.
    steps = np.linspace(-0.25, 1.25, 25)
    found = landscape.interpolate(
        lambda w: (w**2 - 1) ** 2 - (w + 1) / 2,
        jnp.array(-1.0),
        jnp.array(1.0),
        np.random.default_rng(0).permutation(steps),
    )
    assert landscape.barrier(found.steps, found.values) == 1
    # Beyond the ends it is higher, at other ends lower.
    assert found.values.max() > 1
    assert landscape.barrier([0, 0.25, 1], [0, 2.0, 4]) == 1
    assert landscape.barrier([0, 0.25, 1], [0, 0.5, 4]) == 0


def test_barrier_takes_steps_that_are_rounded():
    steps = np.linspace(-0.3, 1.3, 17)
    assert 0 not in steps
    assert landscape.barrier(steps, np.where(np.isclose(steps, 0.5), 3.0, 1.0)) == 2


def test_barrier_that_is_not_finite():
    assert landscape.barrier([0, 0.5, 1], [1, np.inf, 1]) == np.inf
    assert np.isnan(landscape.barrier([0, 0.5, 1], [1, np.nan, 1]))
    assert np.isnan(landscape.barrier([0, 0.5, 1], [np.inf, 1, 1]))
    assert landscape.barrier([-1, 0, 0.5, 1], [np.nan, 1, 2, 1]) == 1


# --- errors ---

W = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: landscape.filter_normalized({"b": jnp.ones(3)}, KEY),
            ValueError,
            "`params` must have a leaf with two",
        ),
        (lambda: landscape.filter_normalized({"a": jnp.ones((2, 3), int)}, KEY), TypeError, "must have floating-point"),
        (
            lambda: landscape.filter_normalized(W, KEY, channel_axis=2),
            ValueError,
            r"channel_axis=...\)` must be an integer in -2..1; got 2",
        ),
        (
            lambda: landscape.line(jnp.sum, W, {"a": jnp.ones((3, 2)), "b": jnp.ones(3)}, [0]),
            ValueError,
            r"`line\(direction=...\)` must have the shapes of `params`; at params\['a'\] it is \(3, 2\)",
        ),
        (
            lambda: landscape.plane(jnp.sum, W, (W, {"a": jnp.ones((2, 3)), "c": jnp.ones(3)}), [0], [0]),
            ValueError,
            r"`plane\(directions=...\)\[1\]` must have the structure of `params`; it has params\['c'\]",
        ),
        (lambda: landscape.plane(jnp.sum, W, W, [0], [0]), ValueError, "must be two trees like `params`"),
        (
            lambda: landscape.interpolate(jnp.sum, W, {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, [0]),
            ValueError,
            r"`interpolate\(second=...\)` must have the shapes of `first`; at first\['b'\] it is \(4,\)",
        ),
        (
            lambda: landscape.line(jnp.sum, W, W, []),
            ValueError,
            r"`line\(steps=...\)` must have one axis .* shape \(0,\)",
        ),
        (lambda: landscape.plane(jnp.sum, W, (W, W), [0], 1.0), ValueError, r"`plane\(b=...\)` must have one axis"),
        (
            lambda: landscape.line(jnp.sum, W, W, [0, np.inf]),
            ValueError,
            r"`line\(steps=...\)` must be finite; got inf",
        ),
        (lambda: landscape.line(jnp.sum, W, W, ["0"]), TypeError, r"`line\(steps=...\)` must be real numbers"),
        (lambda: landscape.line(lambda w: w["b"], W, W, [0]), TypeError, r"`eval_fn\(...\)` must be a real scalar"),
        (
            lambda: landscape.line(lambda w: {"x": w["b"]}, W, W, [0]),
            TypeError,
            r"`eval_fn\(...\)\['x'\]` must be a real scalar; got an array of shape \(3,\)",
        ),
        (
            lambda: landscape.line(lambda w: {}, W, W, [0]),
            ValueError,
            r"`line\(eval_fn=...\)` must return at least one",
        ),
        (
            lambda: landscape.line(lambda w: {"x": 1.0} if w["b"][0] == 1 else {"y": 1.0}, W, W, [0, 1]),
            ValueError,
            r"`eval_fn\(...\)` must have the structure of `its first value`; it has its first value\['y'\]",
        ),
        (
            lambda: landscape.barrier([0, 1], [1.0]),
            ValueError,
            r"one loss a step; got shapes \(2,\) of steps and \(1,\)",
        ),
        (lambda: landscape.barrier([0, 0.9], [1, 1]), ValueError, r"must have the steps 0 and 1, .* got \[0.0, 0.9\]"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- experiments.landscape ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A few epochs of SGD and HERO on digits."""
    base = tmp_path_factory.mktemp("runs")
    for method in ("sgd", "hero"):
        train.main(resolve(method=method, epochs=6, train_size=200), out=base / method)
    return base / "sgd", base / "hero"


@pytest.fixture(scope="module")
def measured(folders):
    config = LandscapeConfig(images=150, points=5, directions=3)
    command.main(folders, config)
    return json.loads((folders[0] / "landscape" / "landscape.json").read_text())


def loss_of(folder, change=lambda params: params):
    """The mean loss and accuracy of a run on its first 150 training images, by its own matrix products in NumPy."""
    params = jax.tree.map(np.asarray, change(runs.load_variables(folder)["params"]))
    dataset = data.subset(data.load("digits"), 200, 0)
    x = (dataset.train.images[:150].reshape(150, -1) / 16 - 0.305) / 0.376
    labels = dataset.train.labels[:150]
    for name in ("dense1", "dense2", "head"):
        x = x @ params[name]["kernel"] + params[name]["bias"]
        x = x if name == "head" else np.maximum(x, 0)
    x = x - x.max(1, keepdims=True)
    losses = np.log(np.exp(x).sum(1)) - x[np.arange(150), labels]
    return losses.mean(), np.mean(x.argmax(1) == labels)


def test_leaves_numbers_and_plots(folders, measured):
    out = folders[0] / "landscape"
    assert {path.name for path in out.iterdir()} == {"landscape.json", "lines.png", "plane.png", "between.png"}
    for name in ("lines.png", "plane.png", "between.png"):
        with Image.open(out / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    assert list(measured["runs"]) == ["sgd", "hero"]
    assert measured["images"] == {"sgd": 150, "hero": 150}
    assert measured["config"]["points"] == 5
    assert measured["environment"]["commit"]


def test_values_are_those_of_the_stated_loss(folders, measured):
    for name, folder in zip(("sgd", "hero"), folders, strict=True):
        found = measured["runs"][name]
        loss, accuracy = loss_of(folder)
        np.testing.assert_allclose(found["center"]["loss"], loss, rtol=1e-4)
        assert found["center"]["accuracy"] == pytest.approx(accuracy)
        lines, plane = np.array(found["lines"]), np.array(found["plane"]["loss"])
        assert (lines.shape, plane.shape) == ((3, 5), (5, 5))
        assert found["steps"] == [-1, -0.5, 0, 0.5, 1]
        np.testing.assert_allclose(lines[:, 2], loss, rtol=1e-4)
        # The first two directions span the plane: its axes are their lines.
        np.testing.assert_allclose(plane[:, 2], lines[0], rtol=1e-5)
        np.testing.assert_allclose(plane[2], lines[1], rtol=1e-5)
        params = runs.load_variables(folder)["params"]
        direction = landscape.filter_normalized(params, jax.random.fold_in(jax.random.key(0), 2))
        moved, _ = loss_of(folder, lambda w, d=direction: jax.tree.map(lambda x, y: x + 0.5 * y, w, d))
        np.testing.assert_allclose(lines[2, 3], moved, rtol=1e-4)


def test_between_two_runs(folders, measured):
    found = measured["between"]["to"]["hero"]
    assert measured["between"]["first"] == "sgd"
    other = runs.load_variables(folders[1])["params"]
    for t in (0.0, 0.5, 1.0):
        loss, accuracy = loss_of(folders[0], lambda w, t=t: jax.tree.map(lambda x, y: (1 - t) * x + t * y, w, other))
        i = found["steps"].index(t)
        np.testing.assert_allclose(found["train"]["loss"][i], loss, rtol=1e-4)
        assert found["train"]["accuracy"][i] == pytest.approx(accuracy)
    losses = np.array(found["test"]["loss"])
    assert found["barriers"]["test"]["loss"] == landscape.barrier(found["steps"], losses)
    assert found["barriers"]["train"]["loss"] != found["barriers"]["test"]["loss"]


def test_table_names_the_barriers_of_train_first():
    parts = {"test": {"loss": 2.5, "error": 0.25}, "train": {"loss": 1.25, "error": 0.5}}
    _, lines = curvature.barriers({"run": {"barriers": parts}})
    assert lines == [["run", "1.250", "50.00", "2.500", "25.00"]]


def test_fraction_below_of_known_areas():
    steps = np.linspace(-2, 2, 21)
    # |x| < 1/2 of |x| <= 2, and the disk of radius 1/2 (linear interpolation of |x| is almost that of a cone).
    assert measuring.fraction_below(steps, np.abs(steps), 0.5) == pytest.approx(0.25, abs=0.01)
    distance = np.hypot(*np.meshgrid(steps, steps))
    assert measuring.fraction_below(steps, distance, 1.0) == pytest.approx(0.25, abs=0.01)
    assert measuring.fraction_below(steps, distance, 9.0) == 1
    half = np.where(steps[:, None] > 0, np.nan, 0 * distance)
    assert measuring.fraction_below(steps, half, 1.0) == pytest.approx(0.5, abs=0.01)
    infinite = np.where(steps > 0, np.inf, 0.0)
    assert measuring.fraction_below(steps, infinite, 1.0) == pytest.approx(0.5, abs=0.01)


def test_levels_rise_and_radius_change_the_measure(folders, tmp_path):
    basins = []
    for i, options in enumerate(({}, {"rise": 1.0}, {"radius": 0.5}, {"seed": 1})):
        command.main(folders[1:], LandscapeConfig(images=50, points=3, directions=2, **options), tmp_path / str(i))
        found = json.loads((tmp_path / str(i) / "landscape.json").read_text())
        basins.append(found["runs"]["hero"]["basin"]["plane"])
        # One run has nothing to be connected with.
        assert found["between"] == {"first": "hero", "to": {}}
        assert not (tmp_path / str(i) / "between.png").exists()
    assert basins[1] > basins[0]
    assert basins[2] > basins[0]
    assert basins[3] != basins[0]


class Normalized(nn.Module):
    """The smallest network with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(10)(nn.relu(x).mean((1, 2)))


def test_batch_statistics_between_two_runs_are_those_of_the_point(monkeypatch):
    monkeypatch.setattr(models, "create", lambda name, num_classes: Normalized())
    dataset = problems.random_images(64)
    config = resolve(batch_size=32, method="sgd")
    trainer = compiled.build(config, dataset)
    states = [trainer.init(seed) for seed in (0, 1)]
    first, second = (
        Saved(
            config,
            trainer,
            classifier(trainer.forward, batch_size=compiled.EVAL_BATCH),
            {"params": s.params, "batch_stats": s.batch_stats},
            dataset.train,
            dataset.test.first(40),
        )
        for s in states
    )
    monkeypatch.setattr(measuring, "BETWEEN", np.array([0.0, 0.5, 1.0]))
    found = measuring.between(first, second, lambda done, total: None)
    params = jax.tree.map(lambda x, y: (x + y) / 2, first.variables["params"], second.variables["params"])
    # One batch is all of the images: its statistics are what they are estimated to be.
    stats = trainer.statistics(first.variables | {"params": params}, first.train.images)
    of_batch = jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, stats, first.variables["batch_stats"])
    expected = trainer.evaluate({"params": params, "batch_stats": of_batch}, first.train)
    np.testing.assert_allclose(found["train"]["loss"][1], expected["loss"], rtol=1e-3)
    assert found["test"]["loss"][1] != found["train"]["loss"][1]
    kept = trainer.evaluate(first.variables | {"params": params}, first.train)
    assert abs(kept["loss"] - expected["loss"]) > 0.01
    # Around a run its own statistics stay.
    around = measuring.around(LandscapeConfig(points=3, directions=2), first, lambda what, done, total: None)
    center = trainer.evaluate(first.variables, first.train)["loss"]
    assert around["lines"][0][1] == pytest.approx(center, rel=1e-6)


def test_runs_of_other_architectures_are_not_connected(folders, tmp_path, monkeypatch):
    loaded = compiled.load
    train.main(resolve(method="sgd", epochs=1, train_size=64), out=tmp_path / "other")

    def load(folder, *arguments):
        config, *rest = loaded(folder, *arguments)
        return config.replace(model="mlp" if folder in folders else "vit_tiny"), *rest

    monkeypatch.setattr(compiled, "load", load)
    command.main((*folders, tmp_path / "other"), LandscapeConfig(images=20, points=3, directions=2), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "landscape.json").read_text())
    assert list(found["runs"]) == ["sgd", "hero", "other"]
    assert list(found["between"]["to"]) == ["hero"]


def test_plots_of_losses_that_are_not_finite(tmp_path):
    losses = np.array([[np.nan, 0.3, np.inf], [0.2, 0.1, 0.4], [np.inf, 6.0, np.nan]])
    found = {"steps": [-1, 0, 1], "lines": losses.tolist(), "plane": {"loss": losses.tolist()}, "basin": {"plane": 0.4}}
    surfaces = {"run": found, "lost": found | {"plane": {"loss": (losses * np.nan).tolist()}}}
    plots.landscape_lines(surfaces, {"run": "sgd", "lost": "sgd"}, tmp_path / "lines.png")
    plots.landscape_planes(surfaces, [0.5, 1.0], tmp_path / "plane.png")
    assert (tmp_path / "lines.png").exists()
    assert (tmp_path / "plane.png").exists()


def test_a_run_has_the_color_of_its_method_where_no_other_has(tmp_path):
    styles = plots._run_styles({"a": "sgd", "b": "hero", "c": "hero"})
    assert styles["a"]["color"] == plots.COLORS["sgd"]
    assert len({style["color"] for style in styles.values()}) == 3


def test_names_of_runs(tmp_path):
    a, b, c = (tmp_path / name for name in ("x/run", "y/run", "other"))
    assert measuring._names([a, c]) == ["run", "other"]
    assert measuring._names([a, b]) == [str(a), str(b)]
    with pytest.raises(ValueError, match=r"`folders` must name each run once; got .* twice"):
        measuring._names([a, tmp_path / "x" / ".." / "x" / "run"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, "`images` must be an integer >= 1; got 0"),
        ({"points": 2}, "`points` must be an integer >= 3; got 2"),
        ({"directions": 1}, "`directions` must be an integer >= 2; got 1"),
        ({"radius": 0.0}, "`radius` must be positive and finite; got 0.0"),
        ({"rise": -0.1}, "`rise` must be positive and finite; got -0.1"),
        ({"levels": ()}, "`levels` must be at least one number, in ascending order"),
        ({"levels": (1.0, 0.5)}, "`levels` must be at least one number, in ascending order"),
        ({"levels": (-1.0, 0.5)}, "`levels` must be positive and finite; got -1.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        LandscapeConfig(**options)


def test_errors_of_the_command(folders, tmp_path, monkeypatch):
    config = LandscapeConfig(images=10, points=3, directions=2)
    with pytest.raises(ValueError, match="`folders` must name at least one run folder"):
        command.main((), config)
    with pytest.raises(FileNotFoundError, match="must be a run folder with a checkpoint"):
        command.main((tmp_path,), config)
    with pytest.raises(FileExistsError, match="`out` must be a new or empty folder"):
        command.main(folders[:1], config, folders[0])
    loaded = compiled.load

    def other(folder, *arguments):
        config, *rest = loaded(folder, *arguments)
        return config if folder == folders[0] else resolve(dataset="cifar10"), *rest

    monkeypatch.setattr(compiled, "load", other)
    with pytest.raises(ValueError, match="`folders` must be of one data set; got cifar10, digits"):
        command.main(folders, config)
