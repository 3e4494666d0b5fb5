"""Ten real models out of pinned wheels (real-models.json), fetched once into a cache; never committed.

The cache is $GLAKE_TEST_CACHE, or ~/.cache/glake-infer-tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

ENTRIES = {
    entry["name"]: entry
    for entry in json.loads(Path(__file__).with_name("real-models.json").read_text())["models"]
}


def cache():
    return Path(os.environ.get("GLAKE_TEST_CACHE") or Path.home() / ".cache" / "glake-infer-tests")


def path_of(name):
    """The model's file, fetched, checked and extracted where that was not done before."""
    entry = ENTRIES[name]
    target = cache() / "models" / name / Path(entry["file"]).name
    if not target.is_file() or _sha256(target) != entry["sha256"]:
        with zipfile.ZipFile(_wheel(entry)) as wheel:
            data = wheel.read(entry["file"])
        assert hashlib.sha256(data).hexdigest() == entry["sha256"], name
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.write_bytes(data)
        temporary.replace(target)
    return target


def _wheel(entry):
    folder = cache() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = f"{entry['package'].replace('-', '_')}-{entry['version']}-".lower()

    def found():
        candidates = [path for path in folder.glob("*.whl") if path.name.lower().startswith(prefix)]
        return next((path for path in candidates if _sha256(path) == entry["wheel_sha256"]), None)

    if (wheel := found()) is None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        subprocess.run(
            [*command, "--dest", str(folder), f"{entry['package']}=={entry['version']}"], check=True
        )
        wheel = found()
    assert wheel is not None, f"{entry['package']}=={entry['version']} does not have the pinned sha256"
    return wheel


def _sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def feeds_of(name):
    """Every listed feed: token ids, masks of ones, pixels, the sampling rate, small numbers."""
    rng = np.random.default_rng(1)
    for listed in ENTRIES[name]["inputs"]:
        feeds = {}
        for key, dtype, shape in listed:
            if key == "input_ids":
                data = rng.integers(1000, 30000, shape)
            elif key == "attention_mask":
                data = np.ones(shape)
            elif key == "token_type_ids":
                data = np.zeros(shape)
            elif key == "sr":
                data = np.full(shape, 16000)
            elif key == "images":
                data = rng.uniform(0, 255, shape)
            else:
                data = rng.standard_normal(shape) * 0.1
            feeds[key] = np.asarray(data).astype(dtype)
        yield feeds
