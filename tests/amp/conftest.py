"""amp's state is global, as apex's was: each test begins without any, and undoes its patches."""

import pytest

from mpengine.amp import casts, state


@pytest.fixture(autouse=True)
def _fresh():
    casts._registered.clear()
    yield
    casts._registered.clear()
    casts.begin(False)
    state._latest = None
