"""`prepare`: which layers stay FP32, how a model is cast, and how FP32 layers meet fp16 activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mpengine.grad_scaler import GradScaler
from mpengine.gradients import parameters
from mpengine.optimizer import MixedPrecisionOptimizer, check_wrappable

# Their CPU and CUDA implementations take fp16 input beside FP32 weights and compute in FP32.
_BATCH_NORMS: tuple[type[nn.Module], ...] = (nn.modules.batchnorm._BatchNorm,)

NORMALIZATION: tuple[type[nn.Module], ...] = (
    *_BATCH_NORMS,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
)

KeepFp32 = Callable[[str, nn.Module], bool] | Iterable[type[nn.Module] | str]


def is_normalization(name: str, module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: one of torch's, or of a class whose name ends in "Norm"."""
    return isinstance(module, NORMALIZATION) or type(module).__name__.endswith("Norm")


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: GradScaler | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    keep_fp32: KeepFp32 | None = None,
    max_grad_norm: float | None = None,
) -> MixedPrecisionOptimizer:
    """Casts a model's weights to fp16 in place, and wraps its optimizer: its FP32 masters are the weights as they were.

    Parameter objects keep their identity. Normalisation layers stay FP32, buffers included, and take and return the
    activations' dtype. Weights that are trained by no optimizer are cast too; weights that another optimizer will
    train stay FP32 until that one is prepared.

    Args:
        model: On its final device.
        optimizer: Any torch optimizer over (some of) the model's parameters.
        scaler: Whose scales the losses will carry; None for bf16, or where `torch.amp.GradScaler` scales.
        dtype: torch.float16 or torch.bfloat16.
        keep_fp32: What stays FP32 besides normalisation layers: module classes and names (a name covers what lies
            below it), or a function of (name, module).
        max_grad_norm: See `MixedPrecisionOptimizer`.

    Returns:
        The wrapper; use it in the optimizer's place.

    Raises:
        TypeError: `optimizer` cannot be wrapped.
        ValueError: The optimizer has no parameters, holds one that the model does not own or that is wrapped
            already; `dtype` is another; a weight does not fit into it. Nothing is changed then.

    Example:
        >>> scaler = mpengine.GradScaler()
        >>> optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-4), scaler)
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype is {dtype}; it must be torch.float16 or torch.bfloat16.")
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(
            f"scaler is a {type(scaler).__module__}.{type(scaler).__name__}; give a mpengine.GradScaler, or None where "
            "torch.amp.GradScaler drives the steps."
        )
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters(remove_duplicate=False)}
    check_wrappable(optimizer, names)
    strangers = [i for i, param in enumerate(parameters(optimizer)) if param not in names]
    if strangers:
        raise ValueError(
            f"parameters {strangers[:8]} of this {type(optimizer).__name__} do not belong to the model; give prepare "
            "the model that owns all of them (a torch.nn.ModuleList of several, say)."
        )
    kept = list(_kept(model, keep_fp32))
    trained = set(map(id, parameters(optimizer)))
    params = [p for p in _cast_params(model, kept) if id(p) in trained or not p.requires_grad]
    for param in params:
        _check_fits(param, names[param], dtype)
    originals: dict[Tensor, Tensor] = {param: param.data for param in params}
    buffers = [(module, name, buffer) for module, name, buffer in _cast_buffers(model, kept) if _fits(buffer, dtype)]
    try:
        for param in params:
            param.data = param.data.to(dtype)
        wrapper = MixedPrecisionOptimizer(
            optimizer, scaler, max_grad_norm=max_grad_norm, _names=names, _originals=originals
        )
    except BaseException:
        for param, original in originals.items():
            param.data = original
        raise
    for module, name, buffer in buffers:
        module._buffers[name] = buffer.to(dtype)
    for module in kept:
        _accept_low_precision(module)
    return wrapper


def _kept(model: nn.Module, keep_fp32: KeepFp32 | None) -> Iterator[nn.Module]:
    """The modules whose own parameters and buffers stay FP32."""
    if keep_fp32 is None or callable(keep_fp32):
        chosen = keep_fp32 or (lambda name, module: False)
        wanted = [module for name, module in model.named_modules() if chosen(name, module)]
    else:
        kinds = list(keep_fp32)
        types = tuple(kind for kind in kinds if isinstance(kind, type))
        prefixes = [kind for kind in kinds if isinstance(kind, str)]
        known = dict(model.named_modules())
        for prefix in prefixes:
            if prefix not in known:
                raise ValueError(f"keep_fp32 names the module '{prefix}', which the model does not have.")
        wanted = [m for m in model.modules() if isinstance(m, types)] + [known[prefix] for prefix in prefixes]
    below = {id(m) for module in wanted for m in module.modules()}
    for name, module in model.named_modules():
        if id(module) in below or is_normalization(name, module):
            yield module


def _cast_params(model: nn.Module, kept: list[nn.Module]) -> list[Tensor]:
    spared = {id(p) for module in kept for p in module.parameters(recurse=False)}
    return [p for p in model.parameters() if id(p) not in spared and p.dtype == torch.float32]


def _cast_buffers(model: nn.Module, kept: list[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    spared = set(map(id, kept))
    return [
        (module, name, buffer)
        for module in model.modules()
        if id(module) not in spared
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.dtype == torch.float32
    ]


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether no finite value becomes infinite. A buffer that does not fit (a mask of -1e9, say) stays FP32."""
    return bool((torch.isfinite(tensor.detach().to(dtype)) | ~torch.isfinite(tensor)).all())


def _check_fits(param: Tensor, name: str, dtype: torch.dtype) -> None:
    if not _fits(param, dtype):
        raise ValueError(
            f"parameter '{name}' holds {float(param.detach().abs().max()):g}, beyond {dtype}'s largest number "
            f"({torch.finfo(dtype).max:g}); keep its module in FP32: keep_fp32=['{name.rpartition('.')[0]}']."
        )


def _accept_low_precision(module: nn.Module) -> None:
    """Lets an FP32 module take fp16 activations and return their dtype, on every device, in autocast and out of it."""
    if isinstance(module, _BATCH_NORMS) or not list(module.parameters(recurse=False)):
        return
    if _widen in module._forward_pre_hooks.values():
        return
    module.register_forward_pre_hook(_widen, with_kwargs=True)
    module.register_forward_hook(_narrow, with_kwargs=True)


def _widen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    floats = [a.dtype for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point()]
    module.__dict__["_activation_dtype"] = floats[0] if floats else None
    return tuple(map(_to_float32, args)), {key: _to_float32(value) for key, value in kwargs.items()}


def _narrow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    dtype = module.__dict__.pop("_activation_dtype", None)
    if dtype in (torch.float16, torch.bfloat16) and isinstance(output, Tensor) and output.dtype == torch.float32:
        return output.to(dtype)
    return output


def _to_float32(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
