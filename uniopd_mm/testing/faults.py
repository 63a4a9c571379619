"""What can go wrong between a client and an inference server, each with a name.

A fault is chosen per call (``Faults``), and acts at one of three stages: on the connection, on the scored tokens before
they are written into a reply, or on the finished reply.  A fault that does not fit a call (two swapped answers where
there is one) leaves it as it is.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from uniopd_mm.errors import ConfigError
from uniopd_mm.testing.scoring import Refusal, Scored

VLLM = ("vllm", "vllm_text", "openai")
SCORING = (*VLLM, "sglang")
EVERY = (*SCORING, "transformers_serve", "llama_cpp")
WITH_IMAGES = ("vllm", "sglang")

Effect = Literal["retry", "error", "refuse", "either", "harmless", "silent"]
"""What a client has to do: send the request again; give up at once (4xx); refuse an answer that came with status 200;
refuse or use it rightly; use it as if nothing were wrong.  ``silent``: one reply alone does not give it away."""


@dataclass(frozen=True)
class Fault:
    effect: Effect
    kinds: tuple[str, ...]
    """The servers that it makes sense for."""
    meaning: str
    needs: Literal["", "images", "batch", "sparse", "echo", "score", "sample"] = ""
    """What a request must have for the fault to act: images, several prompts or answers, ``prompt_logprob_token_ids``,
    ``echo``, a wish for prompt log-probabilities (``score``) or for sampled answers with theirs (``sample``)."""


FAULTS: dict[str, Fault] = {
    # on the connection
    "http_500": Fault("retry", EVERY, "500 with a JSON error"),
    "http_502_html": Fault("retry", EVERY, "502 with a page of HTML, as a proxy writes it"),
    "http_503": Fault("retry", EVERY, "503, the model is still loading"),
    "http_429": Fault("retry", EVERY, "429 with Retry-After: 0"),
    "timeout": Fault("retry", EVERY, "no answer for Faults.hang_s seconds, then the connection closes"),
    "reset": Fault("retry", EVERY, "the connection is reset before an answer"),
    "empty_reply": Fault("retry", EVERY, "200 with an empty body"),
    "html_200": Fault("retry", EVERY, "200 with a page of HTML instead of JSON"),
    "truncated_json": Fault("retry", EVERY, "200 whose JSON ends in the middle; the Content-Length agrees"),
    "truncated_body": Fault("retry", EVERY, "200 whose body is shorter than its Content-Length"),
    "http_400": Fault("error", EVERY, "400, a request that will never be accepted"),
    "unauthorized": Fault("error", EVERY, "401, a missing or wrong key"),
    "scale_out_off": Fault("error", ("vllm",), "403, the server runs without --enable-scale-out"),
    "v2_runner_off": Fault(
        "error", ("vllm",), "400, prompt_logprob_token_ids without the V2 model runner", "sparse"
    ),
    # on the scored tokens
    "wrong_expansion": Fault(
        "refuse", WITH_IMAGES, "the first image has one token more than the client says", "images"
    ),
    "double_expansion": Fault("refuse", WITH_IMAGES, "each image is expanded a second time", "images"),
    "images_ignored": Fault(
        "refuse", WITH_IMAGES, "images are dropped and their markers read as text", "images"
    ),
    "one_id_changed": Fault("refuse", SCORING, "re-tokenised: same length, the last id differs"),
    "retokenised_shorter": Fault("refuse", SCORING, "re-tokenised: the last two ids became one"),
    "nan": Fault("refuse", SCORING, "the last value is NaN", "score"),
    "minus_9999": Fault(
        "refuse", SCORING, "the last value is -inf: vLLM writes -9999.0, SGLang null", "score"
    ),
    "null_value": Fault("refuse", SCORING, "the last value is null", "score"),
    "positive": Fault("refuse", SCORING, "the last value is a log-probability above 0", "score"),
    "values_shifted": Fault(
        "silent", SCORING, "values moved on by one position, ids in their places", "score"
    ),
    # on the reply
    "null_scores": Fault("refuse", SCORING, "200 without scores: the list is null", "score"),
    "shifted": Fault("refuse", SCORING, "entries moved by one: no null first, a null last", "score"),
    "missing_value": Fault("refuse", SCORING, "one entry too few", "score"),
    "extra_value": Fault("refuse", SCORING, "one entry too many", "score"),
    "actual_missing": Fault(
        "refuse", ("vllm", "vllm_text"), "the last entry holds another id than the one in the prompt", "score"
    ),
    "extra_entries": Fault(
        "harmless", ("vllm", "vllm_text"), "a likelier id stands before the actual one in each entry", "score"
    ),
    "wrong_spans": Fault("refuse", ("vllm",), "mm_placeholders begin one position late", "images"),
    "no_prompt_ids": Fault("either", SCORING, "prompt ids are not reported though asked for"),
    "plain_tokens": Fault("either", ("openai",), "echoed tokens are text, not token_id:N", "echo"),
    "npy_garbage": Fault("refuse", ("vllm",), "prompt_token_id_logprobs is not a .npy file", "sparse"),
    "out_of_order": Fault(
        "harmless", VLLM, "answers of a batch come back in another order, rightly indexed", "batch"
    ),
    "batch_short": Fault("refuse", VLLM, "the last answer of a batch is missing", "batch"),
    "phantom_output": Fault(
        "harmless", ("sglang",), "an output log-probability without an output token", "score"
    ),
    "abort": Fault("refuse", ("sglang",), "200 with finish_reason abort and no scores"),
    # on sampled answers, on the first of a reply where it is about one
    "answer_missing": Fault("refuse", SCORING, "one answer fewer than asked for", "sample"),
    "answer_too_many": Fault("refuse", SCORING, "one answer more than asked for", "sample"),
    "same_index": Fault("refuse", VLLM, "two answers have the same index", "sample"),
    "answer_without_logprobs": Fault("refuse", SCORING, "an answer without log-probabilities", "sample"),
    "answer_value_missing": Fault("refuse", SCORING, "one log-probability fewer than tokens", "sample"),
    "answer_nan": Fault("refuse", SCORING, "the last log-probability is NaN", "sample"),
    "answer_null": Fault("refuse", SCORING, "the last log-probability is null", "sample"),
    "answer_minus_9999": Fault("refuse", SCORING, "the last log-probability is -9999.0", "sample"),
    "answer_positive": Fault("refuse", SCORING, "the last log-probability is above 0", "sample"),
    "answer_of_others": Fault("refuse", SCORING, "a log-probability is said to be of another id", "sample"),
    "vision_sampled": Fault("refuse", SCORING, "the first token is one that logit_bias excludes", "sample"),
    "beyond_vocabulary": Fault("refuse", SCORING, "the first token is in no vocabulary", "sample"),
    "stop_missing": Fault("refuse", SCORING, "an answer that stopped ends before its stop token", "sample"),
    "runs_on": Fault("refuse", SCORING, "an answer that stopped has its stop token twice", "sample"),
    "too_long": Fault("refuse", SCORING, "an answer is longer than the limit", "sample"),
    "cut_short": Fault(
        "refuse", SCORING, "an answer is cut before the limit, the context was full", "sample"
    ),
    "answer_aborted": Fault("refuse", SCORING, "an answer ends with the finish reason abort", "sample"),
    "stale_weights": Fault("refuse", WITH_IMAGES, "an answer of other weights than the newest", "sample"),
}


@dataclass(frozen=True)
class Faults:
    """Which POST requests go wrong, and how; the same for the same seed and order of calls."""

    kinds: Sequence[str] = ()
    """Names out of ``FAULTS``, drawn with equal chance."""
    share: float = 1.0
    """Share of calls that get one of ``kinds``."""
    seed: int = 0
    schedule: Mapping[int, str] = field(default_factory=dict)
    """Call number (from 0) -> name; goes before ``kinds``."""
    hang_s: float = 60.0
    """How long ``timeout`` keeps a client waiting."""

    def __post_init__(self) -> None:
        for name in (*self.kinds, *self.schedule.values()):
            if name not in FAULTS:
                near = difflib.get_close_matches(name, FAULTS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(FAULTS)}."
                raise ConfigError(f"Unknown fault {name!r}.{hint}")
        if not 0 <= self.share <= 1:
            raise ConfigError(f"Faults.share is {self.share}; it is a share of calls, from 0 to 1.")

    def pick(self, call: int) -> str | None:
        """The fault of this call (numbered from 0), None = answered as it should be."""
        if call in self.schedule:
            return self.schedule[call]
        draw = random.Random(f"{self.seed}:{call}")
        return draw.choice(list(self.kinds)) if self.kinds and draw.random() < self.share else None


def names(effect: Effect, kind: str, *having: str) -> list[str]:
    """All faults of a server kind that ask the same of a client, for ``pytest.mark.parametrize``.

    ``having``: what the requests have, as in ``Fault.needs``; requests that do not ``sample`` are taken to ``score``, an
    ``openai`` one with ``echo``.  With ``prompt_logprob_token_ids`` a prompt of another length is refused by the server already: 400.
    """
    met = {"", "echo", *having} if "sample" in having else {"", "echo", "score", *having}
    return [
        n
        for n, fault in FAULTS.items()
        if (fault.effect, kind in fault.kinds) == (effect, True) and fault.needs in met
    ]


# ---- stage 1: instead of an answer -------------------------------------------------------------------------------


def refusal(name: str, path: str, payload: Mapping[str, Any]) -> Refusal | None:
    """The error status that this fault answers with, None = it acts elsewhere."""
    if name == "scale_out_off":
        return scale_out_disabled() if path.startswith("/inference/") else None
    if name == "v2_runner_off":
        asked = payload.get("sampling_params") or {}
        return v2_runner_disabled() if "prompt_logprob_token_ids" in asked else None
    status, text = {
        "http_500": (500, "Internal server error"),
        "http_503": (503, "The model is still loading."),
        "http_429": (429, "Too many requests"),
        "http_400": (400, "This request cannot be served."),
        "unauthorized": (401, "Unauthorized"),
    }.get(name, (0, ""))
    return Refusal.openai(status, text) if status else None


def scale_out_disabled() -> Refusal:
    text = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
    return Refusal.openai(403, text)


def v2_runner_disabled() -> Refusal:
    name = "prompt_logprob_token_ids"
    text = f"{name} requires the V2 model runner (VLLM_USE_V2_MODEL_RUNNER=1). (parameter={name})"
    return Refusal.openai(400, text, name)


# ---- stage 2: on the scored tokens -------------------------------------------------------------------------------


def disturb(scored: Scored, name: str | None) -> Scored:
    """The scored tokens as the fault leaves them; the same object where it does not act here."""
    if name in _VALUES:
        return replace(scored, logprobs=[*scored.logprobs[:-1], _VALUES[name]])
    return _TOKENS[name](scored) if name in _TOKENS else scored


_VALUES: dict[str | None, float | None] = {
    "nan": math.nan,
    "minus_9999": -math.inf,
    "null_value": None,
    "positive": 0.5,
}


def _wrong_expansion(scored: Scored) -> Scored:
    if not scored.spans:
        return scored
    (offset, length), *later = scored.spans
    at = offset + length // 2
    keep = [*range(at + 1), *range(at, len(scored.ids))]
    return scored.take(keep, [(offset, length + 1), *((begin + 1, size) for begin, size in later)])


def _double_expansion(scored: Scored) -> Scored:
    keep, spans, done = [], [], 0
    for offset, length in scored.spans:
        span = range(offset, offset + length)
        keep += [*range(done, offset), *span, *span]
        spans.append((len(keep) - 2 * length, 2 * length))
        done = offset + length
    return scored.take([*keep, *range(done, len(scored.ids))], spans) if spans else scored


def _images_ignored(scored: Scored) -> Scored:
    """One position is left per image, as the collapsed marker would be."""
    starts = {offset for offset, _ in scored.spans}
    keep = [at for at in range(len(scored.ids)) if at in starts or not scored.is_image(at)]
    if not scored.spans:
        return scored
    marker = [scored.ids[at] if scored.marker is None or at not in starts else scored.marker for at in keep]
    return replace(scored.take(keep, []), ids=marker)


def retokenise(scored: Scored) -> Scored:
    """The last id another one, as after decoding and encoding again."""
    last = scored.ids[-1]
    return replace(scored, ids=[*scored.ids[:-1], last - 1 if last > 0 else last + 1])


def _retokenised_shorter(scored: Scored) -> Scored:
    if len(scored.ids) < 3:
        return scored
    keep = [*range(len(scored.ids) - 2), len(scored.ids) - 1]
    return scored.take(keep, scored.spans)


def _values_shifted(scored: Scored) -> Scored:
    if len(scored.ids) < 3:
        return scored
    return replace(scored, logprobs=[None, *scored.logprobs[2:], scored.logprobs[1]])


_TOKENS: dict[str | None, Callable[[Scored], Scored]] = {
    "wrong_expansion": _wrong_expansion,
    "double_expansion": _double_expansion,
    "images_ignored": _images_ignored,
    "one_id_changed": retokenise,
    "retokenised_shorter": _retokenised_shorter,
    "values_shifted": _values_shifted,
}


# ---- stage 3: on the reply ---------------------------------------------------------------------------------------


def spoil(reply: Any, name: str | None) -> bool:
    """Change a reply in place as the fault says; whether it did."""
    if isinstance(reply, list):
        spoiled = [spoil(one, name) for one in reply]
        return any(spoiled)
    if name in _LISTS:
        return _spoil_lists(reply, _LISTS[name])
    return name in _REPLIES and _REPLIES[name](reply)


def _homes(reply: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Where this reply keeps its lists of scores, whatever the server."""
    homes = [(reply, "prompt_logprobs"), (reply, "prompt_token_id_logprobs")]
    for choice in reply.get("choices", ()):
        homes += [(choice, "prompt_logprobs"), (choice.get("logprobs") or {}, "token_logprobs")]
    homes.append((reply.get("meta_info") or {}, "input_token_logprobs"))
    return [(home, key) for home, key in homes if isinstance(home.get(key), list) and home[key]]


