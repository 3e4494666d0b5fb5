"""A libcuda.so.1 for machines without one: it counts and names devices and refuses the rest.

It is found as the real one is, through the loader (LD_LIBRARY_PATH), so it needs a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

CODES = {"CUDA_SUCCESS": 0, "CUDA_ERROR_OUT_OF_MEMORY": 2, "CUDA_ERROR_NO_DEVICE": 100, "CUDA_ERROR_INVALID_DEVICE": 101,
         "CUDA_ERROR_ILLEGAL_ADDRESS": 700, "CUDA_ERROR_NOT_SUPPORTED": 801,
         "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": 803}  # fmt: skip

SOURCE = """
#include <stdio.h>
int cuDriverGetVersion(int *version) { *version = VERSION; return VERSION ? 0 : 1; }
int cuInit(unsigned flags) { return INIT; }
int cuGetErrorName(int code, const char **name) {
  switch (code) { NAMES }
  return 1;
}
int cuGetErrorString(int code, const char **text) { *text = "as the fake says"; return 0; }
int cuDeviceGetCount(int *count) { *count = DEVICES; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index < DEVICES ? 0 : 101; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Fake GPU %d", device); return 0; }
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) { *bytes = (80ul + device) << 30; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 141 ? HOST : attribute == 134 ? -1 : VMM;
  return 0;
}
int cuMemGetAllocationGranularity(unsigned long *bytes, const void *properties, int kind) {
  *bytes = 2ul << 20;
  return MEMORY;
}
int cuStreamCreate(void **stream, unsigned flags) { *stream = (void *)8; return MEMORY; }
int cuMemCreate(void **handle, unsigned long bytes, const void *properties, unsigned long long flags) {
  return CREATE;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)8; return RETAIN; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
"""
REFUSE = "int {symbol}(void) {{ return 801; }}\n"


def symbols() -> list[str]:
    """Every function that the native core asks the driver for."""
    header = Path(__file__).parents[2] / "allocators" / "cuda_driver.hpp"
    return re.findall(r'F\(\w+,\s*"(cu\w+)"', header.read_text())


def build(
    folder,
    *,
    version=13000,
    devices=1,
    init="CUDA_SUCCESS",
    vmm=1,
    retain="CUDA_SUCCESS",
    host=1,
    memory="CUDA_ERROR_NOT_SUPPORTED",
    create="CUDA_ERROR_NOT_SUPPORTED",
    without=(),
) -> Path:
    """Compile a driver into `folder` and return the folder; `without` are symbols that it lacks."""
    names = "".join(f'case {code}: *name = "{name}"; return 0;' for name, code in CODES.items())
    source = SOURCE.replace("NAMES", names)
    for key, value in {"VERSION": version, "DEVICES": devices, "INIT": CODES[init], "VMM": vmm,
                       "RETAIN": CODES[retain], "HOST": host, "MEMORY": CODES[memory],
                       "CREATE": CODES[create]}.items():  # fmt: skip
        source = source.replace(key, str(value))
    source += "".join(REFUSE.format(symbol=s) for s in symbols() if f" {s}(" not in source)
    for symbol in without:
        source = source.replace(f" {symbol}(", f" missing_{symbol}(")
    (folder / "fake.c").write_text(source)
    command = ["cc", "-shared", "-fPIC", "-w", "-o", folder / "libcuda.so.1", folder / "fake.c"]
    subprocess.run(command, check=True)
    return Path(folder)


def run(driver, code, *arguments, **environment) -> str:
    """Run Python code in a process that sees the driver in this folder, and return its output."""
    kept = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment = {
        **kept,
        "LD_LIBRARY_PATH": str(driver),
        "PYTHONPATH": os.pathsep.join(sys.path),
        **environment,
    }
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
