"""An allocate and a free of an exact fit, beside the twin: `glake-infer bench pool`, as one line per size.

python -m benchmarks.pool [DEVICE]
"""

import json
import subprocess
import sys

from benchmarks.record import record


def main() -> None:
    """Record one line per size."""
    device = sys.argv[1] if sys.argv[0].endswith("pool.py") and len(sys.argv) > 1 else "cpu"
    command = [sys.executable, "-m", "glake_infer.cli", "bench", "pool", "--json", "--device", device]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        record("pool", json.loads(line))


if __name__ == "__main__":
    main()
