"""Precision plugins for Lightning: `MixedPrecision` for its `Trainer`, `FabricMixedPrecision` for `Fabric`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState

import mpengine
from mpengine import validation
from mpengine.grad_scaler import _any_scaled
from mpengine.gradients import parameters
from mpengine.precision import KeepFp32

try:
    from lightning.fabric.plugins import MixedPrecision as _FabricPlugin
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from lightning.pytorch.plugins import MixedPrecision as _TrainerPlugin
    from lightning.pytorch.plugins import Precision
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError(
        f"mpengine.integrations.lightning needs Lightning, which could not be imported ({error}): pip install lightning"
    ) from error

MixedKind = Literal["16-mixed", "bf16-mixed"]


class MixedPrecision(_TrainerPlugin):
    """`Trainer(plugins=[MixedPrecision()])` in the place of `Trainer(precision="16-mixed")`. The module stays as it is.

    While `fit` runs, the weights are fp16 (or bf16) and every optimizer of `configure_optimizers` is a
    `MixedPrecisionOptimizer` with FP32 masters; afterwards the module has the masters as its FP32 weights. What
    `configure_optimizers` prepared itself, with `trainer.precision_plugin.scaler`, is used as it is.

    `Trainer(gradient_clip_val=...)` clips by norm inside the step, at no extra pass. Where somebody wants to see
    gradients before the step (`on_before_optimizer_step`, `configure_gradient_clipping`, clipping by value,
    `self.clip_gradients` in manual optimization), they are unscaled first, FP32, as Lightning does it.

    Args:
        scaler: Whose scales the losses carry; None: a new `mpengine.GradScaler` for "16-mixed". With several losses
            call `self.manual_backward(loss, loss_id=...)`.
        precision: "16-mixed" or "bf16-mixed".
        keep_fp32: See `mpengine.prepare`.
        max_grad_norm: See `mpengine.MixedPrecisionOptimizer`: also with manual optimization.

    Raises:
        TypeError: `scaler` is not mpengine's.

    Example:
        >>> trainer = Trainer(plugins=[MixedPrecision(mpengine.GradScaler(num_losses=3))])
    """

    def __init__(
        self,
        scaler: mpengine.GradScaler | None = None,
        *,
        precision: MixedKind = "16-mixed",
        keep_fp32: KeepFp32 | None = None,
        max_grad_norm: float | None = None,
    ) -> None:
        self.scaler: mpengine.GradScaler | None
        # The device becomes that of the model, in `connect`.
        super().__init__(precision, "cpu", _scaler_for(precision, scaler))
        self._keep_fp32 = keep_fp32
        self._max_grad_norm = max_grad_norm
        self._prepared: list[mpengine.MixedPrecisionOptimizer] = []
        self._frozen: dict[Tensor, Tensor] = {}  # the FP32 values of frozen weights, on the CPU
        # In this one's step nobody sees gradients before they are used.
        self._clips_within: torch.optim.Optimizer | None = None

    def connect(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[torch.optim.Optimizer], list[Any]]:
        """Wraps the optimizers. Lightning calls it when the model is on its device.

        Raises:
            ValueError: An optimizer cannot be wrapped, or was prepared with another scaler; or the strategy has
                wrapped the model already (DistributedDataParallel).
        """
        first = next(model.parameters(), None)
        if first is not None:
            self.device = first.device.type
        return model, [self._wrapped(model, _bare(optimizer)) for optimizer in optimizers], lr_schedulers

    def _wrapped(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if isinstance(optimizer, mpengine.MixedPrecisionOptimizer):
            if optimizer.scaler is not self.scaler:
                raise ValueError(
                    "configure_optimizers returned an optimizer that was prepared with another scaler than the "
                    "plugin's; prepare it with self.trainer.precision_plugin.scaler, or return it unprepared."
                )
            return optimizer
        if not any(True for _ in parameters(optimizer)):  # configure_optimizers returned None
            return optimizer
        if not isinstance(model, LightningModule):
            raise ValueError(
                f"the strategy wrapped the model in {type(model).__name__} before its optimizer was known, and its "
                "buffers are FP32. Cast it earlier: in LightningModule.setup() move it to "
                "self.trainer.strategy.root_device, call mpengine.prepare(self, optimizer, "
                "self.trainer.precision_plugin.scaler), and return the result from configure_optimizers."
            )
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        frozen = {p: p.detach().cpu() for p in model.parameters() if not p.requires_grad}
        wrapper = mpengine.prepare(
            model, optimizer, self.scaler, dtype, keep_fp32=self._keep_fp32, max_grad_norm=self._max_grad_norm
        )
        self._prepared.append(wrapper)
        self._frozen.update({param: value for param, value in frozen.items() if param.dtype != value.dtype})
        return wrapper

    def teardown(self) -> None:
        """The module gets its FP32 weights back, so that another `fit` goes on from them."""
        for wrapper in self._prepared:
            _release(wrapper)
        self._prepared.clear()
        for param, value in self._frozen.items():
            if param.dtype != value.dtype:  # it was trained after all, and has its master
                _widen(param, value)
        self._frozen.clear()

    # The loop.

    def pre_backward(self, tensor: Tensor, module: LightningModule) -> Tensor:  # type: ignore[override]
        """Calls the hooks, with the unscaled loss: which loss it is, only `backward` is told."""
        return Precision.pre_backward(self, tensor, module)

    def backward(  # type: ignore[override]
        self,
        tensor: Tensor,
        model: LightningModule,
        optimizer: torch.optim.Optimizer | None,
        *args: Any,
        loss_id: int = 0,
        **kwargs: Any,
    ) -> None:
        """Scales the loss and runs its backward pass.

        Args:
            tensor: The loss.
            model: The module, whose `backward` is called.
            optimizer: None in manual optimization.
            args: Of `Tensor.backward`.
            loss_id: The loss, from `self.manual_backward(loss, loss_id=...)`.
            kwargs: Of `Tensor.backward`.
        """
        if self.scaler is not None:
            tensor = self.scaler.scale(tensor, loss_id)
        elif loss_id != 0:
            raise ValueError(f"loss_id is {loss_id}, but {self.precision} has no scaler; leave it out.")
        super().backward(tensor, model, optimizer, *args, **kwargs)

    def optimizer_step(  # type: ignore[override]
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """Runs the closure (forward and backward), clips, steps or skips, and updates the scales.

        Returns:
            What the closure returned.
        """
        if not isinstance(optimizer, mpengine.MixedPrecisionOptimizer) or self.scaler is None:
            return super().optimizer_step(optimizer, model=model, closure=closure, **kwargs)
        result = closure()
        nothing_to_step = result is None and model.automatic_optimization  # training_step returned None
        own_norm = optimizer.max_grad_norm
        try:
            if not nothing_to_step and _shows_gradients(model):
                self._unscale(optimizer)
            elif not nothing_to_step:
                self._clips_within = optimizer
            self._after_closure(model, optimizer)
            if not nothing_to_step:
                self.scaler.step(optimizer, **kwargs)
        finally:
            self._clips_within = None
            optimizer.max_grad_norm = own_norm
        if not nothing_to_step:
            self.scaler.update()
        return result

    def clip_gradients(
        self, optimizer: Any, clip_val: int | float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Clips as Lightning does: inside the step where that is all that happens to the gradients."""
        optimizer = _bare(optimizer)
        if clip_val <= 0:
            return
        if not isinstance(optimizer, mpengine.MixedPrecisionOptimizer):
            super().clip_gradients(optimizer, clip_val, gradient_clip_algorithm)
        elif optimizer is self._clips_within and gradient_clip_algorithm == "norm":
            own = optimizer.max_grad_norm
            optimizer.max_grad_norm = clip_val if own is None else min(own, clip_val)
        else:
            self._unscale(optimizer)
            Precision.clip_gradients(self, optimizer, clip_val, gradient_clip_algorithm)

    def _unscale(self, optimizer: mpengine.MixedPrecisionOptimizer) -> None:
        scaler = self.scaler
        if scaler is not None:
            unscaled = scaler._state(optimizer).stage is OptState.UNSCALED
            if not unscaled or _any_scaled(scaler._pending(optimizer)):
                scaler.unscale_(optimizer)


