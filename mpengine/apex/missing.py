"""What of apex is not provided, and what to use instead."""

from __future__ import annotations

import importlib.abc
import sys
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
    "apex._autocast_utils": "torch.autocast",
    "apex.amp._amp_state.maybe_print": "logging.getLogger('mpengine.amp').info",
    "apex.amp._amp_state.warn_or_err": "an error of your own, or warnings.warn",
    "apex.amp._initialize": "apex.amp.initialize",
    "apex.amp._process_optimizer": "apex.amp.initialize",
    "apex.amp.compat": "torch.is_tensor and torch.is_floating_point",
    "apex.amp.frontend.O0": "apex.amp.initialize(..., opt_level='O0')",
    "apex.amp.frontend.O1": "apex.amp.initialize(..., opt_level='O1')",
    "apex.amp.frontend.O2": "apex.amp.initialize(..., opt_level='O2')",
    "apex.amp.frontend.O3": "apex.amp.initialize(..., opt_level='O3')",
    "apex.amp.frontend.Properties": "apex.amp._amp_state.opt_properties",
    "apex.amp.frontend.opt_levels": "apex.amp.initialize(..., opt_level='O0') to 'O3'",
    "apex.amp.handle.AmpHandle": "apex.amp.initialize and apex.amp.scale_loss",
    "apex.amp.handle.NoOpHandle": "apex.amp.initialize(..., enabled=False)",
    "apex.amp.lists": "apex.amp.register_half_function and register_float_function",
    "apex.amp.opt": "apex.amp.initialize, and the optimizer that it returns",
    "apex.amp.rnn_compat": "torch.nn.LSTM, torch.nn.GRU and torch.nn.RNN",
    "apex.amp.scaler": "apex.amp._amp_state.loss_scalers to read the scales, or mpengine.GradScaler",
    "apex.amp.utils": "torch.autocast",
    "apex.amp.wrap": "apex.amp.half_function, float_function and promote_function",
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
    "apex.deprecated_warning": "warnings.warn",
    "apex.fused_dense": "torch.nn.Linear",
    "apex.mlp": "torch.nn.Sequential of torch.nn.Linear and torch.nn.ReLU",
    "apex.normalization.FusedLayerNormAffineFunction": "apex.normalization.fused_layer_norm_affine",
    "apex.normalization.FusedRMSNormAffineFunction": "apex.normalization.fused_rms_norm_affine",
    "apex.optimizers.FP16_Optimizer": "apex.fp16_utils.FP16_Optimizer",
    "apex.optimizers.FusedMixedPrecisionLamb": "apex.optimizers.FusedLAMB with apex.amp.initialize",
    "apex.optimizers.fused_mixed_precision_lamb": "apex.optimizers.FusedLAMB with apex.amp.initialize",
    "apex.parallel.distributed.multi_tensor_applier": "apex.multi_tensor_apply.multi_tensor_applier",
    "apex.parallel.distributed.split_by_type": "apex.parallel.distributed.flat_dist_call",
    "apex.parallel.distributed.split_half_float_double": "apex.parallel.distributed.flat_dist_call",
    "apex.parallel.multi_tensor_applier": "apex.multi_tensor_apply.multi_tensor_applier",
    "apex.parallel.multiproc": "torchrun",
    "apex.parallel.optimized_sync_batchnorm_kernel": "apex.parallel.SyncBatchNorm",
    "apex.parallel.sync_batchnorm_kernel": "apex.parallel.SyncBatchNorm",
    "apex.pyprof": "torch.profiler",
    "apex.reparameterization": "torch.nn.utils.parametrizations.weight_norm",
    "apex.transformer": "Megatron-Core (megatron.core)",
    # What apex compiled.
    "_apex_gpu_direct_storage": "torch.cuda.gds",
    "_apex_nccl_allocator": "torch.cuda.MemPool",
    "bnp": "torch.nn.BatchNorm2d, or apex.parallel.SyncBatchNorm",
    "cudnn_gbn_lib": "apex.parallel.SyncBatchNorm",
    "distributed_adam_cuda": "torch.distributed.optim.ZeroRedundancyOptimizer",
    "distributed_lamb_cuda": "apex.optimizers.FusedLAMB",
    "fast_bottleneck": "torchvision.models.resnet.Bottleneck",
    "fast_layer_norm": "torch.nn.LayerNorm",
    "fast_multihead_attn": "torch.nn.functional.scaled_dot_product_attention",
    "fmhalib": "torch.nn.functional.scaled_dot_product_attention",
    "focal_loss_cuda": "torchvision.ops.sigmoid_focal_loss",
    "fused_adam_cuda": "apex.optimizers.FusedAdam",
    "fused_conv_bias_relu": "torch.nn.Conv2d and torch.nn.ReLU, fused by torch.compile",
    "fused_dense_cuda": "torch.nn.Linear",
    "fused_index_mul_2d": "rows[index] * other, fused by torch.compile",
    "fused_lamb_cuda": "apex.optimizers.FusedLAMB",
    "fused_layer_norm": "apex.normalization.FusedLayerNorm",
    "fused_layer_norm_cuda": "apex.normalization.FusedLayerNorm",
    "fused_rotary_positional_embedding": "Megatron-Core (megatron.core)",
    "fused_weight_gradient_mlp_cuda": "torch.nn.Linear, or Megatron-Core (megatron.core)",
    "generic_scaled_masked_softmax_cuda": "torch.nn.functional.softmax of the masked scores",
    "group_norm_cuda": "torch.nn.GroupNorm",
    "mlp_cuda": "torch.nn.Sequential of torch.nn.Linear and torch.nn.ReLU",
    "nccl_p2p_cuda": "torch.distributed.send and recv",
    "peer_memory_cuda": "torch.distributed.send and recv",
    "permutation_search_cuda": "torch.sparse.to_sparse_semi_structured",
    "scaled_masked_softmax_cuda": "torch.nn.functional.softmax of the masked scores",
    "scaled_softmax_cuda": "torch.nn.functional.softmax",
    "scaled_upper_triang_masked_softmax_cuda": "torch.nn.functional.scaled_dot_product_attention(..., is_causal=True)",
    "syncbn": "apex.parallel.SyncBatchNorm",
    "transducer_joint_cuda": "f.unsqueeze(2) + g.unsqueeze(1)",
    "transducer_loss_cuda": "torchaudio.functional.rnnt_loss",
    "xentropy_cuda": "torch.nn.CrossEntropyLoss",
}

_ROOTS = {name.partition(".")[0] for name in INSTEAD}


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
    """Asked last for a module of apex, or for one that apex compiled, it says why there is none."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Finds nothing: raises ModuleNotFoundError for such a module where it is imported.

        `importlib.util.find_spec` gets None: a script that looks whether there is such a module goes on without it.
        """
        if name.partition(".")[0] in _ROOTS and sys._getframe(2).f_code.co_name == "_find_and_load_unlocked":
            _refuse(name)


def _refuse(name: str) -> NoReturn:
    """The error of a child bears no name: `from apex import mlp` drops the words of one that names apex.mlp."""
    raise ModuleNotFoundError(message(name), name=None if "." in name else name)
