"""Whole steps (inspect, decide, update) against the reference, bit for bit."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from mpengine import rules
from mpengine.kernels import launch, layout
from mpengine.kernels import rules as kernel_rules
from tests.kernels.harness import (
    BRAIN,
    DEVICE,
    HALF,
    SINGLE,
    Builder,
    Grad,
    Problem,
    Spec,
    assert_same_bits,
    build,
    check,
    run_decide,
    run_inspect,
    run_update,
)

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
OPTIONS = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.1, "maximize": True}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.7, "nesterov": True, "maximize": True, "weight_decay": 1e-2}),
    (ADAM, {}),
    (ADAM, {"weight_decay": 0.1, "maximize": True, "betas": (0.5, 0.999)}),
    (ADAM, {"amsgrad": True, "weight_decay": 0.1, "eps": 1e-3}),
    (ADAM, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    (ADAMW, {}),
    (ADAMW, {"amsgrad": True, "maximize": True, "betas": (0.0, 0.9)}),
]
SIZES = tuple(Spec((n,)) for n in (0, 1, 31, 1023, 1024, 1025))


def name(value):
    return value.__name__ if isinstance(value, type) else ",".join(value) or "plain"


@pytest.mark.parametrize(("optimizer", "options"), OPTIONS, ids=name)
def test_every_rule_and_option_at_odd_sizes(optimizer, options):
    check(Problem(SIZES, optimizer, (options,), max_norm=1.0), steps=3)


@pytest.mark.parametrize("rule", [rules.SGD, rules.SGD_MOMENTUM, rules.ADAM, rules.ADAM_AMSGRAD], ids=lambda r: r.name)
def test_many_programs_on_one_tensor(rule):
    optimizer = ADAM if rule.name.startswith("adam") else SGD
    options = {"rule": rule, "max_norm": 0.5} | ({"groups": ({"momentum": 0.9},)} if optimizer is SGD else {})
    check(Problem((Spec((65537,)),), optimizer, **options), steps=1)


def test_assign_writes_the_unscaled_gradient():
    grads = (Grad(0), Grad(1, SINGLE))
    tensors = (Spec((1030,), SINGLE, grads), Spec((5,), SINGLE, ()), Spec((1024,), HALF))
    check(Problem(tensors, rule=rules.ASSIGN, scales=(3.0, 1000.0)))


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=name)
def test_kinds_mix_in_one_launch(optimizer):
    kinds = (HALF, BRAIN, SINGLE)
    tensors = tuple(Spec((n,), p, (Grad(0, g),)) for n, p, g in product((33, 2048), kinds, kinds))
    check(Problem(tensors, optimizer, max_norm=1.0))


@pytest.mark.parametrize("kind", [BRAIN, SINGLE], ids=str)
def test_one_other_kind(kind):
    check(Problem((Spec((1500,), kind, (Grad(0, kind),)),)))


def test_half_kinds_without_float32():
    kinds = (HALF, BRAIN)
    check(Problem(tuple(Spec((1100,), p, (Grad(0, g),)) for p, g in product(kinds, kinds))))


def test_channels_last():
    tensors = tuple(Spec((4, n, 5, 3), kind, channels_last=True) for n, kind in ((7, HALF), (20, SINGLE)))
    check(Problem(tensors, ADAMW, max_norm=1.0))


@pytest.mark.parametrize(("state", "grad"), [(True, False), (False, True), (True, True)])
def test_misaligned_views(state, grad):
    tensors = tuple(
        Spec((n,), kind, (Grad(0, kind, grad),), misaligned=state) for n in (1023, 3100) for kind in (HALF, SINGLE)
    )
    check(Problem(tensors, max_norm=1.0))


def test_one_misaligned_source_among_aligned_ones():
    grads = (Grad(0), Grad(1, misaligned=True), Grad(2))
    check(Problem((Spec((17000,), grads=grads),), scales=(1024.0, 3.0, 0.1)), steps=1)


def test_idle_tensors_stay_as_they_are_and_do_not_count():
    tensors = (Spec((1025,)), Spec((1025,), grads=()), Spec((0,)), Spec((0,), grads=()), Spec((31,)))
    world = check(Problem(tensors, groups=({"betas": (0.5, 0.9)},), max_norm=1.0), steps=3)
    assert world.table.steps.tolist() == [3, 0, 3, 0, 3]


def test_all_tensors_idle():
    world = check(Problem((Spec((1025,), grads=()), Spec((3,), grads=()))))
    assert world.table.counts.tolist() == [2, 0]


@pytest.mark.parametrize("tensors", [(), (Spec((0,)),)], ids=["none", "empty"])
def test_no_programs(tensors):
    world = check(Problem(tensors, max_norm=1.0))
    assert world.table.counts.tolist() == [2, 0]


def test_groups_have_their_own_hyperparameters_and_rules():
    groups = ({"lr": 0.1, "weight_decay": 0.1}, {"lr": 1e-3, "betas": (0.1, 0.5)}, {"amsgrad": True, "maximize": True})
    tensors = tuple(Spec((n,), kind, group=g) for g in (0, 1, 2) for n, kind in ((1025, HALF), (7, SINGLE)))
    world = check(Problem(tensors, groups=groups, max_norm=1.0))
    assert len(world.table.update_chunks) == 2  # two rules, two launches


@pytest.mark.parametrize("losses", [2, 3, 8])
@pytest.mark.parametrize("kinds", [(HALF,), (HALF, SINGLE, BRAIN)], ids=["fp16", "mixed"])
def test_losses_with_their_own_scales_on_one_parameter(losses, kinds):
    scales = (65536.0, 3.0, None, 0.1, 1e-3, 12345.678, 2.0**-20, 1.0)[:losses]
    grads = tuple(Grad(k, kinds[k % len(kinds)]) for k in range(losses))
    tensors = (
        Spec((2500,), grads=grads),
        Spec((1024,), kinds[-1], grads[1:]),
        Spec((31,), grads=grads[:1]),
        Spec((9,), grads=()),
    )
    check(Problem(tensors, scales=scales, max_norm=1.0))


@pytest.mark.parametrize("max_norm", [0.0, 1e-4, 1.0, 5.0, 1e30, 1e300])
def test_clipping(max_norm):
    check(Problem((Spec((1300,)), Spec((17,), SINGLE)), max_norm=max_norm))


def test_rounding_to_half_precision_is_torchs_cast():
    """Every exponent, ties, subnormals, both infinities and NaN, through `assign`."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 15,), generator=generator, dtype=torch.int64)
    ties = (bits & ~0xFFFF) | 0x8000  # halfway between two bf16
    half_ties = (bits & ~0x1FFF) | 0x1000  # halfway between two fp16
    subnormal = torch.arange(-8192, 8192).to(SINGLE).mul(2.0**-36).view(torch.int32).long()
    special = torch.tensor([0, -(2**31), 0x7F800000, 0x7F7FFFFF, 0x7FFFFFFF, -1, 0x7F800001, 0x477FEFFF, 0x477FF000])
    values = torch.cat([bits, ties, half_ties, subnormal, special]).to(torch.int32).view(SINGLE)
    tensors = tuple(Spec(tuple(values.shape), kind, (Grad(0, SINGLE),)) for kind in (HALF, BRAIN))
    world = build(Problem(tensors, rule=rules.ASSIGN, scales=(None,)), DEVICE)
    for entry, (source,) in zip(world.table.entries, world.sources.entries, strict=True):
        source.grad.copy_(values)
        world.table.decision.copy_(torch.tensor([0.0, 1.0, 0.0, 0.0]))
        run_update(world, launch)
        expected = values.to(entry.param.dtype)
        actual = entry.param.cpu()
        same = (expected.view(torch.int16) == actual.view(torch.int16)) | (expected.isnan() & actual.isnan())
        assert bool(same.all()), f"{values[~same][0]} became {actual[~same][0]}, not {expected[~same][0]}"


