"""The command line as users run it: in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import glake_infer as gi
from glake_infer.models import zoo


class Process(subprocess.Popen):
    """A process that does not outlive its `with`, whatever the test in it finds."""

    def __exit__(self, *error):
        self.kill()
        super().__exit__(*error)


class Shop:
    """A folder with two small encoders of one trunk (a, b), ONNX and packages, and a store of its own."""

    def __init__(self, folder):
        self.folder = folder
        self.store = gi.Store(folder / "store")

    def start(self, *arguments, env=None, **options):
        command = [sys.executable, "-m", "glake_infer.cli", *map(str, arguments)]
        environment = {**os.environ, "GLAKE_STORE": str(self.store.root), "COLUMNS": "80", **(env or {})}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return Process(command, env=environment, cwd=self.folder, text=True, **options)

    def run(self, *arguments, code=0, env=None):
        """Run a command; returns (stdout, stderr) of one that ends with `code`."""
        with self.start(*arguments, env=env) as process:
            out, err = process.communicate()
        assert process.returncode == code, out + err
        assert "Traceback" not in err, err
        return out, err

    def json(self, *arguments, code=0):
        """Run a command with --json; returns the one document on stdout."""
        out, err = self.run(*arguments, "--json", code=code)
        assert err == ""
        return json.loads(out)

    def error(self, *arguments, env=None):
        """Run a command that must fail with a message; returns the message."""
        out, err = self.run(*arguments, code=2, env=env)
        assert out == ""
        assert err.startswith("error: "), err
        return err


def fill(shop):
    for head, labels in (("a", 2), ("b", 17)):
        zoo.write(zoo.spec("bert-tiny", layers=1, head=head, labels=labels), shop.folder / f"{head}.onnx")
        gi.convert(shop.folder / f"{head}.onnx", shop.folder / f"{head}.glake", store=shop.store)
    return shop


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A filled shop that tests only read; what they write has a name of its own."""
    return fill(Shop(tmp_path_factory.mktemp("shop")))


@pytest.fixture
def own_shop(tmp_path):
    """A filled shop for a test that damages things."""
    return fill(Shop(tmp_path))


@pytest.fixture
def empty_shop(tmp_path):
    """A shop with nothing in it."""
    return Shop(tmp_path)


@pytest.fixture
def fits():
    """Check that every line fits a terminal of 80 columns and ends without blanks."""

    def check(text):
        for line in text.splitlines():
            assert len(line) <= 80, line
            assert line == line.rstrip(), line

    return check


def pytest_configure():
    sys.path.insert(0, str(Path(__file__).parent))
