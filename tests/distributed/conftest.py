"""The pair of processes that all tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    workers = Pair()
    yield workers
    workers.stop()
