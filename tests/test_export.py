"""`experiments.export`: a saved run as ONNX files, its table, its section of a report, what is in a file."""

import io
import json
import shutil
import sys

import numpy as np
import pytest

from experiments import cli, export, report, train
from experiments.analysis import tables
from experiments.analysis.deployment import cells
from experiments.config import resolve
from experiments.measure import deployment
from experiments.measure.deployment import ExportConfig
from experiments.storage import records, runs
from hero_jax import quantize


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """SGD on digits, a few epochs."""
    folder = tmp_path_factory.mktemp("runs") / "sgd"
    train.main(resolve(method="sgd", epochs=6, train_size=200), out=folder)
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run as files, and the rows of export.json."""
    out = tmp_path_factory.mktemp("exported") / "files"
    export.main(run, ExportConfig(bits=(8, 3, 2), spec="channel-asymmetric", repeats=2), out=out)
    return out, records.read(out / "export.json", deployment.ExportRecord)


def test_files_and_their_sizes(exported):
    out, record = exported
    assert {path.name for path in out.iterdir()} == {
        "float32.onnx", "bits-8.onnx", "bits-3.onnx", "bits-2.onnx", "table.md", "export.json",
    }  # fmt: skip
    rows = record["rows"]
    assert [(row["bits"], row["types"]) for row in rows] == [
        (None, "float32"),
        (8, "uint8"),
        (3, "uint4"),
        (2, "uint2"),
    ]
    for row in rows:
        assert row["num_bytes"] == (out / row["file"]).stat().st_size
    kernels, others = 64 * 128 + 128 * 128 + 128 * 10, 4 * (128 + 128 + 10)
    assert [row["ideal_bytes"] for row in rows] == [others + kernels * bits / 8 for bits in (32, 8, 3, 2)]
    assert rows[1]["code_bytes"] == kernels + 5 * 266
    assert [row["coded"] for row in rows] == [0, *3 * [pytest.approx(kernels / (kernels + others / 4))]]
    assert rows[3]["code_bytes"] == kernels / 4 + 4 * 266 + (32 + 32 + 3)


def test_accuracies_are_those_of_the_run_and_of_jax(exported, run):
    rows = exported[1]["rows"]
    last = runs.read_metrics(run)[-1]
    assert rows[0]["accuracy"] == pytest.approx(last["accuracy"])
    for row in rows:
        assert row["accuracy"] == row["jax_accuracy"]
        assert row["flipped"] == 0
        assert row["difference"] < 3e-6
        assert row["ms"] > 0
    params = runs.load_variables(run)["params"]
    codes = quantize.quantize(params, 2, quantize.named("channel-asymmetric"))
    assert quantize.onnx.inspect(exported[0] / "bits-2.onnx").quantized["head/kernel"].shape == (128, 10)
    assert codes["head"]["kernel"].bits == 2


def test_all_test_images_although_a_run_was_evaluated_on_some(tmp_path):
    train.main(resolve(method="sgd", epochs=1, train_size=200, test_size=30), out=tmp_path / "run")
    export.main(tmp_path / "run", ExportConfig(bits=(4,), repeats=1))
    record = records.read(tmp_path / "run" / "export" / "export.json", deployment.ExportRecord)
    assert record["images"] == 364
    # A share of 364 images, not of 30.
    assert (record["rows"][0]["accuracy"] * 364) % 1 == pytest.approx(0, abs=1e-6)


def test_the_table_has_the_rows(exported):
    out, record = exported
    text = (out / "table.md").read_text()
    assert f"| 2 | uint2 | {record['rows'][3]['num_bytes'] / 1024:,.1f} |" in text
    assert "Accuracy in percent on 364 images by onnxruntime" in text
    assert "channel-asymmetric, nearest" in text
    assert "which are 99.0 percent of the parameters" in text


def test_the_table_fits_eighty_columns(exported):
    output = io.StringIO()
    cli.Console(width=80, file=output).print(tables.terminal(*cells(exported[1]["rows"]), "a run"))
    assert "unpacked" in output.getvalue()
    assert "\u2026" not in output.getvalue()


def test_the_report_has_a_section(exported, run, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(run, base / "sgd")
    shutil.copytree(exported[0], base / "sgd" / "export")
    report.main((base,))
    text = (base / "report" / "report.md").read_text()
    assert "## Deployment" in text
    assert "| 2 | uint2 |" in text
    record = json.loads((base / "sgd" / "export" / "export.json").read_text())
    record["rows"][3]["accuracy"] += 0.01
    (base / "sgd" / "export" / "export.json").write_text(json.dumps(record))
    shutil.rmtree(base / "report")
    with pytest.raises(ValueError, match=r"must hold whole files; .*export.json is damaged"):
        report.main((base,))


def test_rounding_by_outputs_gives_other_weights(run, exported, tmp_path):
    spec = "channel-asymmetric"
    config = ExportConfig(bits=(2,), spec=spec, step="rounding", calibration=100, images=50, repeats=1, storage=(4, 8))
    export.main(run, config, out=tmp_path / "out")
    record = records.read(tmp_path / "out" / "export.json", deployment.ExportRecord)
    assert record["images"] == 50
    assert record["rows"][1]["types"] == "uint4"
    assert record["rows"][1]["difference"] < 3e-6
    assert record["rows"][1]["accuracy"] == record["rows"][1]["jax_accuracy"]
    assert "channel-asymmetric, rounding" in (tmp_path / "out" / "table.md").read_text()


def test_rounded_activations(run, tmp_path, capsys):
    config = ExportConfig(bits=(8, 4), activations="int8", calibration=100, repeats=1)
    export.main(run, config, out=tmp_path / "out")
    rows = records.read(tmp_path / "out" / "export.json", deployment.ExportRecord)["rows"]
    assert [row["types"] for row in rows] == ["float32", "uint8", "uint8"]
    assert rows[0]["difference"] < 3e-6
    for row in rows[1:]:
        assert 3e-6 < row["difference"] < 0.05
        assert row["flipped"] <= 0.02 * 364
    found = quantize.onnx.inspect(tmp_path / "out" / "bits-4.onnx")
    # The network takes pixels; the range is that of the layer.
    assert set(found.activations) == {"dense1:inputs", "dense2:inputs", "head:inputs"}
    assert not [name for name in found.others if "inputs" in name]
    capsys.readouterr()
    export.main(show=tmp_path / "out" / "bits-4.onnx")
    (line,) = [line.split() for line in capsys.readouterr().out.splitlines() if "head:inputs" in line]
    low, high = found.activations["head:inputs"]
    assert line == ["head:inputs", f"{low:.4g}", "to", f"{high:.4g}", "8", "1", "5"]
    assert "rounded to 8 bits" in (tmp_path / "out" / "table.md").read_text()


class TestShow:
    def test_onnx(self, exported, capsys):
        export.main(show=exported[0] / "bits-3.onnx")
        told = capsys.readouterr().out
        assert "channel-asymmetric" in told
        (line,) = [line.split() for line in told.splitlines() if line.strip().startswith("head/kernel")]
        assert line[1:] == ["uint4", "3", "128", "x", "10", "10", "685"]

    def test_safetensors(self, run, tmp_path, capsys):
        params, spec = runs.load_variables(run)["params"], quantize.named("channel-narrow")
        quantize.save(tmp_path / "a.safetensors", quantize.quantize(params, 3, spec), spec)
        export.main(show=tmp_path / "a.safetensors")
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        assert ["head/kernel", "packed", "3", "bit", "3", "128", "x", "10", "10", "520"] in lines
        assert ["head/bias", "float32", "10", "40"] in lines

    @pytest.mark.parametrize("name", ["a.onnx", "a.safetensors"])
    def test_something_else(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"years of work")
        with pytest.raises(ValueError, match=rf"must be a file of `save`; '.*{name}'"):
            export.main(show=tmp_path / name)


class TestRefused:
    def test_nothing_to_do(self):
        with pytest.raises(ValueError, match="`run` must be a run folder, or `show` a file; got none"):
            export.main()

    def test_both(self, run):
        with pytest.raises(ValueError, match="got both"):
            export.main(run, show=run / "x.onnx")

    def test_a_folder_that_is_taken(self, run, exported):
        before = sorted(path.stat().st_mtime_ns for path in exported[0].iterdir())
        with pytest.raises(FileExistsError, match="`out` must be a new or empty folder"):
            export.main(run, ExportConfig(bits=(4,)), out=exported[0])
        assert sorted(path.stat().st_mtime_ns for path in exported[0].iterdir()) == before

    def test_an_export_that_was_killed_is_made_anew(self, run, exported, tmp_path):
        shutil.copytree(exported[0], tmp_path / "out")
        (tmp_path / "out" / "export.json").unlink()
        export.main(run, ExportConfig(bits=(4,), images=20, repeats=1), out=tmp_path / "out")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"float32.onnx", "bits-4.onnx", "table.md", "export.json"}

    def test_an_error_leaves_nothing(self, run, tmp_path, monkeypatch):
        def fail(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(deployment, "_compared", fail)
        with pytest.raises(KeyboardInterrupt):
            export.main(run, ExportConfig(bits=(4,), images=20, repeats=1), out=tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())

    def test_without_onnxruntime(self, run, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ImportError) as found:
            export.main(run, out=tmp_path / "out")
        line, code = cli.in_one_line(found.value)
        assert line == 'error: `experiments.export` needs onnxruntime: pip install "hero_jax[onnx]"'
        assert code == 2
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"bits": ()}, "`bits` must name at least one"),
            ({"bits": (4, 4)}, "`bits` must name each once; got 4 twice"),
            ({"bits": (1,)}, "`bits` must be an integer in 2..16"),
            ({"spec": "wide"}, "`spec` must be one of"),
            ({"storage": ()}, "`storage` must name at least one"),
            ({"bits": (9,), "activations": "int8"}, r"`activations` int8 needs .* got bits \(9,\) and storage"),
            ({"storage": (4,), "activations": "int8"}, r"`activations` int8 needs .* and storage \(4,\)"),
        ],
    )
    def test_settings(self, fields, message):
        with pytest.raises(ValueError, match=message):
            ExportConfig(**fields)


def test_the_milliseconds_are_medians_of_calls_in_turn():
    called = []

    class Session:
        def __init__(self, name):
            self.name = name

        def run(self, outputs, inputs):
            called.append(self.name)

    lines = []
    times = deployment._milliseconds([Session("a"), Session("b")], np.zeros(1), 3, lambda *line: lines.append(line))
    assert len(times) == 2
    assert called == ["a", "b"] * 4
    assert lines[-1] == ("timing", 4, 4)
