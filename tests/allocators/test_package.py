"""The package's surface: lazy, complete, and described by its stub (__init__.py, _native.pyi)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import glake_infer.allocators as allocators


def test_the_names_are_sorted_and_all_there():
    assert allocators.__all__ == sorted(allocators.__all__)
    assert set(allocators.__all__) == set(allocators._HOMES)
    for name in allocators.__all__:
        assert getattr(allocators, name).__name__ == name
    assert dir(allocators) == allocators.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = allocators.nothing


@pytest.mark.parametrize("use", ["", "; a.errors.GlakeError; a.Pool; a.PoolStats; a.parse_bytes('1GiB')"])
def test_importing_loads_nothing_heavy(use):
    code = (
        f"import sys, glake_infer.allocators as a, glake_infer.allocators.errors{use}; "
        "print([m for m in sys.modules if m.split('.')[0] in "
        "('onnxruntime', 'numpy', 'onnx', 'tensorrt', 'cuda') or m.endswith('_native')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_stub_is_up_to_date(tmp_path):
    """If not: configure with -DGLAKE_UPDATE_STUB=ON, build, ruff check --fix, ruff format."""
    stubgen = pytest.importorskip("nanobind.stubgen", reason="nanobind is not installed")
    source = Path(allocators.__file__).parent
    made = tmp_path / "_native.pyi"
    arguments = ["-m", "glake_infer.allocators._native", "-D", "-q", "-o", str(made)]
    patterns = source / "_native.patterns"
    patterns_here = tmp_path / "patterns"
    patterns_here.write_text(patterns.read_text().replace("_native.", "glake_infer.allocators._native.", 1))
    stubgen.main([*arguments, "-p", str(patterns_here)])

    def shape(path: Path) -> list[str]:
        body = ast.parse(path.read_text()).body
        return sorted(ast.dump(node) for node in body if not isinstance(node, ast.Expr))

    assert shape(made) == shape(source / "_native.pyi")
