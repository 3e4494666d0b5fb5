"""Which GPU needs which TensorRT, and the command that installs it.

Tables and functions of them; no TensorRT is imported. The sources are NVIDIA's support matrices (TensorRT 11.4,
TensorRT-RTX 1.7) and the package index, where TensorRT-RTX begins at 1.4.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["tensorrt", "tensorrt-rtx"]
"""The name of the package on the index, of the extra, and of the engine in a manifest."""

BEST_FIRST: tuple[Kind, ...] = ("tensorrt-rtx", "tensorrt")
NAMES: Mapping[Kind, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
OLDEST: Mapping[Kind, tuple[int, int]] = {"tensorrt": (10, 9), "tensorrt-rtx": (1, 4)}
"""The oldest versions that engines run with: pyproject.toml's bounds."""
RTX_SERVES = ("7.5", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of TensorRT-RTX: GeForce and RTX GPUs from Turing on, and with them A10, L4 and L40."""
FIRST_SERVED = (7, 5)
"""TensorRT's own bound. It serves everything from there on, data-center GPUs (8.0, 9.0, 10.x) alone."""
LAST_PYTHON = (3, 14)
"""The newest Python that both have packages for."""
PACKAGED: Mapping[str, Mapping[Kind, tuple[int, ...]]] = {
    "x86_64": {"tensorrt": (12, 13), "tensorrt-rtx": (12, 13)},
    "aarch64": {"tensorrt": (13,), "tensorrt-rtx": (13,)},
}
"""CUDA versions that there are packages for, by processor and kind."""
DEFAULT_CUDA = 13
"""What the packages without a suffix bring, and ONNX Runtime's for CUDA too."""


@dataclass(frozen=True)
class Installed:
    """A TensorRT that is installed. `cuda` is the major version of CUDA that it was built for."""

    kind: Kind
    version: str
    cuda: int = DEFAULT_CUDA

    @property
    def distribution(self) -> str:
        """The name of the package that brings it."""
        return f"{self.kind}-cu{self.cuda}"


def find_installed() -> tuple[Installed, ...]:
    """What is installed of both, by whichever of its names: the one with CUDA's version says more than the bare one."""
    found = []
    for kind in BEST_FIRST:
        for name, cuda in ((f"{kind}-cu12", 12), (f"{kind}-cu13", 13), (kind, DEFAULT_CUDA)):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(Installed(kind, importlib.metadata.version(name), cuda))
                break
    return tuple(found)


def kinds_for(capability: str) -> tuple[Kind, ...]:
    """The kinds that serve a compute capability ("8.6"), the one to take first; none for GPUs before Turing.

    Where both do it is TensorRT-RTX: its engines are built on any machine, without a GPU, and run on each card named at
    the build.
    """
    if capability in RTX_SERVES:
        return BEST_FIRST
    return ("tensorrt",) if _numbers(capability) >= FIRST_SERVED else ()


def obstacle(
    kind: Kind, cuda: str | None = None, machine: str = "", python: tuple[int, int] | None = None
) -> str:
    """Why `install_command` would not do here; empty where it does. `cuda`: the newest that the driver serves ("13.0")."""
    machine, python = machine or platform.machine(), python or sys.version_info[:2]
    served = PACKAGED[machine][kind] if machine in PACKAGED else ()
    major = _major(cuda)
    if not served:
        return f"there are no packages of {NAMES[kind]} for {machine} on the package index"
    if min(served) > major:
        return f"{NAMES[kind]} on {machine} needs a driver for CUDA {min(served)}, and this one serves {cuda}: update it"
    if python > LAST_PYTHON:
        needed = ".".join(map(str, LAST_PYTHON))
        return f"{NAMES[kind]} has packages up to Python {needed}, and this is {'.'.join(map(str, python))}"
    return ""


def install_command(kind: Kind, cuda: str | None = None) -> str:
    """The pip command that installs it for a driver that serves `cuda` ("13.0"; None: unknown, or there is none)."""
    if _major(cuda) >= DEFAULT_CUDA:
        return f"pip install 'glake-infer[{kind}]'"
    return f"pip install '{kind}-cu12>={'.'.join(map(str, OLDEST[kind]))}'"


def misfit(installed: Installed, capability: str | None = None, cuda: str | None = None) -> str:
    """Why an installed TensorRT does not do for a GPU and its driver; empty where it does.

    Without `capability` and `cuda` only its version is looked at: building for other machines needs no GPU.
    """
    name = f"{NAMES[installed.kind]} {installed.version}"
    if _numbers(installed.version) < OLDEST[installed.kind]:
        return f"{name} is older than {'.'.join(map(str, OLDEST[installed.kind]))}"
    if cuda is not None and installed.cuda > _major(cuda):
        return f"{name} is for CUDA {installed.cuda}, and the driver serves {cuda}"
    if capability is not None and installed.kind not in kinds_for(capability):
        serves = ", ".join(RTX_SERVES) if installed.kind == "tensorrt-rtx" else "7.5 and newer"
        return f"{name} does not serve compute capability {capability} (it serves {serves})"
    if capability == "12.1" and installed.kind == "tensorrt-rtx" and _numbers(installed.version) < (1, 5):
        return f"{name} does not serve compute capability 12.1 (1.5 is the first that does)"
    return ""


@dataclass(frozen=True)
class Need:
    """What one GPU needs to run engines."""

    device: str
    capability: str
    kinds: tuple[Kind, ...]
    """What serves it, the one to take first."""
    uses: str | None
    """What is installed and will do, as "TensorRT-RTX 1.7.1.116"."""
    detail: str
    """What serves the GPU, or why nothing that is installed does."""
    command: str
    """What to run to have it; empty where there is nothing to install."""


def need(
    device: str,
    capability: str,
    installed: Iterable[Installed] = (),
    cuda: str | None = None,
    machine: str = "",
) -> Need:
    """What a GPU of that compute capability needs, beside what is installed, with a driver that serves `cuda`."""
    kinds = kinds_for(capability)
    if not kinds:
        return Need(
            device,
            capability,
            (),
            None,
            f"no TensorRT serves compute capability {capability} (7.5 is the first)",
            "",
        )
    here = sorted(installed, key=lambda found: kinds.index(found.kind) if found.kind in kinds else len(kinds))
    misfits = [misfit(found, capability, cuda) for found in here]
    for found, wrong in zip(here, misfits, strict=True):
        if not wrong:
            uses = f"{NAMES[found.kind]} {found.version}"
            return Need(device, capability, kinds, uses, f"{uses} serves compute capability {capability}", "")
    hindered = {kind: obstacle(kind, cuda, machine) for kind in kinds}
    able = [kind for kind in kinds if not hindered[kind]]
    detail = "; ".join(misfits) or f"engines need {' or '.join(NAMES[kind] for kind in kinds)}"
    if not able:
        return Need(device, capability, kinds, None, f"{detail}; {'; '.join(hindered.values())}", "")
    return Need(device, capability, kinds, None, detail, install_command(able[0], cuda))


def _major(cuda: str | None) -> int:
    return DEFAULT_CUDA if cuda is None else int(cuda.split(".")[0])


def _numbers(version: str) -> tuple[int, int]:
    first, _, rest = version.partition(".")
    second = rest.partition(".")[0]
    return (int(first), int(second)) if first.isdigit() and second.isdigit() else (0, 0)
