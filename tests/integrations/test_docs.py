"""The Python in docs/trainers.md runs as it stands there: a section's blocks after one another, in one namespace."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
}
EXPECTED = {
    # Random batches may overflow at the first scale, 65536.
    "Lightning": [r"[34] [01] (65536|32768)\.0", r"0 (65536|32768)\.0 [01]", r"2 (65536|32768)\.0 [01]"],
    "Fabric": [r"[34] [01] (65536|32768)\.0"],
    "Accelerate": [r"(False|True) [34] (65536|32768)\.0"],
    "transformers": [r"[12] (65536|32768)\.0"],
}


def test_every_section_is_run():
    assert list(SECTIONS) == list(EXPECTED)
    assert all(SECTIONS.values())


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated")  # Lightning's own use of torch
@pytest.mark.filterwarnings("ignore:.*does not have many workers")  # advice on loaders, for tensors in memory
@pytest.mark.filterwarnings("ignore:.*exists and is not empty")  # Lightning's default checkpoints, of several fits
@pytest.mark.filterwarnings("ignore:The number of training batches")  # fewer than Lightning logs by default
@pytest.mark.filterwarnings("ignore:.*tensorboardX")  # Lightning's default logger is another where it is missing
@pytest.mark.filterwarnings("ignore:Precision 16-mixed is not supported by the model summary")  # nor is Lightning's own
@pytest.mark.parametrize("name", SECTIONS)
def test_the_pages_python_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # trainers write logs and checkpoints
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(noisy), "level", logging.ERROR)
    torch.manual_seed(0)
    namespace = {}
    try:
        for block in SECTIONS[name]:
            exec(compile(block, f"{PAGE} ({name})", "exec"), namespace)
    finally:
        for kept in (AcceleratorState, GradientState, PartialState):  # Accelerate's singletons
            kept._reset_state()
    printed = capsys.readouterr().out
    for line in EXPECTED[name]:
        assert re.search(line, printed), printed
