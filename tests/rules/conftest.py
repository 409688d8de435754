"""With a GPU the tests of kernels run the compiled ones; without one, the interpreter runs them on the CPU."""

from pathlib import Path

import pytest
import torch


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what runs on the GPU, by its name."""
    here = Path(__file__).parent
    for item in items:
        if torch.cuda.is_available() and item.path.parent == here and "kernels" in item.nodeid:
            item.add_marker(pytest.mark.gpu)
