"""What a teacher sees of a prompt."""

import pytest

from uniopd_mm.alignment import teacher_messages
from uniopd_mm.errors import AlignmentError
from uniopd_mm.rollout import Prompt


def image_prompt(image_text=("a red square",), n_images=1):
    content = [{"type": "image"} for _ in range(n_images)] + [{"type": "text", "text": "What colour?"}]
    return Prompt(
        id="shapes/3",
        messages=({"role": "system", "content": "Be short."}, {"role": "user", "content": content}),
        images=tuple(f"{i}.png" for i in range(n_images)),
        image_text=image_text,
        source="shapes.jsonl:4",
    )


def shown(messages):
    """Role and text of every message as a template joins it; image parts stay visible."""
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns.append((message["role"], "".join(part.get("text", f"<{part['type']}>") for part in parts)))
    return turns


TEXT_PROMPT = Prompt(id="t", messages=({"role": "user", "content": [{"type": "text", "text": "2 + 2?"}]},))


def test_a_seeing_teacher_gets_the_messages_and_the_images_by_default():
    prompt = image_prompt()
    assert teacher_messages(prompt, None, sees_images=True) == (prompt.messages, True)


def test_a_text_only_teacher_reads_the_description_by_default():
    messages, use_images = teacher_messages(image_prompt(), None, sees_images=False)
    assert shown(messages) == [("system", "Be short."), ("user", "a red square\nWhat colour?")]
    assert not use_images


def test_a_seeing_teacher_with_the_text_view_reads_too():
    messages, use_images = teacher_messages(image_prompt(), "text", sees_images=True)
    assert shown(messages) == [("system", "Be short."), ("user", "a red square\nWhat colour?")]
    assert not use_images


def test_each_image_gets_its_own_description_in_order_over_all_turns():
    turns = (
        {
            "role": "user",
            "content": [{"type": "text", "text": "Compare"}, {"type": "image"}, {"type": "image"}],
        },
        {"role": "assistant", "content": "With what?"},
        {"role": "user", "content": [{"type": "image"}]},
    )
    prompt = Prompt(id="p", messages=turns, images=("a", "b", "c"), image_text=("ONE", "TWO", "THREE"))
    messages, _ = teacher_messages(prompt, "text", sees_images=False)
    assert [text for _, text in shown(messages)] == ["Compare\nONE\nTWO", "With what?", "THREE"]


def test_drop_removes_the_image_parts_only_when_blindness_is_allowed():
    with pytest.raises(AlignmentError, match=r"shapes.jsonl:4.*teachers.NAME.allow_blind=true"):
        teacher_messages(image_prompt(), "drop", sees_images=False)
    with pytest.raises(AlignmentError, match=r"teachers.NAME.view=image"):
        teacher_messages(image_prompt(), "drop", sees_images=True)
    messages, use_images = teacher_messages(image_prompt(), "drop", sees_images=False, allow_blind=True)
    assert shown(messages)[1] == ("user", "What colour?")
    assert not use_images


@pytest.mark.parametrize("allow_blind", [False, True])
@pytest.mark.parametrize("view", [None, "text"])
@pytest.mark.parametrize("image_text", [None, (), ("  ",), ("one", "too many")])
def test_an_image_without_a_description_is_never_scored_blind(image_text, view, allow_blind):
    with pytest.raises(AlignmentError, match=r"shapes.jsonl:4.*Add `image_text`.*teachers.math.view=drop"):
        teacher_messages(image_prompt(image_text), view, False, allow_blind, teacher="math")


def test_the_image_view_of_a_text_only_teacher_is_an_error():
    for prompt in (image_prompt(), TEXT_PROMPT):
        with pytest.raises(AlignmentError, match=r"teachers.NAME.view=text"):
            teacher_messages(prompt, "image", sees_images=False)


def test_a_prompt_without_images_is_the_same_in_every_view():
    assert teacher_messages(TEXT_PROMPT, None, sees_images=True) == (TEXT_PROMPT.messages, False)
    for view in (None, "text", "drop"):
        messages, use_images = teacher_messages(TEXT_PROMPT, view, False)
        assert shown(messages) == [("user", "2 + 2?")] and not use_images


def test_image_parts_must_match_the_images():
    prompt = Prompt(id="x/1", messages=image_prompt(n_images=2).messages, images=("a",), image_text=("one",))
    with pytest.raises(
        AlignmentError, match=r"x/1: the messages have 2 image parts but the row has 1 images"
    ):
        teacher_messages(prompt, None, sees_images=True)


def test_a_text_only_teacher_is_not_shown_other_media():
    prompt = Prompt(id="v/1", messages=({"role": "user", "content": [{"type": "video"}]},))
    with pytest.raises(AlignmentError, match=r"v/1.*video"):
        teacher_messages(prompt, None, sees_images=False)


def test_the_prompt_is_left_as_it_was():
    prompt, same = image_prompt(), image_prompt()
    teacher_messages(prompt, "text", sees_images=True)
    teacher_messages(prompt, "drop", sees_images=False, allow_blind=True)
    assert prompt == same
