"""The house: imports run one way, the kernels are a leaf, Triton is not needed, public names are documented."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import mpengine
from mpengine import rules

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mpengine"

# Each module imports only modules that stand before it.
ORDER = [
    "kernels.layout",
    "scaling",
    "rules.declaration",
    "rules.arithmetic",
    "rules.sgd",
    "rules.adam",
    "rules.adadelta",
    "rules.adagrad",
    "rules.apex",
    "rules.lamb",
    "rules.larc",
    "rules.lion",
    "rules.nadam",
    "rules.novograd",
    "rules.radam",
    "rules.rmsprop",
    "rules.hyperparameters",
    "rules.own",
    "rules.declared",
    "rules",
    "larc",
    "optim",
    "unroll",
    "schedules",
    "upload",
    "alike",
    "agreement",
    "sources",
    "masters",
    "tally",
    "report",
    "timetable",
    "reference",
    "workers",
    "cpu_rules",
    "cpu_blocks",
    "cpu",
    "backend",
    "distributed",
    "labels",
    "nested",
    "gradients",
    "loss_scales",
    "plain",
    "watchdog",
    "execution",
    "validation",
    "general",
    "holdings",
    "weights",
    "saved_state",
    "checkpoint",
    "grad_scaler",
    "optimizer",
    "inputs",
    "capture",
    "capturable",
    "graphs",
    "precision",
    "amp.properties",
    "amp.overflow_log",
    "amp.verdicts",
    "amp.scaler",
    "amp.optimizer",
    "amp.casts",
    "amp.modules",
    "amp.state",
    "amp.handle",
    "amp.saved",
    "amp.frontend",
    "amp",
    "testing.functions",
    "testing.side_by_side",
    "testing.training",
    "testing.ranges",
    "testing.equations",
    "testing.twins",
    "testing.checking",
    "testing",
    "apex.missing",
    "apex.modules",
    "apex",
    "apex.run",
    "apex.__main__",
    "apex.amp_c",
    "apex.multi_tensor_apply",
    "apex.normalization",
    "apex.optimizers",
    "apex.apex_c",
    "apex.parallel",
    "apex.loss_scalers",
    "apex.fp16_optimizer",
    "apex.fp16_utils",
    "integrations.lightning",
    "integrations.accelerate",
    "integrations.transformers",
]


def modules():
    """Every module but the kernels and the integrations; a package has the name of its folder."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").rstrip(".")
        if name and parts[0] not in ("kernels", "integrations"):
            found[name] = path
    return found


def kernel_files():
    return sorted((ROOT / "kernels").rglob("*.py"))


def _runtime(tree):
    """The nodes that run: not what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from _runtime(node)


def imported(path):
    """The names of what a file imports when it runs: "mpengine.masters", ".layout", "torch"."""
    names = set()
    for node in _runtime(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {_module(base, alias.name) for alias in node.names}
    return names


def _module(base, name):
    """What `from base import name` imports: a module of the package `base`, or `base` itself."""
    if base == ".":
        return f".{name}"
    package = ROOT.joinpath(*base.split("."))
    return f"{base}.{name}" if (package / f"{name}.py").exists() or (package / name).is_dir() else base


def test_every_module_has_its_place_in_the_order():
    assert set(modules()) <= set(ORDER)


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_run_one_way(name):
    before = ORDER[: ORDER.index(name)]
    own = {i.removeprefix("mpengine.") for i in imported(modules()[name]) if i.startswith("mpengine.")}
    assert own <= set(before), f"{name} imports {sorted(own - set(before))}, which must not stand below it"


@pytest.mark.parametrize("path", kernel_files(), ids=lambda path: path.stem)
def test_the_kernels_are_a_leaf(path):
    """They import nothing of mpengine but each other."""
    for name in imported(path):
        assert name.split(".")[0] != "mpengine", f"{path.name} imports {name}"
        assert not name.startswith("." * (1 + len(path.relative_to(ROOT / "kernels").parts))), f"{path.name}: {name}"


def test_nobody_imports_plain_kernels():
    """It would load every module a second time, and the name belongs to another package."""
    files = [
        p
        for folder in ("mpengine", "kernels", "tests", "examples", "benchmarks")
        for p in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 20
    for path in files:
        assert not [i for i in imported(path) if i.split(".")[0] == "kernels"], path


def test_the_packages_kernels_are_the_folder_kernels():
    from mpengine.kernels import layout

    assert Path(layout.__file__).resolve() == ROOT / "kernels" / "layout.py"


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is not installed")

sys.meta_path.insert(0, Blocker())
import torch
import mpengine

model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 1))
scaler = mpengine.GradScaler(init_scale=1024.0)
optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), scaler, max_grad_norm=1.0)
for _ in range(3):
    scaler.scale(model(torch.ones(2, 3).half()).float().square().mean()).backward()
    optimizer.step()
    scaler.update()
    optimizer.zero_grad()
assert optimizer.steps_taken == 3, optimizer.steps_taken
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
assert not any(name.startswith("mpengine.kernels.") and "layout" not in name for name in sys.modules)
try:
    mpengine.backend.of(torch.device("cuda"))
except ImportError as error:
    print(error)
"""


