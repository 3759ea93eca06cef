"""Operators and data as types: what they know, through jit, and what they refuse."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hero_jax
from hero_jax import Examples, HostOperator, Operator, Stream, curvature, sharpness, spectrum
from tests import problems, reference

PACKAGE = str(Path(hero_jax.__file__).parent)
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
TREE = {"kernel": (3, 2), "bias": (2,)}


def params():
    return {name: jnp.full(shape, 0.5) for name, shape in TREE.items()}


def loss_fn(params, batch):
    return jnp.mean(jnp.tanh(batch @ params["kernel"] + params["bias"]) ** 3)


def batch():
    return jax.random.normal(jax.random.key(0), (6, 3))


class TestOperator:
    def test_is_its_product_and_knows_its_tree(self):
        operator = Operator(lambda v: jax.tree.map(lambda x: 3 * x, v), params())
        problems.assert_close(operator(params()), jax.tree.map(lambda x: 3 * x, params()))
        for leaf, shape in zip(jax.tree.leaves(operator.like), ((2,), (3, 2)), strict=True):
            assert isinstance(leaf, jax.ShapeDtypeStruct)
            assert leaf.shape == shape
            assert leaf.dtype == jnp.float32

    def test_like_may_be_shapes(self):
        shapes = jax.eval_shape(params)
        assert Operator(lambda v: v, shapes).like == Operator(lambda v: v, params()).like

    def test_of_curvature_goes_through_jit_as_an_argument(self):
        traces = []

        @jax.jit
        def product(operator, vector):
            traces.append(operator.like)
            return operator(vector)

        for scale in (1.0, 0.5):
            at = jax.tree.map(lambda x, s=scale: s * x, params())
            operator = curvature.hessian_operator(loss_fn, at, batch())
            expected = curvature.hvp(loss_fn, at, params(), batch())
            problems.assert_close(product(operator, params()), expected, rtol=1e-5)
        assert len(traces) == 1
        assert traces[0] == operator.like

    def test_plain_function_goes_through_jit(self):
        matrix = jnp.arange(9.0).reshape(3, 3)
        operator = Operator(lambda v: matrix @ v, jnp.zeros(3))
        result = jax.jit(lambda operator, v: operator(v))(operator, jnp.ones(3))
        np.testing.assert_allclose(result, matrix.sum(1))

    def test_solvers_run_on_one_made_inside_jit(self, x64):
        at = jax.tree.map(lambda x: x.astype(jnp.float64), params())

        @jax.jit
        def found(at, batch):
            operator = curvature.hessian_operator(loss_fn, at, batch)
            return spectrum.top_eigenpairs(operator, jax.random.key(0), k=1, rtol=1e-8).eigenvalues[0]

        values = np.linalg.eigvalsh(reference.dense_hessian(lambda p: loss_fn(p, batch().astype(jnp.float64)), at))
        np.testing.assert_allclose(found(at, batch().astype(jnp.float64)), values[np.argmax(np.abs(values))], rtol=1e-7)

    def test_restricted_operator_needs_no_example(self):
        mask = {"kernel": True, "bias": False}
        operator = curvature.hessian_operator(loss_fn, params(), batch(), mask=mask)
        assert operator.like["bias"] is None
        assert operator.like["kernel"].shape == (3, 2)
        trace = spectrum.layer_traces(operator, jax.random.key(0), num_probes=3)
        assert trace.mean["bias"] is None

    @pytest.mark.parametrize("kind", [Operator, HostOperator])
    def test_refusals(self, kind):
        with pytest.raises(TypeError, match=rf"`{kind.__name__}\(matvec=...\)` must be a function; got 3"):
            kind(3, jnp.zeros(2))
        with pytest.raises(TypeError, match=rf"`{kind.__name__}\(like=...\)` must have floating-point leaves"):
            kind(lambda v: v, jnp.zeros(2, int))
        with pytest.raises(ValueError, match=rf"`{kind.__name__}\(like=...\)` must have at least one array"):
            kind(lambda v: v, {})
        operator = kind(lambda v: v, jnp.zeros(2))
        with pytest.raises(ValueError, match=r"`vector` must have the shapes of `like`; at like it is \(3,\)"):
            operator(jnp.zeros(3))

    @pytest.mark.parametrize(
        "solve",
        [
            spectrum.trace,
            spectrum.layer_traces,
            spectrum.diagonal,
            spectrum.frobenius_norm,
            spectrum.moments,
            spectrum.spectral_density,
            spectrum.top_eigenpairs,
        ],
    )
    def test_plain_function_is_refused_where_the_tree_is_needed(self, solve):
        with pytest.raises(
            TypeError, match=rf"`{solve.__name__}\(operator=...\)` must be an Operator, .*got a function"
        ):
            solve(lambda v: v, jax.random.key(0))

    def test_few_frames_lie_between_a_product_and_its_loss(self):
        def failing(params, batch):
            raise RuntimeError("here")

        for data, most in ((batch(), 7), (Examples(batch(), microbatch_size=2), 8), (Stream([batch()]), 9)):
            operator = curvature.hessian_operator(failing, params(), data, coupled=True)
            with pytest.raises(RuntimeError, match="here") as raised:
                operator(params())
            names = [frame.name for frame in raised.traceback if str(frame.path).startswith(PACKAGE)]
            assert 0 < len(names) <= most, names


class TestData:
    def test_bare_batch_is_examples(self):
        bare = curvature.hessian_operator(loss_fn, params(), batch())(params())
        problems.assert_close(
            curvature.hessian_operator(loss_fn, params(), Examples(batch()))(params()), bare, rtol=1e-6
        )

    def test_examples_go_through_jit_as_an_argument(self):
        traces = []

        @jax.jit
        def product(examples, vector):
            traces.append(examples.microbatch_size)
            return curvature.hessian_operator(loss_fn, params(), examples)(vector)

        for size in (2, 2, 3):
            found = product(Examples(batch(), microbatch_size=size), params())
            problems.assert_close(found, curvature.hvp(loss_fn, params(), params(), batch()), rtol=1e-5)
        assert traces == [2, 3]

    def test_stream_is_passed_over_again(self):
        for batches in ([batch()], lambda: iter([batch()])):
            stream = Stream(batches)
            assert [len(x) for x in stream] == [len(x) for x in stream] == [6]

    def test_weight_fn_is_refused_by_the_fisher_matrix(self):
        for data in (Examples(batch(), weight_fn=len), Stream([batch()], weight_fn=len)):
            with pytest.raises(ValueError, match=r"`empirical_fisher_operator\(data=...\)` must have no `weight_fn`"):
                curvature.empirical_fisher_operator(lambda p, x: x @ p["kernel"][:, 0], params(), data)

    @pytest.mark.parametrize("where", ["stream", "microbatches"])
    def test_padding_without_weight_fn_is_noticed(self, x64, where):
        """Two examples of padding in the last batch, which the loss masks: by the number of examples it is wrong."""
        x = jax.random.normal(jax.random.key(0), (10, 3))
        rows = {"x": jnp.concatenate([x, jnp.zeros((2, 3))]), "mask": jnp.arange(12) < 10}
        at = {name: jax.random.normal(jax.random.key(i), shape) for i, (name, shape) in enumerate(TREE.items())}

        def masked_loss(params, rows):
            losses = jnp.mean(jnp.tanh(rows["x"] @ params["kernel"] + params["bias"]) ** 3, axis=1)
            return jnp.sum(rows["mask"] * losses) / jnp.sum(rows["mask"])

        def valid(rows):
            return jnp.sum(rows["mask"])

        def made(weight_fn):
            if where == "microbatches":
                return Examples(rows, microbatch_size=4, weight_fn=weight_fn)
            batches = [jax.tree.map(lambda leaf, i=i: leaf[i : i + 4], rows) for i in (0, 4, 8)]
            return Stream(batches, weight_fn=weight_fn)

        expected = curvature.hvp(loss_fn, at, at, x)
        problems.assert_close(curvature.hessian_operator(masked_loss, at, made(valid))(at), expected, rtol=1e-9)
        with pytest.raises(ValueError, match=r"A loss that leaves out masked examples, .* needs a `weight_fn`"):
            curvature.hessian_operator(masked_loss, at, made(None))(at)
        # It would have been wrong.
        wrong = curvature.hessian_operator(masked_loss, at, made(None), coupled=True)(at)
        assert reference.norm(reference.subtract(wrong, expected)) > 0.01 * reference.norm(expected)

    def test_operator_is_made_inside_jit_of_arrays_that_are_closed_over(self):
        """Nothing is checked under a trace, also where the data themselves are not traced."""
        data, at = Examples(batch(), microbatch_size=2), params()
        found = jax.jit(lambda v: curvature.hessian_operator(loss_fn, at, data)(v))(params())
        problems.assert_close(found, curvature.hvp(loss_fn, at, params(), batch()), rtol=1e-5)
        mean_loss = hero_jax.MeanLoss(loss_fn, data)
        np.testing.assert_allclose(
            jax.jit(lambda scale: scale * mean_loss(at))(2.0), 2 * loss_fn(at, batch()), rtol=1e-5
        )

    def test_mean_over_a_stream_is_not_traced(self):
        mean_loss = hero_jax.MeanLoss(loss_fn, Stream([batch()]))
        for call in (mean_loss, lambda p: sharpness.increase_along(mean_loss, p, p).measured):
            with pytest.raises(TypeError, match=r"A mean over a `Stream` runs on the host .* outside jax.jit"):
                jax.jit(call)(params())

    def test_rounding_of_sixteen_bits_inside_a_loss_is_no_coupling(self):
        """A network in bfloat16 with float32 logits rounds batches of 1, 3 and 4 differently."""
        x = jax.random.normal(jax.random.key(1), (6, 8, 8, 3))
        for seed in range(12):
            keys = jax.random.split(jax.random.key(seed), 3)
            at = [jax.random.normal(keys[0], (3, 3, 3, 16)) / 3, jax.random.normal(keys[1], (3, 3, 16, 16)) / 8]

            def network(at, x):
                x = x.astype(jnp.bfloat16)
                for kernel in at:
                    kernel = kernel.astype(jnp.bfloat16)
                    x = jax.nn.relu(
                        jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)
                    )
                logits = x.mean((1, 2)).astype(jnp.float32)
                return -jax.nn.log_softmax(3 * logits)[:, 0].mean()

            curvature.hessian_operator(network, at, Examples(x, microbatch_size=2))

    def test_microbatch_size_is_a_python_integer(self):
        with pytest.raises(
            TypeError, match=r"`Examples\(microbatch_size=...\)` must be a Python integer; got an array"
        ):
            Examples(batch(), microbatch_size=jnp.int32(2))

    def test_host_operator_is_no_matvec(self):
        host = HostOperator(lambda v: v, jnp.zeros(2))
        with pytest.raises(TypeError, match=r"`Operator\(matvec=...\)` must not be a HostOperator"):
            Operator(host, jnp.zeros(2))

    @pytest.mark.parametrize(
        "batches", [jnp.ones((4, 3)), np.ones((4, 3)), {"x": jnp.ones((4, 3))}, Examples(jnp.ones((4, 3))), 3]
    )
    def test_one_batch_is_no_iterable_of_batches(self, batches):
        with pytest.raises(TypeError, match=r"`batch_eigenvalues\(batches=...\)` must be an iterable of batches"):
            sharpness.batch_eigenvalues(loss_fn, params(), batches, jax.random.key(0))
