"""What is installed, what works on this machine, and what to install for the rest.

Reads versions and files; imports no ONNX Runtime, TensorRT or CUDA. Only the NVIDIA driver is asked, through
ctypes, which GPUs there are (no context is made on them).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glake_infer.allocators.devices import cpu_memory
from glake_infer.allocators.errors import InputError
from glake_infer.allocators.sizes import format_bytes
from glake_infer.models.tensorrt import packages as tensorrt
from glake_infer.models.tensorrt.packages import Installed, Need
from glake_infer.store import default_root
from glake_infer.transfers.settings import transfer_settings
from glake_infer.version import __version__

PACKAGES = ("onnx", "numpy", "onnxruntime", "onnxruntime-gpu", "cuda-python")
NEEDED_ON_CUDA = (1, 27)
"""The oldest ONNX Runtime whose CUDA sessions a pool serves."""
CUDA_ERRORS = {
    100: "CUDA_ERROR_NO_DEVICE: no GPU that this process may use",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: the kernel module and libcuda.so.1 are of different versions; restart",
    999: "CUDA_ERROR_UNKNOWN: often a kernel module that is not loaded, or a container without the GPU's devices",
}
"""What cuInit says most often."""
NEEDED_MAPPINGS = 65_530
"""The kernel's usual vm.max_map_count. Each weight and each chunk of the pool is a mapping."""


@dataclass(frozen=True)
class PackageVersion:
    """A Python package that matters here; `version` is None where it is not installed."""

    name: str
    version: str | None
    detail: str = ""


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU. `memory` in bytes; None where only the kernel's driver answers."""

    index: int
    name: str
    memory: int | None = None
    compute_capability: str | None = None
    virtual_memory: bool | None = None
    """Whether the driver maps memory piece by piece there, which a pool needs."""


@dataclass(frozen=True)
class Check:
    """Something that was tried."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class DoctorReport:
    """Everything `glake-infer doctor` shows. Sizes in bytes."""

    packages: tuple[PackageVersion, ...]
    providers: tuple[str, ...]
    """ONNX Runtime's execution providers that are installed (by their files; none was loaded)."""
    cpu: str
    cores: int
    memory: int
    memory_available: int
    cgroup_limit: int | None
    gpus: tuple[Gpu, ...]
    gpu_note: str
    driver_cuda: str | None
    """The newest CUDA that the NVIDIA driver serves, as "13.0"."""
    onnxruntime_cuda: str | None
    """The CUDA that the installed ONNX Runtime was built for."""
    tensorrt: tuple[Need, ...]
    """What each GPU needs to run TensorRT engines, and what of it is installed."""
    store: str
    store_free: int
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    advice: tuple[str, ...]


def examine() -> DoctorReport:
    """Look at this machine. Writes nothing but a temporary folder at the store, which is removed again."""
    versions = {name: _version(name) for name in PACKAGES}
    engines = tensorrt.find_installed()
    providers = _providers()
    gpus, gpu_note, driver = find_gpus()
    needs = tuple(
        tensorrt.need(f"cuda:{gpu.index}", gpu.compute_capability, engines, driver)
        for gpu in gpus
        if gpu.compute_capability
    )
    built_for = _onnxruntime_cuda()
    store = default_root()
    meminfo = _meminfo()
    total, limit = meminfo.get("MemTotal", 0), cpu_memory()
    return DoctorReport(
        packages=(
            PackageVersion("python", platform.python_version(), platform.platform(terse=True)),
            PackageVersion("glake-infer", __version__),
            *(
                PackageVersion(n, v, ", ".join(providers) if v and n.startswith("onnxruntime") else "")
                for n, v in versions.items()
            ),
            *tensorrt_packages(engines),
        ),
        providers=providers,
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)),
        memory=total,
        memory_available=meminfo.get("MemAvailable", 0),
        cgroup_limit=limit if limit < total else None,
        gpus=gpus,
        gpu_note=gpu_note,
        driver_cuda=driver,
        onnxruntime_cuda=built_for,
        tensorrt=needs,
        store=str(store),
        store_free=shutil.disk_usage(_existing(store)).free,
        checks=(
            *_checks(store),
            *cuda_checks(versions, gpus, providers, driver, built_for),
            *tensorrt_checks(engines, needs),
        ),
        warnings=tuple(_warnings(versions, gpus)),
        advice=(*_advice(versions, gpus), *tensorrt_advice(engines, needs, driver)),
    )


