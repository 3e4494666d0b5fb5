"""The one place that picks a TensorRT: `tensorrt` or `tensorrt_rtx`, which have the same Python API.

Everything else takes the module from here. Nothing is imported before `module` is called.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args

from glake_infer.allocators.errors import InputError, MissingDependencyError
from glake_infer.models.tensorrt import packages
from glake_infer.models.tensorrt.packages import Kind as Kind

KINDS: tuple[Kind, ...] = get_args(Kind)

CARDS = {"a10": "8.6", "3090": "8.6", "l4": "8.9", "4090": "8.9"}
"""Compute capability of each card that has a name here."""

LOGGER = "glake_infer.tensorrt"
"""Where TensorRT's messages go in Python's logging."""

MOST_ERRORS = 100
"""Errors that a logger keeps until they are taken."""

LEVELS = {
    "INTERNAL_ERROR": logging.CRITICAL,
    "ERROR": logging.ERROR,
    "WARNING": logging.WARNING,
    "INFO": logging.INFO,
    "VERBOSE": logging.DEBUG,
}

SECOND_LOGGER = "The logger passed into create"
"""What TensorRT warns of at every builder and runtime but the process's first: it is meant to be so."""

Sink = Callable[[str, str], None]
"""Called with (severity, message) for each message of INFO and above; severities are the keys of LEVELS."""

_log = logging.getLogger(LOGGER)
_log.addHandler(
    logging.NullHandler()
)  # errors are quoted in exceptions; whoever wants the log configures logging
_first: dict[str, Any] = {}
_first_lock = threading.Lock()


def check_kind(kind: str) -> Kind:
    """`kind` as one of KINDS; raises InputError for anything else."""
    for known in KINDS:
        if kind == known:
            return known
    raise InputError(f"{kind!r} is no engine: expected one of {', '.join(KINDS)}.")


def module(kind: Kind) -> ModuleType:
    """Import and return TensorRT. Raises MissingDependencyError with the command to run on this machine."""
    check_kind(kind)
    try:
        return importlib.import_module(kind.replace("-", "_"))
    except ImportError as error:
        raise _missing(kind, error) from error


def version(kind: Kind) -> str:
    """The installed TensorRT's version, as its package has it; raises MissingDependencyError."""
    return str(module(kind).__version__)


def installed(kind: Kind) -> bool:
    """Whether TensorRT is installed here, by its package's metadata; nothing is imported."""
    return any(found.kind == kind for found in packages.find_installed())


def capabilities_here() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs ("8.6"), by the driver; empty where there is none."""
    from glake_infer.models.doctor import find_gpus

    return tuple(gpu.compute_capability for gpu in find_gpus()[0] if gpu.compute_capability)


def _missing(kind: Kind, error: ImportError) -> MissingDependencyError:
    from glake_infer.models.doctor import find_gpus

    gpus, _, driver = find_gpus()
    here = [gpu.compute_capability for gpu in gpus if gpu.compute_capability]
    name, command = packages.NAMES[kind], packages.install_command(kind, driver)
    for found in packages.find_installed():
        if found.kind == kind:
            what = f"{name} {found.version} is installed, but cannot be imported: {error}. Install it again: "
            what += f"pip install --force-reinstall {found.distribution}"
            break
    else:
        hindered = packages.obstacle(kind, driver)
        what = (
            f"{name} is not installed here. "
            + (f"{hindered}; then" if hindered else "Install it:")
            + f" {command}"
        )
    if not here:
        other = packages.install_command("tensorrt-rtx", driver)
        why = (
            "it builds engines without a GPU"
            if kind == "tensorrt-rtx"
            else f"this machine has no GPU, which it needs to build; TensorRT-RTX does not: {other}"
        )
        return MissingDependencyError(f"{what} ({why}).")
    kinds = packages.kinds_for(here[0])
    if kind in kinds:
        return MissingDependencyError(f"{what} (for this machine's GPU of compute capability {here[0]}).")
    other = f"{packages.NAMES[kinds[0]]}: {packages.install_command(kinds[0], driver)}" if kinds else "none"
    return MissingDependencyError(
        f"{what} (but this machine's GPU has compute capability {here[0]}, for which the engine is {other})."
    )


def make_logger(trt: ModuleType, sink: Sink | None = None) -> Any:
    """Return an ILogger of the module `trt` that writes to Python's logging and keeps errors.

    Messages go to the logger "glake_infer.tensorrt" at matching levels (VERBOSE is DEBUG). `logger.errors` lists the
    errors since they were last taken, the newest MOST_ERRORS; `logger.take_errors()` returns and clears them. `sink`
    gets every message from INFO up. Thread-safe. TensorRT keeps the first logger of a process for its
    own use, so that one is never destroyed.
    """
    logger = _logger_class(trt)(sink)
    with _first_lock:
        _first.setdefault(trt.__name__, logger)
    return logger


@functools.cache
def _logger_class(trt: ModuleType) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self, sink: Sink | None) -> None:
            trt.ILogger.__init__(self)
            self._sink = sink
            self._lock = threading.Lock()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT, from any thread; nothing may be raised into it."""
            try:
                name = severity.name
                level = LEVELS.get(name, logging.INFO)
                if SECOND_LOGGER in message:
                    level = logging.DEBUG
                if level >= logging.ERROR:
                    with self._lock:
                        self.errors.append(message)
                        del self.errors[:-MOST_ERRORS]
                if self._sink is not None and level >= logging.INFO:
                    self._sink(name, message)
                _log.log(level, "%s", message)
            except Exception:
                _log.exception("a message of TensorRT was lost")

        def take_errors(self) -> list[str]:
            """Return the errors since the last call."""
            with self._lock:
                errors, self.errors = self.errors, []
            return errors

    return Logger
