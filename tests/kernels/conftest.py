"""With a GPU every test here runs the compiled kernels; without one, the interpreter runs them on the CPU."""

from pathlib import Path

import pytest
import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]
_HOST_ONLY = {"test_aot.py", "test_isolation.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks what runs on the GPU."""
    here = Path(__file__).parent
    for item in items:
        if torch.cuda.is_available() and item.path.parent == here and item.path.name not in _HOST_ONLY:
            item.add_marker(pytest.mark.gpu)
