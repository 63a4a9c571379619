"""Alignment against plain Python: tokens as stretches of bytes, and a span wherever both sides have a boundary.

Nothing of ``uniopd_mm.alignment`` is used to say what is expected: bytes are read off the vocabularies here.
s = student, t = teacher; a token is (index, first byte, end).
"""

from __future__ import annotations

import functools
import re
from itertools import accumulate, groupby, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from trained import byte_level, pair, sentencepiece
from transformers.convert_slow_tokenizer import bytes_to_unicode

from uniopd_mm.alignment import AlignedResponse, Aligner

OTHER_MARKS = ("<end_of_turn>", "<|padding|>", "<|image|>", "<think>")  # <|image|> is a mark of all
TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, other marks": lambda: byte_level(520, "world", marks=OTHER_MARKS),
    "sentencepiece": sentencepiece,
    "sentencepiece without a first space": lambda: sentencepiece(150, "world", False, OTHER_MARKS),
}
PAIRS = [(a, b) for a in TOKENIZERS for b in TOKENIZERS if a != b]

# ---------------------------------------------------------------- what is expected

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


def bytes_of(name: str, token: str) -> bytes:
    if name.startswith("byte-level"):
        return bytes(BYTE_OF[c] for c in token)
    byte = re.fullmatch("<0x(..)>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def written(name: str, ids: list[int]) -> list[bytes]:
    """The bytes of each token, none for special tokens."""
    tokenizer = TOKENIZERS[name]()
    marks = marks_of(tokenizer)
    tokens = zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    return [b"" if i in marks else bytes_of(name, token) for i, token in tokens]


class Expected(NamedTuple):
    teacher_ids: list[int]
    spans: list[tuple[list[int], list[int]]]
    """Student tokens and teacher tokens of each."""


def marks_of(tokenizer: Any) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def expected(s_name: str, t_name: str, ids: list[int], stopped: bool) -> Expected:
    student, teacher = TOKENIZERS[s_name](), TOKENIZERS[t_name]()
    strings, pieces = student.convert_ids_to_tokens(ids), written(s_name, ids)
    is_mark = [i in marks_of(student) for i in ids]
    sent: list[int] = []
    spans: list[tuple[list[int], list[int]]] = []
    for mark, run in groupby(range(len(ids)), key=is_mark.__getitem__):
        at = list(run)
        if not mark:
            if s_name == "sentencepiece" and at[0] == 0:  # it drops the space that begins every text
                pieces[0] = pieces[0].removeprefix(b" ")
            _expect_text([pieces[i] for i in at], at, t_name, sent, spans)
            continue
        for i in at:
            ends_turn = stopped and i == len(ids) - 1 and ids[i] == student.eos_token_id
            twin = teacher.eos_token_id if ends_turn else teacher.get_vocab().get(strings[i])
            if twin is not None and (ends_turn or twin in marks_of(teacher)):
                spans.append(([i], [len(sent)]))
                sent.append(twin)
    return Expected(sent[: max((t[-1] + 1 for _, t in spans), default=0)], spans)


def _expect_text(pieces: list[bytes], at: list[int], t_name: str, sent: list[int], spans: list) -> None:
    teacher = TOKENIZERS[t_name]()
    s_tokens = list(zip(at, *_starts_and_ends(pieces), strict=True))
    for start, chunk in _chunks(b"".join(pieces)):
        text = chunk if isinstance(chunk, str) else "\ufffd"
        found = teacher.encode(text, add_special_tokens=False, split_special_tokens=True)
        first = len(sent)
        sent += found
        if not isinstance(chunk, str):
            continue  # bytes that are no text: the teacher reads a replacement character
        theirs = written(t_name, found)
        if b"".join(theirs) == b" " + text.encode():
            theirs[0] = theirs[0][1:]
        assert b"".join(theirs) == text.encode()
        starts, ends = _starts_and_ends(theirs, start)
        t_tokens = list(zip(range(first, len(sent)), starts, ends, strict=True))
        t_edges = {start, *ends}
        s_edges = {0, *(end for _, _, end in s_tokens)}
        for a, b in pairwise(sorted(s_edges & t_edges)):
            spans.append(
                ([i for i, x, _ in s_tokens if a <= x < b], [i for i, x, _ in t_tokens if a <= x < b])
            )


def _starts_and_ends(pieces: list[bytes], at: int = 0) -> tuple[list[int], list[int]]:
    starts, ends = [], []
    for piece in pieces:
        starts.append(at)
        at += len(piece)
        ends.append(at)
    return starts, ends


def _chunks(data: bytes) -> list[tuple[int, str | bytes]]:
    """Stretches of text and of bytes that are no text, with the offset of each."""
    parts: list[tuple[int, str | bytes]] = []
    at = 0
    while at < len(data):
        try:
            return [*parts, (at, data[at:].decode())]
        except UnicodeDecodeError as error:
            if error.start:
                parts.append((at, data[at : at + error.start].decode()))
            bad = data[at + error.start : at + error.end]
            if parts and isinstance(parts[-1][1], bytes) and not error.start:
                parts[-1] = (parts[-1][0], parts[-1][1] + bad)
            else:
                parts.append((at + error.start, bad))
            at += error.end
    return parts


# ---------------------------------------------------------------- what is drawn

AWKWARD = [
    *(
        "👩‍👩‍👧‍👦",
        "👍🏽",
        "🇩🇪",
        "🙂",
        "𝒳",
        "é",
        "e\u0301",
        "a\u0308\u0323",
        "i̇",
        "日本語",
        "한국어",
        "שלום",
        "مرحبا",
        "ﷺ",
    ),
    *(
        "\u202eabc\u202c",
        "\u200b",
        "\ufeff",
        "\ufffd",
        "\x00",
        "\x1b[31m",
        "\x7f",
        "\x85",
        "\n",
        "\n\n",
        "\r\n",
        "\t",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\u00a0",
        "<|end|>",
        "<end_of_turn>",
        "<|image|>",
        "<unk>",
        "<0x0A>",
        "<think>",
        "</s>",
    ),
    *("the", " cafè", "naì", " fox", "answer", "42", " is", "."),
]
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4)), max_size=12).map("".join)


