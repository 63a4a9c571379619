"""Teachers score rollouts.  ``local`` runs in the process, ``remote`` asks servers; the pool routes each prompt to one
teacher by its domain."""

from uniopd_mm.teachers.base import AlignedTeacher, Teacher, TeacherError
from uniopd_mm.teachers.local import LocalTeacher
from uniopd_mm.teachers.pool import TeacherPool
from uniopd_mm.teachers.remote import RemoteTeacher, TeacherServer

__all__ = [
    "AlignedTeacher",
    "LocalTeacher",
    "RemoteTeacher",
    "Teacher",
    "TeacherError",
    "TeacherPool",
    "TeacherServer",
]
