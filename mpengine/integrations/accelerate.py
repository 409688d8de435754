"""Hugging Face Accelerate: an `Accelerator` whose `prepare` gives fp16 weights with FP32 masters."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import mpengine
from mpengine.gradients import parameters
from mpengine.precision import KeepFp32

try:
    import accelerate  # type: ignore[import-untyped]
    from accelerate.optimizer import AcceleratedOptimizer as _AcceleratedOptimizer  # type: ignore[import-untyped]
    from accelerate.scheduler import AcceleratedScheduler  # type: ignore[import-untyped]
    from accelerate.utils import DistributedType, extract_model_from_parallel  # type: ignore[import-untyped]
except ImportError as error:
    raise ImportError(
        "mpengine.integrations.accelerate needs Hugging Face Accelerate, which could not be imported "
        f"({error}): pip install accelerate"
    ) from error

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_KINDS = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class AcceleratedOptimizer(_AcceleratedOptimizer):
    """Accelerate's wrapper, for an optimizer that decides on the device whether a step is skipped.

    Accelerate takes a step for skipped when the scaler does not call `optimizer.step()`, and so sees no skip of an
    optimizer that decides by itself.
    """

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last step was skipped. Waits for the device, so only when somebody asks."""
        return bool(self.optimizer.last_step_skipped)

    def __getattr__(self, name: str) -> Any:
        """What else the optimizer has: `steps_taken`, `master_params` and the like."""
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)