class FabricMixedPrecision(_FabricPlugin):
    """`Fabric(plugins=[FabricMixedPrecision(scaler)])` in the place of `Fabric(precision="16-mixed")`.

    Prepare each optimizer with this scaler, when the model is on its device, before `fabric.setup_optimizers`.
    `fabric.backward(loss, loss_id=...)` scales by that loss's scale, and `fabric.clip_gradients` works.

    Args:
        scaler: Whose scales the losses carry; None: a new `mpengine.GradScaler` for "16-mixed".
        precision: "16-mixed" or "bf16-mixed".
        device: Of autocast; None: "cuda" where there is one, else "cpu".

    Raises:
        TypeError: `scaler` is not mpengine's.

    Example:
        >>> scaler = mpengine.GradScaler()
        >>> fabric = Fabric(plugins=[FabricMixedPrecision(scaler)])
        >>> model = fabric.setup_module(model)
        >>> optimizer = mpengine.prepare(model, torch.optim.AdamW(model.parameters()), scaler)
        >>> optimizer = fabric.setup_optimizers(optimizer)
    """

    def __init__(
        self,
        scaler: mpengine.GradScaler | None = None,
        *,
        precision: MixedKind = "16-mixed",
        device: str | None = None,
    ) -> None:
        self.scaler: mpengine.GradScaler | None
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        super().__init__(precision, device, _scaler_for(precision, scaler))

    def backward(self, tensor: Tensor, model: nn.Module | None, *args: Any, loss_id: int = 0, **kwargs: Any) -> None:
        """Scales the loss and runs its backward pass.

        Args:
            tensor: The loss.
            model: As Fabric gives it.
            args: Of `Tensor.backward`.
            loss_id: The loss, from `fabric.backward(loss, loss_id=...)`.
            kwargs: Of `Tensor.backward`.
        """
        if self.scaler is not None:
            tensor = self.scaler.scale(tensor, loss_id)
        elif loss_id != 0:
            raise ValueError(f"loss_id is {loss_id}, but {self.precision} has no scaler; leave it out.")
        super(_FabricPlugin, self).backward(tensor, model, *args, **kwargs)


