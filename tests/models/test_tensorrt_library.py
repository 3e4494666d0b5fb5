"""Which TensorRT: what is said where none is installed, and where its messages go."""

import importlib
import logging
import sys

import pytest

from glake_infer.allocators.errors import InputError, MissingDependencyError
from glake_infer.models import doctor
from glake_infer.models.tensorrt import library, packages

L4, H200 = (doctor.Gpu(0, name, 1 << 34, cc, True) for name, cc in (("L4", "8.9"), ("H200", "9.0")))


RTX_COMMAND, COMMAND = r"pip install 'glake-infer\[tensorrt-rtx\]'", r"pip install 'glake-infer\[tensorrt\]'"


@pytest.mark.parametrize(
    ("kind", "gpus", "said"),
    [
        ("tensorrt-rtx", (), rf"{RTX_COMMAND} \(it builds engines without a GPU\)"),
        ("tensorrt", (), rf"{COMMAND} \(this machine has no GPU.*TensorRT-RTX does not: {RTX_COMMAND}"),
        ("tensorrt-rtx", (L4,), rf"{RTX_COMMAND} \(for this machine's GPU of compute capability 8\.9\)"),
        ("tensorrt", (H200,), rf"{COMMAND} \(for this machine's GPU of compute capability 9\.0\)"),
        ("tensorrt-rtx", (H200,), rf"capability 9\.0.*{COMMAND}"),
        ("tensorrt", (L4,), rf"{COMMAND} \(for this machine's GPU of compute capability 8\.9\)"),
    ],
)
def test_what_to_install_for_this_machine(monkeypatch, kind, gpus, said):
    monkeypatch.setitem(sys.modules, kind.replace("-", "_"), None)  # import raises
    monkeypatch.setattr(packages, "find_installed", lambda: ())
    monkeypatch.setattr(doctor, "find_gpus", lambda: (gpus, "", "13.0"))
    monkeypatch.setattr(packages.platform, "machine", lambda: "x86_64")
    with pytest.raises(MissingDependencyError, match=f"{packages.NAMES[kind]} is not installed here.*{said}"):
        library.module(kind)
    with pytest.raises(ImportError):
        library.version(kind)


def test_an_installation_that_is_broken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(packages, "find_installed", lambda: (packages.Installed("tensorrt", "10.9"),))
    monkeypatch.setattr(doctor, "find_gpus", lambda: ((), "", None))
    with pytest.raises(
        MissingDependencyError,
        match=r"10\.9 is installed, but cannot be imported: .*--force-reinstall tensorrt",
    ):
        library.module("tensorrt")


def test_kinds():
    assert library.check_kind("tensorrt") == "tensorrt"
    with pytest.raises(InputError, match="'trt' is no engine: expected one of tensorrt, tensorrt-rtx"):
        library.check_kind("trt")
    assert {packages.kinds_for(capability)[0] for capability in library.CARDS.values()} == {"tensorrt-rtx"}


@pytest.fixture
def trt():
    return (
        importlib.import_module("tensorrt_rtx")
        if library.installed("tensorrt-rtx")
        else pytest.skip("no tensorrt-rtx")
    )


def test_messages_go_to_logging(trt, caplog):
    told = []
    logger = library.make_logger(trt, lambda severity, message: told.append((severity, message)))
    severities = trt.ILogger.Severity
    with caplog.at_level(logging.DEBUG, library.LOGGER):
        for name in library.LEVELS:
            logger.log(getattr(severities, name), f"{name} 100%s {{}}")
    assert [(r.levelno, r.message) for r in caplog.records] == [
        (level, f"{name} 100%s {{}}") for name, level in library.LEVELS.items()
    ]
    assert [severity for severity, _ in told] == ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"]
    assert logger.take_errors() == ["INTERNAL_ERROR 100%s {}", "ERROR 100%s {}"]
    assert logger.take_errors() == logger.errors == []
    for number in range(2 * library.MOST_ERRORS):
        logger.log(severities.ERROR, str(number))
    assert logger.errors == [str(n) for n in range(library.MOST_ERRORS, 2 * library.MOST_ERRORS)]


def test_nothing_is_raised_into_tensorrt(trt, caplog):
    def fail(severity, message):
        raise ValueError("a sink that fails")

    library.make_logger(trt, fail).log(trt.ILogger.Severity.ERROR, "x")
    assert "a message of TensorRT was lost" in caplog.text


def test_the_first_logger_stays(trt):
    """TensorRT keeps a pointer to the first logger of the process."""
    library.make_logger(trt)
    first = library._first[trt.__name__]
    library.make_logger(trt)
    assert library._first[trt.__name__] is first


def test_nothing_of_tensorrt_is_printed_where_logging_was_not_set_up(trt, capfd):
    library.make_logger(trt).log(trt.ILogger.Severity.ERROR, "quoted in exceptions")
    assert capfd.readouterr().err == ""
