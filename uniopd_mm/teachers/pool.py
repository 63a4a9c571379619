"""Several teachers, one per prompt: routed by domain, never mixed (Uni-OPD section 3)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from uniopd_mm.config import TeacherConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.rollout import Group, Prompt
from uniopd_mm.teachers.base import Teacher, TeacherError, is_unscored, reason_class

if TYPE_CHECKING:
    from uniopd_mm.distributed import World

_REASONS_SHOWN = 3


def route(teachers: Mapping[str, TeacherConfig], domain: str) -> str:
    """Name of the teacher of ``domain``; :class:`ConfigError` when nobody serves it."""
    default = None
    for name, teacher in teachers.items():
        if teacher.domains is None:
            default = name
        elif domain in teacher.domains:
            return name
    if default is None:
        served = sorted(d for t in teachers.values() for d in t.domains or ())
        raise ConfigError(
            f"no teacher serves domain '{domain}' (served: {', '.join(served)}). Add it to a teacher's `domains`, "
            f"or leave one teacher without `domains` to make it the default."
        )
    return default


def served_domains(teachers: Mapping[str, TeacherConfig]) -> set[str] | None:
    """Domains that have a teacher; None = all (one teacher is the default)."""
    if any(t.domains is None for t in teachers.values()):
        return None
    return {d for t in teachers.values() for d in t.domains or ()}


class TeacherPool:
    """All teachers of a run behind the one call ``score``."""

    def __init__(
        self,
        settings: Mapping[str, TeacherConfig],
        teachers: Mapping[str, Teacher],
        world: World | None = None,
    ) -> None:
        """``world``: the ranks that score their own groups at the same time; None = this one alone."""
        self.settings = settings
        self.teachers = teachers
        self.world = world

    def start(self, groups: list[Group]) -> None:
        """Tell the teachers of groups that were just sampled: what is behind servers begins to score at once."""
        for group in groups:
            self.teachers[route(self.settings, group.prompt.domain)].start([group])

    def in_modal_weight(self, prompt: Prompt) -> float:
        """Share of a prompt's advantage that is measured against the student reading what its teacher reads."""
        name = route(self.settings, prompt.domain)
        settings, teacher = self.settings[name], self.teachers[name]
        view = settings.view_of(prompt.domain) or ("image" if teacher.sees_images else "text")
        return settings.in_modal_weight if prompt.images and view == "text" else 0.0

    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """Groups in the order given, each scored by its domain's teacher.

        :raises TeacherError: on all ranks, when a teacher left more than ``max_unscored_share`` of them unscored.
        """
        owner = [route(self.settings, g.prompt.domain) for g in groups]
        scored: dict[int, Group] = {}
        for name, teacher in self.teachers.items():
            chosen = [i for i, o in enumerate(owner) if o == name]
            if not chosen:
                continue
            done = len(scored)
            report = (lambda n, done=done: progress(done + n)) if progress else None
            result = teacher.score([groups[i] for i in chosen], temperature, report)
            scored |= dict(zip(chosen, result, strict=True))
        result = [scored[i] for i in range(len(groups))]
        require_scored(result, self.settings, self.world)
        return result


def require_scored(
    groups: list[Group], settings: Mapping[str, TeacherConfig], world: World | None = None
) -> None:
    """:class:`TeacherError`, the same on all ranks, for a teacher that left too many of all ranks' rollouts unscored."""
    mine = Counter(
        (r.teacher, r.unscored_reason if is_unscored(r) else "")
        for g in groups
        for r in g.rollouts
        if r.teacher is not None
    )
    counts: Counter[tuple[str, str]] = Counter()
    for part in world.gather([mine]) if world is not None else [mine]:
        counts.update(part)
    for name, teacher in settings.items():
        n = sum(count for (owner, _), count in counts.items() if owner == name)
        reasons = {reason: count for (owner, reason), count in counts.items() if owner == name and reason}
        unscored = sum(reasons.values())
        if n and unscored > teacher.max_unscored_share * n:
            raise TeacherError(
                f"teacher '{name}' left {unscored} of {n} rollouts ({unscored / n:.0%}) unscored "
                f"(teachers.{name}.max_unscored_share={teacher.max_unscored_share}). The commonest reasons:\n  "
                + "\n  ".join(_commonest(reasons))
                + f"\n{_way_out(name, reasons)}"
            )


def _commonest(reasons: Mapping[str, int]) -> list[str]:
    """``12 x example`` of the reasons that are alike but for their numbers, most frequent first."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for reason, count in reasons.items():
        alike = re.sub(r"\d+", "N", reason)
        counts[alike] += count
        example.setdefault(alike, reason)
    return [f"{count} x {example[alike]}" for alike, count in counts.most_common(_REASONS_SHOWN)]


def _way_out(name: str, reasons: Mapping[str, int]) -> str:
    classes = Counter[str]()
    for reason, count in reasons.items():
        classes[reason_class(reason)] += count
    worst = classes.most_common(1)[0][0]
    if worst == "server":
        first = (
            f"Look at the servers of teachers.{name}.server.urls (are they up, is the context long enough?); where they "
            "are slow, lower server.concurrency or raise server.timeout_s"
        )
    elif worst == "reply":
        first = f"The servers do not score what they are sent: type --check, and compare them with teachers.{name}.model"
    else:
        first = f"Type --check to see how responses are aligned with the tokens of teachers.{name}.model"
    return f"{first}. The same command goes on from the last checkpoint."
