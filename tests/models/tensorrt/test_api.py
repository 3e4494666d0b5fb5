"""The library that stands in for TensorRT has no name, no argument and no value that the real one does not have."""

import enum
import inspect
import re

import building
import pytest
import standin_tensorrt
from engine_packages import linear, matrices

import glake_infer as gi
from glake_infer.allocators import _native
from glake_infer.models.tensorrt.execution import _output_allocator
from glake_infer.models.tensorrt.load import EngineSettings, load_engine
from glake_infer.models.tensorrt.reader import _reader_class

real = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
standin = standin_tensorrt.make()

CLASSES = [
    "ICudaEngine", "IExecutionContext", "IRuntimeCache", "IRuntimeConfig", "Runtime",
]  # fmt: skip
ENUMS = [
    "CudaGraphStrategy", "DataType", "EngineInvalidityDiagnostics", "EngineValidity", "ExecutionContextAllocationStrategy",
    "SeekPosition", "TensorIOMode", "TensorLocation",
]  # fmt: skip
OURS = {"strategy", "cache", "users", "content", "engine", "graphs", "number", "live", "numbers"}
"""What the stand-in keeps for itself."""


def arguments_of(function):
    """The forms of a binding, each as a list of its arguments' names, from its documentation."""
    forms = re.findall(rf"^(?:\d+\. )?{function.__name__}\((.*)\) -> ", function.__doc__, re.MULTILINE)
    return [re.findall(r"(?:^|, )(\w+): ", form)[1:] for form in forms if "self: " in form]


def names_of(name):
    """What a class of the stand-in has: methods, properties, and what its instances are given."""
    kind = getattr(standin, name)
    given = re.findall(r"self\.(\w+)(?:, self\.\w+)* = ", inspect.getsource(kind))
    return {each for each in (*vars(kind), *given) if not each.startswith("_")} - OURS


@pytest.mark.parametrize("name", CLASSES)
def test_every_name_is_one_of_the_real_library(name):
    assert names_of(name) <= set(dir(getattr(real, name)))
    assert len(names_of(name)) > 1


@pytest.mark.parametrize("name", CLASSES)
def test_every_method_takes_what_the_real_one_takes(name):
    compared = 0
    for method, function in vars(getattr(standin, name)).items():
        if method.startswith("_") or not inspect.isfunction(function):
            continue
        mine = list(inspect.signature(function).parameters)[1:]
        forms = arguments_of(getattr(getattr(real, name), method))
        assert forms, method
        if method in ("create_execution_context", "deserialize_cuda_engine"):  # one argument, of either kind
            assert {len(mine)} == {len(form) for form in forms}
        else:
            assert mine in forms, (method, mine, forms)
        compared += 1
    assert compared


@pytest.mark.parametrize("name", ENUMS)
def test_every_value_of_an_enumeration_is_there(name):
    mine, theirs = getattr(standin, name), getattr(real, name)
    assert set(mine.__members__) <= set(theirs.__members__)
    if issubclass(mine, enum.IntEnum):
        assert all(hasattr(member, "value") for member in theirs.__members__.values())


@pytest.mark.parametrize(
    ("base", "made"),
    [("IStreamReaderV2", _reader_class(standin)), ("IOutputAllocator", _output_allocator(standin))],
)
def test_what_tensorrt_calls_has_the_documented_arguments(base, made):
    documented = dict(re.findall(r"def (\w+)\(self, (.*?)\)", getattr(real, base).__doc__))
    documented.pop("__init__", None)
    assert len(documented) > 1
    for name, arguments in documented.items():
        wanted = [part.partition(":")[0].strip() for part in arguments.split(",")]
        assert list(inspect.signature(vars(made)[name]).parameters)[1:] == wanted


def test_what_is_made_here_derives_from_the_real_classes():
    reader, outputs = _reader_class(real), _output_allocator(real)
    assert issubclass(reader, real.IStreamReaderV2)
    assert issubclass(outputs, real.IOutputAllocator)
    made = outputs()
    assert (
        made.reallocate_output_async("y", 0, 1, 256, 1) == 0
    )  # outside a run: refused, and nothing is raised
    assert isinstance(made.error, AssertionError)


@pytest.fixture
def pool():
    with gi.Pool("cpu") as pool:
        yield pool
        assert pool.stats().active == 0


def test_the_real_library_refuses_what_is_no_plan(tmp_path, store, pool):
    package = gi.Package(linear(tmp_path, store, matrices(0)), store)
    with (
        store.using(),
        pytest.raises(gi.PackageError, match=r"does not take .*: malformed engine\. Convert model\.onnx"),
    ):
        load_engine(package, pool, "tensorrt-rtx", EngineSettings())


def test_without_a_driver_the_error_says_so(tmp_path, store, pool):
    try:
        if _native.cuda_device_count():
            pytest.skip("this machine has a GPU")
    except gi.GlakeError:
        pass
    proto = building.model(
        [building.node("MatMul", ["x", "w"], ["y"])], [building.floats("x", (4, 32))], [building.floats("y", (4, 32))],
        [building.tensor(building.matrix(1), "w")],
    )  # fmt: skip
    gi.convert(
        building.save(proto, tmp_path / "m.onnx"), tmp_path / "m.glake", engine="tensorrt-rtx", store=store
    )
    package = gi.Package(tmp_path / "m.glake", store)
    with store.using(), pytest.raises(gi.DriverError, match=r"cannot read a plan here.*`glake-infer doctor`"):
        load_engine(package, pool, "tensorrt-rtx", EngineSettings())
