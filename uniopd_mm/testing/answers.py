"""What can go wrong with sampled answers: changes to the finished reply, the same for every shape that replies have.

A fault acts on the first answer alone, the others stay right; one that concerns the number of answers on them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

JSON = dict[str, Any]
NOBODY = 10**6
"""An id beyond any vocabulary."""


def spoil_answers(reply: Any, name: str | None, payload: Mapping[str, Any]) -> bool:
    """Change a reply in place as the fault says; whether it did."""
    answers = _answers(reply)
    if not answers:
        return False
    if name in _NUMBER:
        return _NUMBER[name](reply)
    answer = _Answer(answers[0])
    return name in _ONE and bool(answer.ids) and _ONE[name](answer, payload)


class _Answer:
    """One answer, wherever its reply keeps the parts."""

    def __init__(self, home: JSON) -> None:
        self.home = home
        self.meta: JSON | None = home.get("meta_info")
        self.ids: list[int] = home.get("output_ids" if self.meta is not None else "token_ids") or []
        logprobs = home.get("logprobs") or {}
        self.lists: list[list[Any]] = [
            found
            for found in (
                logprobs.get("content"),
                logprobs.get("token_logprobs"),
                logprobs.get("tokens"),
                (self.meta or {}).get("output_token_logprobs"),
            )
            if found
        ]

    def set_value(self, value: float | None) -> bool:
        """The last log-probability."""
        for found in self.lists:
            if isinstance(found[-1], dict):
                found[-1]["logprob"] = value
            elif isinstance(found[-1], list):
                found[-1][0] = value
            elif not isinstance(found[-1], str):
                found[-1] = value
        return bool(self.lists)

    def name(self, token: int, at: int) -> bool:
        """The id that a log-probability is said to be of."""
        for found in self.lists:
            if isinstance(found[at], dict):
                found[at]["token_id"] = token
            elif isinstance(found[at], list):
                found[at][1] = token
            elif isinstance(found[at], str):
                found[at] = f"token_id:{token}"
        return bool(self.lists)

    def set_id(self, token: int, at: int) -> bool:
        self.ids[at] = token
        return self.name(token, at)

    def cut(self, n: int = 1) -> bool:
        """Without its last tokens."""
        if len(self.ids) <= n:
            return False
        for found in (self.ids, *self.lists):
            del found[-n:]
        return True

    def repeat(self) -> bool:
        """Its last token once more."""
        for found in (self.ids, *self.lists):
            found.append(found[-1])
        return True

    @property
    def finish(self) -> str:
        said = self.home.get("finish_reason") if self.meta is None else self.meta["finish_reason"]["type"]
        return str(said)

    def end(self, finish: str) -> bool:
        if self.meta is None:
            self.home["finish_reason"] = finish
        else:
            self.meta["finish_reason"] = {"type": finish, "message": "Aborted by AbortReq."}
        return True

    def age(self) -> bool:
        if self.meta is not None:
            self.meta["weight_version"] = "of-yesterday"
            return True
        for span in self.home.get("weight_versions") or ():
            span["version"] = "of-yesterday"
        return bool(self.home.get("weight_versions"))

    def lose_logprobs(self) -> bool:
        if self.meta is not None:
            return self.meta.pop("output_token_logprobs", None) is not None
        self.home["logprobs"] = None
        return bool(self.lists)


def _forbidden(answer: _Answer, payload: Mapping[str, Any]) -> bool:
    """The first of the ids that the request wants never to be sampled."""
    params = payload.get("sampling_params") or payload
    params = params[0] if isinstance(params, list) else params
    ids = params.get("logit_bias") or {}
    return bool(ids) and answer.set_id(int(next(iter(ids))), 0)


def _lose_value(answer: _Answer, payload: Mapping[str, Any]) -> bool:
    for found in answer.lists:
        del found[-1:]
    return bool(answer.lists)


_ONE: dict[str | None, Callable[[_Answer, Mapping[str, Any]], bool]] = {
    "answer_without_logprobs": lambda answer, _: answer.lose_logprobs(),
    "answer_value_missing": _lose_value,
    "answer_nan": lambda answer, _: answer.set_value(math.nan),
    "answer_null": lambda answer, _: answer.set_value(None),
    "answer_minus_9999": lambda answer, _: answer.set_value(-9999.0),
    "answer_positive": lambda answer, _: answer.set_value(0.5),
    "answer_of_others": lambda answer, _: answer.name(answer.ids[0] + 1, 0),
    "vision_sampled": _forbidden,
    "beyond_vocabulary": lambda answer, _: answer.set_id(NOBODY, 0),
    "stop_missing": lambda answer, _: answer.finish == "stop" and answer.cut(),
    "runs_on": lambda answer, _: answer.finish == "stop" and answer.repeat(),
    "too_long": lambda answer, _: answer.finish == "length" and answer.repeat(),
    "cut_short": lambda answer, _: answer.finish == "length" and answer.cut(),
    "answer_aborted": lambda answer, _: answer.end("abort"),
    "stale_weights": lambda answer, _: answer.age(),
}


def _answers(reply: Any) -> list[JSON]:
    if isinstance(reply, list):
        return reply
    if not isinstance(reply, dict):
        return []
    return reply.get("choices") or ([reply] if "meta_info" in reply else [])


def _lose_one(reply: Any) -> bool:
    answers = _answers(reply)
    if len(answers) < 2:
        return False
    del answers[-1]
    return True


def _double_one(reply: Any) -> bool:
    """One too many; among choices, two with the same index."""
    answers = _answers(reply)
    answers.append(answers[0])
    return True


def _same_index(reply: Any) -> bool:
    answers = _answers(reply)
    if len(answers) < 2 or "index" not in answers[-1]:
        return False
    answers[-1]["index"] = 0
    return True


_NUMBER: dict[str | None, Callable[[Any], bool]] = {
    "answer_missing": _lose_one,
    "answer_too_many": _double_one,
    "same_index": _same_index,
}
