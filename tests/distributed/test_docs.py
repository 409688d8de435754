"""docs/distributed.md: its Python runs as it stands there, under torchrun with two processes."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
CHECK = """
import torch

assert optimizer.steps_taken + optimizer.steps_skipped == 6
assert optimizer.steps_taken > 3
torch.save([p.detach() for p in optimizer.master_params()], f"masters{rank}.pt")
"""


def test_the_pages_python_runs_under_torchrun(tmp_path):
    import torch

    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    (tmp_path / "train.py").write_text("\n".join([*blocks, CHECK]))
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(PAGE.parents[1]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    first, second = (torch.load(tmp_path / f"masters{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
