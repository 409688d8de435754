"""docs/graphs.md: its Python runs as it stands there, block after block in one namespace."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "graphs.md"


def test_the_pages_python_runs(capsys):
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 5
    namespace = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    assert namespace["train"].captures == 1
    assert namespace["train"].replays == 30 - 3
    assert namespace["optimizer"].steps_taken + namespace["optimizer"].steps_skipped == 31
    assert namespace["play"].replays == 3
    printed = capsys.readouterr().out
    assert "x: got a float32 tensor of shape (7, 64)" in printed
    assert "'generator':" in printed
