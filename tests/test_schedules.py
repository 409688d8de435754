"""The recipes for learning rates, against their formulas; and the page that shows them."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import re
from fractions import Fraction
from pathlib import Path

import pytest
from torch.optim import lr_scheduler

from mpengine import schedules
from tests.harness import FUSED, GENERAL, SINGLE, parameters
from tests.torch_schedulers import STEPS, made, rows_of

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "schedules.md").read_text()
UNIT = 2.0**-53  # float64's unit roundoff


def rates(recipe, steps, lr=0.1, make=FUSED["sgd"]):
    """The lr of each step, by the scheduler itself, stepped as in a training loop."""
    optimizer = make(parameters([SINGLE]), lr=lr)
    scheduler = recipe(optimizer)
    found = []
    for _ in range(steps):
        found.append(dict(optimizer.param_groups[0]))
        optimizer.step()
        scheduler.step()
    unrolled = rows_of(make(parameters([SINGLE]), lr=lr), recipe, steps)[1]
    assert [row[0]["lr"] for row in unrolled] == [group["lr"] for group in found]
    return found


def close(found, expected, tolerance):
    """Every value within its tolerance of the formula's."""
    for t, (value, wanted) in enumerate(zip(found, expected, strict=True)):
        assert abs(Fraction(value) - Fraction(wanted)) <= Fraction(tolerance(t)), (t, value, float(wanted))


