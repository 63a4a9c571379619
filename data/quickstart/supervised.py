"""Ordinary supervised training of one quickstart model, from fresh weights, and what it gets right afterwards.

B questions, L tokens (prompt and response, padded on the right).  Each question is drawn afresh from the training
scans, which are slightly rotated, scaled and shifted: 1,297 scans alone are soon learnt by heart.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from task import DOMAINS, FULL_INK, SPLITS, Question, boxed_answer, canvas, chain, draw_question, image_text
from tiny_models import FULL_INK_VALUE, IMAGE_TOKEN, ModelShape, build_model, build_tokenizer, save_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAX_NEW_TOKENS = 32
"""The longest chain has 26 tokens."""
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast one model trains."""

    steps: int
    batch: int = 64
    """Questions per step."""
    peak_lr: float = 3e-3
    warmup: int = 50
    """Steps of linear warm-up; a cosine to zero follows."""
    weight_decay: float = 0.05
    rotation_deg: float = 12.0
    """Largest rotation of a training scan, either way."""
    stretch: float = 0.12
    """Largest relative change of a training scan's width and height."""
    shift_px: float = 0.8
    """Largest shift of a training scan, in its own pixels."""
    n_scans: int | None = None
    """Train on the first so many training scans only; null = on all."""


def learning_rate(step: int, schedule: Schedule) -> float:
    """Linear warm-up, then a cosine to zero."""
    if step < schedule.warmup:
        return schedule.peak_lr * (step + 1) / schedule.warmup
    done = (step - schedule.warmup) / max(1, schedule.steps - schedule.warmup)
    return schedule.peak_lr * 0.5 * (1 + math.cos(math.pi * done))


class Encoder:
    """Questions -> token ids; remembers each distinct question, since there are only some ten thousand."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, n_image_tokens: int) -> None:
        """``n_image_tokens`` 0: a model that sees no images and is told the digits instead."""
        self.tokenizer = tokenizer
        self.n_image_tokens = n_image_tokens
        self._known: dict[Question, tuple[list[int], int]] = {}

    def __call__(self, question: Question) -> tuple[list[int], int]:
        """Ids of prompt and response with the closing turn end, and the length of the prompt."""
        if question not in self._known:
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": self.content(question)}], tokenize=False, add_generation_prompt=True
            )
            prompt = prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * max(1, self.n_image_tokens))
            prompt_ids = self.tokenizer(prompt).input_ids
            response_ids = self.tokenizer(chain(question)).input_ids + [self.tokenizer.eos_token_id]
            self._known[question] = (prompt_ids + response_ids, len(prompt_ids))
        return self._known[question]

    def content(self, question: Question) -> list[dict[str, str]]:
        seen = {"type": "image"} if self.n_image_tokens else {"type": "text", "text": image_text(question.digits)}
        return [seen, {"type": "text", "text": question.text}]

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


def warp(scans: Tensor, schedule: Schedule, generator: Any) -> Tensor:
    """Scans [N, 8, 8] each rotated, stretched and shifted at random, bilinear, empty outside."""
    import torch
    from torch.nn.functional import affine_grid, grid_sample

    n = len(scans)

    def symmetric(limit: float) -> Tensor:
        return (2 * torch.rand(n, generator=generator) - 1) * limit

    angle = symmetric(math.radians(schedule.rotation_deg))
    width, height = 1 + symmetric(schedule.stretch), 1 + symmetric(schedule.stretch)
    # affine_grid's unit is half a side: 8 pixels are 2 units.
    across, down = symmetric(schedule.shift_px / 4), symmetric(schedule.shift_px / 4)
    row_x = torch.stack([width * angle.cos(), -height * angle.sin(), across], dim=1)
    row_y = torch.stack([width * angle.sin(), height * angle.cos(), down], dim=1)
    grid = affine_grid(torch.stack([row_x, row_y], dim=1), [n, 1, *scans.shape[1:]], align_corners=False)
    return grid_sample(scans[:, None], grid, align_corners=False)[:, 0]


class Lessons:
    """An endless, seeded source of training batches."""

    def __init__(
        self, scans: np.ndarray, labels: np.ndarray, encoder: Encoder, schedule: Schedule, seed: int
    ) -> None:
        """``scans`` [1797, 8, 8] ink and ``labels`` [1797]; only the training split of both is used."""
        import torch

        self.pool = np.asarray(SPLITS["train"])[: schedule.n_scans]
        self.scans = torch.tensor(scans, dtype=torch.float32)
        self.labels = labels
        self.encoder = encoder
        self.schedule = schedule
        self.rng = np.random.default_rng([seed, 2])
        self.generator = torch.Generator().manual_seed(seed)

    def batch(self) -> dict[str, Tensor]:
        """``input_ids`` and ``labels`` [B, L] and, for a model that sees, ``pixel_values`` [B, 3, 24, 24]."""
        picks = [self.rng.choice(self.pool, size=int(self.rng.integers(2, 4))) for _ in range(self.schedule.batch)]
        questions = [draw_question(self.rng, tuple(int(self.labels[i]) for i in pick)) for pick in picks]
        input_ids, labels = self.encoder.batch(questions)
        if not self.encoder.n_image_tokens:
            return {"input_ids": input_ids, "labels": labels}
        return {"input_ids": input_ids, "labels": labels, "pixel_values": self.pixels(picks)}

    def pixels(self, picks: list[np.ndarray]) -> Tensor:
        """The strips of ``picks``, warped, as the processor would give them: [B, 3, 24, 24], paper 0."""
        import torch

        warped = warp(self.scans[np.concatenate(picks)], self.schedule, self.generator).numpy()
        ends = np.cumsum([len(pick) for pick in picks])
        ink = np.stack([canvas(strip) for strip in np.split(warped, ends[:-1])])
        return torch.from_numpy(FULL_INK_VALUE / FULL_INK * ink)[:, None].expand(-1, 3, -1, -1)


def response_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the response tokens, in nats; the vocabulary layer runs on those positions only."""
    from torch.nn.functional import cross_entropy

    labels = batch["labels"][:, 1:]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    # Padding is on the right, where causal attention never looks: no mask is needed.
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    wanted = labels != IGNORED
    return cross_entropy(model.get_output_embeddings()(hidden[wanted]), labels[wanted])