class Accelerator(accelerate.Accelerator):
    """Accelerate's `Accelerator` with mpengine in the place of `torch.amp.GradScaler`. The loop stays as it is.

    `prepare` casts the models and wraps each torch optimizer into a `MixedPrecisionOptimizer`; give it an optimizer
    and the models whose parameters it has in one call. Also on the CPU, where Accelerate leaves fp16 off.

    Args:
        args: Of `accelerate.Accelerator`.
        scaler: Whose scales the losses carry; None: a new `mpengine.GradScaler` with what `GradScalerKwargs` says.
        keep_fp32: See `mpengine.prepare`.
        max_grad_norm: See `mpengine.MixedPrecisionOptimizer`; for every optimizer. `clip_grad_norm_` works as well,
            and returns the norm, but needs FP32 gradients in memory and passes of its own.
        kwargs: Of `accelerate.Accelerator`; `mixed_precision` must be "fp16" or "bf16".

    Raises:
        ValueError: `mixed_precision` is another, the strategy is none of single process and DistributedDataParallel,
            or the scaler is given twice.
        TypeError: `scaler` is not mpengine's.

    Example:
        >>> accelerator = Accelerator(mixed_precision="fp16")
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    """

    scaler: mpengine.GradScaler | None

    def __init__(
        self,
        *args: Any,
        scaler: mpengine.GradScaler | None = None,
        keep_fp32: KeepFp32 | None = None,
        max_grad_norm: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._use(scaler, keep_fp32, max_grad_norm)

    @classmethod
    def adopt(
        cls,
        accelerator: accelerate.Accelerator,
        *,
        scaler: mpengine.GradScaler | None = None,
        keep_fp32: KeepFp32 | None = None,
        max_grad_norm: float | None = None,
    ) -> Accelerator:
        """Makes one of this class of an `Accelerator` that a library created, in place, before it prepared anything.

        Args:
            accelerator: It becomes one of this class.
            scaler: See the class.
            keep_fp32: See the class.
            max_grad_norm: See the class.

        Returns:
            The same object.

        Raises:
            ValueError: As the class does; then, and where something was prepared already, it stays what it was.
            TypeError: As the class does.
        """
        prepared = len(accelerator._optimizers) + len(accelerator._models)
        if prepared:
            raise ValueError(
                f"this Accelerator has prepared {prepared} models and optimizers already; adopt it before."
            )
        before = accelerator.__class__
        accelerator.__class__ = cls
        assert isinstance(accelerator, Accelerator)
        try:
            accelerator._use(scaler, keep_fp32, max_grad_norm)
        except BaseException:
            accelerator.__class__ = before
            raise
        return accelerator

    def _use(self, scaler: mpengine.GradScaler | None, keep_fp32: KeepFp32 | None, max_grad_norm: float | None) -> None:
        kind, handler = self.mixed_precision, self.scaler_handler
        if kind not in _DTYPES:
            raise ValueError(f"mixed_precision is {kind!r}; give Accelerator(mixed_precision='fp16'), or 'bf16'.")
        if self.distributed_type not in _KINDS:
            raise ValueError(
                f"distributed_type is {self.distributed_type.value}; mpengine trains in one process or with "
                "DistributedDataParallel. Use Accelerate's own Accelerator for others."
            )
        if scaler is not None and not isinstance(scaler, mpengine.GradScaler):
            raise TypeError(
                f"scaler is a {type(scaler).__module__}.{type(scaler).__name__}; give a mpengine.GradScaler, or None "
                "for a new one."
            )
        if scaler is not None and (handler is not None or kind != "fp16"):
            other = "GradScalerKwargs are" if handler is not None else f"mixed_precision={kind!r} is"
            raise ValueError(f"scaler and {other} given; only one of the two can hold. Leave one out.")
        if kind == "fp16":
            settings = {} if handler is None else handler.to_kwargs()
            self.scaler = mpengine.GradScaler(self.device.type, **settings) if scaler is None else scaler
            self.native_amp = True  # autocast in the forward pass, and unscaling where gradients are clipped
        self._kind = kind
        self._keep_fp32 = keep_fp32
        self._max_grad_norm = max_grad_norm

    # Preparing.

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As `accelerate.Accelerator.prepare`, with a `MixedPrecisionOptimizer` in each `AcceleratedOptimizer`.

        Args:
            args: Models, optimizers, dataloaders, schedulers, in any order.
            device_placement: As there, one for each of `args`.

        Returns:
            The same, prepared, in the order given.

        Raises:
            ValueError: An optimizer's parameters belong to no model given here or before, or to one that
                DistributedDataParallel holds already; or `mpengine.prepare` refuses it.
        """
        chosen: list[bool] | list[None] = device_placement or [None] * len(args)
        placed = [self.device_placement if place is None else place for place in chosen]
        for arg, place in zip(args, placed, strict=False):
            if isinstance(arg, nn.Module) and place and not getattr(arg, "_is_accelerate_prepared", False):
                arg.to(self.device)  # masters are made where the model is
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        wrapped = [self._wrapped(arg, models) if isinstance(arg, torch.optim.Optimizer) else arg for arg in args]
        return super().prepare(*wrapped, device_placement=device_placement)

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None) -> Any:
        """As `accelerate.Accelerator.prepare_optimizer`; its models must have been prepared before."""
        return super().prepare_optimizer(self._wrapped(optimizer, []), device_placement=device_placement)

    def prepare_scheduler(self, scheduler: torch.optim.lr_scheduler.LRScheduler) -> AcceleratedScheduler:
        """As `accelerate.Accelerator.prepare_scheduler`: it waits for the skipped steps of its own optimizer."""
        prepared = super().prepare_scheduler(scheduler)
        torch_optimizer = getattr(prepared.scheduler, "optimizer", None)
        own = [optimizer for optimizer in self._optimizers if _inside(optimizer) is torch_optimizer]
        if own:  # it was made before its optimizer was wrapped
            prepared.optimizers = own
        return prepared

    def _wrapped(self, optimizer: torch.optim.Optimizer, models: list[nn.Module]) -> torch.optim.Optimizer:
        if isinstance(optimizer, _AcceleratedOptimizer):
            return optimizer
        if not isinstance(optimizer, mpengine.MixedPrecisionOptimizer):
            owner = self._owner(optimizer, [*models, *self._models])
            if self.mixed_precision != self._kind:
                raise RuntimeError(
                    f"this Accelerator was made with mixed_precision={self._kind!r}, and another Accelerator or "
                    f"TrainingArguments has set it to {self.mixed_precision!r} since: Accelerate has one setting for "
                    "the whole process. Make the other one later, or run it in a process of its own."
                )
            dtype = _DTYPES[self._kind]
            optimizer = mpengine.prepare(
                owner, optimizer, self.scaler, dtype, keep_fp32=self._keep_fp32, max_grad_norm=self._max_grad_norm
            )
        elif optimizer.scaler is not self.scaler:
            raise ValueError("this optimizer was prepared with another scaler; prepare it with accelerator.scaler.")
        # Its state lies on the device of the model, and needs no placement.
        accelerated = AcceleratedOptimizer(optimizer, device_placement=False, scaler=self.scaler)
        accelerated._is_accelerate_prepared = True
        return accelerated

    @staticmethod
    def _owner(optimizer: torch.optim.Optimizer, models: Iterable[nn.Module]) -> nn.Module:
        trained = set(map(id, parameters(optimizer)))
        owners: list[nn.Module] = []
        for model in models:
            bare = extract_model_from_parallel(model)
            own = {id(p) for p in bare.parameters()} & trained
            if own and bare is not model and isinstance(model, nn.parallel.DistributedDataParallel):
                raise ValueError(
                    "the model was given to DistributedDataParallel before its optimizer was known, so its buffers "
                    "are FP32; call accelerator.prepare(model, optimizer) once, with both."
                )
            if own and not any(bare is owner for owner in owners):
                owners.append(bare)
        if not owners:
            raise ValueError(
                f"the parameters of this {type(optimizer).__name__} belong to no model that was prepared; give "
                "accelerator.prepare(model, optimizer) both."
            )
        return owners[0] if len(owners) == 1 else nn.ModuleList(owners)

    # The loop.

    def backward(self, loss: Tensor, *, loss_id: int = 0, **kwargs: Any) -> None:
        """As `accelerate.Accelerator.backward`, scaled by the scale of `loss_id`.

        Args:
            loss: The loss; it is divided by `gradient_accumulation_steps`.
            loss_id: The loss, in [0, num_losses) of the scaler.
            kwargs: Of `Tensor.backward`.

        Raises:
            ValueError: `loss_id` is out of range.
        """
        if self.scaler is None:
            if loss_id != 0:
                raise ValueError(f"loss_id is {loss_id}, but bf16 has no scaler; leave it out.")
            super().backward(loss, **kwargs)
        else:
            self.scaler.scale(loss / self.gradient_accumulation_steps, loss_id).backward(**kwargs)


def _inside(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer that a prepared one holds."""
    wrapper = getattr(optimizer, "optimizer", None)
    return wrapper._inner if isinstance(wrapper, mpengine.MixedPrecisionOptimizer) else None