def test_it_works_without_triton():
    run = subprocess.run([sys.executable, "-W", "error", "-c", BLOCKED], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == (
        "the CUDA path needs Triton, which could not be imported (triton is not installed): pip install triton"
    )


def test_importing_it_is_silent_and_starts_nothing():
    code = "import mpengine, torch; assert not torch.cuda.is_initialized(); print(len(mpengine.__all__))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stderr) == (0, "")
    assert int(run.stdout) == len(mpengine.__all__)


# Public names.


def public(thing, prefix):
    """Public classes, functions and methods that a module or class defines."""
    home = thing.__name__ if inspect.ismodule(thing) else thing.__module__
    for name, value in vars(thing).items():
        if name.startswith("_"):
            continue
        value = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        value = value.fget if isinstance(value, property) else value
        if inspect.isclass(value) and value.__module__ == home:
            yield f"{prefix}.{name}", value
            yield from public(value, f"{prefix}.{name}")
        elif inspect.isfunction(value) and value.__module__ == home:
            yield f"{prefix}.{name}", value


def every_public():
    import importlib

    for name in sorted(modules()):
        module = importlib.import_module(f"mpengine.{name}")
        assert module.__doc__, f"mpengine.{name} says nothing about itself"
        yield from public(module, name)


@pytest.mark.parametrize(
    ("name", "thing"), list(every_public()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_public_names_have_docstrings_and_types(name, thing):
    assert inspect.getdoc(thing), f"{name} has no docstring"
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        own = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        assert all(p.annotation is not p.empty for p in own), f"{name} has an argument without a type"
        assert signature.return_annotation is not signature.empty, f"{name} has no return type"


def test_the_public_face():
    assert set(mpengine.__all__) <= set(dir(mpengine))
    for name in ("GradScaler", "MixedPrecisionOptimizer", "prepare", "LossScaleCollapse", "rules", "reference"):
        assert name in mpengine.__all__
        assert getattr(mpengine, name).__doc__
    hints = typing.get_type_hints(mpengine.prepare)
    assert hints["return"] is mpengine.MixedPrecisionOptimizer


def test_every_built_in_rule_stands_in_the_kernels():
    from mpengine.kernels import rules as kernels

    for rule in rules.BUILT_IN:
        assert rule.name in kernels.RULES
        assert (rule.name in kernels.MEASURES) == (rule.measure is not None), rule.name
        assert (rule.name in kernels.SETTLES) == (rule.settle is not None), rule.name
    assert set(kernels.RULES) == {rule.name for rule in rules.BUILT_IN}
    assert set(kernels.SCALAR_FUNCTIONS) == {family.name for family in rules.FAMILIES}
