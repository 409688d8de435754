"""What the Triton twins are written in. Triton's interpreter computes by NumPy, where every operation rounds correctly.

A GPU does not: there FP32 `/` and `tl.sqrt` are approximations, and `tl.fma` rounds once. So their source is read.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

from mpengine.rules import Rule

_DIVIDES = "is an approximation on a GPU; write tl.div_rn(a, b)"
_ROUNDS = "does not round on a GPU as the CPU's function does; use + - *, tl.div_rn and tl.sqrt_rn"
_SPANS = "works on a block of elements; a rule works element by element (norms are measure's)"
_FOUND = {
    "fdiv": _DIVIDES,
    "sqrt": "is an approximation on a GPU; write tl.sqrt_rn(x)",
    "fma": "rounds once where the CPU rounds twice; write a * b + c",
    **dict.fromkeys(("cos", "erf", "exp", "exp2", "log", "log2", "rsqrt", "sigmoid", "sin", "softmax"), _ROUNDS),
    **dict.fromkeys(("inline_asm_elementwise", "rand", "randn"), _ROUNDS),
    **dict.fromkeys(("argmax", "argmin", "max", "min", "reduce", "sum", "xor_sum"), _SPANS),
    **dict.fromkeys(("associative_scan", "cumprod", "cumsum", "dot", "flip", "sort"), _SPANS),
}


def check_twins(rule: Rule) -> None:
    """Reads a declared rule's `Kernels.update` and `.measure`, and the functions under `triton.jit` that they call.

    Raises:
        AssertionError: FP32 arithmetic in them has other bits on a GPU; says each place, and what to write.
    """
    for kind in ("update", "measure"):
        check_source(kind, getattr(rule.kernels, kind, None))


def check_source(kind: str, twin: Any) -> None:
    """Reads one function under `triton.jit`; None has nothing to read."""
    faults = [] if twin is None else list(dict.fromkeys(_faults(twin.fn, set())))
    if faults:
        raise AssertionError(f"the Triton twin of {kind} has no bits to rely on:\n  " + "\n  ".join(faults))


def _faults(function: FunctionType, seen: set[FunctionType]) -> Iterator[str]:
    seen.add(function)
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    for node in (inner for line in tree.body for inner in ast.walk(line)):
        fault = None
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and isinstance(node.op, ast.Div):
            fault = None if _is_constant(node, function) else f"`{ast.unparse(node)}` {_DIVIDES}"
        elif isinstance(node, ast.Call):
            called = _value(node.func, function)
            plain = getattr(called, "fn", called)  # without triton.jit
            if plain is None or _module(plain).startswith("triton."):
                fault = _fault(node.func, plain)
            elif plain is not called and plain not in seen:
                yield from _faults(plain, seen)
        if fault:
            line = function.__code__.co_firstlineno + node.lineno - 1  # type: ignore[attr-defined]
            yield f"{Path(function.__code__.co_filename).name}:{line}: {fault}."


def _fault(written: ast.expr, function: Any) -> str | None:
    """What is wrong with a call of Triton's functions, or of a block's method of that name (`function` is None)."""
    if function is not None:
        name = getattr(function, "__name__", "")
    elif isinstance(written, ast.Attribute):
        name = written.attr
    else:
        return None  # of Python's own
    fault = _ROUNDS if "libdevice" in _module(function) else _FOUND.get(name)
    return fault and f"`{ast.unparse(written)}` {fault}"


def _module(function: Any) -> str:
    return getattr(function, "__module__", None) or ""


def _is_constant(node: ast.AST, function: FunctionType) -> bool:
    """Whether it is of numbers alone, which Triton divides before it compiles."""
    if isinstance(node, ast.BinOp):
        return _is_constant(node.left, function) and _is_constant(node.right, function)
    if isinstance(node, ast.UnaryOp):
        return _is_constant(node.operand, function)
    value = node.value if isinstance(node, ast.Constant) else _value(node, function)
    return isinstance(getattr(value, "value", value), (int, float))  # tl.constexpr has one


def _value(node: ast.AST, function: FunctionType) -> Any:
    """What a name of the function's module stands for; None for what is known at run time only."""
    if isinstance(node, ast.Name):
        if node.id in function.__code__.co_varnames:
            return None
        return inspect.getclosurevars(function).nonlocals.get(node.id, function.__globals__.get(node.id))
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, function)
        return None if owner is None else getattr(owner, node.attr, None)
    return None
