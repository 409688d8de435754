"""`python -m mpengine.apex`: what it runs sees no difference to `python`, but that apex is there."""

import shutil

import pytest

from mpengine.apex import run
from tests.apex import worlds
from tests.apex.worlds import printed, python, runner, write

PROBE = """
import sys

main = sys.modules["__main__"]
print(__name__, __file__, __package__, __spec__ and __spec__.name, __builtins__, __doc__, type(__loader__).__name__)
print(sys.argv, sys.path[0], main.__dict__ is globals(), sorted(vars(main)))
def typed(x: int): ...
print(typed.__annotations__, __annotations__)
sys.exit(7)
"""
FAILS = '''
"""A failure in a function, after another one."""
import sys

def inner():
    raise ValueError("first")

def outer():
    try:
        inner()
    except ValueError as error:
        raise RuntimeError("second") from error

print("before", flush=True)
outer()
'''


def alike(cwd, *arguments):
    """The same output, errors and exit code, from python and from the runner."""
    ours, theirs = runner(*arguments, cwd=cwd), python(*arguments, cwd=cwd)
    assert (ours.returncode, ours.stderr, ours.stdout) == (theirs.returncode, theirs.stderr, theirs.stdout)
    return ours


def test_a_script(tmp_path):
    write(tmp_path, {"below/probe.py": PROBE})
    (tmp_path / "link.py").symlink_to(tmp_path / "below" / "probe.py")
    done = alike(tmp_path, "link.py", "a", "-m", "--force", "b c")
    assert done.returncode == 7
    assert str(["link.py", "a", "-m", "--force", "b c"]) in done.stdout


def test_a_module(tmp_path):
    write(tmp_path, {"pack/__init__.py": "", "pack/inner.py": PROBE})
    assert "pack.inner" in alike(tmp_path, "-m", "pack.inner", "--help", "x").stdout


def test_a_package(tmp_path):
    write(tmp_path, {"pack/__init__.py": "", "pack/__main__.py": PROBE})
    assert "pack.__main__" in alike(tmp_path, "-m", "pack").stdout


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_a_folder(tmp_path, packed):
    main = "import sys, helper\nprint(helper.x, sys.argv, sys.path[0])\n"
    write(tmp_path, {"app/__main__.py": main, "app/helper.py": "x = 3\n"})
    name = "app"
    if packed:
        name = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "app")
    assert printed(alike(tmp_path, name, "y")).startswith("3 ")


def test_an_error_shows_the_scripts_own_traceback(tmp_path):
    write(tmp_path, {"fails.py": FAILS})
    done = alike(tmp_path, "fails.py")
    assert done.returncode == 1
    assert "mpengine" not in done.stderr


def test_a_syntax_error(tmp_path):
    write(tmp_path, {"wrong.py": "x = = 2\n"})
    assert "SyntaxError" in alike(tmp_path, "wrong.py").stderr


@pytest.mark.parametrize("arguments", [("absent.py",), ("-m", "absent"), ("-m", "json")], ids=" ".join)
def test_nothing_to_run(tmp_path, arguments):
    done = alike(tmp_path, *arguments)
    assert done.returncode != 0
    assert done.stderr


@pytest.mark.parametrize("arguments", [[], ["-m"], ["--unknown", "x.py"], ["--force"]], ids=str)
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: python -m mpengine.apex [--force] SCRIPT")


def test_help(capsys):
    run.main(["--help"])
    assert "torchrun" in capsys.readouterr().out


# What the script finds.