class Case(NamedTuple):
    names: tuple[str, str]
    ids: list[int]
    aligned: AlignedResponse
    wanted: Expected


@functools.cache
def aligner_of(names: tuple[str, str]) -> Aligner:
    return pair(*(TOKENIZERS[name]() for name in names))


def case_of(names: tuple[str, str], ids: list[int], stopped: bool) -> Case:
    aligned = aligner_of(names).align(ids, "stop" if stopped else "length")
    return Case(names, ids, aligned, expected(*names, ids, stopped))


@st.composite
def cases(draw: Any) -> Case:
    """A response of written text, whole or cut after any token, or of any tokens in any order."""
    names = draw(st.sampled_from(PAIRS))
    student = TOKENIZERS[names[0]]()
    if draw(st.integers(0, 3)):
        ids = student.encode(draw(texts), add_special_tokens=False, split_special_tokens=True)
        stopped = draw(st.booleans())
        ids = [*ids, student.eos_token_id] if stopped else ids[: draw(st.integers(0, len(ids)))]
    else:
        ids, stopped = draw(st.lists(st.integers(0, len(student) - 1), max_size=16)), draw(st.booleans())
    if "sentencepiece" in names[1]:  # it would turn the character ▁ into a space: not the same text
        assume("▁".encode() not in b"".join(written(names[0], ids)))
    return case_of(names, ids, stopped)


