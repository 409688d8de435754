"""docs/from-apex.md: its Python runs as it stands there; its list of what is not provided is the program's own."""

import re

from mpengine.apex import missing
from tests.apex.worlds import ROOT, printed, python, write

PAGE = (ROOT / "docs" / "from-apex.md").read_text()
CHECK = """
assert [sorted(checkpoint), sorted(checkpoint["amp"])] == [["amp", "model", "optimizer"], ["loss_scaler0"]]
assert {value.dtype for value in checkpoint["model"].values()} == {torch.float32, torch.int64}
assert scaler.get_scale() == 65536.0
assert 1.0 < optimizer.loss_scale < 2**32 and norm != -1
assert optimizer.optimizer.steps_taken > 0
"""


def test_the_pages_python_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 3
    write(tmp_path, {"page.py": "\n".join([*blocks, CHECK])})
    assert printed(python("page.py", cwd=tmp_path)).startswith("provided\n")


def test_what_is_not_provided():
    """To make it anew: `print(table())`."""
    assert PAGE.partition("<!-- missing: begin -->\n")[2].partition("<!-- missing: end -->")[0] == table()


def table():
    rows = [f"| `{name}` | {instead} |\n" for name, instead in missing.INSTEAD.items()]
    return "".join(["| apex | use instead |\n|---|---|\n", *rows])
