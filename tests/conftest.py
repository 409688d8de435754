"""Where no GPU exists, Triton's interpreter runs the kernels; it must be chosen before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the tests' tensors are tiny: threads would only wait for each other, on busy cores for long
