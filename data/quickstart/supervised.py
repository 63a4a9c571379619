"""Ordinary supervised training of the quickstart's models, and what they get right afterwards.

B questions, L tokens (prompt and response, padded on the right).  Each question is drawn afresh from the training
scans, which are slightly rotated, scaled and shifted: 1,297 scans alone are soon learnt by heart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from task import (
    CANVAS_SIDE,
    CELLS,
    DOMAINS,
    FULL_INK,
    SCAN_SIDE,
    SPLITS,
    Question,
    boxed_answer,
    cells,
    chain,
    draw_question,
    image_text,
)
from tiny_models import FULL_INK_VALUE, IMAGE_TOKEN

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import CLIPVisionModel, PreTrainedModel

Progress = Callable[[int, float], None]
"""Hears (steps done, loss) after each step."""

MAX_NEW_TOKENS = 32
"""The longest chain has 24 tokens."""
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast, and on what, one stage trains."""

    steps: int
    batch: int = 64
    """Questions (for a tower alone: strips) per step."""
    peak_lr: float = 3e-3
    tower_lr_ratio: float = 1.0
    """Learning rate of a tower inside a LLaVA, relative to the rest; a taught tower needs little change."""
    warmup: int = 50
    """Steps of linear warm-up, a quarter of all at most; a cosine to zero follows."""
    weight_decay: float = 0.05
    arithmetic_share: float = 0.7
    """Share of arithmetic questions: reading is learnt sooner."""
    n_scans: int | None = None
    """Train on the first so many training scans only; None = on all."""
    warp: float = 1.0
    """Scales how far training scans are rotated (12 degrees), stretched (12 %) and shifted (0.8 pixels) at most."""


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine to zero."""
    warmup = min(schedule.warmup, schedule.steps // 4)
    if step < warmup:
        return schedule.peak_lr * (step + 1) / warmup
    done = (step - warmup) / max(1, schedule.steps - warmup)
    return schedule.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


class Encoder:
    """Questions -> token ids; remembers each distinct question, since there are only some ten thousand."""

    def __init__(self, tokenizer: Any, n_image_tokens: int) -> None:
        """``n_image_tokens`` 0: a model that sees no images and is told the digits instead."""
        self.tokenizer = tokenizer
        self.n_image_tokens = n_image_tokens
        self._known: dict[Question, tuple[list[int], int]] = {}

    def __call__(self, question: Question) -> tuple[list[int], int]:
        """Ids of prompt and response with the closing turn end, and the length of the prompt."""
        if question not in self._known:
            turns: Any = [{"role": "user", "content": self.content(question)}]
            prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            prompt = str(prompt).replace(IMAGE_TOKEN, IMAGE_TOKEN * max(1, self.n_image_tokens))
            prompt_ids = self.tokenizer(prompt).input_ids
            response_ids = [*self.tokenizer(chain(question)).input_ids, self.tokenizer.eos_token_id]
            self._known[question] = (prompt_ids + response_ids, len(prompt_ids))
        return self._known[question]

    def content(self, question: Question) -> list[dict[str, str]]:
        told = {"type": "text", "text": image_text(question.digits) + "\n"}
        return [{"type": "image"} if self.n_image_tokens else told, {"type": "text", "text": question.text}]

    def batch(self, questions: list[Question]) -> tuple[Tensor, Tensor]:
        """Input ids and labels [B, L], labels aligned with the ids (not shifted), ``IGNORED`` on prompt and padding."""
        import torch

        encoded = [self(question) for question in questions]
        length = max(len(ids) for ids, _ in encoded)
        input_ids = torch.full((len(encoded), length), self.tokenizer.pad_token_id)
        labels = torch.full((len(encoded), length), IGNORED)
        for row, (ids, n_prompt) in enumerate(encoded):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            labels[row, n_prompt : len(ids)] = torch.tensor(ids[n_prompt:])
        return input_ids, labels


def warp(scans: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Scans [N, 8, 8] each rotated, stretched and shifted at random, bilinear, empty outside."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    n = len(scans)

    def symmetric(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit * strength

    angle = symmetric(math.radians(12.0))
    width, height = 1 + symmetric(0.12), 1 + symmetric(0.12)
    # affine_grid's unit is half a side: 4 pixels.
    across, down = symmetric(0.8 / 4), symmetric(0.8 / 4)
    row_x = torch.stack([width * angle.cos(), -height * angle.sin(), across], dim=1)
    row_y = torch.stack([width * angle.sin(), height * angle.cos(), down], dim=1)
    grid = affine_grid(torch.stack([row_x, row_y], dim=1), [n, 1, *scans.shape[1:]], align_corners=False)
    return grid_sample(scans[:, None], grid, align_corners=False)[:, 0]


@dataclass(frozen=True)
class Strips:
    """A batch of B freshly drawn strips with N digits in all."""

    digits: list[tuple[int, ...]]
    """[B]"""
    pixel_values: Tensor
    """[B, 3, 24, 24] float32, as the processor gives them."""
    patches: Tensor
    """[N] int64: where each digit is, as an index into the batch's B x 9 patches."""


