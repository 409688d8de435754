"""transformers: a `Trainer` whose fp16 weights have FP32 masters, and the mixin for subclasses of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mpengine
from mpengine.precision import KeepFp32

try:
    import transformers

    from mpengine.integrations.accelerate import Accelerator
except ImportError as error:
    raise ImportError(
        "mpengine.integrations.transformers needs transformers and Accelerate, which could not be imported "
        f"({error}): pip install transformers accelerate"
    ) from error

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object  # the trainer comes after it in the subclass's bases


class TrainerMixin(_Base):
    """Put it before a `transformers.Trainer`, or any subclass of it, and train with `fp16=True` (or `bf16=True`).

    Args:
        args: Of the trainer.
        scaler: See `mpengine.integrations.accelerate.Accelerator`.
        keep_fp32: See `mpengine.prepare`.
        kwargs: Of the trainer.

    Raises:
        ValueError: Neither `fp16` nor `bf16` is set in the `TrainingArguments`, or as the `Accelerator` does.

    Example:
        >>> class FineTuner(TrainerMixin, trl.SFTTrainer):
        ...     pass
    """

    def __init__(
        self,
        *args: Any,
        scaler: mpengine.GradScaler | None = None,
        keep_fp32: KeepFp32 | None = None,
        **kwargs: Any,
    ) -> None:
        self._scaler, self._keep_fp32 = scaler, keep_fp32
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Called by the trainer's constructor: the accelerator that it creates becomes mpengine's."""
        super().create_accelerator_and_postprocess()
        Accelerator.adopt(self.accelerator, scaler=self._scaler, keep_fp32=self._keep_fp32)


class Trainer(TrainerMixin, transformers.Trainer):
    """`transformers.Trainer` with fp16 weights, FP32 masters and mpengine's scaler.

    Args:
        args: Of `transformers.Trainer`.
        kwargs: Of `transformers.Trainer` and of `TrainerMixin`.

    Example:
        >>> trainer = Trainer(model, TrainingArguments("out", fp16=True), train_dataset=dataset)
    """
