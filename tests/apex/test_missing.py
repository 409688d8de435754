"""What is not provided: each import and attribute fails as Python's would, and names what to use instead."""

import re
import subprocess
import sys

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


def test_other_packages_are_none_of_its_business():
    assert missing.Finder().find_spec("apexes.amp") is None
    assert missing.Finder().find_spec("absent") is None
    with pytest.raises(ModuleNotFoundError, match=r"mpengine provides no apex\.absent") as caught:
        missing.Finder().find_spec("apex.absent")
    assert caught.value.name is None


def test_a_finder_that_says_nothing_would_be_noticed(monkeypatch):
    monkeypatch.setattr(missing, "_refuse", lambda name: None)
    with pytest.raises(pytest.fail.Exception):
        test_other_packages_are_none_of_its_business()