class Lessons:
    """An endless, seeded source of training batches."""

    def __init__(self, scans: np.ndarray, labels: np.ndarray, schedule: Schedule, seed: int) -> None:
        """``scans`` [1797, 8, 8] ink and ``labels`` [1797]; only the training split of both is used."""
        import torch

        self.pool = np.asarray(SPLITS["train"])[: schedule.n_scans]
        self.scans = torch.tensor(scans, dtype=torch.float32)
        self.labels = labels
        self.schedule = schedule
        self.rng = np.random.default_rng([seed, 2])
        self.generator = torch.Generator().manual_seed(seed)

    def strips(self) -> Strips:
        import torch

        n_digits = self.rng.integers(2, 4, size=self.schedule.batch)
        picks = self.rng.choice(self.pool, size=int(n_digits.sum()))
        strip_of = torch.from_numpy(np.repeat(np.arange(len(n_digits)), n_digits))
        column_of = torch.tensor([column for n in n_digits for column in cells(int(n))])
        ink = torch.zeros(len(n_digits), CELLS, SCAN_SIDE, CELLS, SCAN_SIDE)
        middle = CELLS // 2
        ink[strip_of, middle, :, column_of] = warp(self.scans[picks], self.schedule.warp, self.generator)
        pixels = (
            (FULL_INK_VALUE / FULL_INK * ink).reshape(-1, 1, CANVAS_SIDE, CANVAS_SIDE).expand(-1, 3, -1, -1)
        )
        per_strip = np.split(self.labels[picks], np.cumsum(n_digits)[:-1])
        return Strips(
            digits=[tuple(int(d) for d in strip) for strip in per_strip],
            pixel_values=pixels,
            patches=strip_of * CELLS**2 + middle * CELLS + column_of,
        )

    def questions(self, encoder: Encoder) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` [B, L] and, for a model that sees, ``pixel_values`` [B, 3, 24, 24]."""
        strips = self.strips()
        read, arithmetic = DOMAINS
        questions = [
            draw_question(
                self.rng, d, arithmetic if self.rng.random() < self.schedule.arithmetic_share else read
            )
            for d in strips.digits
        ]
        input_ids, labels = encoder.batch(questions)
        batch = {"input_ids": input_ids, "labels": labels}
        return {**batch, "pixel_values": strips.pixel_values} if encoder.n_image_tokens else batch


def response_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the response tokens, in nats; the vocabulary layer runs on those positions only."""
    from torch.nn.functional import cross_entropy

    labels = batch["labels"][:, 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # Padding is on the right, where causal attention never looks: no mask is needed.
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels != IGNORED
    return cross_entropy(model.get_output_embeddings()(hidden[wanted]), labels[wanted])


def descend(
    groups: Sequence[tuple[Sequence[Any], float]],
    loss_of: Callable[[], Tensor],
    schedule: Schedule,
    progress: Progress,
) -> float:
    """AdamW for ``schedule.steps`` steps on (parameters, relative learning rate); the mean of the last 20 losses."""
    import torch

    optimizer = torch.optim.AdamW(
        [{"params": params, "ratio": ratio} for params, ratio in groups],
        lr=schedule.peak_lr,
        betas=(0.9, 0.98),
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    everything = [param for params, _ in groups for param in params]
    losses = []
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule) * group["ratio"]
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        progress(step + 1, losses[-1])
    return round(float(np.mean(losses[-20:])), 4)


def teach_tower(tower: CLIPVisionModel, lessons: Lessons, progress: Progress) -> float:
    """Train a tower alone, to name the digit that each patch shows; the naming layer is thrown away."""
    import torch

    naming = torch.nn.Linear(tower.config.hidden_size, 10)

    def loss_of() -> Tensor:
        strips = lessons.strips()
        features = tower(strips.pixel_values).last_hidden_state[:, 1:].flatten(0, 1)
        shown = torch.tensor([digit for strip in strips.digits for digit in strip])
        return torch.nn.functional.cross_entropy(naming(features[strips.patches]), shown)

    return descend([([*tower.parameters(), *naming.parameters()], 1.0)], loss_of, lessons.schedule, progress)


def teach_questions(model: Any, encoder: Encoder, lessons: Lessons, progress: Progress) -> float:
    """Train a whole model to answer questions with their chains."""
    tower = list(model.model.vision_tower.parameters()) if encoder.n_image_tokens else []
    of_tower = {id(param) for param in tower}
    rest = [param for param in model.parameters() if id(param) not in of_tower]
    groups = [
        (params, ratio) for params, ratio in ((tower, lessons.schedule.tower_lr_ratio), (rest, 1.0)) if params
    ]
    return descend(
        groups, lambda: response_loss(model, lessons.questions(encoder)), lessons.schedule, progress
    )


def load(folder: Path) -> tuple[PreTrainedModel, Any]:
    """A saved model and its processor (a text-only model: its tokenizer), through ``from_pretrained`` alone."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    sees = hasattr(AutoConfig.from_pretrained(folder), "vision_config")
    auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def prompt_inputs(processor: Any, rows: list[dict[str, Any]], data: Path) -> dict[str, Tensor]:
    """Model inputs of data rows, padded on the left; a tokenizer gets ``image_text`` in place of the pictures."""
    from PIL import Image

    sees = hasattr(processor, "image_processor")
    texts = []
    for row in rows:
        seen = iter(row["image_text"])
        messages = [
            {
                "role": message["role"],
                "content": [
                    part if sees or part["type"] != "image" else {"type": "text", "text": next(seen) + "\n"}
                    for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    pictures = {"images": [Image.open(data / name) for row in rows for name in row["images"]]} if sees else {}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **pictures)
    return {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in inputs}


def sample(model: Any, inputs: dict[str, Tensor], seed: int | None) -> Tensor:
    """Responses [B, T], padded on the right; greedy without a seed, else drawn at temperature 1."""
    import torch

    # A placeholder in a response would ask for a picture that is not there.
    image_token = getattr(model.config, "image_token_id", None)
    forbidden = None if image_token is None else [image_token]

    if seed is None:
        choice = {"do_sample": False}
    else:
        torch.manual_seed(seed)
        choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        full = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=forbidden, **choice)
    return full[:, inputs["input_ids"].shape[1] :]


def accuracy(rows: list[dict[str, Any]], responses: list[str]) -> dict[str, float]:
    """Share of rows whose boxed answer is right, per domain and over all."""
    right = [boxed_answer(text) == row["answer"] for row, text in zip(rows, responses, strict=True)]
    shares = {"all": float(np.mean(right))}
    for domain in DOMAINS:
        of_domain = [ok for ok, row in zip(right, rows, strict=True) if row["domain"] == domain]
        shares[domain] = float(np.mean(of_domain)) if of_domain else float("nan")
    return {key: round(share, 4) for key, share in shares.items()}


def token_logprobs(model: Any, inputs: dict[str, Tensor], responses: Tensor) -> Tensor:
    """log p(response token t | prompt, tokens < t) in nats [B, T] float32."""
    import torch

    length = responses.shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(responses)], dim=1)
    with torch.no_grad():
        logits = model(
            **{
                **inputs,
                "input_ids": torch.cat([inputs["input_ids"], responses], dim=1),
                "attention_mask": mask,
            },
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=length + 1,
        ).logits[:, :-1]
    return logits.float().log_softmax(-1).gather(-1, responses[..., None])[..., 0]


def measure(folder: Path, teachers: dict[str, str], seed: int) -> dict[str, Any]:
    """Held-out accuracy of all models, greedy and at temperature 1, and how the teachers see the student's samples.

    ``teachers``: model name -> the domain it serves.  A gap is the mean of log p_teacher - log p_student over the
    student's own tokens, in nats per token; negative: the teacher finds them less likely than the student does.
    """
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    results: dict[str, Any] = {}
    student, processor = load(folder / "student")
    inputs = prompt_inputs(processor, rows, folder)
    sampled = sample(student, inputs, seed)
    student_lp = token_logprobs(student, inputs, sampled)
    for name in ("student", *teachers):
        model, its_processor = (student, processor) if name == "student" else load(folder / name)
        its_inputs = prompt_inputs(its_processor, rows, folder)
        drawn = sampled if name == "student" else sample(model, its_inputs, seed)
        results[name] = {
            mode: accuracy(rows, its_processor.batch_decode(ids, skip_special_tokens=True))
            for mode, ids in (("greedy", sample(model, its_inputs, None)), ("sampled", drawn))
        }
        if name == "student":
            continue
        gap = token_logprobs(model, its_inputs, sampled) - student_lp
        mine = np.array([row["domain"] == teachers[name] for row in rows])[:, None]
        keep = (sampled != processor.tokenizer.pad_token_id).numpy() & mine
        results[name]["gap_nats_per_token"] = (
            round(float(gap.numpy()[keep].mean()), 4) if keep.any() else None
        )
    return results
