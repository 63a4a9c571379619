"""The student under DeepSpeed: gathered for sampling, updated group by group.

R rollouts, T response tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from uniopd_mm.alignment import teacher_messages
from uniopd_mm.config import OptimConfig, TrainConfig
from uniopd_mm.distributed import World
from uniopd_mm.errors import ConfigError
from uniopd_mm.loss import loss_denominators, policy_loss
from uniopd_mm.models import (
    MultimodalLM,
    group_logprobs,
    load_student,
    pad_responses,
    plan_chunks,
    stage_parameters,
)
from uniopd_mm.rollout import Group, Prompt, Rollout, fill

if TYPE_CHECKING:
    from uniopd_mm.processors import EncodedPrompt


class Trainer:
    """Owns the student's weights, optimizer and DeepSpeed engine.

    ``trained`` is what the engine updates; ``student`` has the same weights and is for everything else.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        import deepspeed

        self.config, self.world = config, world
        self.accumulation = accumulation_steps(config, world.size)
        self._zero3 = self._hold_zero3_config()
        self.trained: MultimodalLM = load_student(config.student, config.seed)
        # ZeRO-3 fetches and frees weights in hooks on the modules it trains, also while all are gathered.
        self.student = self.trained.sharing_copy() if config.distributed.zero_stage == 3 else self.trained
        groups = optimizer_groups(self.trained, config.optim)
        self.base_lrs = [g["lr"] for g in groups]
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=self.trained,
            optimizer=self._optimizer(groups),
            config=deepspeed_config(config, self.accumulation),
            dist_init_required=False,
        )
        self.student.take_buffers_of(self.trained)  # DeepSpeed may have moved them
        self.updates = 0
        self.dummy = dummy_group(self.student)

    def _hold_zero3_config(self) -> object | None:
        """While this object lives, ``from_pretrained`` partitions the weights as it reads them."""
        if self.config.distributed.zero_stage != 3:
            return None
        from transformers.integrations.deepspeed import HfDeepSpeedConfig

        return HfDeepSpeedConfig(deepspeed_config(self.config, self.accumulation))

    def release_zero3_config(self) -> None:
        """From here on ``from_pretrained`` loads whole models again."""
        self._zero3 = None

    def _optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        optim = self.config.optim
        if self.config.distributed.offload_optimizer:
            from deepspeed.ops.adam import DeepSpeedCPUAdam as Adam
        else:
            from torch.optim import AdamW as Adam  # DeepSpeed's fused one is compiled at first use
        return Adam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Inside, every rank holds all weights, and ``student`` may run a different number of times on each."""
        if self.config.distributed.zero_stage != 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.student.parameters())):
            yield

    # ------------------------------------------------------------------ scoring

    def needs_forward(self, sampler_matches: bool) -> bool:
        """Whether ``sampler_logprobs`` cannot stand for the trainer's own (``rollout.rescore``)."""
        rollout = self.config.rollout
        if rollout.rescore != "auto":
            return rollout.rescore == "always"
        same_numbers = sampler_matches and self.config.student.dtype == "float32"
        return not same_numbers or rollout.temperature != self.config.loss.score_temperature

    @torch.no_grad()
    def score_student(self, groups: list[Group], sampler_matches: bool) -> list[Group]:
        """Fill ``student_logprobs``, by a forward pass where that is needed.  Call inside :meth:`whole_weights`."""
        if not self.needs_forward(sampler_matches):
            return fill(groups, "student_logprobs", [r.sampler_logprobs for g in groups for r in g.rollouts])
        return fill(groups, "student_logprobs", self._logprobs(groups, [g.encoded for g in groups]))

    @torch.no_grad()
    def score_in_modal(self, groups: list[Group], weight_of: Callable[[Prompt], float]) -> list[Group]:
        """Fill ``baseline_logprobs`` of prompts with a weight: that share of it is the student that reads the images as
        text (X-OPD, arXiv 2603.24596).  Call inside :meth:`whole_weights`, after :meth:`score_student`."""
        weights = {i: weight for i, g in enumerate(groups) if (weight := weight_of(g.prompt)) > 0}
        chosen = [groups[i] for i in weights]
        views = [teacher_messages(g.prompt, "text", sees_images=True)[0] for g in chosen]
        encoded = [self.student.processor.encode(list(messages), ()) for messages in views]
        reading = iter(self._logprobs(chosen, encoded))
        result = list(groups)
        for i, weight in weights.items():
            mixed = [
                torch.lerp(r.student_logprobs, next(reading), weight)
                for r in groups[i].rollouts
                if r.student_logprobs is not None
            ]
            (result[i],) = fill([groups[i]], "baseline_logprobs", mixed)
        return result

    def _logprobs(self, groups: list[Group], encoded: list[EncodedPrompt]) -> list[Tensor]:
        """[T] of every rollout in order, given its group's prompt."""
        rollout, micro_tokens = self.config.rollout, self.config.distributed.micro_tokens
        temperature = self.config.loss.score_temperature
        return group_logprobs(
            self.student, groups, encoded, temperature, rollout.concurrent_rollouts, micro_tokens
        )

    # ------------------------------------------------------------------ update

    def update(self, groups: list[Group], correct_mismatch: bool) -> dict[str, float]:
        """One optimizer step on this rank's groups; returns means over all ranks."""
        settings = self.config.loss
        batches = self._batches(groups)
        self._remember_images(batches)
        # Rollouts that are masked or balanced out get no forward pass, but stay in the denominators.
        n_rollouts, n_tokens = loss_denominators(*scored_and_kept(groups), settings).tolist()
        total = self.world.sum({"rollouts": n_rollouts, "tokens": n_tokens})
        sums: dict[str, float] = {"loss": 0.0}
        self.trained.train(self.config.student.gradient_checkpointing)  # what makes transformers recompute
        for batch in batches:
            new_lp = self.engine(
                batch.encoded,
                batch.row,
                batch.response,
                batch.mask,
                temperature=settings.score_temperature,
                chunks=batch.chunks,
            )
            loss, stats = policy_loss(
                new_lp,
                batch.old_logprobs,
                batch.advantages,
                batch.teacher_logprobs,
                batch.scored,
                batch.kept,
                settings,
                (total["rollouts"] or 1.0, total["tokens"] or 1.0),
                sampler_lp_BT=batch.sampler_logprobs if correct_mismatch else None,
            )
            # DeepSpeed averages over ranks and micro-batches; the loss is already a share of the global sum.
            self.engine.backward(loss * self.accumulation * self.world.size)
            is_last = batch is batches[-1]
            if is_last:
                grad_norm, lr = self._before_step()
            self.engine.step()
            sums["loss"] += float(loss.detach())
            for key, (value, count) in ((k, v.tolist()) for k, v in stats.items()):
                sums[key] = sums.get(key, 0.0) + value
                sums[f"#{key}"] = sums.get(f"#{key}", 0.0) + count
        self.trained.eval()
        self.updates += 1
        sums = self.world.sum(sums)
        means = {k: v / (sums[f"#{k}"] or 1.0) for k, v in sums.items() if f"#{k}" in sums}
        norm = self.engine.get_global_grad_norm() if grad_norm is None else grad_norm
        return {
            **means,
            "loss": sums["loss"],
            "grad_norm": float(math.nan if norm is None else norm),
            "lr": lr,
        }

    def _before_step(self) -> tuple[float | None, float]:
        """Set the learning rates; the gradient norm under ZeRO-0, where DeepSpeed does not report one."""
        factor = lr_factor(self.updates, self.config.optim, self.config.steps)
        for group, base in zip(self.engine.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        if self.config.distributed.zero_stage != 0 or self.config.student.dtype != "float32":
            return None, self.config.optim.lr * factor
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients)), self.config.optim.lr * factor

    def _batches(self, groups: list[Group]) -> list[Batch]:
        """This rank's micro-batches: the rollouts worth a forward pass, and what keeps the ranks in step.

        Every rank must touch the same weights equally often in every micro-batch, or one waits for another for ever:
        a group without loss stands in where no image (no rollout) is left, and under ZeRO-3 all micro-batches of all
        ranks run in as many chunks.
        """
        micro, max_tokens = self.config.distributed.micro_groups, self.config.distributed.micro_tokens
        parts = [self._fill_up(groups[i * micro : (i + 1) * micro]) for i in range(self.accumulation)]
        n_chunks = 1
        if self.config.distributed.zero_stage == 3:
            n_chunks = max(
                self.world.gather(len(plan_chunks(response_lengths(p), max_tokens)) for p in parts)
            )
        return [self._batch(part, n_chunks) for part in parts]

    def _fill_up(self, groups: list[Group]) -> list[Group]:
        trained = [replace(g, rollouts=tuple(filter(is_trained, g.rollouts))) for g in groups]
        used = [g for g in trained if g.rollouts]
        has_image = any(g.encoded.image_spans for g in used)
        if not used or (not has_image and self.student.processor.sees_images):
            used.append(self.dummy)
        return used

    def _batch(self, groups: list[Group], n_chunks: int) -> Batch:
        missing = max(0, n_chunks - len(response_lengths(groups)))
        groups[-1] = replace(groups[-1], rollouts=groups[-1].rollouts + self.dummy.rollouts * missing)
        max_tokens = self.config.distributed.micro_tokens
        chunks = plan_chunks(
            response_lengths(groups), max_tokens, at_least=n_chunks, device=self.student.device
        )
        return Batch.of(groups, self.student, chunks)

    def _remember_images(self, batches: list[Batch]) -> None:
        """Run a frozen vision tower before the update where sampling has not: under ZeRO-3 only all ranks together
        can run it, and they may not all need to."""
        if self.config.distributed.zero_stage != 3:
            return
        if self.world.any(not all(self.student.knows_images(b.encoded) for b in batches)):
            with self.whole_weights(), torch.no_grad():
                for batch in batches:
                    self.student.remember_images(batch.encoded)


