"""`apex.fp16_utils`: `FP16_Optimizer`, and the small tools of loops that hold their FP32 masters by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as clip_grad_norm

from mpengine.apex.fp16_optimizer import FP16_Optimizer
from mpengine.apex.loss_scalers import DynamicLossScaler, LossScaler

__all__ = [
    "BN_convert_float",
    "DynamicLossScaler",
    "FP16Model",
    "FP16_Optimizer",
    "LossScaler",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


class tofp16(nn.Module):
    """A layer that casts its input to fp16."""

    def forward(self, input: Tensor) -> Tensor:
        """The input in fp16."""
        return input.half()


class FP16Model(nn.Module):
    """A network in fp16, its batch norms in FP32; inputs are cast to fp16.

    Args:
        network: It is cast in place.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = convert_network(network, torch.half)

    def forward(self, *inputs: Tensor) -> Any:
        """What the network returns for the inputs in fp16."""
        return self.network(*(value.half() for value in inputs))


def network_to_half(network: nn.Module) -> nn.Sequential:
    """The network in fp16, its batch norms in FP32, behind a layer that casts the input. It is cast in place."""
    return nn.Sequential(tofp16(), BN_convert_float(network.half()))


def BN_convert_float(module: nn.Module) -> nn.Module:
    """Casts the batch norms of a network to FP32, in place, and returns it."""
    for layer in module.modules():
        if isinstance(layer, _BATCH_NORM):
            layer.float()
    return module


def convert_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Casts all but the batch norms that have weights, in place, and returns the network."""
    for layer in network.modules():
        if not (isinstance(layer, _BATCH_NORM) and layer.affine):
            convert_module(layer, dtype)
        if isinstance(layer, nn.RNNBase):
            layer.flatten_parameters()
    return network


def convert_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Casts the floating parameters, with their gradients, and buffers of one module, in place; not of those below."""
    for param in module.parameters(recurse=False):
        if param.is_floating_point():
            grad, param.grad = param.grad, None
            param.data = param.data.to(dtype)
            param.grad = None if grad is None else grad.to(dtype)
    for buffer in module.buffers(recurse=False):
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


# Masters by hand.


def prep_param_lists(model: nn.Module, flat_master: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """The model's trained parameters, and FP32 copies of them.

    Args:
        model: Its parameters may be fp16, FP32 or both.
        flat_master: Whether there is one copy of all, of one dimension; its gradient is zeros at first.

    Returns:
        Parameters and masters.
    """
    params: list[Tensor] = [param for param in model.parameters() if param.requires_grad]
    masters = [param.detach().float().clone() for param in params]
    if flat_master:
        masters = [torch.cat([master.reshape(-1) for master in masters])]
        masters[0].grad = torch.zeros_like(masters[0])
    return params, [master.requires_grad_() for master in masters]


@torch.no_grad()
def model_grads_to_master_grads(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copies gradients to the masters, in FP32.

    Args:
        model_params: Of `prep_param_lists`.
        master_params: Of `prep_param_lists`.
        flat_master: As given to `prep_param_lists`; a parameter without a gradient has zeros then.
    """
    if flat_master:
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in model_params]
        master_params[0].grad = torch.cat([grad.float().reshape(-1) for grad in grads])
        return
    for param, master in zip(model_params, master_params, strict=True):
        master.grad = None if param.grad is None else param.grad.float().clone()


@torch.no_grad()
def master_params_to_model_params(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copies the masters to the parameters, rounded to their dtype.

    Args:
        model_params: Of `prep_param_lists`.
        master_params: Of `prep_param_lists`.
        flat_master: As given to `prep_param_lists`.
    """
    if flat_master:
        master_params = master_params[0].split([param.numel() for param in model_params])
    for param, master in zip(model_params, master_params, strict=True):
        param.copy_(master.view_as(param))


def to_python_float(value: Any) -> float:
    """The number in a tensor, or a sequence, of one element. Waits for the device."""
    return value.item() if isinstance(value, Tensor) else value[0]
