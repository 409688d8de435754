"""transformers' Trainer with `fp16=True`, on a tiny Llama made from its configuration."""

from __future__ import annotations

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

import mpengine
from mpengine.integrations.transformers import Trainer, TrainerMixin
from tests.harness import frozen, same_bits
from tests.integrations.world import INIT_SCALE

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # there is no accelerator here


@pytest.fixture(autouse=True)
def _a_state_of_its_own():
    """Accelerate keeps its state in singletons."""
    yield
    for kept in (AcceleratorState, GradientState, PartialState):
        kept._reset_state()


def scaler_of(kind=mpengine.GradScaler, **kwargs):
    return kind("cpu", init_scale=INIT_SCALE, growth_interval=3, **kwargs)


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def sentences(count=12):
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 13, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, **kwargs):
    settings = {
        "use_cpu": True,
        "fp16": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.5,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**settings, **kwargs})


class Seen(TrainerCallback):
    def __init__(self):
        self.skipped, self.lrs, self.scales, self.dtypes = [], [], [], []

    def on_step_end(self, args, state, control, model, optimizer, lr_scheduler, **kwargs):
        self.skipped.append(self.trainer.accelerator.optimizer_step_was_skipped)
        self.lrs.append(lr_scheduler.get_last_lr()[0])
        self.scales.append(self.trainer.accelerator.scaler.get_scale())
        self.dtypes.append(model.model.layers[0].mlp.up_proj.weight.dtype)


class Overflowing:
    """Before a Trainer: the loss of these steps is inf."""

    overflow: tuple[int, ...] = (1, 3)

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("inf") if self.state.global_step in self.overflow else loss


class Ours(Overflowing, Trainer):
    pass


class Theirs(Overflowing, transformers.Trainer):
    """On the CPU Accelerate leaves fp16 off; this is what it does on a GPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler, self.accelerator.native_amp = scaler_of(torch.amp.GradScaler), True


def trained(cls, args, resume=None, **kwargs):
    seen = Seen()
    seen.trainer = trainer = cls(llama(), args, train_dataset=sentences(), callbacks=[seen], **kwargs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


def test_it_trains_as_transformers_with_torchs_scaler_does(tmp_path):
    """Same skips, learning rates and scales; the norms that it logs within fp16's rounding of the weights.

    Not with the default optimizer, torch's fused AdamW: transformers does not see that one skip a step.
    """
    args = {"optim": "adamw_torch", "logging_strategy": "steps", "logging_steps": 1, "logging_nan_inf_filter": False}
    ours, seen = trained(Ours, arguments(tmp_path, **args), scaler=scaler_of())
    AcceleratorState._reset_state()
    theirs, expected = trained(Theirs, arguments(tmp_path, **args))
    assert seen.skipped == expected.skipped == [False, True, False, True, False, False]
    assert seen.lrs == expected.lrs
    assert seen.scales == expected.scales == [1024.0, 512.0, 512.0, 256.0, 256.0, 256.0]
    assert set(seen.dtypes) == {torch.float16}
    assert set(expected.dtypes) == {torch.float32}
    optimizer = ours.optimizer
    assert (optimizer.steps_taken, optimizer.steps_skipped) == (4, 2)
    # The norm layers compute in FP32 here and partly in fp16 there: 2^-10 each, of which there are 5.
    logs = [
        (a["grad_norm"], b["grad_norm"])
        for a, b in zip(*(t.state.log_history for t in (ours, theirs)), strict=True)
        if "grad_norm" in a
    ]
    for step in (0, 2, 4, 5):
        assert logs[step][0] == pytest.approx(logs[step][1], rel=5 / 1024)
    assert ours.state.log_history[0]["grad_norm"] > 0.5  # so it was clipped


def test_resuming_is_bitwise_equal_to_never_having_stopped(tmp_path):
    """Step 3 of 6 is saved: the scale has backed off twice, and the masters are not what fp16 weights say."""
    saving = {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 1.0}
    unbroken, seen = trained(Ours, arguments(tmp_path, **saving), scaler=scaler_of())
    AcceleratorState._reset_state()
    resumed, rest = trained(Ours, arguments(tmp_path, **saving), tmp_path / "checkpoint-4", scaler=scaler_of())
    assert len(rest.scales) == 2
    assert rest.scales == seen.scales[4:]
    for part in (lambda t: t.optimizer.state_dict(), lambda t: t.accelerator.scaler.state_dict()):
        assert frozen(part(resumed)) == frozen(part(unbroken))
    masters = list(resumed.optimizer.master_params())
    assert not same_bits(masters, [m.half().float() for m in masters])


def test_accumulation_and_no_clipping(tmp_path):
    class Plain(Trainer):
        pass

    trainer, seen = trained(Plain, arguments(tmp_path, gradient_accumulation_steps=3, max_grad_norm=0.0))
    assert seen.skipped == [False, False]
    assert trainer.optimizer.steps_taken == 2
    assert isinstance(trainer.accelerator.scaler, mpengine.GradScaler)
    trainer.train()  # again, from where it is
    assert trainer.optimizer.steps_taken == 4


def test_the_mixin_goes_before_any_trainer(tmp_path):
    class Library(transformers.Trainer):
        pass

    class FineTuner(TrainerMixin, Library):
        pass

    scaler = scaler_of()
    trainer = FineTuner(llama(), arguments(tmp_path), train_dataset=sentences(), scaler=scaler, keep_fp32=["lm_head"])
    trainer.train()
    assert trainer.accelerator.scaler is scaler
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert trainer.model.model.embed_tokens.weight.dtype == torch.float16
    assert trainer.optimizer.steps_taken == 6


def test_neither_fp16_nor_bf16_is_refused(tmp_path):
    with pytest.raises(ValueError, match="mixed_precision is 'no'"):
        Trainer(llama(), arguments(tmp_path, fp16=False))
