"""Views: what a teacher sees of a prompt (``image``, ``text`` or ``drop``).

A blind teacher that scores answers about a picture teaches the student to ignore the picture, so dropping
images is never a silent fallback.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from uniopd_mm.errors import AlignmentError
from uniopd_mm.processors.chat import replace_images

if TYPE_CHECKING:
    from uniopd_mm.config import View
    from uniopd_mm.rollout import Message, Prompt


def teacher_messages(
    prompt: Prompt, view: View | None, sees_images: bool, allow_blind: bool = False, teacher: str = "NAME"
) -> tuple[tuple[Message, ...], bool]:
    """Messages for the teacher's own template, and whether the prompt's images go with them.

    ``image``: messages as they are.  ``text``: each image part becomes its ``image_text``, on its own lines.
    ``drop``: image parts are left out.  None = ``image`` if the teacher sees images, else ``text``.
    ``teacher`` is its name in the settings, for messages.
    :raises AlignmentError: the teacher cannot have this view of this prompt.
    """
    row = prompt.source or prompt.id
    chosen = view or ("image" if sees_images else "text")
    _check_parts(prompt, row, sees_images)
    if chosen == "image":
        if not sees_images:
            raise AlignmentError(
                f"{row}: teacher '{teacher}' is text-only but its view is `image`. "
                f"Type teachers.{teacher}.view=text (each image becomes the row's `image_text`) or name "
                "a multimodal model."
            )
        return prompt.messages, bool(prompt.images)
    if prompt.images:
        _check_blind(prompt, row, chosen, sees_images, allow_blind, teacher)
    texts = prompt.image_text or () if chosen == "text" else [""] * len(prompt.images)
    return tuple(replace_images(prompt.messages, texts)) if prompt.images else prompt.messages, False


def _check_parts(prompt: Prompt, row: str, sees_images: bool) -> None:
    kinds = [part.get("type") for message in prompt.messages for part in _parts(message)]
    if kinds.count("image") != len(prompt.images):
        raise AlignmentError(
            f"{row}: the messages have {kinds.count('image')} image parts but the row has "
            f"{len(prompt.images)} images. "
            'Give each image one {"type": "image"} part.'
        )
    other = sorted({str(kind) for kind in kinds} - {"image", "text"})
    if other and not sees_images:
        raise AlignmentError(
            f"{row}: a text-only teacher cannot be shown content of type {', '.join(other)}. "
            "Give text and image parts only, or route this domain to a multimodal teacher."
        )


def _check_blind(
    prompt: Prompt, row: str, view: str, sees_images: bool, allow_blind: bool, teacher: str
) -> None:
    n = len(prompt.images)
    other = "image" if sees_images else "text"
    if view == "drop":
        if not allow_blind:
            raise AlignmentError(
                f"{row}: view `drop` would have teacher '{teacher}' score answers on {n} image(s) it never "
                "sees, which can wreck the student. If the images add nothing type "
                f"teachers.{teacher}.allow_blind=true; else type teachers.{teacher}.view={other}."
            )
        return
    texts = prompt.image_text or ()
    if len(texts) == n and all(text.strip() for text in texts):
        return
    found = f"{sum(bool(text.strip()) for text in texts)} (of {len(texts)})" if texts else "no"
    way_out = (
        f"type teachers.{teacher}.view=image"
        if sees_images
        else f"use a multimodal teacher, or, if the images add nothing, type teachers.{teacher}.view=drop "
        f"teachers.{teacher}.allow_blind=true"
    )
    raise AlignmentError(
        f"{row}: teacher '{teacher}' is to read the {n} image(s) as text, but the row has {found} usable "
        f"`image_text`. Add `image_text` to the row, one description per image, or {way_out}."
    )


def _parts(message: Message) -> Sequence[dict[str, Any]]:
    content = message.get("content")
    return () if content is None or isinstance(content, str) else content
