"""What is not provided: each import and attribute fails as Python's would, and names what to use instead."""

import importlib.util
import re
import subprocess
import sys
from importlib import import_module

import pytest

from mpengine.apex import missing, modules
from tests.apex.worlds import ROOT


@pytest.fixture(scope="module")
def answers():
    """Every statement below, run in one process: the class and the words of its error."""
    code = f"""
import mpengine.apex
mpengine.apex.install()
for statement in {STATEMENTS!r}:
    try:
        exec(statement, {{}})
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("nothing")
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    return dict(zip(STATEMENTS, run.stdout.splitlines(), strict=True))


REMEDIES = {
    "import apex.RNN": "torch.nn.LSTM",
    "from apex import RNN": "torch.nn.LSTM",
    "import apex; apex.RNN": "torch.nn.LSTM",
    "from apex.RNN.models import LSTM": "torch.nn.LSTM",
    "from apex.contrib.multihead_attn import SelfMultiheadAttn": "scaled_dot_product_attention",
    "import apex.contrib.xentropy": "torch.nn.CrossEntropyLoss",
    "from apex.contrib import xentropy": "torch.nn.CrossEntropyLoss",
    "from apex.contrib.xentropy import SoftmaxCrossEntropyLoss": "torch.nn.CrossEntropyLoss",
    "import apex; apex.contrib.xentropy": "torch.nn.CrossEntropyLoss",
    "from apex.contrib.optimizers.fp16_optimizer import FP16_Optimizer": "ZeroRedundancyOptimizer",
    "from apex.contrib.optimizers import FP16_Optimizer": "ZeroRedundancyOptimizer",
    "from apex.mlp import MLP": "torch.nn.Linear",
    "from apex import mlp": "torch.nn.Linear",
    "from apex.fused_dense import FusedDense": "torch.nn.Linear",
    "import apex.reparameterization": "weight_norm",
    "import apex.transformer": "Megatron-Core",
    "from apex.transformer.parallel_state import get_rank_info": "Megatron-Core",
    "import apex.parallel.multiproc": "torchrun",
    "from apex import pyprof": "torch.profiler",
    "import amp_C; amp_C.multi_tensor_adam": "apex.optimizers.FusedAdam",
    "from apex.optimizers import FusedMixedPrecisionLamb": "FusedLAMB",
    "from apex.normalization import FusedRMSNormAffineFunction": "fused_rms_norm_affine",
    "from apex.optimizers import FP16_Optimizer": "apex.fp16_utils.FP16_Optimizer",
    "import apex.optimizers.fused_mixed_precision_lamb": "FusedLAMB",
    "from apex.amp._amp_state import maybe_print": "logging.getLogger",
    "from apex.amp.frontend import O2": "opt_level='O2'",
    "from apex.amp.frontend import opt_levels": "opt_level='O0'",
    "from apex.amp.handle import AmpHandle": "apex.amp.scale_loss",
    "from apex.amp.lists import torch_overrides": "register_half_function",
    "from apex.amp import lists": "register_half_function",
    "from apex.amp.opt import OptimWrapper": "apex.amp.initialize",
    "from apex.amp.scaler import LossScaler": "mpengine.GradScaler",
    "from apex.amp._process_optimizer import AmpOptimizerState": "apex.amp.initialize",
    "from apex.parallel import multi_tensor_applier": "apex.multi_tensor_apply",
    "from apex.parallel.distributed import split_by_type": "flat_dist_call",
    "import bnp": "SyncBatchNorm",
    "import fused_layer_norm_cuda": "apex.normalization.FusedLayerNorm",
    "from xentropy_cuda import forward": "torch.nn.CrossEntropyLoss",
    "import scaled_upper_triang_masked_softmax_cuda": "is_causal=True",
}
NO_REMEDY = [
    "import amp_C; amp_C.unheard_of",
    "import apex.unheard_of",
    "from apex import unheard_of",
    "from apex.parallel import unheard_of",
]
STATEMENTS = [*REMEDIES, *NO_REMEDY]


@pytest.mark.parametrize("statement", REMEDIES)
def test_it_names_what_to_use_instead(answers, statement):
    kind, _, words = answers[statement].partition(" ")
    assert kind == ("AttributeError" if ";" in statement else "ModuleNotFoundError")
    name = re.match(r"mpengine provides no ([\w.]+); use .*instead\.$", words)
    assert name is not None, words
    assert REMEDIES[statement] in words


@pytest.mark.parametrize("statement", NO_REMEDY)
def test_names_that_apex_never_had(answers, statement):
    words = r"(ModuleNotFound|Attribute)Error mpengine provides no (apex|amp_C)\.[\w.]*unheard_of; docs/from-apex.md"
    assert re.match(words, answers[statement])


def test_nothing_is_both_provided_and_missing():
    assert not set(missing.INSTEAD) & set(modules.PROVIDED)


def test_the_longest_name_answers():
    assert "apex.fp16_utils.FP16_Optimizer" in missing.message("apex.contrib.optimizers.FP16_Optimizer")
    assert "apex.optimizers.FusedSGD" in missing.message("apex.contrib.optimizers.FusedSGD.step")


def test_other_packages_are_none_of_its_business(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, missing.Finder()])
    with pytest.raises(ModuleNotFoundError, match="No module named 'absent'"):
        import_module("absent")
    with pytest.raises(ModuleNotFoundError, match=r"mpengine provides no fmhalib; use") as caught:
        import_module("fmhalib")
    assert caught.value.name == "fmhalib"


def test_a_script_may_look_whether_there_is_such_a_module(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, missing.Finder()])
    assert importlib.util.find_spec("fmhalib") is None


def test_an_installed_module_of_that_name_is_found(monkeypatch, tmp_path):
    (tmp_path / "fmhalib.py").write_text("x = 3")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, missing.Finder()])
    assert import_module("fmhalib").x == 3
    del sys.modules["fmhalib"]


def test_a_finder_that_says_nothing_would_be_noticed(monkeypatch):
    monkeypatch.setattr(missing, "_refuse", lambda name: None)
    with pytest.raises(AssertionError):
        test_other_packages_are_none_of_its_business(monkeypatch)
