"""Several teachers, one per prompt: routed by domain, never mixed (Uni-OPD section 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from uniopd_mm.config import TeacherConfig
from uniopd_mm.errors import ConfigError
from uniopd_mm.rollout import Group
from uniopd_mm.teachers.base import Teacher


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

    def __init__(self, settings: Mapping[str, TeacherConfig], teachers: Mapping[str, Teacher]) -> None:
        self.settings = settings
        self.teachers = teachers

    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """Groups in the order given, each scored by its domain's teacher."""
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
        return [scored[i] for i in range(len(groups))]