def tensorrt_packages(engines: tuple[Installed, ...]) -> Iterator[PackageVersion]:
    """A line for each kind, installed or not."""
    for kind in sorted(tensorrt.BEST_FIRST):
        found = next((one for one in engines if one.kind == kind), None)
        yield (
            PackageVersion(kind, found.version, f"for CUDA {found.cuda}")
            if found
            else PackageVersion(kind, None)
        )


def tensorrt_checks(engines: tuple[Installed, ...], needs: tuple[Need, ...]) -> Iterator[Check]:
    """Whether what is installed serves the GPUs, or builds where there is none; nothing where none is installed."""
    for one in needs:
        if engines:
            run = f" For this GPU: {one.command}" if one.command else ""
            yield Check(f"TensorRT on {one.device}", one.uses is not None, f"{one.detail}{run and '.'}{run}")
    for found in engines:
        if not needs:
            wrong = tensorrt.misfit(found)
            does = (
                "builds engines here"
                if found.kind == "tensorrt-rtx"
                else "builds and runs engines only beside a GPU"
            )
            yield Check(tensorrt.NAMES[found.kind], not wrong, wrong or f"{found.version} {does}")


def tensorrt_advice(
    engines: tuple[Installed, ...], needs: tuple[Need, ...], driver: str | None
) -> Iterator[str]:
    """What to install for engines: for the GPUs that are here, or to build for others."""
    if not engines:
        for command in dict.fromkeys(one.command for one in needs if one.command):
            devices = ", ".join(one.device for one in needs if one.command == command)
            yield f"for TensorRT engines on {devices}: {command}"
        for one in needs:
            if not one.command:
                yield f"TensorRT on {one.device}: {one.detail}"
    if (
        not needs
        and not any(found.kind == "tensorrt-rtx" for found in engines)
        and not tensorrt.obstacle("tensorrt-rtx")
    ):
        yield f"to build TensorRT-RTX engines (needs no GPU): {tensorrt.install_command('tensorrt-rtx', driver)}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _providers() -> tuple[str, ...]:
    """Execution providers by the files of ONNX Runtime's wheel."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        return ()
    providers = ["CPUExecutionProvider"]
    spelled = {"cuda": "CUDA", "tensorrt": "Tensorrt", "nv_tensorrt_rtx": "NvTensorRTRTX"}
    for file in sorted((Path(found.origin).parent / "capi").glob("libonnxruntime_providers_*.so")):
        kind = file.name.removeprefix("libonnxruntime_providers_").removesuffix(".so")
        if kind != "shared":
            providers.append(f"{spelled.get(kind, kind)}ExecutionProvider")
    return tuple(providers)


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _meminfo() -> dict[str, int]:
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) << 10
    return found


def find_gpus() -> tuple[tuple[Gpu, ...], str, str | None]:
    """The NVIDIA GPUs, a sentence about the driver (why there are none, or its version), and the CUDA it serves."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        seen = tuple(Gpu(index, name) for index, name in enumerate(_kernel_gpus()))
        if seen:
            return (
                seen,
                "the kernel sees the GPU, but libcuda.so.1 is missing: install the driver's libraries",
                None,
            )
        return (), "none (no NVIDIA driver: libcuda.so.1 cannot be loaded)", None
    count, version = ctypes.c_int(), ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))  # needs no cuInit
    served = f"{version.value // 1000}.{version.value % 1000 // 10}"
    if code := cuda.cuInit(0):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hint = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        reason = CUDA_ERRORS.get(code, f"error {code}")
        return (), f"none (libcuda.so.1 is there, but cuInit failed: {reason}{hint})", served
    cuda.cuDeviceGetCount(ctypes.byref(count))
    gpus = tuple(_ask(cuda, index) for index in range(count.value))
    return gpus, f"CUDA {served}" if gpus else f"none (driver for CUDA {served})", served


