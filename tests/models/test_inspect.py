import building
import pytest
from folders import tree

import glake_infer as gi
from glake_infer.models.convert import convert
from glake_infer.models.inspect import inspect


def test_a_model_and_its_package_look_the_same(store, tmp_path):
    for name, make in building.SHAPES.items():
        path = building.save(make(), tmp_path / f"{name}.onnx")
        convert(path)
        model, package = inspect([path, path.with_suffix(".glake")]).models
        assert (model.kind, package.kind) == ("onnx", "package")
        assert sorted((w.name, w.digest, w.bytes, w.dtype, w.shape) for w in model.weights) == sorted(
            (w.name, w.digest, w.bytes, w.dtype, w.shape) for w in package.weights
        ), name
        assert model.inputs == package.inputs
        assert model.outputs == package.outputs
        assert model.by_dtype == package.by_dtype


def test_what_is_twice_and_what_is_shared(store, tmp_path):
    a = building.save(building.odd_sizes(), tmp_path / "a.onnx")
    b = building.save(building.chain(building.matrix(1), building.matrix(2)), tmp_path / "b.onnx")
    found = inspect([a, b])
    first, second = found.models
    assert [[w.name for w in group] for group in first.duplicates] == [
        ["schicht/größe:0", "层/重み 😀", "flat"]
    ]
    assert second.duplicates == []
    assert (first.bytes, sum(first.distinct.values()), found.bytes, found.distinct_bytes) == (
        12288,
        4096,
        5 * 4096,
        8192,
    )
    assert found.shared() == {(str(a), str(b)): 4096}
    assert first.by_dtype == {"float": (3, 12288)}
    assert inspect(b).models == (second,)


def test_nothing_is_written(store, tmp_path):
    path = building.with_external(building.inline(), tmp_path / "m")
    before = tree(tmp_path)
    assert inspect(path).bytes == 12288
    assert tree(tmp_path) == before


def test_unsound_ones_are_refused(store, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"text")
    with pytest.raises(gi.ModelError, match=r"x\.onnx is not an ONNX model"):
        inspect(tmp_path / "x.onnx")
    with pytest.raises(gi.ModelError, match="No such file"):
        inspect(tmp_path / "absent")
    with pytest.raises(gi.PackageError, match="is not a package"):
        inspect(tmp_path)
