"""`experiments.quantize`: saved runs, their tables, steps, sensitivities; by its functions and by its command."""

import csv
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments import cli, progress, quantize, train
from experiments.analysis import plots, tables
from experiments.analysis.networks import group_runs
from experiments.config import resolve
from experiments.measure.quantization import QuantizeConfig

SIZE = 200


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two seeds of SGD and one of HERO, a few epochs on digits."""
    base = tmp_path_factory.mktemp("runs")
    for method, seed in (("sgd", 0), ("sgd", 1), ("hero", 0)):
        config = resolve(method=method, epochs=6, train_size=SIZE, seed=seed)
        train.main(config, out=base / f"{method}-{seed}")
    return base / "sgd-0", base / "sgd-1", base / "hero-0"


@pytest.fixture(scope="module")
def finished(folders, tmp_path_factory):
    config = QuantizeConfig(
        specs=("channel-narrow", "tensor-asymmetric"),
        bits=(8, 2),
        steps=("nearest", "rounding+bias", "activations"),
        activation_bits=3,
        calibration=100,
        sensitivity=3,
        probes=4,
    )
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize.main(folders, config, out)
    return out


def lines(finished, **wanted):
    with (finished / "rows.csv").open() as file:
        return [row for row in csv.DictReader(file) if all(row[k] == str(v) for k, v in wanted.items())]


def test_leaves_tables_rows_plots_and_a_record(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"table.md", "rows.csv", "results.json", "bits.png", "layers-0.png", "layers-1.png"}
    for name in ("bits.png", "layers-0.png"):
        with Image.open(finished / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20
    record = json.loads((finished / "results.json").read_text())
    assert record["runs"] == {"SGD": ["sgd-0", "sgd-1"], "HERO": ["hero-0"]}
    assert record["environment"]["commit"]
    assert len(lines(finished)) == 2 * 3 * 3 * 3


def test_full_precision_is_the_accuracy_of_the_run(finished, folders):
    for run, folder in enumerate(folders[:2]):
        (row,) = lines(finished, spec="channel-narrow", step="nearest", network="SGD", run=run, bits="full")
        last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        assert float(row["accuracy"]) == pytest.approx(last["accuracy"])
        assert float(row["drop"]) == 0
        assert float(row["flipped"]) == 0


def test_table_has_mean_and_deviation_of_the_rows(finished):
    values = [
        100 * float(row["accuracy"])
        for row in lines(finished, spec="tensor-asymmetric", step="nearest", network="SGD", bits=2)
    ]
    table = (finished / "table.md").read_text()
    line = next(x for x in table.splitlines() if x.startswith("| tensor-asymmetric | nearest | SGD | 2 |"))
    assert f"{np.mean(values):.2f} \u00b1 {np.std(values, ddof=1):.2f} |" in line
    assert "on 364 images" in table


def test_steps_and_specifications_differ(finished):
    kinds = [(spec, step) for spec in ("channel-narrow", "tensor-asymmetric") for step in ("nearest", "rounding+bias")]
    losses = [
        float(lines(finished, spec=spec, step=step, network="HERO", bits=2)[0]["loss"])
        for spec, step in [*kinds, ("channel-narrow", "activations")]
    ]
    assert len(set(losses)) == 5
    near, optimized = (
        float(lines(finished, spec="channel-narrow", step=step, network="SGD", run=0, bits=2)[0]["flipped"])
        for step in ("nearest", "rounding+bias")
    )
    assert optimized < near
    # Three-bit activations change the row of full precision too.
    full = [
        float(lines(finished, spec="channel-narrow", step=s, network="HERO", bits="full")[0]["loss"])
        for s in ("nearest", "activations")
    ]
    assert full[0] != full[1]


def test_layers(finished):
    measured = json.loads((finished / "results.json").read_text())["layers"]["SGD"]
    assert [layer["layer"] for layer in measured["layers"]] == ["dense1/kernel", "dense2/kernel", "head/kernel"]
    # Near a minimum d^T H d / 2 is what a small change does, but for the gradient.
    for layer in measured["layers"]:
        assert layer["by_hessian"] == pytest.approx(layer["increase"], rel=2, abs=0.01)
    assert measured["allocation"]["mean_bits"] <= 3
    assert set(measured["accuracy"]) == {"full", "uniform", "allocated"}


def test_terminal_tables_fit_eighty_columns():
    widths = ("full", "8", "6", "5", "4", "3", "2")
    kind = {"spec": "channel-narrow", "step": "nearest", "network": "GRAD L1", "value": 100.0}
    header, lines = quantize.cells(pd.DataFrame([kind | {"run": i, "bits": bits} for i in (0, 1) for bits in widths]))
    output = io.StringIO()
    for kind, part in lines.items():
        cli.Console(width=80, file=output).print(tables.terminal(header, part, ", ".join(kind)))
    assert "\u2026" not in output.getvalue()
    assert "channel-narrow, nearest" in output.getvalue()
    assert "\u00b10.00" in output.getvalue()


def test_seeds_of_a_network_share_what_is_compiled(folders):
    with progress.bar() as display:
        loaded = quantize.load(folders, None, progress.steps(display), 100)
    first, second, other = (loaded[folder] for folder in folders)
    assert first.classify is second.classify is not other.classify
    assert first.trainer is second.trainer is not other.trainer
    kernels = [network.variables["params"]["head"]["kernel"] for network in (first, second)]
    assert not np.allclose(*kernels)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of what is drawn, instead of files."""
    seen: list = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *rest, **options: seen.extend(figure.axes))
    return seen


