"""`FP16_Optimizer`: apex's loop for a model that is fp16 already, on the engine's optimizer and scaler."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from mpengine.amp.optimizer import AmpOptimizer
from mpengine.amp.overflow_log import OverflowLog
from mpengine.amp.scaler import LossScaler
from mpengine.apex import loss_scalers
from mpengine.gradients import parameters
from mpengine.labels import UNSCALED
from mpengine.scaling import FLOAT32_MAX, SMALLEST_SCALE


class _LossScaler(LossScaler):
    """The engine's, with the names that apex's loss scalers had."""

    @property
    def loss_scale(self) -> float:
        """The scale. Waits for the device."""
        return self.get_scale()

    cur_scale = loss_scale


class FP16_Optimizer:
    """FP32 masters and a loss scale for an optimizer whose parameters are fp16, FP32 or both.

    ```
    optimizer.backward(loss)             scales the loss
    optimizer.clip_master_grads(1.0)     optional
    optimizer.step()                     unscale, check, update or skip; moves the scale
    ```

    Args:
        init_optimizer: Its masters are taken from the fp16 values that the parameters have. It may go on being used.
        static_loss_scale: The scale, where it is static. A step whose gradients are not finite is skipped, too.
        dynamic_loss_scale: Whether the scale is dynamic.
        dynamic_loss_args: init_scale, scale_factor and scale_window: see `DynamicLossScaler`.
        verbose: False: overflows are not logged (logger mpengine.amp).

    Attributes:
        optimizer: The `mpengine.MixedPrecisionOptimizer` within; what learning-rate schedulers take.
        loss_scaler: The `mpengine.GradScaler`; its `loss_scale` is the scale.

    Raises:
        TypeError: `init_optimizer` cannot be wrapped; see `mpengine.MixedPrecisionOptimizer`.
        ValueError: A number is out of its range.
    """

    def __init__(
        self,
        init_optimizer: torch.optim.Optimizer,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
        dynamic_loss_args: dict[str, Any] | None = None,
        verbose: bool = True,
    ) -> None:
        if dynamic_loss_scale:
            start: loss_scalers.LossScaler = loss_scalers.DynamicLossScaler(**(dynamic_loss_args or {}))
        else:
            start = loss_scalers.LossScaler(_checked("static_loss_scale", static_loss_scale))
        policy = start.policy
        self.loss_scaler = _LossScaler(
            OverflowLog(enabled=verbose),
            init_scale=start.loss_scale,
            growth_factor=policy.growth_factor,
            backoff_factor=policy.backoff_factor,
            growth_interval=policy.growth_interval,
            min_scale=policy.min_scale,
            max_scale=policy.max_scale,
        )
        self._begin_log()
        self.dynamic_loss_scale = dynamic_loss_scale
        self.optimizer = AmpOptimizer(init_optimizer, self.loss_scaler, {}, {})
        self.loss_scaler._lazy_init_scale_growth_tracker(next(parameters(init_optimizer)).device)

    # The loop.

    def backward(self, loss: Tensor, update_master_grads: bool = True, retain_graph: bool = False) -> None:
        """`backward()` of the loss times the scale.

        Args:
            loss: Of any floating dtype; it is scaled in FP32.
            update_master_grads: Without effect: gradients wait until something asks for them, and several backward
                passes add up.
            retain_graph: As torch's.
        """
        self.loss_scaler.scale(loss).backward(retain_graph=retain_graph)

    def update_master_grads(self) -> None:
        """Checks the gradients, moves the scale, and puts the unscaled FP32 gradients into `.grad` of the masters.

        Raises:
            RuntimeError: The gradients are not of `backward`.
        """
        self._check_scaled()
        if self._pending():
            self.optimizer.unscale_pending()

    def clip_master_grads(self, max_norm: float, norm_type: float = 2) -> Tensor | int:
        """Clips the unscaled FP32 gradients as `torch.nn.utils.clip_grad_norm_` does. Waits for the device.

        Args:
            max_norm: The largest norm.
            norm_type: 2, another order, or inf.

        Returns:
            The norm before clipping, float32; -1 where the gradients overflowed.
        """
        self.update_master_grads()
        if self.overflow:
            return -1
        return torch.nn.utils.clip_grad_norm_(list(self.optimizer.master_params()), max_norm, norm_type)

    def inspect_master_grad_data(self) -> list[list[Tensor | None]] | None:
        """The unscaled FP32 gradient of every parameter, group by group; None where they overflowed.

        Waits for the device.
        """
        self.update_master_grads()
        if self.overflow:
            return None
        return [[param.grad for param in group["params"]] for group in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One step on the pending gradients; skipped where one is not finite.

        Args:
            closure: Refused.

        Raises:
            RuntimeError: A closure was given; the gradients are not of `backward`; see also
                `mpengine.MixedPrecisionOptimizer.step`.
        """
        if closure is not None:
            raise RuntimeError(
                "FP16_Optimizer.step takes no closure: a step that overflows would have to call it again with another "
                "scale. Compute the loss, optimizer.backward(loss), then optimizer.step()."
            )
        self._check_scaled()
        self.optimizer.step()

    def _check_scaled(self) -> None:
        """Raises where the pending gradients would be taken as unscaled ones, though nothing has unscaled them."""
        labels = self.loss_scaler._peek(self.optimizer).labels
        if labels and all(label is UNSCALED for label in labels) and not self.optimizer._unscaled:
            raise RuntimeError(
                "these gradients do not come from optimizer.backward(loss): call it in the place of loss.backward(), "
                "for it scales the loss. Set gradients by hand after optimizer.update_master_grads(), not before."
            )

    def zero_grad(self, set_grads_to_None: bool = True, *, set_to_none: bool | None = None) -> None:
        """Drops all gradients, as torch's optimizers do by default, or fills them with zeros.

        Args:
            set_grads_to_None: Whether to drop them.
            set_to_none: The same by torch's name, which counts where it is given.
        """
        self.optimizer.zero_grad(set_to_none=set_grads_to_None if set_to_none is None else set_to_none)

    # What it is.

    @property
    def overflow(self) -> bool:
        """Whether gradients overflowed: the pending ones, or else those of the last step. Waits for the device."""
        if self._pending():
            self.loss_scaler.check_rest(self.optimizer)
        found_inf = self.loss_scaler.verdicts.on(self.optimizer)
        return self.optimizer.last_step_skipped if found_inf is None else bool(found_inf)

    def _pending(self) -> bool:
        return any(param.grad is not None for group in self.param_groups for param in group["params"])

    @property
    def loss_scale(self) -> float:
        """The scale. Waits for the device. Setting a static one makes it the static one."""
        return self.loss_scaler.get_scale()

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        value = _checked("loss_scale", value)
        state = self.loss_scaler.state_dict()
        if not self.dynamic_loss_scale:
            state["mpengine"] |= {"min_scale": value, "max_scale": value}
        self.loss_scaler.load_state_dict({**state, "scale": value})
        self._begin_log()

    def _begin_log(self) -> None:
        (state,) = self.loss_scaler.statistics()
        self.loss_scaler.overflow_log.begin([state.scale], [state.overflows])

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state: FP32 tensors, by parameter."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups, of the model's parameters; masters: `optimizer.master_params()`."""
        return self.optimizer.param_groups

    @property
    def fp16_groups(self) -> list[list[Tensor]]:
        """The trained parameters of each group that are not FP32."""
        return [[param for param, master in group if master is not param] for group in self._pairs()]

    @property
    def fp32_from_fp16_groups(self) -> list[list[Tensor]]:
        """The FP32 masters of `fp16_groups`. They have gradients after `update_master_grads`."""
        return [[master for param, master in group if master is not param] for group in self._pairs()]

    @property
    def fp32_from_fp32_groups(self) -> list[list[Tensor]]:
        """The trained parameters of each group that are FP32."""
        return [[param for param, master in group if master is param] for group in self._pairs()]

    def _pairs(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Trained parameters and their masters, group by group."""
        trained = self.optimizer._steps
        masters = self.optimizer.master_params()
        return [
            [(param, next(masters)) for param in group["params"] if param in trained] for group in self.param_groups
        ]

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, and the optimizer's in torch.optim's format with the FP32 masters in it."""
        return {
            "loss_scaler": self.loss_scaler.state_dict(),
            "dynamic_loss_scale": self.dynamic_loss_scale,
            "optimizer_state_dict": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned; model and optimizer in either order. Resuming is bitwise.

        Raises:
            ValueError: It is the state of apex's own class, or does not fit. Nothing has changed then.
        """
        if "fp32_from_fp16" in state_dict:
            raise ValueError(
                "this is a state of apex's own FP16_Optimizer, whose groups are in another order. Load the model's "
                "weights, set optimizer.loss_scale, and let the moments build up again."
            )
        missing = {"loss_scaler", "dynamic_loss_scale", "optimizer_state_dict"} - set(state_dict)
        if missing:
            raise ValueError(
                f"the state dict has no {sorted(missing)}; give what FP16_Optimizer.state_dict() returned."
            )
        scaler = self.loss_scaler.state_dict()
        self.loss_scaler.load_state_dict(state_dict["loss_scaler"])
        try:
            self.optimizer.load_state_dict(state_dict["optimizer_state_dict"])
        except BaseException:
            self.loss_scaler.load_state_dict(scaler)
            raise
        self.dynamic_loss_scale = state_dict["dynamic_loss_scale"]
        self._begin_log()

    def __getstate__(self) -> NoReturn:
        raise RuntimeError("FP16_Optimizer should be serialized using state_dict().")


def _checked(name: str, value: Any) -> float:
    """A static scale. Raises ValueError where it is none."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not SMALLEST_SCALE <= number <= FLOAT32_MAX:
        raise ValueError(
            f"{name} is {value!r}; it must be a number > 0 (128.0, say). For a scale that moves: "
            "dynamic_loss_scale=True."
        )
    return number