def test_offsets_beyond_two_to_the_31():
    """A tensor of 2^32 elements of which only one chunk exists, far behind its first element."""
    far = 2**32 - layout.UPDATE_CHUNK
    world = build(Problem((Spec((layout.UPDATE_CHUNK,)),)), DEVICE)
    other = build(Problem((Spec((layout.UPDATE_CHUNK,)),)), DEVICE)
    run_inspect(other, launch)
    run_decide(other, launch)
    run_update(other, launch)
    row = world.table.rows[0]
    row[layout.NUMEL] = 2**32
    row[layout.PARAM_PTR] -= 2 * far
    for column in (layout.MASTER_PTR, layout.SLOT_PTR, layout.SLOT_PTR + 1):
        row[column] -= 4 * far
    world.sources.rows[0, 0, layout.GRAD_PTR] -= 2 * far
    for chunks in world.table.update_chunks.values():
        chunks[0, 1] = far // layout.UPDATE_CHUNK
    world.table.inspect_chunks[0, 1] = 2**32 // layout.INSPECT_CHUNK - 1
    world.table.decision.copy_(other.table.decision)
    world.table.scalars.copy_(other.table.scalars)
    run_update(world, launch)
    for buffer in ("param 0", "master 0", "slot 0 of 0", "slot 1 of 0"):
        assert_same_bits(buffer, other.buffers[buffer].cpu(), world.buffers[buffer].cpu())


