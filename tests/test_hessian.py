"""`experiments.hessian` and `--every`: a saved run's curvature against the dense Hessian."""

import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from experiments import data, hessian, progress, train
from experiments.config import resolve
from experiments.measure.hessian import HessianConfig
from experiments.storage import files, records, runs
from experiments.training import compiled
from hero_jax import models

SIZE = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six epochs of SGD on digits, with the curvature of every third."""
    out = tmp_path_factory.mktemp("hessian") / "run"
    train.main(resolve(method="sgd", epochs=7, train_size=SIZE, every=3, curvature_size=150), out=out)
    return out


@pytest.fixture(scope="module")
def measured(run):
    config = HessianConfig(images=120, eigenvalues=3, probes=12, density_probes=2, density_steps=10)
    hessian.main(run, config)
    return json.loads((run / "hessian-train" / "curvature.json").read_text())


def product_fn(run, split, size):
    """An independent Hessian-vector product of the run: the MLP by its own apply, on pixels scaled here."""
    variables = runs.load_variables(run)
    flat, unravel = ravel_pytree(variables["params"])
    dataset = data.subset(data.load("digits"), SIZE, 0)
    images, labels = (x[:size] for x in getattr(dataset, split))
    x = data.normalize(jnp.asarray(images), dataset.pixels)
    model = models.create("mlp", 10)

    def loss(flat):
        logits = model.apply({"params": unravel(flat)}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return jax.jit(lambda v: jax.jvp(jax.grad(loss), (flat,), (v,))[1]), flat


def test_leaves_numbers_and_plots(run, measured):
    names = {path.name for path in (run / "hessian-train").iterdir()}
    assert names == {"curvature.json", "density.png", "layers.png"}
    assert measured["images"] == 120
    assert measured["config"]["split"] == "train"
    assert all(measured["converged"])
    assert max(measured["residuals"]) <= 1e-3
    assert measured["asymmetry"] < 1e-4
    assert [row["layer"] for row in measured["layer_traces"]][:2] == ["dense1/bias", "dense1/kernel"]
    total = sum(row["mean"] for row in measured["layer_traces"])
    np.testing.assert_allclose(total, measured["trace"]["mean"], rtol=1e-4)
    assert 0 < measured["trace"]["sem"] < abs(measured["trace"]["mean"])
    assert measured["hessian_norm"]["probes"] == 12


def test_eigenvalue_is_that_of_the_stated_loss(run, measured):
    product, flat = product_fn(run, "train", 120)
    v = jax.random.normal(jax.random.key(0), flat.shape)
    for _ in range(60):
        v = product(v)
        v = v / jnp.linalg.norm(v)
    np.testing.assert_allclose(measured["eigenvalues"][0], v @ product(v), rtol=1e-3)


def test_test_split_is_another_matrix(run, measured, tmp_path):
    config = HessianConfig(split="test", eigenvalues=1, probes=2, density_probes=2, density_steps=2)
    hessian.main(run, config, out=tmp_path / "out")
    other = json.loads((tmp_path / "out" / "curvature.json").read_text())
    assert other["images"] == 364
    assert not math.isclose(other["eigenvalues"][0], measured["eigenvalues"][0], rel_tol=1e-2)


def test_every_product_is_reported(run):
    with progress.bar() as display:
        _, trainer, variables, dataset = compiled.load(run, None, progress.steps(display))
    operator = trainer.hessian(variables, data.Split(*(x[:50] for x in dataset.train)))
    calls = []
    config = HessianConfig(eigenvalues=1, probes=3, density_probes=2, density_steps=4)
    result = hessian.measure(config, operator, lambda *call: calls.append(call))
    assert calls.count(("trace and norm", 3, 3)) == 1
    assert [done for what, done, _ in calls if what == "density"] == [*range(1, 9), 8]
    assert sum(what == "eigenvalues" for what, _, _ in calls) == result["products"] + 1


def test_training_logs_the_curvature_of_every_third_epoch(run):
    rows = {row["epoch"]: row for row in runs.read_metrics(run)}
    # The last epoch is always measured.
    assert [epoch for epoch, row in rows.items() if "eigenvalue" in row] == [3, 6, 7]
    assert (run / "curvature.png").exists()
    product, flat = product_fn(run, "train", 150)
    v = jax.random.normal(jax.random.key(0), flat.shape)
    for _ in range(60):
        v = product(v)
        v = v / jnp.linalg.norm(v)
    last = rows[7]
    np.testing.assert_allclose(last["eigenvalue"], v @ product(v), rtol=1e-3)
    assert last["eigenvalue_residual"] <= 1e-3
    assert last["eigenvalue_products"] < 100
    probes = jax.random.rademacher(jax.random.key(5), (60, flat.size), jnp.float32)
    norm = jnp.sqrt(jnp.mean(jnp.sum(jax.lax.map(product, probes) ** 2, axis=1)))
    assert abs(last["hessian_norm"] - norm) < 5 * last["hessian_norm_sem"]


def test_without_every_nothing_is_measured(tmp_path):
    train.main(resolve(method="sgd", epochs=1, train_size=64), out=tmp_path / "run")
    assert "eigenvalue" not in runs.read_metrics(tmp_path / "run")[0]
    assert not (tmp_path / "run" / "curvature.png").exists()


def test_results_are_not_overwritten(run, measured):
    with pytest.raises(FileExistsError, match="`out` must be a new or empty folder"):
        hessian.main(run, HessianConfig())


def test_folder_without_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="`run` must be a run folder with a checkpoint"):
        hessian.main(tmp_path, HessianConfig())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "validation"}, "`split` must be one of 'train', 'test'; got 'validation'"),
        ({"images": 0}, "`images` must be an integer >= 1; got 0"),
        ({"probes": 1}, "`probes` must be an integer >= 2; got 1"),
        ({"rtol": 0.0}, "`rtol` must be positive and finite; got 0.0"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        HessianConfig(**options)


def test_bad_every():
    with pytest.raises(ValueError, match="`every` must be an integer >= 1; got 0"):
        resolve(every=0)


def test_a_configuration_that_is_not_that_of_the_checkpoint(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    config = records.read(out / "config.json")
    records.write_settings(out / "config.json", config | {"seed": 3})
    with pytest.raises(records.Damaged, match=r"config.json is damaged \(`seed` is 3, but the run began with 0\)"):
        compiled.load(out, None)
    # Version 0.1 did not record what a run began with.
    environment = records.read(out / "environment.json")
    del environment["config"]
    records.write(out / "environment.json", environment)
    assert compiled.load(out, None)[0].seed == 3
    records.write_settings(out / "config.json", config | {"model": "resnet8"})
    with pytest.raises(files.Failed, match="has a checkpoint of another network than the resnet8 of its config"):
        compiled.load(out, None)
    (out / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"`run` must be a run folder with a config.json; .* has none"):
        compiled.load(out, None)
