"""The README's Python runs as it stands there, block after block in one namespace."""

import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own use of torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # advice on loaders, for tensors in memory
@pytest.mark.filterwarnings("ignore:The number of training batches")  # fewer than Lightning logs by default
@pytest.mark.filterwarnings("ignore:.*tensorboardX")  # Lightning's default logger is another where it is missing
@pytest.mark.filterwarnings("ignore:Precision 16-mixed is not supported by the model summary")  # nor is Lightning's own
def test_the_readmes_python_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # trainers write logs and checkpoints
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 8
    namespace = {}
    try:
        for block in blocks:
            exec(compile(block, str(README), "exec"), namespace)
    finally:  # Accelerate's are global
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    assert namespace["optimizer"].steps_taken + namespace["optimizer"].steps_skipped == 10 + 4
    assert namespace["train"].captures == 1
    assert namespace["trainer"].optimizers[0].steps_taken >= 3
    assert namespace["opt"].steps_taken >= 2
    printed = capsys.readouterr().out
    assert "torch.float16" in printed
    assert "zero or subnormal" in printed
