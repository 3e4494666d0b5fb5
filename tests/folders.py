"""Looking at folders: what is in them, what is half-written."""

from __future__ import annotations

from pathlib import Path


def tree(folder):
    """{relative path: bytes} of everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def temporaries(*folders):
    """What looks half-written below the folders."""
    return [path for folder in folders for path in Path(folder).rglob("*") if path.name.endswith(".tmp")]


def flip_bit(path, at=100):
    """Change one bit of a file of the store, or change it back."""
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))