def scored_and_kept(groups: list[Group]) -> tuple[Tensor, Tensor]:
    """``scored`` [R, T] bool, right-padded, and ``kept`` [R] bool of all rollouts that a teacher could score.

    An unscored rollout (a failed teacher) counts as never sampled: unknown is not worth 0.
    """
    rollouts = [r for g in groups for r in g.rollouts if r.scored is not None and bool(r.scored.any())]
    longest = max((len(r.response_ids) for r in rollouts), default=0)
    scored = torch.zeros(len(rollouts), longest, dtype=torch.bool)
    for i, rollout in enumerate(rollouts):
        if rollout.scored is not None:
            scored[i, : len(rollout.scored)] = rollout.scored
    return scored, torch.tensor([r.kept for r in rollouts], dtype=torch.bool)


def is_trained(rollout: Rollout) -> bool:
    """It carries loss: kept, and with at least one scored token."""
    return rollout.kept and rollout.scored is not None and bool(rollout.scored.any())


def response_lengths(groups: list[Group]) -> list[int]:
    return [len(r.response_ids) for g in groups for r in g.rollouts]


class Batch:
    """Tensors of one micro-batch, on the student's device; rollouts right-padded."""

    encoded: list[Any]
    chunks: list[Tensor]  # the rollouts that run together
    row: Tensor  # [R] prompt of each rollout
    response: Tensor  # [R, T] int64
    mask: Tensor  # [R, T] bool, real tokens
    scored: Tensor  # [R, T] bool
    kept: Tensor  # [R] bool
    old_logprobs: Tensor  # [R, T] the weights that sampled, scored by the trainer
    sampler_logprobs: Tensor  # [R, T]
    teacher_logprobs: Tensor  # [R, T]
    advantages: Tensor  # [R, T]

    @classmethod
    def of(cls, groups: list[Group], student: MultimodalLM, chunks: list[Tensor]) -> Batch:
        self, device = cls(), student.device
        self.chunks = chunks
        rollouts = [r for g in groups for r in g.rollouts]
        self.encoded = [g.encoded for g in groups]
        self.row = torch.tensor([i for i, g in enumerate(groups) for _ in g.rollouts], device=device)
        response, mask = pad_responses([r.response_ids for r in rollouts], student.processor.pad_token_id)
        self.response, self.mask = response.to(device), mask.to(device)
        self.kept = torch.tensor([r.kept for r in rollouts], device=device)

        def padded(values: list[Tensor | None], dtype: torch.dtype) -> Tensor:
            out = torch.zeros(response.shape, dtype=dtype)
            for r, value in enumerate(values):
                if value is not None:
                    out[r, : len(value)] = value
            return out.to(device)

        self.scored = padded([r.scored for r in rollouts], torch.bool)
        self.sampler_logprobs = padded([r.sampler_logprobs for r in rollouts], torch.float32)
        self.old_logprobs = padded([r.student_logprobs for r in rollouts], torch.float32)
        self.teacher_logprobs = padded([r.teacher_logprobs for r in rollouts], torch.float32)
        self.advantages = padded([r.advantages for r in rollouts], torch.float32)
        return self


