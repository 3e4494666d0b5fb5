"""The documentation is executed: README's code blocks and commands run as they stand there."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import glake_infer as gi
from glake_infer.models import zoo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the files that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    weight = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        folder / "model.onnx",
    )
    store = gi.Store(folder / "store")
    for name in "ab":
        zoo.convert(zoo.spec("bert-tiny", head=name), folder / f"{name}.glake", store=store)
    return folder


def environment(folder):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "GLAKE_STORE": str(folder / "store"), "PATH": path}


def run(command, folder):
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run(workplace):
    blocks = [block for block in BLOCKS if "cuda" not in block]
    assert len(blocks) == 3
    for block in blocks:
        assert run([sys.executable, "-W", "error", "-c", block], workplace)


@pytest.mark.gpu
def test_python_blocks_for_the_gpu_run(workplace):
    pytest.importorskip("torch")
    blocks = [block for block in BLOCKS if "cuda" in block]
    assert len(blocks) == 1
    converts = "import glake_infer as gi; gi.convert('model.onnx', 'model.glake')"
    run([sys.executable, "-c", converts], workplace)
    for block in blocks:
        assert run([sys.executable, "-c", block], workplace)


def test_commands_run(workplace):
    section = README.partition("## Convert, load, run")[2].partition("Every command")[0]
    commands = re.findall(r"^    (glake-infer .*?)(?:#.*)?$", section, re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        assert run(shlex.split(command), workplace)
    run(["glake-infer", "import", "a.tar", "-o", "c.glake"], workplace)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == gi.__version__


def test_every_public_name_is_there_and_documented():
    assert dir(gi) == sorted(dir(gi))
    for name in gi.__all__:
        assert name == "__version__" or getattr(gi, name).__doc__
    errors = (ROOT / "docs/errors.md").read_text()
    for name in gi.__all__:
        if name.endswith("Error"):
            assert f"`{name}`" in errors, name


def test_importing_is_light():
    code = (
        "import sys, glake_infer; dir(glake_infer);"
        "print([m for m in ('onnxruntime', 'onnx', 'numpy', 'tensorrt', 'cuda') if m in sys.modules])"
    )
    assert run([sys.executable, "-c", code], ROOT).strip() == "[]"