def values(n: int, seed: int) -> torch.Tensor:
    """[n] log-probabilities, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = -8 * torch.rand(n, generator=generator, dtype=torch.float64)
    return torch.where(torch.rand(n, generator=generator) < 0.2, 0.0, drawn)


# ---------------------------------------------------------------- claims


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_spans_are_where_both_sides_have_a_boundary(case: Case):
    spans = [(list(range(s.s0, s.s1)), list(range(s.t0, s.t1))) for s in case.aligned.spans()]
    assert spans == case.wanted.spans
    assert case.aligned.teacher_ids.tolist() == case.wanted.teacher_ids
    assert case.aligned.problem == ""


@settings(max_examples=200, deadline=None)
@given(case=cases(), seed=st.integers(0, 99), mode=st.sampled_from(["span", "exact"]))
def test_what_the_teacher_says_of_the_covered_bytes_is_what_the_students_tokens_get(
    case: Case, seed: int, mode: Any
):
    teacher_lp, student_lp = values(len(case.wanted.teacher_ids), seed), values(len(case.ids), seed + 100)
    wanted, scored = [0.0] * len(case.ids), [False] * len(case.ids)
    total = 0.0
    for mine, theirs in case.wanted.spans:
        if mode == "exact" and len(mine) > 1:
            continue
        said = sum(float(teacher_lp[u]) for u in theirs)
        own = sum(float(student_lp[t]) for t in mine)
        total += said
        for t in mine:
            wanted[t] = said * (float(student_lp[t]) / own if own < -1e-6 else 1 / len(mine))
            scored[t] = True
    for dtype, near in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        got, usable = case.aligned.to_student(teacher_lp.to(dtype), student_lp.to(dtype), mode)
        assert got.tolist() == pytest.approx(wanted, abs=near)
        assert usable.tolist() == scored
        assert float(got.double().sum()) == pytest.approx(total, abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(case=cases(), seed=st.integers(0, 99), data=st.data())
def test_every_used_teacher_token_counts_once(case: Case, seed: int, data: Any):
    n = len(case.wanted.teacher_ids)
    assume(n)
    teacher_lp, student_lp = values(n, seed), values(len(case.ids), seed + 100)
    u = data.draw(st.integers(0, n - 1))
    more = teacher_lp.clone()
    more[u] -= 1
    change = case.aligned.to_student(more, student_lp)[0] - case.aligned.to_student(teacher_lp, student_lp)[0]
    used = any(u in theirs for _, theirs in case.wanted.spans)
    assert float(change.sum()) == pytest.approx(-1 if used else 0, abs=1e-5)


@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_coverage_is_the_share_of_text_tokens_that_are_scored(case: Case):
    marks = marks_of(TOKENIZERS[case.names[0]]())
    text = {i for i, token in enumerate(case.ids) if token not in marks}
    for mode in ("span", "exact"):
        spans = [mine for mine, _ in case.wanted.spans if mode == "span" or len(mine) == 1]
        scored = text & {i for mine in spans for i in mine}
        assert case.aligned.coverage(mode) == pytest.approx(len(scored) / len(text) if text else 1)


@pytest.mark.parametrize("names", PAIRS, ids=" on ".join)
def test_awkward_text_is_scored_whole_by_every_pair_in_both_directions(names: tuple[str, str]):
    student, teacher = (TOKENIZERS[name]() for name in names)
    for text in (*AWKWARD, "".join(AWKWARD), " ".join(AWKWARD), "\n".join(reversed(AWKWARD))):
        ids = student.encode(text, add_special_tokens=False, split_special_tokens=True)
        aligned = aligner_of(names).align([*ids, student.eos_token_id], "stop")
        spaces_only = names[0] == "sentencepiece" and text == " "  # its decoder drops the one space there is
        assert aligned.coverage() == (0 if spaces_only else 1), repr(text)
        assert aligned.teacher_ids[-1] == teacher.eos_token_id
        assert not {*aligned.teacher_ids[:-1].tolist()} & {*teacher.all_special_ids}
        assert aligned.problem == ""


@pytest.mark.parametrize("names", PAIRS, ids=" on ".join)
def test_text_cut_after_any_token_is_scored_up_to_the_last_whole_character(names: tuple[str, str]):
    ids = TOKENIZERS[names[0]]().encode("the 👩‍👩‍👧‍👦 fox 日本 cafè naì", add_special_tokens=False)
    ends = list(accumulate(len(piece) for piece in written(names[0], ids)))
    n_cut_inside = 0
    for n in range(1, len(ids) + 1):
        text_end = len(b"".join(written(names[0], ids[:n])).decode(errors="ignore").encode())
        n_cut_inside += text_end < ends[n - 1]
        whole = [i for i in range(n) if ends[i] <= text_end]
        aligned = case_of(names, ids[:n], stopped=False).aligned
        scored = [i for i in range(n) if aligned.student_span[i] >= 0]
        assert scored == whole[: len(scored)]
        assert len(scored) == n or text_end < ends[n - 1]
    assert n_cut_inside > 5


def test_a_certain_students_even_shares_of_a_long_span_lose_nothing():
    names = ("byte-level", "byte-level, other marks")
    teacher_only = "日本" * 40  # a few teacher tokens; a student token for each of 240 bytes
    ids = TOKENIZERS[names[0]]().encode(teacher_only, add_special_tokens=False)
    aligned = aligner_of(names).align(ids, "length")
    teacher_lp = torch.full((len(aligned.teacher_ids),), -5000 / 3, dtype=torch.float64)
    got, scored = aligned.to_student(teacher_lp, torch.zeros(len(ids), dtype=torch.float64))
    assert scored.all() and len(aligned.spans()) < len(ids) / 3
    assert float(got.sum()) == pytest.approx(float(teacher_lp.sum()), abs=1e-5)
