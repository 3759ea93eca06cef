"""What `quantize_and_evaluate` makes of an `eval_fn` that does not return the same things in every call."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from hero_jax.quantize import quantize_and_evaluate

W = jnp.array([[1.0, 0.3], [-0.4, 0.8]])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"a": 1.0}, {"b": 1.0}, r"got a, then b\."),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}, r"got a, then a, b\."),
        ({"a": 1.0, "b": 2.0}, {"a": 1.0}, r"got a, b, then a\."),
        ({"a": 1.0}, 1.0, r"got a, then value\."),
        # Each would count as flipped.
        ({"a": 1.0}, {"a": 1.0, "predictions": np.arange(3)}, r"got a, then a, predictions of shape \(3,\)\."),
        ({"a": 1.0, "predictions": np.arange(3)}, {"a": 1.0}, r"got a, predictions of shape \(3,\), then a\."),
        ({"predictions": np.arange(3)}, {"predictions": np.arange(1)}, r"\(3,\), then predictions of shape \(1,\)\."),
    ],
)
def test_results_that_differ_are_refused(first, second, message):
    results = itertools.chain([first], itertools.repeat(second))
    with pytest.raises(ValueError, match=r"must return the same metrics in every call; .*" + message):
        quantize_and_evaluate(lambda w: next(results), W, bits=(4,))


def test_a_metric_that_stops_being_a_scalar_is_refused():
    results = iter([{"a": 1.0}, {"a": jnp.ones(2)}])
    with pytest.raises(TypeError, match=r"`eval_fn\(...\)\['a'\]` must be a real scalar; got an array of shape \(2,\)"):
        quantize_and_evaluate(lambda w: next(results), W, bits=(4,))


def test_the_order_of_metrics_does_not_matter():
    results = iter([{"a": 1.0, "b": 2.0}, {"b": 4.0, "a": 3.0}])
    row = quantize_and_evaluate(lambda w: next(results), W, bits=(4,))[1]
    assert row.drop == {"a": -2.0, "b": -2.0}
