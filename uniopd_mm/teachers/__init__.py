"""Teachers score rollouts.  ``local`` runs in the process; the pool routes each prompt to one teacher by its domain."""

from uniopd_mm.teachers.base import Teacher
from uniopd_mm.teachers.local import LocalTeacher
from uniopd_mm.teachers.pool import TeacherPool

__all__ = ["LocalTeacher", "Teacher", "TeacherPool"]
