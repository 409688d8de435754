"""The script that the project began from, unmodified, through `python -m mpengine.apex`."""

import math
import re

import pytest
import torch

from tests.apex.worlds import ROOT, printed, runner

SCRIPT = ROOT / "tests" / "apex" / "scripts" / "dcgan_main_amp.py"
SMALL = [
    "--nz",
    "8",
    "--ngf",
    "4",
    "--ndf",
    "4",
    "--batchSize",
    "16",
    "--images",
    "96",
    "--niter",
    "2",
    "--lr",
    "1e-3",
    "--lossWeight",
    "8",
]
LINE = re.compile(r"\[(\d)/2\]\[(\d)/6\] Loss_D: (\S+) Loss_G: (\S+) D\(x\): (\S+) D\(G\(z\)\): (\S+) / (\S+)")


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_it_trains(tmp_path, level):
    words = printed(runner(SCRIPT, "--opt_level", level, "--outf", "out", *SMALL, cwd=tmp_path))
    lines = LINE.findall(words)
    assert len(lines) == 2 * 6
    assert all(math.isfinite(float(number)) for line in lines for number in line)
    assert f"opt_level='{level}'" in words
    assert f"Selected optimization level {level}" in words
    assert "Gradient overflow.  Skipping step, loss scaler 0 reducing loss scale to 32768.0\n" in words
    net = torch.load(tmp_path / "out" / "netG_epoch_1.pth", weights_only=True)
    assert {value.dtype for value in net.values() if value.is_floating_point()} == {torch.float32}
    samples = torch.load(tmp_path / "out" / "fake_samples_epoch_001.pt", weights_only=True)
    assert (samples.shape, samples.dtype) == ((16, 1, 16, 16), torch.float32)
    assert samples.isfinite().all()