def _spoil_lists(reply: dict[str, Any], change: Callable[[list], list]) -> bool:
    homes = _homes(reply)
    for home, key in homes:
        home[key] = change(home[key])
    return bool(homes)


def _shifted(entries: list) -> list:
    """The matrix of the sparse route has rows of -inf where the other lists have null."""
    is_matrix = isinstance(entries[0], list) and isinstance(entries[0][0], float)
    return [*entries[1:], [-math.inf] * len(entries[0]) if is_matrix else None]


_LISTS: dict[str | None, Callable[[list], list]] = {
    "missing_value": lambda entries: entries[:-1],
    "extra_value": lambda entries: [*entries, entries[-1]],
    "shifted": _shifted,
}


def _null_scores(reply: dict[str, Any]) -> bool:
    homes = _homes(reply)
    for home, key in homes:
        home[key] = None
    for choice in reply.get("choices", ()):
        choice["logprobs"] = None
    return bool(homes)


def _entries(reply: dict[str, Any]) -> list[list[Any]]:
    return [home[key] for home, key in _homes(reply) if key == "prompt_logprobs"]


def _actual_missing(reply: dict[str, Any]) -> bool:
    for entries in _entries(reply):
        (token, entry), *_ = entries[-1].items()
        entries[-1] = {str(int(token) + 1): {**entry, "rank": 1}}
    return bool(_entries(reply))