IMPORTS = """
import importlib.util
import apex
import apex.amp as amp1
import apex.amp.amp
import apex.multi_tensor_apply.multi_tensor_apply
import amp_C
import apex_C
from apex import amp, fp16_utils, parallel
from apex.amp._amp_state import _amp_state
from apex.fp16_utils import *
from apex.fp16_utils import FP16_Optimizer as Other
from apex.fp16_utils.fp16util import network_to_half as half
from apex.fp16_utils.loss_scaler import DynamicLossScaler
from apex.multi_tensor_apply import multi_tensor_applier
from apex.normalization import FusedLayerNorm
from apex.normalization.fused_layer_norm import FusedLayerNorm as again
from apex.optimizers import FusedAdam, FusedLAMB
from apex.optimizers.fused_sgd import FusedSGD
from apex.parallel import DistributedDataParallel as DDP
from apex.parallel import LARC, ReduceOp
from apex.parallel.distributed import Reducer, apply_flat_dist_call, flat_dist_call, flatten, unflatten
import mpengine

assert FP16_Optimizer is Other is mpengine.apex.fp16_optimizer.FP16_Optimizer
assert network_to_half is half and FusedLayerNorm is again
assert amp is amp1 is apex.amp and amp.initialize is mpengine.amp.initialize is apex.amp.amp.initialize
assert amp._amp_state is _amp_state
assert multi_tensor_applier(amp_C.multi_tensor_l2norm, *NORM)[0].item() == 5.0
assert apex_C.flatten is flatten and apex_C.unflatten is unflatten
assert importlib.util.find_spec("apex") is apex.__spec__
assert {"initialize", "scale_loss"} <= set(dir(amp))
assert importlib.util.find_spec("apex.mlp") is importlib.util.find_spec("fmhalib") is None
assert not hasattr(apex, "__version__")
assert mpengine.apex.install() == mpengine.apex.install() == "provided"
assert mpengine.apex.install(force=True) == "provided"
assert apex is __import__("apex")
print("good")
""".replace("NORM", "(torch.zeros(1), [[torch.tensor([3.0, 4.0])]])").replace(
    "import apex\n", "import apex, torch\n", 1
)


MESSAGES = """
import contextlib, io, logging
from mpengine.apex.run import start

start()  # once more is not twice
logging.basicConfig(level=logging.DEBUG)
logger = logging.getLogger("mpengine.amp")
logger.info("Gradient overflow.")
logger.debug("a detail")
with contextlib.redirect_stdout(io.StringIO()) as caught:
    logger.info("elsewhere")
print([caught.getvalue()])
"""


def test_a_script_of_apexs_users(tmp_path):
    """Imports of every kind; messages are printed as apex did."""
    write(tmp_path, {"imports.py": IMPORTS + MESSAGES})
    assert printed(runner("imports.py", cwd=tmp_path)) == "good\nGradient overflow.\n['elsewhere\\n']\n"


def test_install_from_code(tmp_path):
    code = "import mpengine.apex\nprint(mpengine.apex.install())\n" + IMPORTS
    write(tmp_path, {"imports.py": code})
    assert printed(python("imports.py", cwd=tmp_path)) == "provided\ngood\n"


SPAWNS = """
import logging, multiprocessing
from apex import amp

def work(queue):
    logging.getLogger("mpengine.amp").info("in the child")
    queue.put(amp.__name__)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get())
    process.join()
"""


def test_processes_that_it_spawns_find_apex_too(tmp_path):
    write(tmp_path, {"spawns.py": SPAWNS})
    assert sorted(printed(runner("spawns.py", cwd=tmp_path)).splitlines()) == ["apex.amp", "in the child"]


# Another apex is installed.

INSTALLED = {
    "apex/__init__.py": "__version__ = '25.06'\nfrom . import optimizers\n",
    "apex/optimizers/__init__.py": "class FusedAdam: theirs = True\n",
    "apex/contrib/__init__.py": "",
    "apex/contrib/xentropy.py": "theirs = True\n",
    "apex/normalization/__init__.py": "class FusedLayerNorm: theirs = True\n",
    "amp_C.py": "theirs = True\ndef multi_tensor_scale(): ...\n",
}
ASKS = """
import mpengine
from apex import amp
import amp_C, apex, apex.normalization, apex.parallel.distributed
answer = mpengine.apex.install()
print(answer, hasattr(amp, "theirs"), hasattr(amp_C, "theirs"), getattr(apex, "__version__", None))
print(hasattr(apex.normalization.FusedLayerNorm, "theirs"))
if answer == "completed":
    from apex.contrib.xentropy import theirs
    from apex.optimizers import FusedAdam
    assert FusedAdam.theirs
    assert apex.normalization.FusedRMSNorm is mpengine.apex.normalization.FusedRMSNorm
    assert apex.amp is amp and apex.parallel.DistributedDataParallel
    assert amp.initialize is mpengine.amp.initialize
"""
WITH_AMP = INSTALLED | dict.fromkeys(("apex/parallel/__init__.py", "apex/parallel/distributed.py"), "")
WITH_AMP["apex/amp.py"] = "theirs = True\n"
BROKEN = {"apex/__init__.py": "from pyramid.session import absent\n", "apex/amp.py": "theirs = True\n"}