def test_chunks_far_into_a_tensor_are_inspected():
    far = 2**32 - layout.INSPECT_CHUNK
    problem = Problem((Spec((layout.INSPECT_CHUNK,)),))
    world, other = build(problem, DEVICE), build(problem, DEVICE)
    run_inspect(other, launch)
    world.table.rows[0, layout.NUMEL] = 2**32
    world.sources.rows[0, 0, layout.GRAD_PTR] -= 2 * far
    world.table.inspect_chunks[0, 1] = far // layout.INSPECT_CHUNK
    run_inspect(world, launch)
    assert_same_bits("partials", other.buffers["partials"].cpu(), world.buffers["partials"].cpu())


def test_the_builder_lays_misaligned_tensors():
    laid = Builder(Problem(()), DEVICE)
    assert laid.lay("a", torch.zeros(3)).data_ptr() % 16 == 0
    assert laid.lay("b", torch.zeros(3), misaligned=True).data_ptr() % 16 != 0


# Sabotage: the comparison must notice each of these.


@triton.jit
def _ascending_adam(p, g, slots, c):
    return kernel_rules.adam(p, -g, slots, c)


@triton.jit
def _forgetful_adam(p, g, slots, c):
    p, _ = kernel_rules.adam(p, g, slots, c)
    return p, slots


@triton.jit
def _contracted_adam(p, g, slots, c):
    """The same mathematics in another order: only the last bits differ."""
    m = slots[0] * (1.0 - c[3]) + g * c[3]
    v = slots[1] * c[4] + g * g * c[5]
    return p - tl.div_rn(m, tl.sqrt_rn(v) * c[6] + c[8]) * c[7], (m, v)


def _sabotaged(**functions):
    return SimpleNamespace(**{"inspect": launch.inspect, "decide": launch.decide, "update": launch.update} | functions)


def _without_clip(table, sources, rule, decision):
    decision = decision.clone()
    decision[layout.CLIP] = 1.0
    launch.update(table, sources, rule, decision)


def _doubled_lr(table, sources, rule, decision):
    table.scalars[:, 7] *= 2.0
    launch.update(table, sources, rule, decision)
    table.scalars[:, 7] *= 0.5


def _never_skipping(table, sources, rule, decision):
    decision = decision.clone()
    decision[layout.SKIP] = 0.0
    decision[layout.CLIP] = 1.0
    launch.update(table, sources, rule, decision)


PROBLEM = Problem((Spec((1025,)), Spec((40,), SINGLE)), max_norm=1.0)


@pytest.mark.parametrize("rule", [_ascending_adam, _forgetful_adam, _contracted_adam], ids=lambda r: r.__name__)
def test_a_sabotaged_rule_is_noticed(rule, monkeypatch):
    check(PROBLEM)
    monkeypatch.setitem(kernel_rules.RULES, "adam", rule)
    with pytest.raises(AssertionError, match="differ"):
        check(PROBLEM)


@pytest.mark.parametrize(
    "sabotage",
    [
        {"update": lambda *_: None},
        {"update": _without_clip},
        {"update": _doubled_lr},
        {"decide": lambda *_: None},
        {"inspect": lambda *_: None},
    ],
    ids=["no update", "no clip", "doubled lr", "no decision", "no inspection"],
)
def test_a_sabotaged_step_is_noticed(sabotage):
    with pytest.raises(AssertionError):
        check(PROBLEM, module=_sabotaged(**sabotage))


def test_a_step_taken_in_spite_of_an_overflow_is_noticed():
    overflowing = PROBLEM.with_spikes(0, 0, (3, float("inf")))
    check(overflowing)
    with pytest.raises(AssertionError, match="differ"):
        check(overflowing, module=_sabotaged(update=_never_skipping))


def test_a_write_past_the_end_is_noticed():
    def careless(table, sources, rule, decision):
        launch.update(table, sources, rule, decision)
        master = table.entries[0].master
        master.as_strided((master.numel() + 1,), (1,))[-1] = 0.0

    with pytest.raises(AssertionError, match="first at 1025"):
        check(replace(PROBLEM, tensors=PROBLEM.tensors[:1]), module=_sabotaged(update=careless))