def test_the_linear_scaling_rule():
    assert schedules.scaled_lr(0.1, global_batch=8192) == 0.1 * 8192 / 256 == 3.2
    assert schedules.scaled_lr(0.3, 64, base_batch=64) == 0.3
    for bad in ({"base_lr": 0.0}, {"global_batch": -1}, {"base_batch": 0}, {"base_lr": math.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*must be > 0"):
            schedules.scaled_lr(**{"base_lr": 0.1, "global_batch": 8, "base_batch": 8, **bad})


@pytest.mark.parametrize(("width", "start"), [(1, 0.5), (7, 256 / 8192), (100, 0.01), (10, 1.0)])
def test_linear_warmup(width, start):
    found = [group["lr"] for group in rates(schedules.linear_warmup(warmup_steps=width, start_factor=start), width + 5)]
    s = Fraction(start)
    expected = [Fraction(0.1) * (s + (1 - s) * min(t, width) / width) for t in range(width + 5)]
    # LinearLR multiplies from step to step: at most 8 roundings in each, of positive numbers.
    close(found, expected, lambda t: 8 * (t + 1) * UNIT * 0.1)
    assert found[0] == 0.1 * start
    assert found[width:] == [found[width]] * 5


def test_warmup_by_the_paper():
    """Goyal et al.: from base_lr to base_lr * k, then a tenth at epochs 30, 60 and 80."""
    epoch, k = 10, 32
    warmup = schedules.linear_warmup(warmup_steps=5 * epoch, start_factor=1 / k)
    milestones = [30 * epoch, 60 * epoch, 80 * epoch]
    optimizer = FUSED["momentum"](parameters([SINGLE]), lr=schedules.scaled_lr(0.1, 256 * k))
    _, rows = rows_of(optimizer, lambda opt: [warmup(opt), lr_scheduler.MultiStepLR(opt, milestones)], 90 * epoch)
    found = [rows[t][0]["lr"] for t in (0, 5 * epoch, 300, 600, 800)]
    assert found == pytest.approx([0.1, 3.2, 0.32, 0.032, 0.0032], rel=1e-12)


@pytest.mark.parametrize(("up", "down"), [(4, None), (3, 5), (1, 1)])
@pytest.mark.parametrize("gamma", [None, 0.9])
def test_cyclic_decaying(up, down, gamma):
    low, high, least, most = 0.01, 0.5, 0.8, 0.95
    recipe = schedules.cyclic_decaying(
        base_lr=low, max_lr=high, step_size_up=up, step_size_down=down, gamma=gamma, momentum_range=(least, most)
    )
    found = rates(recipe, 40, make=FUSED["momentum"])
    down = down or up
    lrs, momenta = [], []
    for t in range(40):
        cycle, x = divmod(t, up + down)
        tri = Fraction(x, up) if x <= up else Fraction(up + down - x, down)
        decay = Fraction(1, 2**cycle) if gamma is None else Fraction(gamma) ** t
        lrs.append(Fraction(low) + (Fraction(high) - Fraction(low)) * tri * decay)
        momenta.append(Fraction(most) - (Fraction(most) - Fraction(least)) * tri * decay)

    def tolerance(t):
        # CyclicLR rounds 1 + t / total, then takes the whole cycles away and divides by the share of a side.
        return 4 * (t / (up + down) + 4) * (up + down) / min(up, down) * UNIT

    close([group["lr"] for group in found], lrs, tolerance)
    close([group["momentum"] for group in found], momenta, tolerance)
    assert found[up]["lr"] == pytest.approx(high if gamma is None else low + (high - low) * gamma**up, rel=1e-12)
    peaks = [found[up + c * (up + down)]["lr"] for c in range(3)]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 3


def test_cyclic_decaying_leaves_momentum_alone_unless_asked():
    recipe = schedules.cyclic_decaying(base_lr=[0.01, 0.02], max_lr=0.1, step_size_up=4)
    for make in (FUSED["momentum"], FUSED["adam"], FUSED["adagrad"], GENERAL["Rprop"]):
        table, rows = rows_of(made(make), recipe)
        assert table.keys == ("lr",)
        assert [group["lr"] for group in rows[0]] == [0.01, 0.02]
        assert [group["lr"] for group in rows[4]] == [0.1, 0.1]


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("make", [FUSED["momentum"], FUSED["adam"]], ids=["momentum", "beta1"])
def test_one_cycle(linear, make):
    total, high, start, final, least, most = 50, 0.4, 0.1, 1e-3, 0.8, 0.95
    recipe = schedules.one_cycle(
        max_lr=high,
        total_steps=total,
        warmup_fraction=0.4,
        start_factor=start,
        final_factor=final,
        momentum_range=(least, most),
        linear=linear,
    )
    found = rates(recipe, total, make=make)
    peak, end = 0.4 * total - 1, total - 1

    def blend(a, b, x):
        return a + (b - a) * x if linear else b + (a - b) * (1 + math.cos(math.pi * x)) / 2

    lrs, momenta = [], []
    for t in range(total):
        if t <= peak:
            lrs.append(blend(start * high, high, t / peak))
            momenta.append(blend(most, least, t / peak))
        else:
            lrs.append(blend(high, final * high, (t - peak) / (end - peak)))
            momenta.append(blend(least, most, (t - peak) / (end - peak)))
    # Both sides round: x thrice, pi * x, the cosine of it, and a few products and sums of numbers up to 1.
    close([group["lr"] for group in found], lrs, lambda t: 64 * UNIT * high)
    used = [group["betas"][0] if "betas" in group else group["momentum"] for group in found]
    close(used, momenta, lambda t: 64 * UNIT)
    assert max(range(total), key=lambda t: lrs[t]) == min(range(total), key=lambda t: used[t]) == 19
    assert found[19]["lr"] == pytest.approx(high, rel=1e-14)
    assert found[-1]["lr"] == pytest.approx(high * final, rel=1e-12)


def test_one_cycle_is_torchs_by_default():
    for make in (FUSED["momentum"], FUSED["adam"]):
        _, ours = rows_of(made(make), schedules.one_cycle(max_lr=0.1, total_steps=STEPS))
        _, torchs = rows_of(made(make), lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=STEPS))
        for row, wanted in zip(ours, torchs, strict=True):
            for group, other in zip(row, wanted, strict=True):
                assert group["lr"] == pytest.approx(other["lr"], rel=16 * UNIT)
                assert {k: v for k, v in group.items() if k != "lr"} == {k: v for k, v in other.items() if k != "lr"}


@pytest.mark.parametrize(("width", "total"), [(0, 20), (1, 2), (7, 50), (100, 400)])
@pytest.mark.parametrize(("start", "final"), [(0.01, 0.0), (0.0, 0.1), (1.0, 1.0)])
def test_warmup_cosine(width, total, start, final):
    recipe = schedules.warmup_cosine(warmup_steps=width, total_steps=total, start_factor=start, final_factor=final)
    found = [group["lr"] for group in rates(recipe, total + 5)]
    expected = []
    for t in range(total + 5):
        if t < width:
            factor = Fraction(start) + (1 - Fraction(start)) * t / width
        else:
            cosine = math.cos(math.pi * min((t - width) / (total - width), 1.0))
            factor = Fraction(final) + (1 - Fraction(final)) * (1 + Fraction(cosine)) / 2
        expected.append(Fraction(0.1) * factor)
    close(found, expected, lambda t: 8 * UNIT * 0.1)  # the cosine is the same; a few roundings beside it
    assert found[width] == 0.1
    assert found[total:] == [0.1 * final] * 5
    middle = width + (total - width) // 2
    if (total - width) % 2 == 0:
        assert found[middle] == pytest.approx(0.1 * (1 + final) / 2, rel=1e-15, abs=1e-17)


def test_warmup_cosine_is_torchs_linear_and_cosine_in_sequence():
    ours = rates(schedules.warmup_cosine(warmup_steps=7, total_steps=50, start_factor=0.1), 50)

    def torchs(opt):
        parts = [lr_scheduler.LinearLR(opt, 0.1, total_iters=7), lr_scheduler.CosineAnnealingLR(opt, 43)]
        return lr_scheduler.SequentialLR(opt, parts, [7])

    for group, other in zip(ours, rates(torchs, 50), strict=True):
        assert group["lr"] == pytest.approx(other["lr"], rel=1e-9, abs=1e-15)  # torch's recurrence loses some digits


RECIPE_NAMES = ("linear_warmup", "cyclic_decaying", "one_cycle", "warmup_cosine")
RECIPES = {
    "linear_warmup": schedules.linear_warmup(warmup_steps=9, start_factor=0.1),
    "triangular2": schedules.cyclic_decaying(base_lr=0.01, max_lr=0.1, step_size_up=4, momentum_range=(0.8, 0.9)),
    "exp_range": schedules.cyclic_decaying(base_lr=0.01, max_lr=0.1, step_size_up=4, gamma=0.98),
    "one_cycle": schedules.one_cycle(max_lr=0.1, total_steps=STEPS),
    "warmup_cosine": schedules.warmup_cosine(warmup_steps=5, total_steps=STEPS),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_resumes_and_pickles(recipe):
    expected = rates(recipe, STEPS, make=FUSED["momentum"])
    optimizer = FUSED["momentum"](parameters([SINGLE]), lr=0.1)
    scheduler = recipe(optimizer)
    for _ in range(8):
        optimizer.step()
        scheduler.step()
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    resumed = FUSED["momentum"](parameters([SINGLE]), lr=0.1)
    again = pickle.loads(pickle.dumps(recipe))(resumed)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for t in range(8, STEPS):
        group = resumed.param_groups[0]
        assert (group["lr"], group["momentum"]) == (expected[t]["lr"], expected[t]["momentum"])
        resumed.step()
        again.step()


@pytest.mark.parametrize(
    ("make", "arguments", "match"),
    [
        (schedules.linear_warmup, {"warmup_steps": 0}, "warmup_steps is 0; it must be an int of at least 1"),
        (schedules.linear_warmup, {"warmup_steps": 2.5}, "warmup_steps is 2.5; it must be an int"),
        (schedules.linear_warmup, {"warmup_steps": 5, "start_factor": 0.0}, r"start_factor is 0.0.*\(0, 1\]"),
        (schedules.linear_warmup, {"warmup_steps": 5, "start_factor": 1.5}, r"start_factor is 1.5.*\(0, 1\]"),
        (schedules.cyclic_decaying, {"base_lr": 0.2}, "base_lr is 0.2 and max_lr 0.1"),
        (schedules.cyclic_decaying, {"base_lr": -0.1}, "base_lr is -0.1"),
        (schedules.cyclic_decaying, {"max_lr": math.inf}, "max_lr inf; they must be finite"),
        (schedules.cyclic_decaying, {"max_lr": math.nan}, "max_lr nan; they must be finite"),
        (schedules.cyclic_decaying, {"base_lr": [0.0, 0.2]}, "base_lr is 0.2 and max_lr 0.1"),
        (schedules.cyclic_decaying, {"base_lr": [0.0, 0.2], "max_lr": [1.0] * 3}, "base_lr has 2 values and max_lr 3"),
        (schedules.cyclic_decaying, {"max_lr": []}, "base_lr has 1 values and max_lr 0"),
        (schedules.cyclic_decaying, {"step_size_up": 0}, "step_size_up is 0"),
        (schedules.cyclic_decaying, {"step_size_down": 0}, "step_size_down is 0"),
        (schedules.cyclic_decaying, {"gamma": 1.1}, r"gamma is 1.1; it must lie in \(0, 1\]"),
        (schedules.cyclic_decaying, {"momentum_range": (0.9, 0.8)}, r"momentum_range is \(0.9, 0.8\)"),
        (schedules.one_cycle, {"max_lr": 0.0}, r"max_lr\[0\] is 0.0; it must be > 0"),
        (schedules.one_cycle, {"total_steps": 1}, "total_steps is 1"),
        (schedules.one_cycle, {"warmup_fraction": 1.0}, "warmup_fraction is 1.0"),
        (schedules.one_cycle, {"warmup_fraction": 0.1, "total_steps": 10}, "warmup_fraction is 0.1.*total_steps=10"),
        (schedules.one_cycle, {"start_factor": 0.0}, "start_factor is 0.0"),
        (schedules.one_cycle, {"final_factor": 2.0}, "final_factor is 2.0"),
        (schedules.one_cycle, {"momentum_range": (0.9, 1.0)}, r"momentum_range is \(0.9, 1.0\)"),
        (schedules.warmup_cosine, {"warmup_steps": -1}, "warmup_steps is -1"),
        (schedules.warmup_cosine, {"warmup_steps": 100}, "total_steps is 100; it must be an int of at least 101"),
        (schedules.warmup_cosine, {"start_factor": -0.1}, "start_factor is -0.1"),
        (schedules.warmup_cosine, {"final_factor": math.nan}, "final_factor is nan"),
    ],
)
def test_arguments_out_of_range_are_named(make, arguments, match):
    good = {
        schedules.linear_warmup: {},
        schedules.cyclic_decaying: {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 4},
        schedules.one_cycle: {"max_lr": 0.1, "total_steps": 100},
        schedules.warmup_cosine: {"warmup_steps": 10, "total_steps": 100},
    }[make]
    with pytest.raises(ValueError, match=match):
        make(**{**good, **arguments})


def test_the_smallest_one_cycle_that_is_accepted_runs():
    for total, fraction in ((2, 0.75), (10, 0.11), (3, 0.99)):
        rates(schedules.one_cycle(max_lr=0.1, total_steps=total, warmup_fraction=fraction), total)


# The page about them.


def test_the_pages_python_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 7
    namespace = {}
    for block in blocks:
        exec(compile(block, "docs/schedules.md", "exec"), namespace)
    assert namespace["optimizer"].scheduled() == [{"lr": 0.1}]  # the last block that schedules: warmup from 0.1 to 3.2
    lr, momentum = map(float, capsys.readouterr().out.split())
    assert (lr, momentum) == (namespace["values"]["lr"], namespace["values"]["momentum"])


@pytest.mark.parametrize("make", [schedules.scaled_lr, *(getattr(schedules, name) for name in RECIPE_NAMES)])
def test_the_page_has_the_formulas_of_the_docstrings(make):
    (formula,) = re.findall(r"```\n(.*?)```", inspect.getdoc(make), flags=re.DOTALL)
    for line in formula.splitlines():
        assert " ".join(line.split()) in " ".join(PAGE.split()), line


def test_the_plots_are_there_and_small():
    plots = re.findall(r"!\[.*?\]\((.*?)\)", PAGE)
    assert {path.stem for path in map(Path, plots)} >= set(RECIPE_NAMES)
    for plot in plots:
        assert 1_000 < (DOCS / plot).stat().st_size < 100_000, plot