STATES = {
    "without amp": (INSTALLED, [], "completed False True 25.06\nTrue\n"),
    "with amp": (WITH_AMP, [], "kept True True 25.06\nTrue\n"),
    "with amp, forced": (WITH_AMP, ["--force"], "provided False False None\nFalse\n"),
    "another package of that name": (BROKEN, [], "provided False False None\nFalse\n"),
}


@pytest.mark.parametrize("state", STATES)
def test_another_apex_is_installed(tmp_path, state):
    files, options, answer = STATES[state]
    write(tmp_path / "installed", files)
    write(tmp_path, {"asks.py": ASKS})
    assert printed(runner(*options, "asks.py", cwd=tmp_path, path=tmp_path / "installed")) == answer


def test_an_apex_beside_the_script_is_an_installed_one(tmp_path):
    """And one in the current folder is not, as `python` has it."""
    write(
        tmp_path, {"apex/__init__.py": "1 / 0\n", "below/apex/__init__.py": "", "below/apex/amp.py": "theirs = True\n"}
    )
    write(tmp_path, {"below/asks.py": "from apex.amp import theirs\nimport mpengine\nprint(mpengine.apex.install())\n"})
    assert printed(runner("below/asks.py", cwd=tmp_path)) == "kept\n"


RANKS = """
import os, sys, time, torch
import torch.distributed as dist
from apex import amp
from apex.parallel import DistributedDataParallel as DDP

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(rank)
model = torch.nn.Linear(8, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model, optimizer = amp.initialize(model, optimizer, opt_level="O2", loss_scale=128.0, verbosity=0)
model = DDP(model)
for _ in range(3):
    optimizer.zero_grad()
    loss = model(torch.randn(16, 8)).square().mean()
    with amp.scale_loss(loss, optimizer) as scaled:
        scaled.backward()
    optimizer.step()
masters = torch.cat([p.detach().reshape(-1) for p in amp.master_params(optimizer)])
others = [torch.empty_like(masters) for _ in range(2)]
dist.all_gather(others, masters)
assert torch.equal(*others) and optimizer.steps_taken == 3
with open(f"done{rank}", "w") as file:
    file.write(" ".join(sys.argv))
deadline = time.monotonic() + 30
while not os.path.exists(f"done{1 - rank}") and time.monotonic() < deadline:
    time.sleep(0.01)
os._exit(0)  # under pytest a rank that ended otherwise aborted now and then (SIGABRT); the cause is not known
"""


def test_under_torchrun(tmp_path):
    write(tmp_path, {"ranks.py": RANKS})
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python("-W", "default", *torchrun, "-m", "mpengine.apex", "ranks.py", "--lr", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"done{rank}").read_text() for rank in range(2)] == ["ranks.py --lr 1"] * 2


# The tests notice.

SABOTAGES = {
    "a runner's own frames": ("run._excepthook = sys.__excepthook__", test_an_error_shows_the_scripts_own_traceback),
    "another sys.path[0]": ("run._begin = lambda folder, force: run.start(force)", test_a_script),
}


@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_a_difference_to_python_would_be_noticed(tmp_path, monkeypatch, sabotage):
    change, test = SABOTAGES[sabotage]
    code = f"import sys\nfrom mpengine.apex import run\n{change}\nrun.main(sys.argv[1:])"
    monkeypatch.setattr(worlds, "RUNNER", ("-c", code))
    with pytest.raises(AssertionError):
        test(tmp_path)
