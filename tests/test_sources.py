"""The table of gradients: a column of one label is described as one by one, and only when it changed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpengine.kernels import layout
from mpengine.sources import Ballot, Column, Source, SourceTable
from mpengine.upload import Mirror

CPU = torch.device("cpu")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
SCALE = torch.tensor(8.0)
BALLOTS = [Ballot(layout.FRESH, SCALE), Ballot(layout.STALE, SCALE)]


def gradient(kind):
    """None, or a gradient of a dtype that may be empty or misaligned."""
    if kind is None:
        return None
    dtype, size, start = kind
    return torch.ones(start + size, dtype=dtype)[start:]


GRADIENTS = st.lists(
    st.none() | st.tuples(st.sampled_from([HALF, BRAIN, SINGLE]), st.sampled_from([0, 1, 9]), st.integers(0, 1)),
    min_size=1,
    max_size=6,
)


def one_by_one(column):
    sources = SourceTable(CPU)
    entries = [[] if g is None else [Source(g, column.scale, column.loss_id)] for g in column.grads]
    sources.set(entries, BALLOTS)
    return sources


def assert_equal(table, expected):
    assert torch.equal(table.rows, expected.rows)
    assert torch.equal(table.ballot_rows, expected.ballot_rows)
    assert (table.width, table.kinds, table.ballots) == (expected.width, expected.kinds, expected.ballots)
    for ours, theirs in zip(table.entries, expected.entries, strict=True):
        assert [(id(g), id(s), k) for g, s, k in ours] == [(id(g), id(s), k) for g, s, k in theirs]


@settings(deadline=None)
@given(GRADIENTS, st.sampled_from([None, SCALE]), st.integers(0, 1))
def test_a_column_is_described_as_its_gradients_are(kinds, scale, loss_id):
    column = Column([gradient(kind) for kind in kinds], scale, loss_id)
    table = SourceTable(CPU)
    assert not table.knows(column)
    table.learn(column)
    assert table.knows(column) == any(grad is not None for grad in column.grads)
    if table.knows(column):
        table.set_column(column, BALLOTS)
        assert_equal(table, one_by_one(column))


def known_table(*grads):
    column = Column(list(grads), SCALE, 0)
    table = SourceTable(CPU)
    table.learn(column)
    table.set_column(column, BALLOTS)
    return table, column


def test_what_it_does_not_know():
    grad = torch.ones(4, 2, dtype=HALF)
    table, column = known_table(grad, None)
    others = {
        "another dtype": [grad.float(), None],
        "another layout": [torch.ones(2, 4, dtype=HALF).t(), None],
        "another place": [None, grad],
        "one more": [grad, grad],
        "none": [None, None],
    }
    assert table.knows(column._replace(grads=[grad.clone(), None]))
    for name, grads in others.items():
        assert not table.knows(column._replace(grads=grads)), name
    assert not table.knows(column._replace(scale=SCALE.to("meta")))


CHANGES = {
    "a gradient": lambda c, b: (c._replace(grads=[torch.ones(4, dtype=HALF)]), b),
    "the scale": lambda c, b: (c._replace(scale=torch.tensor(2.0)), b),
    "no scale": lambda c, b: (c._replace(scale=None), b),
    "the loss": lambda c, b: (c._replace(loss_id=1), b),
    "a ballot": lambda c, b: (c, [b[0], Ballot(layout.ABSENT)]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_reaches_the_device(change):
    table, column = known_table(torch.ones(4, dtype=HALF))
    column, ballots = change(column, BALLOTS)
    assert table.knows(column)
    table.set_column(column, ballots)
    expected = SourceTable(CPU)
    expected.set([[Source(g, column.scale, column.loss_id)] for g in column.grads], ballots)
    assert_equal(table, expected)


def test_an_unchanged_column_uploads_nothing():
    table, column = known_table(torch.ones(4, dtype=HALF))
    table.rows.fill_(-7)  # as the device has it: an upload would write it
    table.set_column(column, BALLOTS)
    assert (table.rows == -7).all()


def test_a_column_after_a_general_table_is_described_anew():
    table, column = known_table(torch.ones(4, dtype=HALF))
    table.set([[]], BALLOTS)
    table.set_column(column, BALLOTS)
    assert_equal(table, one_by_one(column))


def test_released_gradients_are_gone():
    import weakref

    grad = torch.ones(4, dtype=HALF)
    reference = weakref.ref(grad)
    table, column = known_table(grad)
    table.release()
    del grad, column
    assert reference() is None
    assert table.entries == []


def test_a_mirror_stays_where_it_is():
    mirror, array = Mirror(CPU), np.arange(3.0)
    first = mirror.follow(array)
    array[1] = 7.0  # the caller's array is not the device's
    assert first.tolist() == [0.0, 1.0, 2.0]
    assert mirror.follow(array) is first
    assert first.tolist() == [0.0, 7.0, 2.0]
    assert mirror.follow(np.arange(4.0)).tolist() == [0.0, 1.0, 2.0, 3.0]
