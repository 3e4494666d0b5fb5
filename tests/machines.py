"""A place where programs with daemons run, none of which may stay: folders of their own for sockets, sessions, stores."""

import contextlib
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path


@contextlib.contextmanager
def machine():
    """Yield a folder and the environment of what runs in it. Afterwards nothing of it may run but a broker."""
    folder = Path(tempfile.mkdtemp(prefix="glake-", dir="/tmp"))  # short: sockets lie in it
    (folder / "run").mkdir(mode=0o700)
    try:
        yield (
            folder,
            {
                "TMPDIR": str(folder),
                "XDG_RUNTIME_DIR": str(folder / "run"),
                "GLAKE_BROKER": "auto",
                "RAY_TMPDIR": str(folder),
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_AUTH_MODE": "disabled",
            },
        )
    finally:
        end = time.monotonic() + 20
        while (left := running_in(folder)) and time.monotonic() < end:
            if all("broker" in command for command in left.values()):
                break
            time.sleep(0.2)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        shutil.rmtree(folder)
    assert all("broker" in command for command in left.values()), left


def running_in(folder):
    """{pid: command} of the processes that have this folder in their environment."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (entry / "environ").read_bytes():
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found
