"""The pair of processes that the tests of `apex.parallel` share."""

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    workers = Pair()
    yield workers
    workers.stop()