def _scaler_for(precision: str, scaler: mpengine.GradScaler | None) -> mpengine.GradScaler | None:
    if scaler is not None and not isinstance(scaler, mpengine.GradScaler):
        raise TypeError(
            f"scaler is a {type(scaler).__module__}.{type(scaler).__name__}; give a mpengine.GradScaler, or None for "
            "a new one."
        )
    return mpengine.GradScaler() if scaler is None and precision == "16-mixed" else scaler


def _bare(optimizer: Any) -> Any:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _shows_gradients(model: LightningModule) -> bool:
    """Whether somebody's code looks at the gradients of a step, and so wants them unscaled."""
    callbacks = model.trainer.callbacks  # type: ignore[attr-defined]
    hooks = ("on_before_optimizer_step", "on_before_zero_grad")
    return is_overridden("configure_gradient_clipping", model) or any(
        is_overridden(hook, model) or any(is_overridden(hook, callback, Callback) for callback in callbacks)
        for hook in hooks
    )


@torch.no_grad()
def _release(wrapper: mpengine.MixedPrecisionOptimizer) -> None:
    """Gives the masters back to the parameters. Where somebody wrote a parameter since the last step, that holds."""
    for param, master in wrapper._masters.items():
        if param.dtype != torch.float32:
            param.grad = None
            _widen(param, master.detach())
    validation.wrappers.discard(wrapper)


@torch.no_grad()
def _widen(param: Tensor, value: Tensor) -> None:
    """The parameter becomes FP32: `value` where that still rounds to the parameter, else what somebody wrote there."""
    value = value.to(param.device)
    param.data = torch.where(value.to(param.dtype) == param, value, param.to(torch.float32))