def _ask(cuda: ctypes.CDLL, index: int) -> Gpu:
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    mapping = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(mapping), 102, device)  # VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
    capability = f"{major.value}.{minor.value}"
    return Gpu(index, name.value.decode(errors="replace"), memory.value, capability, bool(mapping.value))


def _kernel_gpus() -> Iterator[str]:
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        with contextlib.suppress(OSError):
            for line in file.read_text().splitlines():
                if line.startswith("Model:"):
                    yield line.partition(":")[2].strip()


def _onnxruntime_cuda() -> str | None:
    """The CUDA version that the installed ONNX Runtime was built for, read from its wheel."""
    found = importlib.util.find_spec("onnxruntime")
    if found is None or found.origin is None:
        return None
    with contextlib.suppress(OSError):
        text = (Path(found.origin).parent / "capi" / "build_and_package_info.py").read_text()
        if match := re.search(r"""^cuda_version\s*=\s*["']([\d.]+)["']""", text, re.MULTILINE):
            return match[1]
    return None


def cuda_checks(
    versions: dict[str, str | None],
    gpus: tuple[Gpu, ...],
    providers: tuple[str, ...],
    driver: str | None,
    built_for: str | None,
) -> Iterator[Check]:
    """What running on a GPU needs; nothing where there is neither a GPU nor the wheel for one."""
    if not gpus and not versions["onnxruntime-gpu"]:
        return
    if not gpus or driver is None:
        yield Check(
            "CUDA driver", False, "no GPU can be used (see above). Install or repair the NVIDIA driver."
        )
    elif built_for and int(built_for.split(".")[0]) > int(driver.split(".")[0]):
        yield Check(
            "CUDA driver",
            False,
            f"it serves CUDA up to {driver}, and ONNX Runtime is built for {built_for}. Update the driver.",
        )
    else:
        yield Check("CUDA driver", True, f"serves CUDA up to {driver}")
    for gpu in gpus:
        if gpu.virtual_memory is not None:
            yield Check(
                f"stitching on cuda:{gpu.index}",
                gpu.virtual_memory,
                "memory is mapped piece by piece"
                if gpu.virtual_memory
                else "the driver has no virtual memory management for this GPU: no pool can be made on it.",
            )
    version = versions["onnxruntime-gpu"]
    install = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'glake-infer[cuda]'"
    needed = ".".join(map(str, NEEDED_ON_CUDA))
    if version is None:
        yield Check("ONNX Runtime on CUDA", False, f"onnxruntime-gpu is not installed. {install}")
    elif "CUDAExecutionProvider" not in providers:
        yield Check(
            "ONNX Runtime on CUDA",
            False,
            f"onnxruntime-gpu {version} is installed, but its CUDA provider is gone (another wheel overwrote it): {install}",
        )
    elif tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < NEEDED_ON_CUDA:
        yield Check(
            "ONNX Runtime on CUDA", False, f"{version} is installed, {needed} or newer is needed. {install}"
        )
    else:
        yield Check(
            "ONNX Runtime on CUDA", True, f"{version}" + (f", for CUDA {built_for}" if built_for else "")
        )


