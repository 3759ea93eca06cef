"""Quantized weights on disk and as qwix arrays: exact round trips, sizes, damage, interruptions, contradictions."""

import dataclasses
import hashlib
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import safetensors
import safetensors.numpy

from hero_jax.quantize import QuantizedArray, QuantSpec, dequantize, files, quantize
from hero_jax.quantize._plan import plan_of, sizes
from hero_jax.quantize.files import from_qwix, load, save, to_qwix

KINDS = [("narrow", True), ("full", True), ("stretched", True), ("full", False)]
SPECS = [
    QuantSpec(granularity, grid, symmetric, group_size=2 if granularity == "group" else None)
    for granularity, (grid, symmetric) in itertools.product(("tensor", "channel", "group"), KINDS)
]
UNEVEN = QuantSpec("channel", "full", symmetric=False)


def weights(shape=(6, 5), seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, size=shape), dtype)


def params(dtype=jnp.float32):
    return {
        "stem": {"kernel": weights((3, 4, 5), dtype=dtype), "bias": weights((5,), 1, dtype)},
        "head": {"kernel": weights((6, 3), 2, dtype)},
    }


def assert_identical(tree, other):
    """The same structure, static fields, types and bytes (NaN and signed zeros included)."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.fixture
def saved(path):
    save(path, quantize(params(), 3, UNEVEN), UNEVEN)
    return path


def contents(path):
    """The tensors and metadata of a file, by safetensors alone."""
    data = path.read_bytes()
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return safetensors.numpy.load(data), metadata


def rewrite(path, tensors, metadata):
    """A file with a right checksum, whatever it says."""
    names = sorted(tensors)
    heads = [[name, tensors[name].dtype.name, *tensors[name].shape] for name in names]
    text = json.dumps([{**metadata, "sha256": ""}, heads], sort_keys=True)
    digest = hashlib.sha256(text.encode() + b"".join(tensors[name].tobytes() for name in names)).hexdigest()
    path.write_bytes(safetensors.numpy.save(tensors, {**metadata, "sha256": digest}))


def edited(metadata, key, edit):
    value = json.loads(metadata[key])
    edit(value)
    return {**metadata, key: json.dumps(value)}


class TestRoundTrip:
    @pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
    def test_every_spec_and_width(self, path, spec):
        for bits in range(2, 17):
            q = quantize(params(), bits, spec)
            save(path, q, spec)
            tree, loaded = load(path)
            assert loaded == spec
            assert_identical(tree, q)
            assert_identical(dequantize(tree), dequantize(q))

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    @pytest.mark.parametrize("bits", [4, 12])
    def test_types(self, path, dtype, bits):
        q = quantize(params(dtype), bits)
        save(path, q, QuantSpec())
        tree, _ = load(path)
        assert tree["stem"]["bias"].dtype == dtype
        assert tree["stem"]["kernel"].dtype == dtype
        assert_identical(tree, q)
        assert_identical(dequantize(tree), dequantize(q))

    def test_float64(self, path, x64):
        q = quantize(params(jnp.float64), 5)
        save(path, q, QuantSpec())
        assert_identical(load(path)[0], q)
        with jax.enable_x64(False), pytest.raises(ValueError, match=r"'stem/bias' has float64, which needs jax_enable"):
            load(path)

    def test_other_types_and_numpy(self, path):
        tree = {
            "counts": jnp.arange(3),
            "flag": np.array([True, False]),
            "byte": np.arange(4, dtype=np.uint8),
            "big_endian": np.arange(3, dtype=">f4"),
            "strided": np.arange(12, dtype=np.float32).reshape(3, 4).T[::2],
            "scalar": np.float32(2.5),
            "float8": jnp.arange(3).astype(jnp.float8_e4m3fn),
        }
        save(path, tree, QuantSpec())
        assert_identical(load(path)[0], jax.tree.map(jnp.asarray, {**tree, "big_endian": np.arange(3, dtype="f4")}))

    @pytest.mark.parametrize("spec", [QuantSpec(), UNEVEN, QuantSpec("group", group_size=2)], ids=lambda s: s.name)
    def test_empty_and_scalar_leaves(self, path, spec):
        shapes = [(0, 5), (4, 0), (2, 0, 3), (), (7,), (1, 1)]
        q = quantize({str(shape): weights(shape) for shape in shapes}, 5, spec, mask=lambda _: True)
        save(path, q, spec)
        assert_identical(load(path)[0], q)

    def test_nan_and_infinity(self, path):
        tree = {"kernel": weights().at[0, 1].set(jnp.nan).at[2, 3].set(-jnp.inf), "bias": jnp.array([jnp.nan, -0.0])}
        for spec in (QuantSpec(), UNEVEN):
            q = quantize(tree, 4, spec)
            save(path, q, spec)
            assert_identical(load(path)[0], q)

    def test_spec_with_everything(self, path):
        spec = QuantSpec(
            "group",
            "full",
            symmetric=False,
            range_rule="percentile",
            percentile=np.float32(99.5),
            group_size=np.int64(2),
            leaves=("*kernel",),
            overrides=(("head/*", np.int32(7)), ("stem/*", None)),
        )
        q = quantize(params(), 3, spec)
        save(path, q, spec)
        tree, loaded = load(path)
        assert loaded == spec
        assert loaded.name == "group2-asymmetric-p99.5+only['*kernel']+head/*@7+stem/*@full"
        assert tree["head"]["kernel"].bits == 7
        assert_identical(tree, q)

    @pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
    def test_stacked_layers(self, path, spec):
        spec = dataclasses.replace(spec, stacked=("layers/*",))
        tree = {"layers": {"kernel": weights((3, 4, 5)), "bias": weights((3, 5), 1)}, "head": weights((6, 3), 2)}
        q = quantize(tree, 3, spec)
        save(path, q, spec)
        found, loaded = load(path)
        assert loaded == spec
        assert_identical(found, q)
        scales = {"tensor": (3, 1, 1), "channel": (3, 1, 5), "group": (3, 2, 5)}[spec.granularity]
        assert found["layers"]["kernel"].scale.shape == scales
        tensors = sum(x.nbytes for x in contents(path)[0].values())
        assert tensors == sizes(tree, plan_of("test", tree, 3, spec, None), spec)["stored_bytes"]
        assert_identical(from_qwix(to_qwix(q), "float32"), q)
        kernel = qwix.dequantize(to_qwix(q)["layers"]["kernel"])
        assert_identical(kernel, dequantize(q)["layers"]["kernel"])

    def test_a_specification_without_stacks_is_as_before(self, saved):
        # So that files of before are read, and files of now by a version of before.
        assert "stacked" not in json.loads(contents(saved)[1]["spec"])
        assert load(saved)[1] == UNEVEN

    def test_structure(self, path):
        tree = {"b": {"none": {}, "x": jnp.ones(2)}, "a": jnp.zeros(1), "é ü/".strip("/"): jnp.ones(3)}
        save(str(path), tree, QuantSpec())
        loaded, _ = load(str(path))
        assert loaded["b"]["none"] == {}
        assert_identical(loaded, tree)
        save(path, {}, QuantSpec())
        assert load(path)[0] == {}

    def test_blocks(self, path, monkeypatch):
        q = {bits: quantize({"kernel": weights((7, 9))}, bits, UNEVEN) for bits in (2, 3, 7, 8, 11, 16)}
        whole = {}
        for bits, tree in q.items():
            save(path, tree, UNEVEN)
            whole[bits] = contents(path)[0]["kernel.codes"]
        monkeypatch.setattr(files, "BLOCK", 16)
        for bits, tree in q.items():
            save(path, tree, UNEVEN)
            np.testing.assert_array_equal(contents(path)[0]["kernel.codes"], whole[bits])
            assert_identical(load(path)[0], tree)

    def test_order_in_the_file_does_not_matter(self, path):
        save(path, quantize(params(), 3), QuantSpec())
        tensors, metadata = contents(path)
        path.write_bytes(safetensors.numpy.save(dict(reversed(tensors.items())), dict(reversed(metadata.items()))))
        assert_identical(load(path)[0], quantize(params(), 3))


class TestFormat:
    def test_codes_by_hand(self, path):
        # codes 3, 3, -1, 2, plus 4
        save(path, quantize({"k": jnp.array([[1.0, 4.0], [-0.4, 2.5]])}, 3), QuantSpec())
        value = 7 | 7 << 3 | 3 << 6 | 6 << 9
        tensors, metadata = contents(path)
        assert tensors["k.codes"].tobytes() == value.to_bytes(2, "little")
        np.testing.assert_array_equal(tensors["k.scale"], np.array([[1 / 3, 4 / 3]], np.float32))
        assert (metadata["format"], metadata["version"]) == ("hero_jax.quantized", "1")
        assert json.loads(metadata["leaves"]) == {"k": {"bits": 3, "shape": [2, 2], "dtype": "float32"}}

    @pytest.mark.parametrize("spec", [QuantSpec(), UNEVEN], ids=lambda s: s.name)
    def test_sizes(self, path, spec):
        tree = {"kernel": weights((41, 5)), "bias": weights((5,))}
        totals = []
        for bits in range(2, 17):
            save(path, quantize(tree, bits, spec), spec)
            tensors, _ = contents(path)
            zeros = 0 if spec.symmetric else 5 * (1 if bits <= 8 else 2)
            payload = sum(x.nbytes for x in tensors.values())
            assert payload == math.ceil(41 * 5 * bits / 8) + 5 * 4 + zeros + 5 * 4
            assert payload == sizes(tree, plan_of("quantize", tree, bits, spec, None), spec)["stored_bytes"]
            data = path.read_bytes()
            assert len(data) == 8 + int.from_bytes(data[:8], "little") + payload
            totals.append(len(data))
        # 41 * 5 / 8 bytes a bit, less the padding of the header
        assert all(17 <= b - a <= 42 for a, b in itertools.pairwise(totals))


class TestDamage:
    def test_every_truncation(self, saved):
        data = saved.read_bytes()
        for n in range(0, len(data), 3):
            saved.write_bytes(data[:n])
            with pytest.raises(ValueError, match=r"^`load\(path=\.\.\.\)` must be .*weights\.safetensors") as error:
                load(saved)
            assert "\n" not in str(error.value)
        saved.write_bytes(data + b"\0")
        with pytest.raises(ValueError, match=r"^`load\(path"):
            load(saved)

    @pytest.mark.parametrize("mask", [0xFF, 0x01, 0x20, 0x80])
    def test_every_flipped_byte(self, saved, mask):
        data = saved.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for i in {*range(0, start, 3), *range(8), *range(start, len(data))}:
            saved.write_bytes(data[:i] + bytes([data[i] ^ mask]) + data[i + 1 :])
            with pytest.raises(ValueError, match=r"^`load\(path") as error:
                load(saved)
            assert "\n" not in str(error.value)

    def test_header_length(self, saved):
        data = saved.read_bytes()
        n = int.from_bytes(data[:8], "little")
        for length in (0, 1, n - 8, n - 1, n + 1, n + 8, len(data), 2**31, 2**63, 2**64 - 1):
            saved.write_bytes(length.to_bytes(8, "little") + data[8:])
            with pytest.raises(ValueError, match=r"^`load\(path"):
                load(saved)

    @pytest.mark.parametrize("data", [b"", b"\n", b"a text file\nof two lines\n", b"\x80\x04]\x94.", bytes(100)])
    def test_other_files(self, path, data):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"^`load\(path=\.\.\.\)` must be a file of `save`; '.*safetensors': Safe"):
            load(path)

    def test_safetensors_of_something_else(self, path):
        for metadata in (None, {"format": "pt"}):
            path.write_bytes(safetensors.numpy.save({"x": np.ones(3)}, metadata))
            with pytest.raises(ValueError, match="it is a safetensors file of something else"):
                load(path)

    def test_missing(self, path):
        with pytest.raises(FileNotFoundError):
            load(path)

    def test_version(self, saved):
        tensors, metadata = contents(saved)
        rewrite(saved, tensors, {**metadata, "version": "2"})
        with pytest.raises(ValueError, match=r"it has version '2'; this hero_jax reads '1'\.$"):
            load(saved)

    def test_rewrite_keeps_a_good_file(self, saved):
        expected = load(saved)[0]
        rewrite(saved, *contents(saved))
        assert_identical(load(saved)[0], expected)

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (lambda t: t.pop("head/kernel.codes"), "it lacks the tensor 'head/kernel.codes'"),
            (lambda t: t.pop("head/kernel.scale"), "it lacks the tensor 'head/kernel.scale'"),
            (lambda t: t.pop("head/kernel.zero_point"), "it lacks the tensor 'head/kernel.zero_point'"),
            (lambda t: t.pop("stem/bias"), "it lacks the tensor 'stem/bias'"),
            (lambda t: t.update(extra=np.ones(2)[:0]), "'extra'"),
            (
                lambda t: t.update({"head/kernel.codes": np.zeros(6, np.uint8)}),
                "codes of 6 bytes; 18 of 3 bits are due",
            ),
            (
                lambda t: t.update({"head/kernel.codes": np.zeros(8, np.uint8)}),
                "codes of 8 bytes; 18 of 3 bits are due",
            ),
            (lambda t: t.update({"head/kernel.codes": np.zeros(7, np.int8)}), "codes of 7 bytes"),
            (lambda t: t.update({"head/kernel.scale": np.ones((4, 3), np.float32)}), r"shape \(4, 3\), .* \(6, 3\)"),
            (lambda t: t.update({"head/kernel.scale": np.ones((0, 3), np.float32)}), r"shape \(0, 3\), .* \(6, 3\)"),
            (lambda t: t.update({"head/kernel.scale": np.ones((3,), np.float32)}), r"shape \(3,\), .* \(6, 3\)"),
            (lambda t: t.update({"head/kernel.scale": np.ones((1, 3), np.float16)}), "float16 scales"),
            (lambda t: t.update({"head/kernel.zero_point": np.ones((1, 3), np.int16)}), "int16 zero points"),
            (lambda t: t.update({"head/kernel.zero_point": np.ones((1, 1), np.int8)}), "int8 zero points of shape"),
        ],
    )
    def test_contradicting_tensors(self, saved, edit, message):
        tensors, metadata = contents(saved)
        edit(tensors)
        # float64 of no entries: the type is not what the message is about
        tensors = {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in tensors.items()}
        rewrite(saved, tensors, metadata)
        with pytest.raises(ValueError, match=rf"^`load\(path=\.\.\.\)` .*weights\.safetensors': .*{message}"):
            load(saved)

    @pytest.mark.parametrize(
        ("key", "edit"),
        [
            ("leaves", lambda v: v["head/kernel"].update(bits=17)),
            ("leaves", lambda v: v["head/kernel"].update(bits=1)),
            ("leaves", lambda v: v["head/kernel"].update(bits=3.0)),
            ("leaves", lambda v: v["head/kernel"].update(bits=True)),
            ("leaves", lambda v: v["head/kernel"].update(shape=[-6, -3])),
            ("leaves", lambda v: v["head/kernel"].update(shape=[18])),
            ("leaves", lambda v: v["head/kernel"].update(shape=None)),
            ("leaves", lambda v: v["head/kernel"].update(shape=[2**70, 2**70])),
            ("leaves", lambda v: v["head/kernel"].update(dtype="int8")),
            ("leaves", lambda v: v["head/kernel"].update(dtype=["float32"])),
            ("leaves", lambda v: v["head/kernel"].pop("dtype")),
            ("leaves", lambda v: v.update({"head/kernel": 3})),
            ("leaves", lambda v: v.update({"stem": None})),
            ("leaves", lambda v: v.update({"stem/bias/more": None})),
            ("leaves", lambda v: v.pop("stem/bias")),
            ("spec", lambda v: v.update(grid="wide")),
            ("spec", lambda v: v.update(symmetric=True)),
            ("spec", lambda v: v.update(new=1)),
            ("spec", lambda v: v.pop("overrides")),
            ("spec", lambda v: v.update(overrides=[["a"]])),
        ],
    )
    def test_contradicting_metadata(self, saved, key, edit):
        tensors, metadata = contents(saved)
        rewrite(saved, tensors, edited(metadata, key, edit))
        with pytest.raises(ValueError, match=r"^`load\(path=\.\.\.\)` must be a file of `save`; '[^']*': ") as error:
            load(saved)
        assert "\n" not in str(error.value)
        assert "checksum" not in str(error.value)

    @pytest.mark.parametrize("key", ["spec", "leaves"])
    @pytest.mark.parametrize("value", ["no JSON", "", "[]", "3", "null", "[" * 100_000, None])
    def test_metadata_that_is_no_json(self, saved, key, value):
        tensors, metadata = contents(saved)
        metadata = {k: v for k, v in metadata.items() if k != key} | ({} if value is None else {key: value})
        rewrite(saved, tensors, metadata)
        with pytest.raises(ValueError, match=r"^`load\(path"):
            load(saved)

    def test_checksum(self, saved):
        tensors, metadata = contents(saved)
        for broken in ({**metadata, "sha256": "0" * 64}, {k: v for k, v in metadata.items() if k != "sha256"}):
            saved.write_bytes(safetensors.numpy.save(tensors, broken))
            with pytest.raises(ValueError, match="its checksum does not match"):
                load(saved)


class TestInterruption:
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
    @pytest.mark.parametrize("place", ["fsync", "replace"])
    def test_leaves_the_old_file(self, saved, monkeypatch, place, error):
        def fail(*_):
            raise error

        before = saved.read_bytes()
        monkeypatch.setattr(files.os if place == "fsync" else files.Path, place, fail)
        for target in (saved, saved.with_name("new.safetensors")):
            with pytest.raises(type(error)):
                save(target, quantize(params(), 7), QuantSpec())
        monkeypatch.undo()
        assert [x.name for x in saved.parent.iterdir()] == [saved.name]
        assert saved.read_bytes() == before

    def test_replaces(self, saved):
        mode = saved.stat().st_mode
        save(saved, quantize(params(), 7), QuantSpec())
        assert_identical(load(saved)[0], quantize(params(), 7))
        assert [x.name for x in saved.parent.iterdir()] == [saved.name]
        assert saved.stat().st_mode == mode

    def test_refused_trees_write_nothing(self, path):
        with pytest.raises(TypeError):
            save(path, {"a": jnp.ones(2), "b": object()}, QuantSpec())
        assert list(path.parent.iterdir()) == []


class TestErrors:
    @pytest.mark.parametrize(
        ("tree", "message"),
        [
            (jnp.ones(2), r"must be nested dicts; got an array of shape \(2,\)\.$"),
            ([jnp.ones(2)], "must be nested dicts; got "),
            ({"a": {1: jnp.ones(2)}}, r"keys that are strings without '/'; at 'a' it has 1\.$"),
            ({"a": {"b/c": jnp.ones(2)}}, r"keys that are strings without '/'; at 'a' it has 'b/c'\.$"),
            ({"": jnp.ones(2)}, r"keys that are strings without '/'; at '' it has ''\.$"),
            ({"a": {"b": [jnp.ones(2)]}}, "at 'a/b' it has "),
            ({"a": None}, r"at 'a' it has None\.$"),
            ({"a": 1.5}, r"at 'a' it has 1\.5\.$"),
            ({"a": jnp.ones(2, jnp.int4)}, r"at 'a' it has int4\.$"),
            ({"a": jax.random.key(0)}, r"at 'a' it has key<fry>\.$"),
            ({"a": np.array(["x"])}, r"at 'a' it has "),
        ],
    )
    def test_trees(self, path, tree, message):
        with pytest.raises(TypeError, match=r"^`save\(tree=\.\.\.\)` .*" + message):
            save(path, tree, QuantSpec())

    def test_tracers(self, path):
        with pytest.raises(TypeError, match=r"^`save\(tree=\.\.\.\)` must hold arrays"):
            jax.jit(lambda x: save(path, {"a": x}, QuantSpec()))(jnp.ones(2))

    @pytest.mark.parametrize("name", ["kernel.codes", "kernel.scale"])
    @pytest.mark.parametrize("is_first", [True, False])
    def test_names_taken(self, path, name, is_first):
        tree = {**quantize({"kernel": weights()}, 3), name: jnp.ones(2)}
        tree = dict(reversed(tree.items())) if is_first else tree
        with pytest.raises(ValueError, match=rf"a name of its own; '{name}' is taken\.$"):
            save(path, tree, QuantSpec())

    def test_reserved_name(self, path):
        with pytest.raises(ValueError, match="'__metadata__' is taken"):
            save(path, {"__metadata__": jnp.ones(2)}, QuantSpec())

    def test_spec(self, path):
        with pytest.raises(TypeError, match=r"`save\(spec=\.\.\.\)` must be a QuantSpec; got 'narrow'\.$"):
            save(path, quantize(params(), 3), "narrow")
        with pytest.raises(ValueError, match=r"at 'head/kernel' it has no zero points on an asymmetric grid\.$"):
            save(path, quantize(params(), 3), UNEVEN)
        with pytest.raises(ValueError, match=r"at 'head/kernel' it has zero points on a symmetric grid\.$"):
            save(path, quantize(params(), 3, UNEVEN), QuantSpec())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bits": 2}, "it has codes that need more than 2 bits"),
            ({"bits": 17}, "must be an integer in 2..16; got 17"),
            ({"bits": 12}, "it has int8 codes, float32 scales and float32 weights at 12 bits"),
            ({"dtype": "int8"}, "int8 weights at 3 bits"),
            ({"scale": np.ones((4, 5), np.float32)}, r"scales of shape \(4, 5\), which does not divide \(6, 5\)"),
        ],
    )
    def test_broken_leaves(self, path, change, message):
        q = quantize({"k": weights()}, 3)["k"]
        fields = {"codes": q.codes, "scale": q.scale, "zero_point": None, "bits": 3, "dtype": "float32", **change}
        with pytest.raises(ValueError, match=message):
            save(path, {"k": QuantizedArray(**fields)}, QuantSpec())

    def test_missing_packages(self, path, monkeypatch):
        for name in ("safetensors", "safetensors.numpy", "qwix"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r'`save` needs safetensors.numpy: pip install "hero_jax\[files\]"'):
            save(path, {}, QuantSpec())
        with pytest.raises(ImportError, match=r'`load` needs safetensors: pip install "hero_jax\[files\]"'):
            load(path)
        for function in (to_qwix, from_qwix):
            with pytest.raises(ImportError, match="needs qwix: pip install qwix"):
                function({})


class TestQwix:
    @pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_round_trip_and_values(self, spec, bits):
        q = quantize(params(), bits, spec)
        arrays = to_qwix(q)
        assert isinstance(arrays["head"]["kernel"], qwix.QArray)
        assert arrays["stem"]["bias"] is q["stem"]["bias"]
        assert_identical(from_qwix(arrays, "float32"), q)
        for name in ("stem", "head"):
            assert_identical(qwix.dequantize(arrays[name]["kernel"]), dequantize(q[name]["kernel"]))

    @pytest.mark.parametrize("bits", range(2, 9))
    def test_types_are_those_of_qwix(self, bits):
        w = weights()
        theirs = qwix.quantize(w, {4: jnp.int4, 8: jnp.int8}.get(bits, f"int{bits}"), channelwise_axes=(1,))
        ours = to_qwix(quantize(w, bits, QuantSpec("channel", "stretched")))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
        assert (ours.qvalue.dtype, ours.scale.dtype) == (theirs.qvalue.dtype, theirs.scale.dtype)
        np.testing.assert_array_equal(ours.qvalue, theirs.qvalue)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
    @pytest.mark.parametrize("bits", range(2, 9))
    def test_arrays_made_by_qwix(self, path, bits, dtype):
        w = weights(dtype=dtype)
        arrays = {"tiled": qwix.quantize(w, f"int{bits}", channelwise_axes=(1,), tiled_axes={0: 3})}
        if bits in (4, 8):
            arrays["asymmetric"] = qwix.quantize(w, f"int{bits}", channelwise_axes=(1,), calibration_method="minmax")
        for name, array in arrays.items():
            q = from_qwix({"k": array})
            assert (q["k"].bits, q["k"].dtype) == (bits, jnp.dtype(dtype).name)
            assert_identical(dequantize(q)["k"], qwix.dequantize(array))
            spec = UNEVEN if name == "asymmetric" else QuantSpec("group", "stretched", group_size=3)
            save(path, q, spec)
            assert_identical(load(path)[0], q)
        assert from_qwix(arrays["tiled"], jnp.float16).dtype == "float16"

    def test_sixteen_bit_leaves_round_last(self):
        q = quantize(weights(dtype=jnp.bfloat16), 5)
        values = qwix.dequantize(to_qwix(q))
        assert values.dtype == jnp.float32
        assert_identical(values.astype(jnp.bfloat16), dequantize(q))
        assert_identical(from_qwix(to_qwix(q), jnp.bfloat16), q)

    def test_float64(self, x64):
        q = quantize(weights(dtype=jnp.float64), 6)
        assert_identical(qwix.dequantize(to_qwix(q)), dequantize(q))
        assert_identical(from_qwix(to_qwix(q)), q)

    def test_jit(self):
        q = quantize(params(), 4, UNEVEN)
        assert_identical(jax.jit(lambda q: from_qwix(to_qwix(q)))(q), q)

    def test_errors(self):
        with pytest.raises(ValueError, match=r"^`to_qwix\(tree=.*at most 8 bits; at 'head/kernel' it has 9\.$"):
            to_qwix(quantize(params(), 9))
        with pytest.raises(ValueError, match=r"^`from_qwix\(tree=.* int2 to int8; at 'a' it is nf4\.$"):
            from_qwix({"a": qwix.quantize(weights(), "nf4")})
        with pytest.raises(ValueError, match=r"int2 to int8; at 'a' it is float8_e4m3fn\.$"):
            from_qwix({"a": qwix.quantize(weights(), jnp.float8_e4m3fn)})
        with pytest.raises(ValueError, match=r"at 'a' it has scales of shape \(1, 2\), which does not divide \(5, 6\)"):
            from_qwix({"a": qwix.quantize(weights((5, 6)), "int4", tiled_axes={1: 3})})
        with pytest.raises(TypeError, match=r"^`from_qwix\(dtype=\.\.\.\)` must be a floating-point type; got 'int8'"):
            from_qwix({}, "int8")
