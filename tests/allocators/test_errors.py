"""The exception tree (errors.py)."""

from __future__ import annotations

import inspect
import pickle

import pytest

from glake_infer.allocators import errors


def test_every_error_is_a_glake_error_and_in_the_tree():
    classes = [
        value for _, value in inspect.getmembers(errors, inspect.isclass) if issubclass(value, Exception)
    ]
    assert sorted(cls.__name__ for cls in classes) == sorted(errors.__all__) == errors.__all__
    for cls in classes:
        assert issubclass(cls, errors.GlakeError)
        assert cls.__name__ in errors.__doc__
        assert cls.__doc__


@pytest.mark.parametrize(
    ("error", "base"),
    [("OutOfMemoryError", MemoryError), ("InputError", ValueError), ("MissingDependencyError", ImportError)],
)
def test_errors_are_also_what_python_would_raise(error, base):
    assert issubclass(getattr(errors, error), base)


def test_out_of_memory_says_what_happened_and_what_to_do():
    error = errors.OutOfMemoryError(
        requested=5 << 20,
        active=3 << 20,
        idle=1 << 20,
        reserved=4 << 20,
        limit=6 << 20,
        needed_limit=8 << 20,
        device_free=1 << 30,
        holders=[("bert", "weights", 2 << 20), ("", "activations", 1 << 20)],
    )
    text = str(error)
    for part in ("5.0 MiB (5242880 bytes)", "limit of 6.0 MiB", "3.0 MiB are active", "raise pool.limit"):
        assert part in text
    assert "(bert: weights 2.0 MiB, activations 1.0 MiB)" in text  # the largest first
    assert "with a limit of 8388608 bytes (8.0 MiB)" in text


@pytest.mark.parametrize(
    "error",
    [
        errors.OutOfMemoryError(
            requested=1,
            active=2,
            idle=3,
            reserved=5,
            limit=6,
            needed_limit=7,
            device_free=8,
            holders=[("", "weights", 2)],
        ),
        errors.PoolExistsError("cpu"),
        errors.ForkedProcessError(),
        errors.PoolClosedError(),
        errors.DriverError("mmap failed"),
        errors.PoolInUseError.close(1, 2),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
