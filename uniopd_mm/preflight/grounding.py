"""Does a teacher look at the picture?  The same responses scored with it, with a grey one, and with none.

Two kinds of responses: what the student sampled, and the gold answers of rows that have one.  What an untrained
student says tells little of a picture; a gold answer is where a teacher that sees must differ from one that does not.

What decides, in nats per scored token, averaged over the rollouts of a prompt and then over prompts:

- The picture is *used* when putting a grey one of the same size in its place changes the scores: the mean |difference|
  is above the threshold, the larger of ``NOTICEABLE`` and ``NOISE_FACTOR`` times the mean |difference| of scoring the
  same thing twice (in another order, without the score cache).
- It *helps* when it makes one of the two kinds of responses likelier: the mean difference log p(real) - log p(grey)
  is above 0.  A bare gold answer may be nothing that the teacher would say, with or without the picture; then what the
  student says of the picture is the better witness.

Both are decided by the 95 % interval of a bootstrap over prompts (rollouts of one prompt are no independent witnesses);
an interval that holds the threshold decides nothing, and neither do fewer than ``MIN_PROMPTS`` prompts say that it helps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np
import torch
from torch import Tensor

from uniopd_mm.errors import AlignmentError
from uniopd_mm.preflight.checks import view_of
from uniopd_mm.preflight.findings import Finding
from uniopd_mm.preflight.tables import print_table
from uniopd_mm.processors.chat import replace_images
from uniopd_mm.rollout import Group, Prompt, Rollout
from uniopd_mm.teachers import AlignedTeacher

if TYPE_CHECKING:
    from PIL.Image import Image

    from uniopd_mm.processors import VLMProcessor

NOTICEABLE = 0.01
"""Nats per token: a smaller change moves a probability by less than 1 %, and nobody will learn from it."""
NOISE_FACTOR = 3.0
MIN_PROMPTS = 5
"""Fewer all agree by chance too often."""
N_RESAMPLES = 2000
_SHOWN_TOKENS = 6
_GREY = (128, 128, 128)

Interval = tuple[float, float, float]
"""Mean, and the ends of its 95 % bootstrap interval."""


@dataclass(frozen=True)
class Comparison:
    """What one change to the prompt did to the scores; in nats per token."""

    responses: str
    """sampled or gold."""
    variant: str
    """grey = a grey picture of the same size, none = no picture, text = image_text in its place, image = the picture."""
    n_prompts: int
    n_tokens: int
    change: Interval
    """Mean |difference|."""
    largest: float
    """Largest |difference| of a token."""
    gain: Interval
    """Mean difference: log p(as trained) - log p(variant); positive: what the variant lacks makes responses likelier."""


@dataclass(frozen=True)
class Token:
    """One token of the example."""

    token: str
    real_lp: float
    variant_lp: float


@dataclass(frozen=True)
class Example:
    """All scored tokens of one response."""

    prompt: str
    responses: str
    variant: str
    tokens: list[Token]


@dataclass(frozen=True)
class Audit:
    """What a teacher makes of pictures in one view."""

    teacher: str
    view: str
    noise: float
    """Mean |difference| of scoring the same thing twice."""
    comparisons: list[Comparison]
    examples: list[Example]
    """Of each kind the response that depends on the picture most."""

    @property
    def threshold(self) -> float:
        """Nats per token from which a change counts."""
        return max(NOTICEABLE, NOISE_FACTOR * self.noise)

    def find(self, responses: str, variant: str) -> Comparison | None:
        return next((c for c in self.comparisons if (c.responses, c.variant) == (responses, variant)), None)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "threshold": self.threshold}

    def show(self, file: TextIO | None = None) -> None:
        """Print the comparisons, and the most and least grounded tokens of the example."""
        print(f"teacher {self.teacher}, view {self.view}: nats per token, [95 % interval]", file=file)
        columns = (
            "responses",
            f"{self.view} against",
            "prompts",
            "tokens",
            "mean |difference|",
            "largest",
            "gain",
        )
        rows = [
            (
                c.responses,
                c.variant,
                str(c.n_prompts),
                str(c.n_tokens),
                _show(c.change),
                f"{c.largest:.3f}",
                _show(c.gain, "+"),
            )
            for c in self.comparisons
        ]
        print_table(columns, rows, right=(2, 3, 4, 5, 6), file=file)
        for example in self.examples:
            ordered = sorted(example.tokens, key=lambda t: t.variant_lp - t.real_lp)
            if len(ordered) > 2 * _SHOWN_TOKENS:
                ordered = ordered[:_SHOWN_TOKENS] + ordered[-_SHOWN_TOKENS:]
            named = {"sampled": "a sampled answer", "gold": "the gold answer"}[example.responses]
            print(f"tokens of {named} to {example.prompt}, largest gain first", file=file)
            cells = [
                (
                    repr(t.token),
                    *(f"{lp:.3f}" for lp in (t.real_lp, t.variant_lp)),
                    f"{t.real_lp - t.variant_lp:+.3f}",
                )
                for t in ordered
            ]
            print_table(("token", self.view, example.variant, "gain"), cells, right=(1, 2, 3), file=file)


def gold_groups(groups: Sequence[Group], student: VLMProcessor) -> list[Group]:
    """The groups with their gold answer as the only response, as if the student had said it; rows without are left out.

    The end of turn is not part of it: how long an answer should be is no question to the picture.
    """
    found = []
    for group in groups:
        answer = group.prompt.answer
        text = answer if isinstance(answer, str) else answer[0] if answer else ""
        ids = torch.tensor(student.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)
        if len(ids):
            rollout = Rollout(ids, torch.zeros(len(ids)), "length", text, student_logprobs=None)
            found.append(replace(group, rollouts=(rollout,)))
    return found


def audit(
    teacher: AlignedTeacher,
    sampled: Sequence[Group],
    gold: Sequence[Group],
    student: VLMProcessor,
    temperature: float = 1.0,
) -> list[Audit]:
    """One audit for each view that the teacher has of these groups; only groups with pictures count.

    All rollouts need ``student_logprobs`` (they share out spans, and cancel in every difference).
    """
    found = []
    for view in ("image", "text"):
        by_kind = {
            kind: [g for g in groups if g.prompt.images and view_of(teacher, g.prompt.domain) == view]
            for kind, groups in (("sampled", sampled), ("gold", gold))
        }
        if any(by_kind.values()):
            found.append(_audit_view(teacher, view, by_kind, student, temperature))
    return found


def _audit_view(
    teacher: AlignedTeacher,
    view: str,
    by_kind: Mapping[str, list[Group]],
    student: VLMProcessor,
    temperature: float,
) -> Audit:
    comparisons: list[Comparison] = []
    noises: list[Tensor] = []
    examples: list[Example] = []
    for kind, groups in by_kind.items():
        if not groups:
            continue
        real = _flat(teacher.score(groups, temperature))
        noises += _differences(real, _score_again(teacher, groups, temperature))
        for variant in _variants(view):
            asked = _change(teacher, groups, variant)
            if asked is None:
                continue
            other = _flat(asked[0].score(asked[1], temperature))
            differences = _differences(real, other)
            if not any(map(len, differences)):
                continue
            owners = [g for g in groups for _ in g.rollouts]
            comparisons.append(_compare(kind, variant, differences, [g.prompt.id for g in owners]))
            if variant == _variants(view)[0]:
                best = int(np.argmax([float(d.abs().mean()) if len(d) else -1.0 for d in differences]))
                tokens = _tokens(real[best], other[best], student)
                examples.append(Example(owners[best].prompt.id, kind, variant, tokens))
    comparisons.sort(key=lambda c: (_variants(view).index(c.variant), c.responses))
    noise = torch.cat(noises).abs()
    return Audit(teacher.name, view, float(noise.mean()) if len(noise) else 0.0, comparisons, examples)


def _variants(view: str) -> tuple[str, ...]:
    """What a view is compared with, the deciding one first."""
    return ("grey", "none", "text") if view == "image" else ("none", "image")


def _change(
    teacher: AlignedTeacher, groups: list[Group], variant: str
) -> tuple[AlignedTeacher, list[Group]] | None:
    """Whom to ask what, so that it sees ``variant``; None where the teacher or the rows have no such view."""
    if variant == "image":
        seeing = copy.copy(teacher)
        seeing.settings = teacher.settings.model_copy(update={"view": "image"})
        try:
            seeing.messages(groups[0].prompt)
        except AlignmentError:
            return None
        return seeing, groups
    if variant == "text" and not all(_has_text(g.prompt) for g in groups):
        return None
    return teacher, [_changed(g, variant) for g in groups]


def _has_text(prompt: Prompt) -> bool:
    texts = prompt.image_text or ()
    return len(texts) == len(prompt.images) and all(text.strip() for text in texts)


def _changed(group: Group, variant: str) -> Group:
    prompt = group.prompt
    if variant == "grey":
        grey = tuple(_grey_like(image) for image in group.images)
        return replace(group, prompt=replace(prompt, images=grey), images=grey)
    texts = prompt.image_text if variant == "text" else [""] * len(prompt.images)
    messages = tuple(replace_images(prompt.messages, list(texts or ())))
    return replace(group, prompt=replace(prompt, messages=messages, images=(), image_text=None), images=())


def _grey_like(image: Image) -> Image:
    from PIL import Image as images

    return images.new("RGB", image.size, _GREY)


def _score_again(teacher: AlignedTeacher, groups: Sequence[Group], temperature: float) -> list[Rollout]:
    """The same scores computed once more, in another order: batches and padding differ, nothing else."""
    again = copy.copy(teacher)
    again.cache = None
    turned = [replace(g, rollouts=g.rollouts[::-1]) for g in reversed(groups)]
    return _flat(again.score(turned, temperature))[::-1]


def _flat(groups: Sequence[Group]) -> list[Rollout]:
    return [r for g in groups for r in g.rollouts]


def _differences(real: Sequence[Rollout], other: Sequence[Rollout]) -> list[Tensor]:
    """For each rollout, log p(real) - log p(other) of the tokens that are scored in both [n]."""
    found = []
    for a, b in zip(real, other, strict=True):
        (a_lp, a_scored), (b_lp, b_scored) = _scores(a), _scores(b)
        found.append((a_lp - b_lp)[a_scored & b_scored])
    return found


def _scores(rollout: Rollout) -> tuple[Tensor, Tensor]:
    assert rollout.teacher_logprobs is not None and rollout.scored is not None
    return rollout.teacher_logprobs, rollout.scored


def _compare(
    responses: str, variant: str, differences: Sequence[Tensor], owners: Sequence[str]
) -> Comparison:
    """``owners``: the prompt of each rollout."""
    by_prompt: dict[str, list[Tensor]] = {}
    for difference, owner in zip(differences, owners, strict=True):
        if len(difference):
            by_prompt.setdefault(owner, []).append(difference)
    prompts = list(by_prompt.values())
    return Comparison(
        responses=responses,
        variant=variant,
        n_prompts=len(prompts),
        n_tokens=sum(map(len, differences)),
        change=bootstrap([_mean([d.abs().mean() for d in ds]) for ds in prompts]),
        largest=max(float(d.abs().max()) for ds in prompts for d in ds),
        gain=bootstrap([_mean([d.mean() for d in ds]) for ds in prompts]),
    )


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.stack(list(values)).mean())


def bootstrap(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean over prompts, and its 95 % percentile interval when prompts are drawn anew, with replacement."""
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed).integers(0, len(array), (N_RESAMPLES, len(array)))
    low, high = np.quantile(array[draws].mean(1), [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def _tokens(real: Rollout, other: Rollout, student: VLMProcessor) -> list[Token]:
    strings = student.decode_tokens(real.response_ids)
    (real_lp, real_scored), (other_lp, other_scored) = _scores(real), _scores(other)
    both = (real_scored & other_scored).nonzero()[:, 0].tolist()
    return [Token(strings[t], float(real_lp[t]), float(other_lp[t])) for t in both]


# ---------------------------------------------------------------------- verdicts


def judge(found: Audit) -> list[Finding]:
    """The verdicts of one audit."""
    name = f"grounding {found.teacher}"
    decisive = [c for kind in ("gold", "sampled") if (c := found.find(kind, _variants(found.view)[0]))]
    if not decisive:
        return [Finding(name, "no response could be scored with and without the picture", None, "grounding")]
    findings = [_judge_use(name, found, decisive)]
    text = found.find("gold", "text") or found.find("sampled", "text")
    if text:
        findings.append(_judge_text_view(f"text view {found.teacher}", text))
    picture = found.find("gold", "image") or found.find("sampled", "image")
    if picture:
        findings.append(_judge_text_view(f"text view {found.teacher}", _turned(picture)))
    return findings


def _judge_use(name: str, found: Audit, decisive: Sequence[Comparison]) -> Finding:
    """``decisive``: gold and sampled responses against the variant without what the picture (or its text) says."""
    what = "picture" if found.view == "image" else "image_text"
    limit = found.threshold
    strongest = max(decisive, key=lambda c: c.change[1])
    instead = "a grey one in its place" if found.view == "image" else "leaving it out"
    measured = (
        f"{instead} changes {strongest.responses} answers by {_show(strongest.change)} nats per token "
        f"(threshold {limit:.3f}, noise {found.noise:.1e})"
    )
    if max(c.change[2] for c in decisive) <= limit:
        text = f"this teacher does not use the {what}: {measured}. {_advice(found)}"
        return Finding(name, text, False, "grounding")
    if strongest.change[1] <= limit:
        text = f"undecided whether this teacher uses the {what}: {measured}. Look at more: --prompts N"
        return Finding(name, text, None, "grounding")
    helped = [c for c in decisive if c.gain[1] > 0 and c.n_prompts >= MIN_PROMPTS]
    gains = "; ".join(f"{c.responses} answers gain {_show(c.gain, '+')}" for c in helped or decisive)
    if helped:
        return Finding(name, f"uses the {what}: {measured}; {gains} from it", True, "grounding")
    text = f"uses the {what}: {measured}; but nothing is clearly likelier with it: {gains}. Look at the tokens, and at more: --prompts N"
    return Finding(name, text, None, "grounding")


def _advice(found: Audit) -> str:
    if found.view == "image":
        return (
            "It would teach the student to ignore it. Use a teacher that sees, or give the rows an `image_text` and type "
            f"teachers.{found.teacher}.view=text"
        )
    return "Its descriptions may say nothing that the question needs: look at `image_text` of the rows"


def _judge_text_view(name: str, text: Comparison) -> Finding:
    """``text``: gain of the picture over the text view."""
    _, low, high = text.gain
    shown = f"{_show(text.gain, '+')} nats per token of {text.responses} answers"
    if low > NOTICEABLE:
        return Finding(name, f"image_text loses against the picture: {shown}", None, "grounding")
    if high < -NOTICEABLE:
        return Finding(
            name, f"image_text is better than the picture: {shown} from the picture", None, "grounding"
        )
    return Finding(
        name,
        f"no clear difference between image_text and the picture: {shown} from the picture",
        True,
        "grounding",
    )


def _turned(comparison: Comparison) -> Comparison:
    mean, low, high = comparison.gain
    return replace(comparison, gain=(-mean, -high, -low))


def _show(interval: Interval, sign: str = "") -> str:
    mean, low, high = interval
    return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
