"""Packages with an engine of the stand-in library (tests/standin_tensorrt.py) beside their graph."""

from __future__ import annotations

import threading

import building
import numpy as np
import standin_tensorrt as standin
from onnx import TensorProto, helper

import glake_infer as gi
from glake_infer.digest import digest_of
from glake_infer.models.manifest import Engine
from glake_infer.models.package import write_package
from glake_infer.models.tensorrt.plan import split, weights_section

SIDE = 512  # a matrix of 1 MiB


def matrices(seed, columns=SIDE):
    rng = np.random.default_rng(seed)
    return {
        "w1": rng.standard_normal((SIDE, SIDE), np.float32) / SIDE**0.5,
        "w2": rng.standard_normal((SIDE, columns), np.float32) / SIDE**0.5,
    }


def expected(weights, x):
    hidden = np.maximum(x @ weights["w1"], 0)
    return {"y": hidden @ weights["w2"], "hidden": hidden}


def linear(folder, store, weights, name="model", kind="tensorrt-rtx", *, rows=((1, 4, 8),), **options):
    """x[n, SIDE] -> y, hidden; `rows`: (min, opt, max) of n of each profile. Returns the package's path."""
    graph = building.model(
        [
            building.node("MatMul", ["x", "w1"], ["product"]),
            building.node("Relu", ["product"], ["hidden"]),
            building.node("MatMul", ["hidden", "w2"], ["y"]),
        ],
        [building.floats("x", ("n", SIDE))],
        [building.floats("y", ("n", weights["w2"].shape[1])), building.floats("hidden", ("n", SIDE))],
        [building.tensor(array, key) for key, array in weights.items()],
    )
    tensors = [
        standin.tensor("x", "FLOAT", (-1, SIDE)),
        standin.tensor("y", "FLOAT", (-1, weights["w2"].shape[1]), mode="OUTPUT"),
        standin.tensor("hidden", "FLOAT", (-1, SIDE), mode="OUTPUT"),
    ]
    profiles = [{"x": [(n, SIDE) for n in spans]} for spans in rows]
    plan = standin.plan("linear", tensors, weights, profiles=profiles, **options)
    return package(folder, store, graph, plan, name, kind, streaming=options.get("streaming", False))


def package(folder, store, graph, plan, name="model", kind="tensorrt-rtx", *, streaming=False, **changes):
    """Convert an ONNX graph and add an engine to the package."""
    building.save(graph, folder / f"{name}.onnx")
    path = folder / f"{name}.glake"
    gi.convert(folder / f"{name}.onnx", path, store=store)
    opened = gi.Package(path, store)
    manifest = opened.manifest
    with store.using():
        made = split(plan, manifest.weights, store)
        section = weights_section(plan)
        engine = Engine(
            **{
                "kind": kind, "version": standin.VERSION, "capabilities": ("8.6", "8.9"), "bytes": len(plan),
                "digest": digest_of(plan), "parts": tuple(made.parts), "objects": made.objects,
                "compressed": made.compressed, "inputs": manifest.inputs, "outputs": manifest.outputs,
                "weights_offset": section[0], "weights_bytes": section[1], "streaming": streaming,
            } | changes
        )  # fmt: skip
        files = {v.graph: (path / v.graph).read_bytes() for v in manifest.variants.values()}
        write_package(
            store, path, manifest.model_copy(update={"version": 3, "engines": {kind: engine}}), files
        )
    return path


def small_graph(inputs, outputs):
    """A graph whose engine is all that matters: every output is made from the first input."""
    kinds = {"float": TensorProto.FLOAT, "int64": TensorProto.INT64}
    described = [
        [helper.make_tensor_value_info(n, kinds[k], s) for n, (k, s) in part.items()]
        for part in (inputs, outputs)
    ]
    first = next(iter(inputs))
    nodes = [building.node("Cast", [first], [name], to=kinds[kind]) for name, (kind, _) in outputs.items()]
    return building.model(nodes, *described)


def rows(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, SIDE), np.float32)


def check(results, weights, x):
    for name, array in expected(weights, x).items():
        if name in results:
            np.testing.assert_array_equal(results[name], array)


def run_at_once(runs):
    errors, start = [], threading.Barrier(len(runs))

    def work(run):
        try:
            start.wait()
            run()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