def _checks(store: Path) -> Iterator[Check]:
    yield _tried(
        "native core",
        _try_native,
        "the C++ core loads",
        "Install glake-infer again: `pip install --force-reinstall glake-infer`.",
    )
    yield _tried(
        "memfd",
        _try_memfd,
        "pools on the CPU: real stitching",
        "Linux 3.17 or newer is needed, and no sandbox that forbids it.",
    )
    yield from _check_files(store)
    mappings = _number("/proc/sys/vm/max_map_count")
    yield Check(
        "max_map_count",
        mappings is None or mappings >= NEEDED_MAPPINGS,
        f"{mappings} mappings per process (one for each weight and each chunk); raise it with "
        "`sysctl vm.max_map_count=262144`"
        if mappings is not None and mappings < NEEDED_MAPPINGS
        else f"{mappings} mappings per process",
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    locked = "unlimited" if soft == resource.RLIM_INFINITY else format_bytes(soft)
    yield Check("locked memory", True, f"limit {locked} (nothing here locks memory on the CPU)")
    yield _check_transfers()
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield Check(
        "open files",
        files >= 256,
        f"limit {files}" + ("" if files >= 256 else "; raise it with `ulimit -n 1024`"),
    )


def _check_transfers() -> Check:
    try:
        settings = transfer_settings()
    except InputError as error:
        return Check("transfers", False, f"{error} Every load would fail: correct the variable.")
    return Check(
        "transfers",
        True,
        f"{settings.reader_count} readers, at most {format_bytes(settings.in_flight)} page-locked between files and GPUs, "
        f"paths: {settings.paths}. `glake-infer links` measures them",
    )


def _try_native() -> None:
    importlib.import_module("glake_infer.allocators._native")


def _try_memfd() -> None:
    os.close(os.memfd_create("glake-doctor"))


def _tried(name: str, action: Callable[[], None], purpose: str, remedy: str) -> Check:
    try:
        action()
    except (OSError, ImportError, AttributeError) as error:
        return Check(name, False, f"{error}. {remedy}")
    return Check(name, True, purpose)


def _check_files(store: Path) -> Iterator[Check]:
    """Try the store's file system in a temporary folder as near to the store as there is one."""
    where = _existing(store)
    try:
        scratch = tempfile.TemporaryDirectory(prefix=".glake-doctor-", dir=where)
    except OSError as error:
        yield Check(
            "store", False, f"{where}: {error.strerror}. Make it writable, or point GLAKE_STORE elsewhere."
        )
        return
    with scratch as folder:
        yield Check("store", True, "writable" if where == store else f"will be made below {where}")
        yield _tried(
            "hard links", lambda: _try_link(Path(folder)), "weights enter the store in one step",
            "The store needs a file system with hard links: point GLAKE_STORE elsewhere.",
        )  # fmt: skip
        yield _tried(
            "rename exchange", lambda: _try_exchange(Path(folder)), "packages are replaced in one step",
            "Packages are replaced in two steps here: do not convert while somebody loads the same one.",
        )  # fmt: skip


def _try_link(folder: Path) -> None:
    (folder / "a").touch()
    (folder / "b").hardlink_to(folder / "a")


def _try_exchange(folder: Path) -> None:
    (folder / "c").mkdir()
    (folder / "d").mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, bytes(folder / "c"), -100, bytes(folder / "d"), 2):  # AT_FDCWD, RENAME_EXCHANGE
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):
        return None


def _warnings(versions: dict[str, str | None], gpus: tuple[Gpu, ...]) -> Iterator[str]:
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        yield (
            "onnxruntime and onnxruntime-gpu are both installed, and overwrite each other's files. Keep one: "
            "`pip uninstall -y onnxruntime onnxruntime-gpu`, then `pip install 'glake-infer[cpu]'` "
            "or `pip install 'glake-infer[cuda]'`."
        )
    if gpus and versions["onnxruntime"] and not versions["onnxruntime-gpu"]:
        yield "there is a GPU, but the ONNX Runtime installed here is the one for the CPU."


def _advice(versions: dict[str, str | None], gpus: tuple[Gpu, ...]) -> Iterator[str]:
    if not versions["onnxruntime"] and not versions["onnxruntime-gpu"]:
        extra = "cuda" if gpus else "cpu"
        yield f"to run models: pip install 'glake-infer[{extra}]'"
    elif gpus and not versions["onnxruntime-gpu"]:
        yield "to run on the GPU: pip uninstall -y onnxruntime, then pip install 'glake-infer[cuda]'"
