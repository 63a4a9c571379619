"""The program in a response.  Everything here is linear in the text and leaves its characters as they are."""

from __future__ import annotations

from uniopd_mm.verifiers.extract import outside_reasoning

_PYTHON = ("python", "python3", "py")


def extract_code(text: str, profile: str = "strict") -> str | None:
    """The program that a response gives; None = none.

    strict: the last closed Python code block outside the reasoning, else the last closed block.  evalplus: the longest
    closed block, the whole text if there is none.  livecodebench: between the last two lines with a fence.  prime: from
    the last Python fence to the next fence, the whole text without any.
    """
    if profile == "livecodebench":
        lines = text.split("\n")
        fences = [i for i, line in enumerate(lines) if "```" in line]
        code = "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) >= 2 else ""
    elif profile == "prime":
        code = text.rpartition("```python")[2].partition("```")[0]
    elif profile == "evalplus":
        code = max((code for _, code in code_blocks(text)), key=len, default=text)
    else:
        code = _last_python(code_blocks(outside_reasoning(text)))
    return code if code.strip() else None


def _last_python(blocks: list[tuple[str, str]]) -> str:
    python = [code for language, code in blocks if language in _PYTHON]
    return (python or [code for _, code in blocks] or [""])[-1]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each closed block between fence lines."""
    blocks, opened, language = [], None, ""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        mark = line.strip()
        if not mark.startswith("```"):
            continue
        if opened is None:
            opened, language = i, mark.strip("`").strip().lower()
        elif not mark.strip("`"):
            blocks.append((language, "\n".join(lines[opened + 1 : i])))
            opened = None
        elif mark.strip("`").strip().lower() in _PYTHON:  # the block before it was never closed
            opened, language = i, mark.strip("`").strip().lower()
    return blocks
