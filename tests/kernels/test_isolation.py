"""`kernels` is a leaf: it imports nothing of mpengine but itself, and without Triton it still imports."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "kernels").glob("*.py"))
WITHOUT_TRITON = {"__init__", "layout"}
ALLOWED = {"__future__", "collections", "contextlib", "typing", "numpy", "operator", "torch", "triton"}


def imported(tree):
    """(module, level) of every import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


def offences(source, stem):
    found = []
    for module, level in imported(ast.parse(source)):
        top = module.split(".")[0]
        if (
            level > 1
            or (level == 0 and top not in ALLOWED)
            or (stem in WITHOUT_TRITON and top in {"numpy", "torch", "triton"})
        ):
            found.append("." * level + module)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_kernel_file_imports_only_its_own_package(path):
    assert offences(path.read_text(), path.stem) == []


@pytest.mark.parametrize(
    "line",
    ["import mpengine", "from mpengine import rules", "from .. import masters", "import kernels", "import scipy"],
)
def test_a_forbidden_import_is_noticed(line):
    assert offences(line, "update")


def run(code):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


BLOCK_TRITON = "import sys; sys.modules['triton'] = None\n"


def test_the_package_imports_without_triton():
    done = run(BLOCK_TRITON + "import mpengine.kernels, mpengine.kernels.layout, mpengine.reference")
    assert done.returncode == 0, done.stderr


def test_the_launchers_need_triton():
    done = run(BLOCK_TRITON + "import mpengine.kernels.launch")
    assert "ModuleNotFoundError" in done.stderr
    assert "triton" in done.stderr


def test_importing_the_kernels_compiles_nothing_and_touches_no_device():
    done = run("import mpengine.kernels.launch, torch; assert not torch.cuda.is_initialized()")
    assert done.returncode == 0, done.stderr