def rounded(networks, bits=("full",)):
    return pd.DataFrame([{"network": name, "bits": width, "value": 1.0} for name in networks for width in bits])


def test_each_network_has_a_colour_of_its_own_and_a_method_keeps_its(drawn, tmp_path):
    plots.over_bits({"spec": rounded(("HERO (a)", "SGD", "HERO (b)", "HERO"))}, tmp_path / "plot.png")
    seen = {bars.get_label(): bars.lines[0].get_color() for bars in drawn[0].containers}
    assert len(set(seen.values())) == 4
    assert (seen["SGD"], seen["HERO"]) == (plots.COLORS["sgd"], plots.COLORS["hero"])


def test_a_colour_of_a_method_that_is_drawn_is_no_other_networks(drawn, tmp_path):
    networks = ["SGD", *(f"HERO (rho {i})" for i in range(9))]
    points = [{"network": name, "noise": rate, "value": 50.0} for name in networks for rate in (0.2, 0.4)]
    plots.over_noise(pd.DataFrame(points), "%", tmp_path / "plot.png")
    colors = [container.lines[0].get_color() for container in drawn[0].containers]
    assert colors[0] == plots.COLORS["sgd"]
    assert len(set(colors)) == 10
    # The points of a rate stay beside it.
    shown = np.stack([container.lines[0].get_xdata() for container in drawn[0].containers])
    np.testing.assert_allclose(shown, [[20, 40]] * 10, atol=2)


def test_points_of_a_bit_width_stay_beside_it_however_many_networks_there_are(drawn, tmp_path):
    plots.over_bits({"spec": rounded(map(str, range(12)), ("full", "3"))}, tmp_path / "plot.png")
    shown = np.stack([container.lines[0].get_xdata() for container in drawn[0].containers])
    np.testing.assert_allclose(shown, [[0, 1]] * 12, atol=0.2)
    assert (np.diff(shown[:, 0]) > 0.01).all()


def test_panels_are_four_in_a_row(drawn, tmp_path):
    panels = {str(i): rounded(("SGD", "HERO"), ("full", "3")) for i in range(5)}
    plots.over_bits(panels, tmp_path / "plot.png")
    assert [axes.get_title(loc="left") for axes in drawn if axes.get_visible()] == list(panels)
    assert len(drawn) == 8


def test_runs_are_grouped_by_what_differs_besides_the_seed(tmp_path):
    runs = [(tmp_path / str(i), resolve(seed=i)) for i in range(2)]
    others = [resolve(epochs=9), resolve(epochs=9, rho=0.5), resolve(method="sam")]
    assert group_runs([*runs, *((tmp_path / str(i), other) for i, other in enumerate(others, 2))]) == {
        "HERO (epochs 60)": [tmp_path / "0", tmp_path / "1"],
        "HERO": [tmp_path / "2"],
        "HERO (rho 0.5)": [tmp_path / "3"],
        "SAM": [tmp_path / "4"],
    }
    two = [(tmp_path / str(n), resolve(epochs=n)) for n in (3, 4)]
    assert list(group_runs(two)) == ["HERO (epochs 3)", "HERO (epochs 4)"]
    # What a method's networks do not settle, those of all methods do, but for what is the method's own.
    longer = [(tmp_path / f"sgd{n}", resolve(method="sgd", epochs=n)) for n in (4, 16)]
    hero = [(tmp_path / f"hero{rho}", resolve(epochs=4, rho=rho)) for rho in (0.1, 1.0)]
    assert list(group_runs([*longer, *hero])) == ["SGD", "SGD (epochs 16)", "HERO (rho 0.1)", "HERO"]
    with pytest.raises(ValueError, match="`folders` must differ"):
        group_runs([runs[0], runs[0]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"specs": ("channel-narow",)}, "`spec` must be one of"),
        ({"steps": ("roundin",)}, "`steps` must be one of .* Did you mean 'rounding'"),
        ({"bits": (1,)}, "`bits` must be an integer in 2..16; got 1"),
        ({"bits": ()}, "must each name at least one"),
        ({"activation_bits": 1}, "`activation_bits` must be an integer in 2..16; got 1"),
        ({"specs": ("qwix", "channel-stretched")}, "`specs` must name each once; got 'channel-stretched' twice"),
        ({"steps": ("bias", "bias")}, "`steps` must name each once; got 'bias' twice"),
        ({"steps": ("bias+bias",)}, "`steps` must name each once; got 'bias' twice"),
        ({"calibration": 0}, "`calibration` must be an integer >= 1"),
        ({"probes": 1}, "`probes` must be an integer >= 2"),
    ],
)
def test_config_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantizeConfig(**fields)


def test_errors_of_the_command(folders, tmp_path):
    with pytest.raises(ValueError, match="at least one run folder"):
        quantize.main((), QuantizeConfig())
    with pytest.raises(FileNotFoundError, match="must be a run folder with a checkpoint"):
        quantize.main((tmp_path,), QuantizeConfig())
    with pytest.raises(ValueError, match="has no BatchNorm after a layer"):
        quantize.main(folders[:1], QuantizeConfig(steps=("fold",)), tmp_path / "out")
    with pytest.raises(FileExistsError, match="`out` must be a new or empty folder"):
        quantize.main(folders[:1], QuantizeConfig(), folders[0])