def _extra_entries(reply: dict[str, Any]) -> bool:
    for entries in _entries(reply):
        for at, entry in enumerate(entries):
            if entry is not None:
                other = str(1 + max(int(token) for token in entry))
                entries[at] = {other: {"logprob": -0.01, "rank": 1, "decoded_token": None}, **entry}
    return bool(_entries(reply))


def _wrong_spans(reply: dict[str, Any]) -> bool:
    spans = (reply.get("mm_placeholders") or {}).get("image", [])
    for span in spans:
        span["offset"] += 1
    return bool(spans)


def _no_prompt_ids(reply: dict[str, Any]) -> bool:
    homes = [one for one in (reply, *reply.get("choices", ())) if one.get("prompt_token_ids") is not None]
    for home in homes:
        home["prompt_token_ids"] = None
    return bool(homes)


def _plain_tokens(reply: dict[str, Any]) -> bool:
    found = [
        choice["logprobs"] for choice in reply.get("choices", ()) if "tokens" in (choice["logprobs"] or {})
    ]
    for logprobs in found:
        logprobs["tokens"] = [token.removeprefix("token_id:") + "?" for token in logprobs["tokens"]]
    return bool(found)


def _npy_garbage(reply: dict[str, Any]) -> bool:
    asked = reply.get("prompt_token_id_logprobs") is not None
    if asked:
        reply["prompt_token_id_logprobs"] = "bm90IGEgLm5weSBmaWxl"
    return asked


