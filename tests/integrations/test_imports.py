"""The trainers' packages are needed by their own module alone, and a missing one is named."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("lightning", "accelerate", "transformers")

WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("lightning", "accelerate", "transformers"):
            raise ImportError(f"No module named {name!r}")

sys.meta_path.insert(0, Blocker())
import importlib
import mpengine
import mpengine.integrations

for name in ("lightning", "accelerate", "transformers"):
    try:
        importlib.import_module(f"mpengine.integrations.{name}")
    except ImportError as error:
        print(error)
"""


def test_a_missing_package_is_named_with_its_remedy():
    run = subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.rpartition(": ")[2] for line in lines] == [
        "pip install lightning",
        "pip install accelerate",
        "pip install transformers accelerate",
    ]
    assert all(line.startswith(f"mpengine.integrations.{name} needs") for line, name in zip(lines, NAMES, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_public_names_have_docstrings_and_types(name):
    module = importlib.import_module(f"mpengine.integrations.{name}")
    assert module.__doc__
    own = [
        v for k, v in vars(module).items() if not k.startswith("_") and getattr(v, "__module__", "") == module.__name__
    ]
    assert any(inspect.isclass(thing) for thing in own)
    for thing in own:
        methods = [f for n, f in vars(thing).items() if inspect.isfunction(f) and not n.startswith("_")]
        for documented in (thing, *methods):
            assert inspect.getdoc(documented), documented
        for method in methods:
            signature = inspect.signature(method)
            parameters = [p for p in signature.parameters.values() if p.name != "self"]
            assert all(p.annotation is not p.empty for p in parameters), method
            assert signature.return_annotation is not signature.empty, method


def test_nothing_else_imports_the_integrations():
    for path in (ROOT / "mpengine").glob("*.py"):
        assert "integrations" not in path.read_text(), path


def test_every_package_is_installed():
    setup = (ROOT / "setup.py").read_text()
    folders = {path.parent.name for path in (ROOT / "mpengine").glob("*/__init__.py")}
    assert {"integrations", "kernels"} <= folders
    for folder in folders:
        assert f'"mpengine.{folder}"' in setup
