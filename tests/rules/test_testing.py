"""`check_rule`: what it says of sound rules, and that it finds the fault of each broken one."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import mpengine
from mpengine import cpu, optim
from mpengine.kernels import rules as kernel_rules
from mpengine.rules import declare
from mpengine.testing import RuleReport, check_rule, checking, equations, side_by_side, training, twins
from tests.rules import broken_rules
from tests.rules.own_rules import (
    PARTS,
    TRUST,
    Ratio,
    Steady,
    Trust,
    paper,
    trust_paper,
    trust_settle,
    trust_update,
    update,
)

ROOT = Path(__file__).parents[2]
GPU = torch.cuda.is_available()


def test_a_sound_rule_passes_on_every_path_and_says_what_did_not_run():
    report = check_rule(Ratio, expected=paper, kernels=True)
    assert report.optimizer == "Ratio with lr=0.01, beta=0.9, eps=1e-08, maximize=False"
    assert len(report.passed) == (13 if GPU else 12)
    assert "reference = Triton kernels" in str(report)
    assert report.not_run == (() if GPU else ("compiled Triton kernels: there is no GPU",))
    assert str(report).count("passed") == len(report.passed)
    assert str(report).count("NOT RUN") == len(report.not_run)


@pytest.mark.parametrize("make", [Steady, optim.LAMB])
def test_sound_rules_pass_without_kernels(make):
    report = check_rule(make, kernels=False)
    assert report.not_run == (
        "paths and training on the Triton kernels: not asked for (kernels=False)",
        "equations: no expected= was given",
    )
    assert isinstance(report, RuleReport)


def test_constants_among_the_scalars_pass_on_every_path():
    assert "reference = Triton kernels" in str(check_rule(Trust, expected=trust_paper, kernels=True))


def test_the_options_that_were_tested_are_told():
    optimizer = check_rule(lambda params: Ratio(params, lr=0.1, maximize=True), kernels=False).optimizer
    assert optimizer == "Ratio with lr=0.1, beta=0.9, eps=1e-08, maximize=True"


def test_what_cannot_run_is_said_or_raised():
    bare = declare("Bare", update, **PARTS, module=__name__)
    globals()["Bare"] = bare
    report = check_rule(bare)
    assert "the rule has no Triton functions (declare(kernels=...))" in report.not_run[0]
    with pytest.raises(
        AssertionError, match=r"kernels=True, but the Triton kernels cannot run: the rule has no Triton"
    ):
        check_rule(bare, kernels=True)


@pytest.mark.skipif(GPU, reason="of machines without a GPU")
def test_without_the_interpreter_the_kernels_are_not_said_to_have_run():
    """Nor does it need what only tests need, nor is it imported by itself."""
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('pytest', 'hypothesis')))\n"
        "import mpengine; assert 'mpengine.testing' not in sys.modules\n"
        "from mpengine.testing import check_rule; print(check_rule(mpengine.optim.LAMB))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    assert "on Triton's interpreter" not in run.stdout
    assert "NOT RUN  paths and training on the Triton kernels: there is no GPU, and TRITON_INTERPRET=1" in run.stdout


def test_without_triton_the_kernels_are_not_said_to_have_run(monkeypatch):
    def without_triton(device):
        raise ImportError("no Triton here")

    monkeypatch.setattr(checking.backend, "of", without_triton)
    assert checking._where([Ratio.family.variant({})]) == "no Triton here"


def test_other_optimizers_are_refused():
    with pytest.raises(TypeError, match=r"make returned a SGD; check_rule checks the optimizers that rules make"):
        check_rule(lambda params: torch.optim.SGD(params, lr=0.1))


@pytest.mark.parametrize("make", [Ratio([torch.nn.Parameter(torch.zeros(2))]), 3])
def test_instances_are_refused(make):
    with pytest.raises(
        TypeError, match=r"make is an instance of (Ratio|int); give the optimizer's class, or a function"
    ):
        check_rule(make)


# Broken rules.

RETURNS = {
    "one_slot": "update returned 1 slots; the rule has 2: ('mean', 'magnitude')",
    "only_p": "update returned a Tensor; it must return (p, slots)",
    "edits_gradient": "update edits its argument g in place",
    "edits_slot": "update edits its argument slot 0 in place",
    "edits_scalars": "update edits its scalars c",
    "double": "update: p is torch.float64[257]; it must be torch.float32[257]",
    "one_number": "update: slot 'magnitude' is torch.float32[]; it must be torch.float32[257]",
    "keeps_p": "update returned magnitude in the memory of p; return a new tensor",
    "over_elements": "otherwise where it gets them in two pieces: it must work element by element",
    "infinite": "update gives p as [",
    "does_nothing": "0 of 265 weights moved in 3 steps",
    "ignores_gradient": "0 of 265 weights differ after 3 steps on other gradients: the update ignores them",
}
SCALARS = {
    "thirteen": "scalars returned a list of 13; it must return at most 12 columns",
    "edits_h": "scalars edits its arguments",
    "of_all_steps": "scalars gives number 4 at step 1 as",
    "without_bound": "at steps [   1    2 1000]; it must be finite",
    "of_another_length": "scalars gives number 5 as float64[4]; it must be float64[3]",
    "with_if": "scalars raises ValueError (The truth value of an array",
}
SETTLES = {
    "without_cell": "settle returned 0 cells; the rule has 1: ['mean_norm']",
    "edits_cells": "settle edits cells",
    "of_all_tensors": "for a tensor among others",
    "of_no_norm": "settle gives number 0 as [",
}
MEASURES = {
    "two": "measure returned a tuple of 2; it must return norms=1 tensors",
    "a number": "measure: tensor 0 is torch.float32[]",
}
ALL = [
    (rules[name], message)
    for rules, messages in (
        (broken_rules.RETURNS, RETURNS),
        (broken_rules.SCALARS, SCALARS),
        (broken_rules.SETTLES, SETTLES),
        (broken_rules.MEASURES, MEASURES),
    )
    for name, message in messages.items()
]


@pytest.mark.parametrize(("broken", "message"), ALL, ids=[message[:40] for _, message in ALL])
def test_functions_that_return_or_change_what_they_must_not_are_found(broken, message):
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_rule(broken, kernels=False)


def test_every_broken_function_has_its_test():
    for rules, messages in (
        (broken_rules.RETURNS, RETURNS),
        (broken_rules.SCALARS, SCALARS),
        (broken_rules.SETTLES, SETTLES),
        (broken_rules.MEASURES, MEASURES),
    ):
        assert rules.keys() == messages.keys()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other_brackets", r"differs after update of step 0: \d+ of \d+ elements, by .* at most, first at \d+: "),
        ("old_slot", r"slot 'magnitude' of tensor \d+ .* differs after update of step 0"),
        ("too_few_slots", r"update of step 0 fails where the reference does not"),
        ("other_scalars", r"scalars differ at 66 of 97 step counts, first at step 1: number 4 is .* the reference has"),
        ("late_scalars", r"scalars differ at 73 of 97 step counts, first at step 25: number 4 is .* the reference has"),
        ("switched", r"differs after update of step 4"),
        ("zero_settle", r"scalars differs after settle of step 0: 1 of"),
        ("other_settle", r"cell 'mean_norm' of tensor \d+ .* differs after settle of step 0"),
        ("other_measure", r"cell 'mean_norm' of tensor \d+ .* differs after settle of step 0"),
    ],
)
def test_triton_functions_that_are_no_twins_are_found(name, message):
    with pytest.raises(AssertionError, match=message):
        check_rule(broken_rules.TWINS[name], kernels=True)


FP32 = {
    "divides": [r"`m / (a + c[3])` is an approximation on a GPU; write tl.div_rn(a, b)."],
    "divides_numbers": ["`rate /= c[1]` is an approximation on a GPU"],
    "takes_roots": ["`tl.sqrt` is an approximation on a GPU; write tl.sqrt_rn(x)."],
    "fuses": ["`tl.fma` rounds once where the CPU rounds twice"],
    "takes_exponentials": ["log` does not round on a GPU as", "`tl.math.exp` does not round on a GPU as"],
    "adds_up": ["`tl.sum` works on a block of elements"],
}


@pytest.mark.parametrize("twin", broken_rules.FP32, ids=list(FP32))
def test_arithmetic_that_only_a_gpu_rounds_otherwise_is_found(twin):
    with pytest.raises(AssertionError) as error:
        twins.check_source("update", twin)
    _, *told = str(error.value).splitlines()
    messages = FP32[twin.fn.__name__]
    assert len(told) == len(messages)
    lines = Path(broken_rules.__file__).read_text().splitlines()
    for line, message in zip(told, messages, strict=True):
        assert message in line
        number = int(re.match(r"  broken_rules\.py:(\d+): ", line).group(1))
        assert re.search(r"`([^`]*)`", line).group(1) in lines[number - 1]


def test_twins_are_read_by_check_rule_too():
    with pytest.raises(AssertionError, match=r"the Triton twin of update has no bits to rely on:\n  broken_rules"):
        check_rule(broken_rules.Rooted, kernels=False)


def test_the_engines_own_functions_have_no_such_arithmetic():
    functions = [*kernel_rules.RULES.values(), *kernel_rules.MEASURES.values()]
    assert len(functions) > 10
    for function in functions:
        twins.check_source("update", function)


def test_an_optimizer_that_is_another_by_itself_is_found():
    with pytest.raises(
        AssertionError, match=r"step 0: the optimizer by itself, and prepared: state\['mean'\] of weight 0"
    ):
        check_rule(broken_rules.Different, kernels=False)


def test_an_optimizer_that_takes_any_value_is_found():
    with pytest.raises(AssertionError, match=r"the constructor accepts lr = -1\.0, which is out of its bounds"):
        check_rule(broken_rules.Careless, kernels=False)


def test_a_class_that_cannot_be_pickled_is_found():
    hidden = declare("Hidden", update, **PARTS)
    with pytest.raises(AssertionError, match=r"an instance of Hidden cannot be pickled .* the name of the variable"):
        check_rule(hidden, kernels=False)


def test_other_equations_are_found():
    def uncorrected(p, g, state, hyper):
        p, state = paper(p, g, {**state, "t": 10**6}, hyper)
        return p, state

    with pytest.raises(
        AssertionError, match=r"after step 1 weight \d+ of a tensor is .*, the equations' is .* apart, on"
    ):
        check_rule(Ratio, expected=uncorrected, kernels=False)


def test_equations_that_say_nothing_are_found():
    with pytest.raises(AssertionError, match=r"passes with the update's sign flipped too, so it says nothing"):
        check_rule(Ratio, expected=paper, kernels=False, tolerance=1e9)
    with pytest.raises(AssertionError, match="went less than ten times their rounding in 20 steps"):
        equations.deviation(lambda params: Ratio(params, lr=1e-8), paper, 20, 1e-5)


def test_equations_that_are_otherwise_later_are_found():
    def late(p, g, state, hyper):
        after, state = paper(p, g, state, hyper)
        return (after if state["t"] < 400 else p + 1.01 * (after - p)), state

    equations.deviation(Ratio, late, 20, 1e-5)
    with pytest.raises(AssertionError, match=r"after step [45]\d\d weight \d+ of a tensor .* the equations' is"):
        check_rule(Ratio, expected=late, kernels=False)


def test_equations_of_zeros_are_compared():
    def still(c, norms, cells):
        """A rate of 0 for weights of 0, on both sides."""
        (rate, *others), cells = trust_settle(c, norms, cells)
        return (np.where(norms[0] > 0.0, rate, 0.0), *others), cells

    make = declare("Broken", trust_update, **{**TRUST, "settle": still})
    with pytest.raises(AssertionError, match=r"after step 1 weight \d+ of a tensor whose weights begin at 0 is 0, the"):
        equations.deviation(make, trust_paper, 20, 1e-5)

    def nothing(p, g, state, hyper):
        p, state = paper(p, g, state, hyper)
        return p + 0.0 * (g / np.abs(g)), state

    with pytest.raises(AssertionError, match=r"of a tensor whose first 3 gradients are 0 .* the equations' is nan"):
        equations.deviation(Ratio, nothing, 20, 1e-5)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "a NoneType"),
        (np.zeros(1000), "a ndarray"),
        ((np.zeros(1000), []), r"\(float64\[1000\], a list\)"),
        ((np.zeros(1000, np.float32), {}), r"\(float32\[1000\], a dict\)"),
        ((np.zeros(3), {}), r"\(float64\[3\], a dict\)"),
        ((1.0, {}), r"\(a float, a dict\)"),
    ],
)
def test_malformed_equations_are_refused(returned, told):
    message = rf"expected returned {told}; it must return \(p, state\): float64\[1000\] and a dict"
    with pytest.raises(AssertionError, match=message):
        equations.deviation(Ratio, lambda p, g, state, hyper: returned, 20, 1e-5)


@pytest.mark.parametrize("expected", [5, lambda p, g: p])
def test_what_cannot_be_equations_is_refused(expected):
    with pytest.raises(TypeError, match=r"give a function \(p, g, state, hyper\) -> \(p, state\)"):
        check_rule(Ratio, expected=expected)


# A broken engine.


def test_a_device_that_steps_otherwise_is_found(monkeypatch):
    device = torch.device("cuda" if GPU else "cpu")
    training.check_by_itself(Ratio, device)
    grads_of, calls = training.grads_of, iter(range(6))
    monkeypatch.setattr(training, "grads_of", lambda k: grads_of(next(calls)))
    with pytest.raises(AssertionError, match="by itself on a CPU, and on"):
        training.check_by_itself(Ratio, device)


def test_a_skipped_step_that_writes_is_found(monkeypatch):
    step = cpu.update

    def never_skips(table, sources, rule, decision):
        decision = decision.clone()
        decision[0] = 0.0
        step(table, sources, rule, decision)

    monkeypatch.setattr(cpu, "update", never_skips)
    with pytest.raises(AssertionError, match="differs after update of step 1"):
        check_rule(Ratio, kernels=False)
    with pytest.raises(AssertionError, match="a step that was skipped: weight 0"):
        training.check_prepared(Ratio, torch.device("cpu"))


def test_a_clip_that_is_dropped_is_found(monkeypatch):
    decide = mpengine.reference.decide

    def unclipped(table, sources, found, partials, hyper, max_norm, *others):
        decide(table, sources, found, partials, hyper, torch.full_like(max_norm, np.inf), *others)

    monkeypatch.setattr(cpu, "decide", unclipped)
    with pytest.raises(AssertionError, match="step 0, clipped: by itself, and prepared: weight 0"):
        training.check_clipping(Ratio, torch.device("cpu"))


def test_state_that_is_not_saved_is_found(monkeypatch):
    pack = mpengine.optimizer.checkpoint.pack

    def without_slot(optimizer):
        state = pack(optimizer)
        for own in state["state"].values():
            own["mean"] = torch.zeros_like(own["mean"])
        return state

    monkeypatch.setattr(mpengine.optimizer.checkpoint, "pack", without_slot)
    with pytest.raises(AssertionError, match="step 2: never stopped, and resumed: weight 0"):
        training.check_saving(Ratio, torch.device("cpu"))


def test_a_schedule_that_counts_skipped_steps_is_found(monkeypatch):
    values = mpengine.reference._scheduled
    monkeypatch.setattr(mpengine.reference, "_scheduled", lambda hyper, plan, taken: values(hyper, plan, taken + 1))
    with pytest.raises(AssertionError, match="step 0 of a schedule: by itself, and prepared: weight 0"):
        training.check_schedule(Ratio, torch.device("cpu"))


def test_a_comparison_that_never_fails_is_found(monkeypatch):
    monkeypatch.setattr(training, "same", lambda *_: None)
    with pytest.raises(AssertionError, match="comparison with the prepared optimizer passes with the update's sign"):
        check_rule(Ratio, kernels=False)
    monkeypatch.setattr(side_by_side, "_compare", lambda *_: None)
    with pytest.raises(AssertionError, match="comparison of the paths passes with the update's sign flipped too"):
        check_rule(Ratio, kernels=False)