def train(
    model: PreTrainedModel, lessons: Lessons, schedule: Schedule, progress: Callable[[int, float], None]
) -> None:
    """AdamW for ``schedule.steps`` steps; ``progress`` hears (steps done, loss)."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=schedule.peak_lr, betas=(0.9, 0.98), weight_decay=schedule.weight_decay, fused=True
    )
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        loss = response_loss(model, lessons.batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress(step + 1, loss.item())
    model.eval()


def build(
    folder: Path,
    shape: ModelShape,
    schedule: Schedule,
    scans: np.ndarray,
    labels: np.ndarray,
    seed: int,
    progress: Callable[[int, float], None],
) -> dict[str, Any]:
    """Train one model and save it to ``folder``; returns its size, last loss and cost in CPU seconds."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    start = time.process_time()
    losses: list[float] = []

    def note(step: int, loss: float) -> None:
        losses.append(loss)
        progress(step, loss)

    tokenizer = build_tokenizer()
    model = build_model(shape, tokenizer, seed)
    n_image_tokens = model.config.image_seq_length if shape.kind == "llava" else 0
    lessons = Lessons(scans, labels, Encoder(tokenizer, n_image_tokens), schedule, seed)
    train(model, lessons, schedule, note)
    save_model(model, tokenizer, shape, folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": schedule.steps,
        "last_loss_nats": round(float(np.mean(losses[-20:])), 4),
        "train_cpu_s": round(time.process_time() - start, 1),
    }


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
                    part if sees or part["type"] != "image" else {"type": "text", "text": next(seen)}
                    for part in message["content"]
                ],
            }
            for message in row["messages"]
        ]
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    pictures = {"images": [Image.open(data / name) for row in rows for name in row["images"]]} if sees else {}
    inputs = processor(text=texts, padding=True, return_tensors="pt", **pictures)
    return {key: inputs[key] for key in ("input_ids", "attention_mask", "pixel_values") if key in inputs}


def sample(model: PreTrainedModel, inputs: dict[str, Tensor], seed: int | None) -> Tensor:
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


def token_logprobs(model: PreTrainedModel, inputs: dict[str, Tensor], responses: Tensor) -> Tensor:
    """log p(response token t | prompt, tokens < t) in nats [B, T] float32."""
    import torch

    length = responses.shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(responses)], dim=1)
    with torch.no_grad():
        logits = model(
            **{**inputs, "input_ids": torch.cat([inputs["input_ids"], responses], dim=1), "attention_mask": mask},
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
    import transformers

    transformers.utils.logging.disable_progress_bar()
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
        results[name]["gap_nats_per_token"] = round(float(gap.numpy()[keep].mean()), 4) if keep.any() else None
    return results
