"""Arenas, layouts and tables: what the device is told about parameters, masters, state and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpengine.kernels import layout
from mpengine.masters import Entry, TensorTable, arena, flat, is_dense, same_layout
from mpengine.rules import ADAM, SGD
from mpengine.sources import Ballot, Source, SourceTable
from tests.harness import BRAIN, HALF, SINGLE, same_bits

CPU = torch.device("cpu")


# Layouts.


@pytest.mark.parametrize(
    ("make", "dense"),
    [
        (lambda: torch.ones(()), True),
        (lambda: torch.ones(0), True),
        (lambda: torch.ones(3, 0, 2), True),
        (lambda: torch.ones(4), True),
        (lambda: torch.ones(2, 3).t(), True),
        (lambda: torch.ones(2, 3, 4).permute(2, 0, 1), True),
        (lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (lambda: torch.ones(1, 3).expand(1, 3), True),
        (lambda: torch.ones(3, 1).as_strided((3, 1), (1, 77)), True),
        (lambda: torch.ones(5)[1:], True),
        (lambda: torch.ones(4).expand(3, 4), False),
        (lambda: torch.ones(1).expand(4), False),
        (lambda: torch.ones(8)[::2], False),
        (lambda: torch.ones(4, 4)[:, :2], False),
        (lambda: torch.ones(8).as_strided((3, 3), (2, 1)), False),
    ],
)
def test_is_dense(make, dense):
    assert is_dense(make()) is dense


def test_same_layout():
    a = torch.ones(2, 3, 4, 5)
    last = a.to(memory_format=torch.channels_last)
    assert same_layout(a, a.clone())
    assert same_layout(last, torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last))
    assert not same_layout(a, last)
    assert not same_layout(a, torch.ones(2, 3, 4, 6))
    assert not same_layout(torch.ones(6), torch.ones(2, 3))
    assert same_layout(torch.ones(3, 1), torch.ones(3).as_strided((3, 1), (1, 9)))  # one element has no stride


def test_flat_is_a_view_in_the_order_of_memory():
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    last = base.to(memory_format=torch.channels_last)
    assert flat(last).tolist() == last.permute(0, 2, 3, 1).reshape(-1).tolist()
    part = torch.arange(10.0)[3:7]
    flat(part)[0] = 99.0
    assert part[0] == 99.0
    assert flat(torch.tensor(5.0)).tolist() == [5.0]
    assert flat(torch.ones(0, 3)).shape == (0,)
    assert not flat(nn.Parameter(torch.ones(2))).requires_grad


# Arenas.


@pytest.mark.parametrize("fill", [0.0, 2.5])
def test_an_arena_is_one_allocation_of_slices_like_the_tensors(fill):
    like = [
        torch.ones(7, dtype=HALF),
        torch.ones((), dtype=BRAIN),
        torch.ones(0),
        torch.ones(2, 3, 4, 5, dtype=HALF).to(memory_format=torch.channels_last),
        torch.ones(3, 5).t(),
        torch.ones(65),
    ]
    cut = arena(like, fill=fill)
    assert len({t.untyped_storage().data_ptr() for t in cut}) == 1
    for tensor, own in zip(like, cut, strict=True):
        assert own.dtype == SINGLE
        assert own.shape == tensor.shape
        assert own.stride() == tensor.stride()
        assert (own == fill).all()
        assert own.storage_offset() % 64 == 0
    for i, own in enumerate(cut):
        own.fill_(float(i))
    assert all((own == i).all() for i, own in enumerate(cut))  # they do not overlap
    assert cut[0].untyped_storage().nbytes() == 4 * sum(-(-t.numel() // 64) * 64 for t in like)


def test_an_arena_of_nothing():
    assert arena([]) == []


# Tables.


def entry(param, rule=SGD, group=0):
    own = param.dtype == SINGLE
    master = param.detach() if own else param.detach().float()
    slots = tuple(torch.zeros_like(master) for _ in rule.slots)
    return Entry(param.detach(), master, slots, group, rule, not own)


def test_the_rows_of_a_table():
    half, single = torch.ones(5, dtype=HALF), torch.ones(3, 7)
    buffer = torch.ones(10, dtype=BRAIN)
    odd = buffer[1:9]
    entries = [entry(half, ADAM, 1), entry(single), entry(odd)]
    table = TensorTable(entries, num_losses=2, device=CPU)
    rows = table.rows.numpy()
    assert rows.shape == (3, layout.ROW)
    assert rows[:, layout.PARAM_PTR].tolist() == [half.data_ptr(), 0, odd.data_ptr()]  # FP32 is its own master
    assert rows[:, layout.MASTER_PTR].tolist() == [e.master.data_ptr() for e in entries]
    assert rows[0, layout.SLOT_PTR : layout.SLOT_PTR + 2].tolist() == [s.data_ptr() for s in entries[0].slots]
    assert rows[:, layout.NUMEL].tolist() == [5, 21, 8]
    assert rows[:, layout.GROUP].tolist() == [1, 0, 0]
    kinds = [layout.FLOAT16 + layout.ALIGNED, layout.FLOAT32 + layout.ALIGNED, layout.BFLOAT16]
    assert rows[:, layout.FORMAT].tolist() == kinds
    assert table.stamps.shape == (3, 2)
    assert table.found.tolist() == [0, 0]
    assert table.steps.tolist() == [0, 0, 0]
    assert table.counts.tolist() == [0, 0]
    assert table.decision[: layout.NORM].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("numel", [0, 1, layout.UPDATE_CHUNK - 1, layout.UPDATE_CHUNK, layout.UPDATE_CHUNK + 1, 40000])
def test_every_element_has_one_program(numel):
    sizes = [3, numel, 5]
    entries = [entry(torch.ones(size, dtype=HALF), rule) for size, rule in zip(sizes, (SGD, ADAM, SGD), strict=True)]
    table = TensorTable(entries, num_losses=1, device=CPU)

    def covered(chunks, chunk):
        seen = [np.zeros(size, dtype=int) for size in sizes]
        for tensor, number in chunks.tolist():
            assert number * chunk < sizes[tensor]
            seen[tensor][number * chunk : (number + 1) * chunk] += 1
        return seen

    assert all((seen == 1).all() for seen in covered(table.inspect_chunks, layout.INSPECT_CHUNK))
    assert len(table.partials) == len(table.inspect_chunks)
    assert set(table.update_chunks) == {SGD, ADAM}
    sgd, adam = (covered(table.update_chunks[rule], layout.UPDATE_CHUNK) for rule in (SGD, ADAM))
    assert all((s + a == 1).all() for s, a in zip(sgd, adam, strict=True))
    assert not sgd[1].any()


def test_the_rows_of_the_sources():
    scale, grads = torch.tensor(8.0), [torch.ones(4, dtype=HALF), torch.ones(9, dtype=BRAIN)[1:5], torch.ones(0)]
    sources = SourceTable(CPU)
    ballots = [Ballot(layout.FRESH), Ballot(layout.STALE, scale)]
    sources.set([[Source(grads[0], scale, 1)], [], [Source(grads[1], None, 0)], [Source(grads[2], None, 0)]], ballots)
    assert sources.width == 1
    assert sources.rows.shape == (4, 1, layout.SOURCE)
    rows = sources.rows[:, 0].tolist()
    assert rows[0] == [grads[0].data_ptr(), scale.data_ptr(), layout.FLOAT16 + layout.ALIGNED, 1]
    assert rows[1][layout.GRAD_PTR] == 0
    assert rows[2] == [grads[1].data_ptr(), 0, layout.BFLOAT16, 0]
    assert rows[3][layout.GRAD_PTR] != 0  # an empty gradient has no address, but its tensor takes the step
    assert sources.ballot_rows.tolist() == [[layout.FRESH, 0], [layout.STALE, scale.data_ptr()]]
    assert sources.kinds == {layout.FLOAT16, layout.BFLOAT16, layout.FLOAT32}


def test_several_sources_of_one_tensor():
    grads = [torch.ones(4, dtype=HALF) for _ in range(3)]
    sources = SourceTable(CPU)
    sources.set([[Source(grad, None, k) for k, grad in enumerate(grads)], [Source(grads[0], None, 2)]], [])
    assert sources.width == layout.MAX_SOURCES
    pointers = sources.rows[:, :, layout.GRAD_PTR].tolist()
    assert pointers[0][:4] == [grad.data_ptr() for grad in grads] + [0]
    assert pointers[1][:2] == [grads[0].data_ptr(), 0]


def test_the_sources_are_uploaded_only_where_they_changed():
    grad = torch.ones(4, dtype=HALF)
    sources = SourceTable(CPU)
    sources.set([[Source(grad, None, 0)]], [])
    first = sources.rows.data_ptr()
    sources.set([[Source(grad, None, 0)]], [])
    assert sources.rows.data_ptr() == first
    other = torch.ones(4, dtype=HALF)
    sources.set([[Source(other, None, 0)]], [])
    assert sources.rows[0, 0, layout.GRAD_PTR] == other.data_ptr()


def test_an_empty_table():
    table = TensorTable([], num_losses=1, device=CPU)
    assert table.rows.shape == (0, layout.ROW)
    assert table.update_chunks == {}
    sources = SourceTable(CPU)
    sources.set([], [])
    assert sources.rows.shape == (0, 1, layout.SOURCE)
    assert same_bits(table.counts, torch.zeros(2, dtype=torch.int32))
