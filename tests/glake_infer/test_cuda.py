"""The calls to the CUDA driver, with a driver that records them. tests/gpu has the real one."""

import types

import numpy as np
import pytest

import glake_infer as gi
from glake_infer import cuda


class Driver:
    """Answers like cuda.bindings.driver: a tuple that begins with a code. `failing` names a call that fails."""

    CUpointer_attribute = types.SimpleNamespace(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)

    def __init__(self, failing=""):
        self.calls, self.failing = [], failing

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            failed = name == self.failing
            code = types.SimpleNamespace(value=700 if failed else 0, name="CUDA_ERROR_ILLEGAL_ADDRESS")
            answers = {
                "cuDeviceGet": "device",
                "cuDevicePrimaryCtxRetain": "context",
                "cuPointerGetAttribute": 3,
            }
            return (code, answers[name]) if name in answers else (code,)

        return call


@pytest.fixture
def driver(monkeypatch):
    def use(failing=""):
        made = Driver(failing)
        monkeypatch.setattr(cuda, "_driver", lambda: made)
        cuda._primary_context.cache_clear()
        return made

    yield use
    cuda._primary_context.cache_clear()


def test_a_stream_is_waited_for_on_the_primary_context_of_its_device(driver):
    calls = driver().calls
    cuda.synchronize(2, 1)
    assert calls == [
        ("cuInit", 0),
        ("cuDeviceGet", 2),
        ("cuDevicePrimaryCtxRetain", "device"),
        ("cuCtxPushCurrent", "context"),
        ("cuStreamSynchronize", 1),
        ("cuCtxPopCurrent",),
    ]
    cuda.synchronize(2, 77)  # the context is retained once
    assert [call[0] for call in calls[6:]] == ["cuCtxPushCurrent", "cuStreamSynchronize", "cuCtxPopCurrent"]


def test_copies_and_owners(driver):
    made = driver()
    target = np.empty((2, 3), np.float32)
    cuda.copy_to_host(0, 4096, target)
    assert ("cuMemcpyDtoH", target.ctypes.data, 4096, 24) in made.calls
    count = len(made.calls)
    cuda.copy_to_host(0, 0, target[:0])
    assert len(made.calls) == count
    assert cuda.device_of(4096) == 3


@pytest.mark.parametrize(
    "failing", ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuStreamSynchronize"]
)
def test_errors_name_the_call_and_leave_no_context_current(driver, failing):
    made = driver(failing)
    with pytest.raises(
        gi.DriverError, match=rf"{failing} failed while .*: CUDA_ERROR_ILLEGAL_ADDRESS \(700\)"
    ):
        cuda.synchronize(0, 1)
    names = [call[0] for call in made.calls]
    assert names.count("cuCtxPushCurrent") == names.count("cuCtxPopCurrent")