def dummy_group(student: MultimodalLM) -> Group:
    """A group without loss: one (blank image and) token, nothing scored."""
    from PIL import Image

    content = [{"type": "text", "text": "-"}]
    images = ()
    if student.processor.sees_images:
        content, images = [{"type": "image"}, *content], (Image.new("RGB", (32, 32)),)
    prompt = Prompt(id="dummy", messages=({"role": "user", "content": content},))
    encoded = student.processor.encode(list(prompt.messages), images)
    nothing = torch.zeros(1)
    rollout = Rollout(
        response_ids=torch.tensor(student.processor.stop_token_ids()[:1]),
        sampler_logprobs=nothing,
        student_logprobs=nothing,
        finish="stop",
        teacher_logprobs=nothing,
        scored=torch.zeros(1, dtype=torch.bool),
        advantages=nothing,
        kept=False,
    )
    return Group(prompt, encoded, (rollout,))


def accumulation_steps(config: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimizer step on each rank."""
    prompts, micro = config.rollout.prompts_per_step, config.distributed.micro_groups
    if prompts % (world_size * micro):
        raise ConfigError(
            f"rollout.prompts_per_step={prompts} must be a multiple of ranks x distributed.micro_groups = "
            f"{world_size} x {micro}. Try rollout.prompts_per_step={math.ceil(prompts / (world_size * micro)) * world_size * micro}"
        )
    return prompts // (world_size * micro)


def optimizer_groups(student: MultimodalLM, optim: OptimConfig) -> list[dict[str, Any]]:
    """One parameter group per stage that has something to train, each with its learning rate."""
    stages = stage_parameters(student.model, student.model_type)
    return [{"params": p, "lr": optim.stage_lr.get(s, optim.lr)} for s, p in stages.items() if p]


def lr_factor(step: int, optim: OptimConfig, n_steps: int) -> float:
    """Learning rate of the ``step``-th update (from 0) relative to the peak."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, n_steps - optim.warmup_steps)
    if optim.schedule == "linear":
        return 1.0 - progress
    if optim.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def deepspeed_config(config: TrainConfig, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's own settings; ``distributed.deepspeed`` has the last word."""
    distributed = config.distributed
    zero: dict[str, Any] = {"stage": distributed.zero_stage}
    if distributed.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    settings = {
        "train_micro_batch_size_per_gpu": distributed.micro_groups,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": zero,
        "bf16": {"enabled": config.student.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }
    return merge(settings, distributed.deepspeed)


def merge(settings: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with ``extra`` laid over them."""
    merged = dict(settings)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
