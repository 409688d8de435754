"""The order of the checks, and what is said of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from mpengine import backend, cpu
from mpengine.rules import BUILT_IN, Rule, RuleOptimizer
from mpengine.testing.equations import LONG, Expected, check_signature, deviation, long_deviation
from mpengine.testing.functions import check_functions
from mpengine.testing.ranges import check_ranges
from mpengine.testing.side_by_side import COUNTS, STEPS, TENSORS, compare, compare_scalars
from mpengine.testing.training import (
    Make,
    check_by_itself,
    check_clipping,
    check_groups,
    check_moves,
    check_prepared,
    check_saving,
    check_schedule,
    checked,
    flip,
    flipped,
)
from mpengine.testing.twins import check_twins

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` has done. Printed, it says so in lines.

    Attributes:
        optimizer: The class's name, and the hyperparameters that were tested.
        passed: What ran, each with its extent; all of it passed.
        not_run: What did not run, each with the reason.
    """

    optimizer: str
    passed: tuple[str, ...]
    not_run: tuple[str, ...]

    def __str__(self) -> str:
        passed = [f"  passed   {line}" for line in self.passed]
        return "\n".join([f"{self.optimizer}:", *passed, *(f"  NOT RUN  {line}" for line in self.not_run)])


def check_rule(
    make: Make,
    *,
    kernels: bool | None = None,
    expected: Expected | None = None,
    steps: int = 20,
    tolerance: float = 1e-5,
) -> RuleReport:
    """Tests an optimizer that a rule makes, as mpengine's own are tested, with the hyperparameters that `make` gives.

    ```
    functions    return what they must, edit nothing, work element by element and tensor by tensor
    movement     weights move, and otherwise on other gradients
    twins        their source has no FP32 arithmetic that a GPU rounds otherwise, which the interpreter does not show
    paths        reference = CPU path = Triton kernels, bit for bit: odd sizes, misaligned, fp16, bf16, FP32, several
                 losses, idle tensors, weights or gradients of zeros, clipping, an overflow; the first 4 steps, and a
                 late one of each tensor
    scalars      reference = decide, at steps 1 to 64, powers of 2 and of 10, and 2^31 - 1
    training     by itself = prepared; an overflow, max_grad_norm, param groups, save and resume, pickling, a schedule
    bounds       values beyond them are refused by name, before anything changes
    equations    the paper's, in float64, as `expected` has them
    itself       the comparisons of paths, of training and of equations fail where the update goes the other way
    ```

    It does not see: options that `make` leaves alone; weights and gradients of other sizes than a few hundred; an
    `expected` of more than 1,000 steps; and what is rounded otherwise on a GPU by ways that `twins` does not know.

    Args:
        make: The class, or a function from parameters to its instance: `lambda params: Mine(params, lr=1e-2)`. Options
            that it leaves alone are not tested: call this once for each.
        kernels: Whether the Triton functions run: compiled where there is a GPU, else in Triton's interpreter, which
            TRITON_INTERPRET=1 chooses before anything imports Triton. True makes an error of neither; the interpreter
            is enough for it. None: where that is possible.
        expected: `(p, g, state, hyper) -> (p, state)`: one step of the paper's equations on the float64 array of a
            whole tensor. `state` is an empty dict at first, and what was returned then; `hyper` a param group's
            hyperparameters.
        steps: Of the comparison with it. Another one takes 1,000 steps, with a hundred times the tolerance.
        tolerance: Of the same: how far a weight may be from its float64 one, as a fraction of the way that it has
            gone, beyond the rounding of the weight itself.

    Returns:
        What ran and what did not.

    Raises:
        AssertionError: A test failed; says what differs, where and by how much. Or the kernels cannot run, and
            `kernels` is True.
        TypeError: `make` is no class or function, or returns no optimizer of a rule; or `expected` does not take four
            arguments.

    Example:
        >>> print(mpengine.testing.check_rule(mpengine.optim.LAMB))
    """
    if not callable(make):  # as no instance is
        raise TypeError(
            f"make is an instance of {type(make).__name__}; give the optimizer's class, or a function from parameters "
            "to its instance: lambda params: Mine(params, lr=1e-2)."
        )
    if expected is not None:
        check_signature(expected)
    optimizer = checked(make([torch.nn.Parameter(torch.zeros(3))]))
    passed, not_run = [], []

    check_functions(optimizer)
    passed.append("functions: well formed, element by element and tensor by tensor")
    check_moves(make)
    passed.append("movement: weights move, by their gradients")

    rules = [optimizer.family.variant(group) for group in optimizer.param_groups]
    for rule in rules:
        check_twins(rule)
    if any(rule.kernels is not None for rule in rules):
        passed.append("twins: their source has no FP32 arithmetic that a GPU rounds otherwise")

    _check_path(optimizer, cpu, _CPU)
    extent = f"{STEPS} steps of {len(TENSORS)} tensors, bit for bit"
    passed.append(f"paths: reference = CPU path, {extent}")
    _check_training(make, _CPU, contextlib.nullcontext)
    _check_storing(make, _CPU)
    passed.append("training on a CPU: by itself = prepared; overflow, clipping, schedule; groups, saving, pickling")

    where = _kernels_run(optimizer, kernels)
    if isinstance(where, str):
        not_run.append(f"paths and training on the Triton kernels: {where}")
    else:
        launch = backend.of(torch.device("cuda"))
        compare_scalars(optimizer, launch, where)
        _check_path(optimizer, launch, where)
        how = "Triton's interpreter" if where == _CPU else torch.cuda.get_device_name()
        passed.append(f"paths: reference = Triton kernels, {extent}, on {how}")
        passed.append(f"scalars: reference = decide, bit for bit, at {len(COUNTS)} step counts from 1 to {COUNTS[-1]}")
        _check_training(make, where, backend.interpreter if where == _CPU else contextlib.nullcontext)
        passed.append(f"training by Triton kernels: by itself = prepared; overflow, clipping, schedule, on {how}")
        if where == _CPU:
            not_run.append("compiled Triton kernels: there is no GPU")
        else:
            _check_storing(make, where)
            check_by_itself(make, where)
            passed.append("training on the GPU: groups, saving, pickling; by itself as on a CPU")

    passed.append(f"bounds: {check_ranges(make)} values beyond them refused")

    if expected is None:
        not_run.append("equations: no expected= was given")
    else:
        passed += _check_equations(make, expected, steps, tolerance)
    compared = "paths, by itself = prepared" + (", equations" if expected is not None else "")
    passed.append(f"itself: {compared} fail with the update's sign flipped")
    tested = ", ".join(f"{name}={optimizer.defaults[name]}" for name in optimizer.hyperparameters)
    return RuleReport(f"{type(optimizer).__name__} with {tested}", tuple(passed), tuple(not_run))


