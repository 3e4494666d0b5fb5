"""convert, export, import, inspect and zoo on real files."""

import onnx
import pytest

import glake_infer as gi
from glake_infer.models.tensorrt import library


def test_convert_prints_a_table_and_json(empty_shop, shop, fits):
    report = empty_shop.json("convert", shop.folder / "a.onnx", "-o", "x.glake")
    assert report["new_bytes"] == report["distinct_bytes"] > 0
    assert report["stored_bytes"] == 0
    assert report["package"] == "x.glake"
    assert report["variants"] == ["onnx", "cuda"]
    assert {"source", "weights", "weight_bytes", "constants", "runs", "notes", "seconds"} <= report.keys()
    out, err = empty_shop.run("convert", shop.folder / "b.onnx", "-o", "y.glake")
    assert err == ""
    fits(out)
    assert "in the store already" in out
    assert (empty_shop.folder / "y.glake" / "manifest.json").is_file()


def test_export_gives_an_ordinary_model(shop, tmp_path):
    report = shop.json("export", "a.glake", "-o", tmp_path / "out")
    onnx.checker.check_model(report["target"], full_check=True)
    assert report["weights"] > 0
    told, _ = shop.run("export", "a.glake", "-o", tmp_path / "out")
    assert "a.onnx" in told.replace("\n", "")  # the path may be long


def test_archive_travels_to_another_store(shop, empty_shop):
    file = empty_shop.folder / "a.archive"
    report = shop.json("export", "a.glake", "--archive", file)
    assert file.stat().st_size == report["bytes"]
    found = empty_shop.json("import", file)
    assert found["package"] == "a.glake"
    assert found["distinct_bytes"] == sum(
        gi.Package(shop.folder / "a.glake", shop.store).manifest.distinct.values()
    )
    assert "b.glake" in empty_shop.run("import", file, "-o", "b.glake")[0]
    assert empty_shop.json("run", "b.glake")["models"][0]["runs"] == 1


def test_inspect_shows_what_is_shared(shop, fits):
    found = shop.json("inspect", "a.glake", "b.onnx")
    assert [model["kind"] for model in found["models"]] == ["package", "onnx"]
    assert found["distinct_bytes"] < found["bytes"]
    assert found["shared"] == [{"a": "a.glake", "b": "b.onnx", "bytes": found["shared"][0]["bytes"]}]
    assert found["shared"][0]["bytes"] > 0.9 * found["models"][0]["distinct_bytes"]
    first = found["models"][0]
    assert sum(entry["bytes"] for entry in first["by_dtype"].values()) == first["bytes"]
    assert first["inputs"][0] == {"name": "input_ids", "dtype": "int64", "shape": ["batch", "sequence"]}
    out, _ = shop.run("inspect", "a.glake", "b.onnx")
    fits(out)
    assert "Distinct bytes in both" in out
    assert "embeddings.word_embeddings.weight" not in out
    out, _ = shop.run("inspect", "a.glake", "--weights")
    fits(out)
    assert "embeddings.word_embeddings.weight" in out


def test_inspect_lists_pairs_where_a_matrix_would_not_fit(shop, fits):
    out, _ = shop.run("inspect", *["a.glake"] * 3, *["b.glake"] * 4)
    fits(out)


