"""docs/write-a-rule.md: its Python runs as one module, in a file, from which Triton reads its functions."""

import importlib.util
import re
import sys
from pathlib import Path

import torch

from mpengine.kernels import layout

PAGE = Path(__file__).parents[2] / "docs" / "write-a-rule.md"


def test_the_pages_python_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a checkpoint
    text = PAGE.read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 6
    path = tmp_path / "page_of_rules.py"
    path.write_text("\n".join(blocks))
    spec = importlib.util.spec_from_file_location("page_of_rules", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "page_of_rules", module)  # where pickle finds the classes
    spec.loader.exec_module(module)

    printed = capsys.readouterr().out
    if not torch.cuda.is_available():
        shown = re.search(r"prints\n\n```\n(.*?)```", text, flags=re.DOTALL).group(1)
        assert printed.startswith(shown), "the page shows another report"
    assert "Steady with lr=0.01, beta=0.9:\n" in printed
    assert printed.count("reference = Triton kernels") == 2
    assert module.losses[-1] < 0.5 * module.losses[0]
    assert "torch.float32" in printed
    assert "betas[1] of group 0 is 1.0; it must be finite and at least 0 and below 1." in printed


def test_the_page_knows_how_much_room_there_is():
    text = PAGE.read_text()
    rooms = layout.HYPER, layout.SCALARS, layout.MAX_SLOTS, layout.NORMS, layout.MAX_CELLS
    assert [int(number) for number in re.findall(r"at most (\d+)", text.split("### Bounds")[0])][-5:] == list(rooms)
