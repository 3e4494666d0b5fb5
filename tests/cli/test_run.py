"""run: several models in one process."""

import numpy as np
import onnxruntime as ort
import pytest


def test_run_shares_the_trunk_and_says_where_the_memory_is(shop, fits):
    report = shop.json("run", "a.glake", "b.glake", "--repeat", "3", "--shape", "input_ids=2,8")
    assert [(model["name"], model["runs"]) for model in report["models"]] == [("a", 3), ("b", 3)]
    for model, labels in zip(report["models"], (2, 17), strict=True):
        assert model["min"] <= model["median"] <= model["p95"]
        assert [(o["name"], o["dtype"], o["shape"]) for o in model["outputs"]] == [
            ("logits", "float32", [2, labels])
        ]
        assert model["outputs"][0]["min"] <= model["outputs"][0]["mean"] <= model["outputs"][0]["max"]
    memory = report["memory"]
    assert memory["shared"] > 5 * memory["own"] > 0
    parts = memory["shared"] + memory["own"] + memory["private"] + memory["activations"] + memory["idle"]
    assert parts == memory["reserved"] <= memory["peak_reserved"] <= memory["limit"]
    assert memory["process"]["total"] > memory["reserved"] - memory["idle"] - memory["shared"]
    assert (report["device"], report["sharing"], report["threads"], report["repeat"]) == ("cpu", "fast", 1, 3)
    out, err = shop.run("run", "a.glake", "b.glake", "--sharing", "lean")
    assert err == ""
    fits(out)
    assert "shared weights" in out
    assert "a:logits" in out


def test_files_are_fed_and_outputs_saved(shop, tmp_path):
    ids = np.arange(10).reshape(2, 5)
    np.save(tmp_path / "ids.npy", ids)
    np.savez(
        tmp_path / "rest.npz",
        attention_mask=np.ones((2, 5), np.int64),
        token_type_ids=np.zeros((2, 5), np.int64),
    )
    np.save(tmp_path / "others.npy", ids + 1)
    inputs = [f"input_ids={tmp_path}/ids.npy", tmp_path / "rest.npz"]
    inputs += [f"{model}:input_ids={tmp_path}/others.npy" for model in ("b", "3")]
    options = [text for value in inputs for text in ("--input", value)]
    options += ["--save", tmp_path / "out", "--threads", "3", "--repeat", "2"]
    shop.json("run", "a.glake", "b.glake", "a.onnx", *options)
    feeds = {"attention_mask": np.ones((2, 5), np.int64), "token_type_ids": np.zeros((2, 5), np.int64)}
    for name, file, fed in (("a", "a", ids), ("b", "b", ids + 1), ("a#2", "a", ids + 1)):
        session = ort.InferenceSession(shop.folder / f"{file}.onnx", providers=["CPUExecutionProvider"])
        expected = session.run(None, {**feeds, "input_ids": fed})[0]
        with np.load(tmp_path / "out" / f"{name}.npz") as saved:
            np.testing.assert_allclose(saved["logits"], expected, rtol=1e-4, atol=1e-4)


def test_generated_data_is_the_same_again(shop, tmp_path):
    first, second = (shop.json("run", "a.glake", "--seed", "5")["models"][0]["outputs"] for _ in range(2))
    assert first == second != shop.json("run", "a.glake", "--seed", "6")["models"][0]["outputs"]


def test_an_onnx_model_leaves_no_package_behind(own_shop):
    before = own_shop.json("store", "ls")["packages"]
    report = own_shop.json("run", "a.onnx", "b.glake", "--shape", "1:input_ids=1,4")
    assert report["memory"]["shared"] > 0
    listing = own_shop.json("store", "ls")
    assert listing["packages"] == before
    assert listing["missing_packages"] == []
    assert own_shop.json("store", "gc")["temporary"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "missing.glake"], "does not exist"),
        (["run", "missing.onnx"], "missing.onnx"),
        (["run", "a.glake", "--device", "cuda:77"], "cuda:77"),
        (["run", "a.glake", "--device", "banana"], "'cpu'"),
        (["run", "a.glake", "--limit", "1MiB"], "limit"),
        (["run", "a.glake", "--limit", "much"], "'4GiB'"),
        (["run", "a.glake", "--shape", "nope=1,2"], "input_ids"),
        (["run", "a.glake", "--shape", "input_ids=1,x"], "input_ids=1,128"),
        (["run", "a.glake", "--shape", "input_ids=1,2,3"], "axes"),
        (["run", "a.glake", "--input", "ids.npy"], "NAME=FILE.npy"),
        (["run", "a.glake", "--input", "input_ids=missing.npy"], "missing.npy"),
        (["run", "a.glake", "--input", "input_ids=a.onnx"], "numpy.save"),
        (["run", "a.glake", "--input", "input_idz=ids.npy"], "input_ids"),
        (["run", "a.glake", "--input", "input_ids=floats.npy"], "astype"),
        (["run", "a.glake", "--shape", "input_ids=1,4000"], "--shape"),
        (["run", "a.glake", "--offload", "much"], "'auto'"),
        (["run", "a.glake", "--save", "a.onnx"], "a.onnx"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_explained(shop, arguments, message):
    np.save(shop.folder / "ids.npy", np.ones((1, 3), np.int64))
    np.save(shop.folder / "floats.npy", np.ones((1, 3), np.float32))
    assert message in shop.error(*arguments)


@pytest.mark.parametrize("offload", ["auto", "1GiB"])
def test_offload_is_for_gpus(shop, offload):
    report = shop.json("run", "a.glake", "--offload", offload)
    (model,) = report["models"]
    assert "changes nothing on the CPU" in model["notes"][-1]
    assert model["memory"]["offloaded"] == report["memory"]["offloaded"] == 0
    out, _ = shop.run("run", "a.glake", "--offload", "none")
    assert "On the host" not in out


def test_an_engine_needs_a_gpu_and_a_package_that_has_it(shop):
    error = shop.error("run", "a.glake", "--engine", "tensorrt-rtx")
    assert "engine='tensorrt-rtx' needs a GPU" in error
    report = shop.json("run", "a.glake", "--engine", "onnxruntime", "--concurrency", "2")
    assert report["models"][0]["runs"] == 1
