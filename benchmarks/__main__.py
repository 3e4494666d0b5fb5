"""Run benchmarks by name; see the package's docstring."""

import importlib
import sys

NAMES = ("family", "real_models", "int8", "pool", "traces")


def main() -> None:
    """Run those that are named, or all."""
    chosen = sys.argv[1:] or NAMES
    if unknown := [name for name in chosen if name not in NAMES]:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are {', '.join(NAMES)}")
    for name in chosen:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
