"""Imports run one way, `kernels` is a leaf, CPU use needs no Triton, and public names are typed and documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import mpengine

ROOT = Path(__file__).parents[1]

# Who may import whom: a module may use those in the levels before its own.
LEVELS = [
    {"scaling", "rules"},
    {"masters"},
    {"reference", "gradients"},
    {"backend", "watchdog"},
    {"plain", "loss_scales", "general", "validation"},
    {"execution", "checkpoint"},
    {"grad_scaler", "holdings"},
    {"optimizer"},
    {"precision"},
]


def runtime_imports(path):
    """Modules of mpengine that a file imports, but for those that only type checkers see."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "mpengine":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpengine."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mpengine.")}
    return found


def modules():
    return sorted(path for path in (ROOT / "mpengine").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_imports_run_one_way(path):
    level = next((i for i, names in enumerate(LEVELS) if path.stem in names), None)
    assert level is not None, f"{path.stem} has no level: add it to LEVELS"
    allowed = {"kernels"}.union(*LEVELS[:level])
    assert runtime_imports(path) <= allowed


def test_an_import_against_the_order_is_seen(tmp_path):
    file = tmp_path / "scaling.py"
    file.write_text("from mpengine.optimizer import MixedPrecisionOptimizer\n")
    assert not runtime_imports(file) <= {"kernels"}


def test_nobody_imports_the_bare_package_kernels():
    for path in ROOT.glob("**/*.py"):
        if ".venv" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert all(alias.name.split(".")[0] != "kernels" for alias in node.names), path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert (node.module or "").split(".")[0] != "kernels", path


def test_a_cpu_needs_no_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"  # makes every import of it fail
        "import torch, mpengine\n"
        "model = torch.nn.Linear(4, 4)\n"
        "scaler = mpengine.GradScaler('cpu')\n"
        "optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler)\n"
        "scaler.scale(model(torch.randn(2, 4).half()).float().mean()).backward()\n"
        "optimizer.step(); scaler.update(); assert optimizer.steps_taken == 1\n"
        "assert 'mpengine.kernels.launch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("name", mpengine.__all__)
def test_public_names_are_documented_and_typed(name):
    thing = getattr(mpengine, name)
    assert thing.__doc__
    if inspect.ismodule(thing):
        return
    functions = [thing] if inspect.isfunction(thing) else [f for f in vars(thing).values() if inspect.isfunction(f)]
    for function in functions:
        if function.__name__.startswith("_") or function.__module__.split(".")[0] != "mpengine":
            continue
        assert function.__doc__, function
        assert "return" in function.__annotations__, function