def _check_path(optimizer: RuleOptimizer, module: ModuleType, device: torch.device) -> None:
    compare(optimizer, module, device)
    _must_fail("comparison of the paths", lambda: compare(optimizer, module, device, change=flip))


def _check_training(
    make: Make, device: torch.device, context: Callable[[], contextlib.AbstractContextManager[None]]
) -> None:
    backwards = flipped(make)
    with context():
        check_prepared(make, device)
        _must_fail("comparison with the prepared optimizer", lambda: check_prepared(make, device, backwards))
        check_clipping(make, device)
        check_schedule(make, device)


def _check_storing(make: Make, device: torch.device) -> None:
    """What is done on the host alone, and so but once on a CPU."""
    check_groups(make, device)
    check_saving(make, device)


def _check_equations(make: Make, expected: Expected, steps: int, tolerance: float) -> list[str]:
    far = deviation(make, expected, steps, tolerance)
    _must_fail("comparison with expected", lambda: deviation(flipped(make), expected, steps, tolerance))
    beyond = f"the rounding of the weights and {far:.1e} of their way" if far else "the rounding of the weights"
    later = long_deviation(make, expected, tolerance)
    return [
        f"equations: within {beyond} in {steps} steps",
        f"equations: within {later:.1e} of the way in {LONG} steps, the last that are compared",
    ]


def _must_fail(what: str, check: Callable[[], object]) -> None:
    try:
        check()
    except AssertionError:
        return
    raise AssertionError(f"the {what} passes with the update's sign flipped too, so it says nothing about this rule.")


def _kernels_run(optimizer: RuleOptimizer, wanted: bool | None) -> torch.device | str:
    """Where the kernels run, or why they do not."""
    where: torch.device | str = "not asked for (kernels=False)"
    if wanted is not False:
        where = _where([optimizer.family.variant(group) for group in optimizer.param_groups])
    if wanted and isinstance(where, str):
        raise AssertionError(f"kernels=True, but the Triton kernels cannot run: {where}.")
    return where


def _where(rules: list[Rule]) -> torch.device | str:
    if any(rule.kernels is None and rule not in BUILT_IN for rule in rules):
        return "the rule has no Triton functions (declare(kernels=...))"
    try:
        launch = backend.of(torch.device("cuda"))
    except ImportError as error:
        return str(error)
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    own = [f for rule in rules if rule.kernels is not None for f in vars(rule.kernels).values() if f is not None]
    if any(type(f).__name__ != "InterpretedFunction" for f in (launch._update_kernel, *own)):
        return "there is no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported"
    return _CPU
