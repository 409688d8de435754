"""What of apex is not provided, and what to use instead."""

from __future__ import annotations

import importlib.abc
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

# The longest name that covers what was asked for is the one that answers.
INSTEAD = {
    "amp_C.multi_tensor_adagrad": "apex.optimizers.FusedAdagrad",
    "amp_C.multi_tensor_adam": "apex.optimizers.FusedAdam",
    "amp_C.multi_tensor_lamb": "apex.optimizers.FusedLAMB",
    "amp_C.multi_tensor_sgd": "apex.optimizers.FusedSGD",
    "apex.RNN": "torch.nn.LSTM, torch.nn.GRU and torch.nn.RNN",
    "apex.contrib.bottleneck": "torchvision.models.resnet.Bottleneck",
    "apex.contrib.clip_grad": "torch.nn.utils.clip_grad_norm_",
    "apex.contrib.conv_bias_relu": "torch.nn.Conv2d and torch.nn.ReLU, fused by torch.compile",
    "apex.contrib.cudnn_gbn": "apex.parallel.SyncBatchNorm",
    "apex.contrib.fmha": "torch.nn.functional.scaled_dot_product_attention",
    "apex.contrib.focal_loss": "torchvision.ops.sigmoid_focal_loss",
    "apex.contrib.gpu_direct_storage": "torch.cuda.gds",
    "apex.contrib.group_norm": "torch.nn.GroupNorm",
    "apex.contrib.groupbn": "torch.nn.BatchNorm2d, or apex.parallel.SyncBatchNorm",
    "apex.contrib.index_mul_2d": "rows[index] * other, fused by torch.compile",
    "apex.contrib.layer_norm": "torch.nn.LayerNorm",
    "apex.contrib.multihead_attn": "torch.nn.functional.scaled_dot_product_attention",
    "apex.contrib.nccl_allocator": "torch.cuda.MemPool",
    "apex.contrib.optimizers": "torch.distributed.optim.ZeroRedundancyOptimizer",
    "apex.contrib.optimizers.FP16_Optimizer": "apex.fp16_utils.FP16_Optimizer",
    "apex.contrib.optimizers.FusedAdam": "apex.optimizers.FusedAdam",
    "apex.contrib.optimizers.FusedLAMB": "apex.optimizers.FusedLAMB",
    "apex.contrib.optimizers.FusedSGD": "apex.optimizers.FusedSGD",
    "apex.contrib.sparsity": "torch.sparse.to_sparse_semi_structured",
    "apex.contrib.transducer": "torchaudio.functional.rnnt_loss",
    "apex.contrib.xentropy": "torch.nn.CrossEntropyLoss",
    "apex.fused_dense": "torch.nn.Linear",
    "apex.mlp": "torch.nn.Sequential of torch.nn.Linear and torch.nn.ReLU",
    "apex.normalization.FusedLayerNormAffineFunction": "apex.normalization.fused_layer_norm_affine",
    "apex.normalization.FusedRMSNormAffineFunction": "apex.normalization.fused_rms_norm_affine",
    "apex.optimizers.FusedMixedPrecisionLamb": "apex.optimizers.FusedLAMB with apex.amp.initialize",
    "apex.parallel.multiproc": "torchrun",
    "apex.pyprof": "torch.profiler",
    "apex.reparameterization": "torch.nn.utils.parametrizations.weight_norm",
    "apex.transformer": "Megatron-Core (megatron.core)",
}


def message(name: str) -> str:
    """What to say of a name that is not provided.

    Args:
        name: The full name that was asked for: "apex.contrib.xentropy.SoftmaxCrossEntropyLoss".
    """
    covering = name
    while covering and covering not in INSTEAD:
        covering = covering.rpartition(".")[0]
    if not covering:
        return f"mpengine provides no {name}; docs/from-apex.md lists what of apex it provides."
    return f"mpengine provides no {name}; use {INSTEAD[covering]} instead."


class Finder(importlib.abc.MetaPathFinder):
    """Asked last for a module of apex, it says why there is none."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Finds nothing: raises ModuleNotFoundError for a module of apex.

        The error bears no name: `from apex import mlp` drops the words of one that names apex.mlp.
        """
        if name.startswith("apex."):
            _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise ModuleNotFoundError(message(name))