def test_zoo_lists_and_writes(empty_shop, fits):
    assert {"name", "description", "bytes"} == empty_shop.json("zoo", "--list")[0].keys()
    out, _ = empty_shop.run("zoo")
    fits(out)
    assert "bert-base" in out
    written = empty_shop.json(
        "zoo", "bert-tiny", "--size", "layers=1", "--head", "none", "--seed", "3", "-o", "m.onnx"
    )
    assert written["files"] == ["m.onnx"]
    assert (empty_shop.folder / "m.onnx").stat().st_size == written["bytes"]
    report = empty_shop.json("zoo", "bert-tiny", "--dtype", "float16", "--labels", "5", "-o", "m.glake")
    assert report["variants"] == ["onnx", "cpu-lean", "cuda"]
    other = ["zoo", "bert-tiny", "--dtype", "float16", "--labels", "5", "--variant", "1", "--changed", "0.1"]
    changed = empty_shop.json(*other, "-o", "v.glake")
    assert 0.05 < changed["new_bytes"] / changed["distinct_bytes"] < 0.15
    assert "Notes" in empty_shop.run(*other, "-o", "v.glake")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "missing.onnx"], "missing.onnx"),
        (["convert", "text.onnx"], "not an ONNX model"),
        (["convert", "short.onnx"], "truncated"),
        (["convert", "a.onnx", "-o", "text.onnx"], "not a package"),
        (["convert", "a.onnx", "-o", "nowhere/x.glake"], "nowhere"),
        (["export", "a.glake"], "--archive"),
        (["export", "a.glake", "-o", "x", "--archive", "y"], "--archive"),
        (["export", "missing.glake", "-o", "x"], "does not exist"),
        (["export", "a.glake", "-o", "text.onnx"], "is a file"),
        (["import", "text.onnx"], "not a glake-infer archive"),
        (["import", "missing.archive"], "missing.archive"),
        (["inspect", "missing.onnx"], "missing.onnx"),
        (["inspect", "empty"], "not a package"),
        (["zoo", "bert-huge"], "Did you mean"),
        (["zoo", "bert-tiny", "--size", "layers"], "KEY=N"),
        (["zoo", "bert-tiny", "--size", "layer=1"], "layers"),
        (["zoo", "bert-tiny", "-o", "nowhere/x.onnx"], "nowhere"),
        (["zoo", "-o", "x.onnx"], "--list"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_explained(shop, arguments, message):
    (shop.folder / "text.onnx").write_text("this is no model" * 10)
    (shop.folder / "short.onnx").write_bytes((shop.folder / "a.onnx").read_bytes()[:-5000])
    (shop.folder / "empty").mkdir(exist_ok=True)
    before = sorted(path.name for path in shop.folder.iterdir())
    assert message in shop.error(*arguments)
    assert sorted(path.name for path in shop.folder.iterdir()) == before


def test_convert_builds_an_engine(empty_shop, shop, fits):
    if not library.installed("tensorrt-rtx"):
        pytest.skip("tensorrt-rtx is not installed")
    order = ["convert", shop.folder / "a.onnx", "-o", "x.glake", "--engine", "tensorrt-rtx", "--card", "L4"]
    assert "--profile input_ids=1x1:8x8:64x64" in empty_shop.error(*order)
    order += ["--profile", "input_ids=1x1:2x16:4x64", "--streaming", "--workspace", "1GiB"]
    (engine,) = empty_shop.json(*order)["engines"]
    assert (engine["kind"], engine["capabilities"], engine["streaming"]) == ("tensorrt-rtx", ["8.9"], True)
    assert engine["found_bytes"] > 0.9 * engine["weights_bytes"]
    assert "columns of zeros" in fits_and(fits, empty_shop.run(*order)[0], "found in the store")
    (model,) = empty_shop.json("inspect", "x.glake")["models"]
    assert model["engines"]["tensorrt-rtx"]["profiles"] == [
        {
            name: {"min": [1, 1], "opt": [2, 16], "max": [4, 64]}
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
    ]
    fits_and(
        fits, empty_shop.run("inspect", "x.glake")[0], "profile 1", "can be streamed", "Engine tensorrt-rtx"
    )
    again = empty_shop.run("convert", shop.folder / "a.onnx", "-o", "x.glake")[0]
    fits_and(fits, again, "The model is the same: its tensorrt-rtx engine stays.")


def fits_and(fits, out, *said):
    fits(out)
    for words in said:
        assert words in out
    return out


def test_options_of_an_engine_need_one(shop):
    message = shop.error("convert", "a.onnx", "-o", "y.glake", "--card", "l4", "--profile", "x=1:2:3")
    assert (
        "there is no engine for --profile, --card: give --engine tensorrt-rtx or --engine tensorrt too"
        in message
    )
    assert "'ids=1' cannot be read" in shop.error(
        "convert", "a.onnx", "-o", "y.glake", "--engine", "tensorrt-rtx", "--profile", "ids=1"
    )