def _out_of_order(reply: dict[str, Any]) -> bool:
    reply.get("choices", []).reverse()
    return len(reply.get("choices", ())) > 1


def _batch_short(reply: dict[str, Any]) -> bool:
    return bool(reply.get("choices")) and reply["choices"].pop() is not None


def _phantom_output(reply: dict[str, Any]) -> bool:
    reply["meta_info"] |= {"output_token_logprobs": [[-0.1, 7, None]], "output_token_logprobs_length": 1}
    return True


def _abort(reply: dict[str, Any]) -> bool:
    reason = {"type": "abort", "message": "Aborted by AbortReq.", "status_code": None, "err_type": None}
    reply["meta_info"] |= {"finish_reason": reason, "input_token_logprobs": []}
    return True


_REPLIES: dict[str | None, Callable[[dict[str, Any]], bool]] = {
    "null_scores": _null_scores,
    "actual_missing": _actual_missing,
    "extra_entries": _extra_entries,
    "wrong_spans": _wrong_spans,
    "no_prompt_ids": _no_prompt_ids,
    "plain_tokens": _plain_tokens,
    "npy_garbage": _npy_garbage,
    "out_of_order": _out_of_order,
    "batch_short": _batch_short,
    "phantom_output": _phantom_output,
    "abort": _abort,
}
