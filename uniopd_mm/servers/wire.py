"""The languages of inference servers: a request for the log-probabilities of given tokens, and the check of the reply.

Pure: no network.  Servers are sent the collapsed prompt (one marker per image) beside the pictures and expand it
themselves; what they say they made of it must be our own expansion, id for id.  A reply in which anything differs
is refused with a reason: no value of it is used.

None of these servers applies a temperature to prompt log-probabilities: all values are at temperature 1.

C collapsed prompt ids, P expanded prompt ids, U response ids.  Log-probabilities in nats.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from uniopd_mm.errors import AlignmentError
from uniopd_mm.servers.errors import ReplyError
from uniopd_mm.servers.replies import check_ids, check_placeholders, checked_logprobs, field, token_id

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


@dataclass(frozen=True)
class ScoreRequest:
    """One response to score after one prompt."""

    collapsed_ids: list[int]
    """[C] the teacher's prompt, one marker per image: what is sent."""
    expanded_ids: list[int]
    """[P] what the teacher's own processor makes of it: what must come back."""
    response_ids: list[int]
    """[U] the teacher tokens to score."""
    images: tuple[str, ...] = ()
    """Pictures as data URIs (:func:`png_uri`), made once for all responses to a prompt."""

    def __post_init__(self) -> None:
        if not (self.collapsed_ids and self.expanded_ids and self.response_ids):
            raise AlignmentError(
                f"a request with {len(self.collapsed_ids)} collapsed and {len(self.expanded_ids)} expanded prompt "
                f"ids and {len(self.response_ids)} response ids; at least one of each is needed: the first id of a "
                f"sequence has no log-probability."
            )


class Wire(Protocol):
    """One server's way to be asked for log-probabilities."""

    name: str

    def request(self, asked: ScoreRequest, model: str) -> tuple[str, dict[str, Any]]:
        """Path and JSON body; ``model`` is the served name."""
        ...

    def parse(self, reply: Mapping[str, Any], asked: ScoreRequest) -> Tensor:
        """log p(response token | all before it) [U] float32; :class:`ReplyError` if anything is not as asked."""
        ...


class VllmGenerate:
    """vLLM, tokens in and tokens out, with images: ``vllm serve MODEL --enable-scale-out``."""

    name = "vllm"

    def __init__(self, sparse: bool = False) -> None:
        """``sparse``: ask for the response positions alone, in binary (vLLM >= 0.33, Model Runner V2)."""
        self.sparse = sparse

    def request(self, asked: ScoreRequest, model: str) -> tuple[str, dict[str, Any]]:
        """See :class:`Wire`."""
        sampling: dict[str, Any] = {"max_tokens": 1, "temperature": 1.0, "detokenize": False}
        if self.sparse:
            sampling["prompt_logprob_token_ids"] = [[token] for token in asked.response_ids]
            sampling["prompt_logprob_start"] = len(asked.expanded_ids) - 1
        else:
            sampling["prompt_logprobs"] = 0
        body: dict[str, Any] = {
            "model": model,
            "token_ids": asked.collapsed_ids + asked.response_ids,
            "sampling_params": sampling,
            "return_token_ids": True,
        }
        if asked.images:
            # The URL lies on the part itself: nested as in chat messages, the server sees an image without data.
            body["content_parts"] = [{"type": "image_url", "url": uri} for uri in asked.images]
        return "/inference/v1/generate", body

    def parse(self, reply: Mapping[str, Any], asked: ScoreRequest) -> Tensor:
        """See :class:`Wire`."""
        if self.sparse:
            values = _npy_values(field(reply, "prompt_token_id_logprobs", str), asked)
            check_ids(field(reply, "prompt_token_ids", list), asked.expanded_ids, asked.response_ids)
        else:
            values = _row_values(reply, asked)
        check_placeholders(reply, asked)
        return checked_logprobs(values)


class VllmCompletions:
    """vLLM's ``/v1/completions``: text teachers only, no flag needed."""

    name = "vllm_text"

    def request(self, asked: ScoreRequest, model: str) -> tuple[str, dict[str, Any]]:
        """See :class:`Wire`."""
        return "/v1/completions", {
            "model": model,
            "prompt": _text_only(asked, self.name),
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": 0,
            "return_token_ids": True,
            "add_special_tokens": False,
        }

    def parse(self, reply: Mapping[str, Any], asked: ScoreRequest) -> Tensor:
        """See :class:`Wire`."""
        return checked_logprobs(_row_values(_only_choice(reply), asked))


class OpenAIEcho:
    """``/v1/completions`` with ``echo``, of any server that then says token ids; text teachers only."""

    name = "openai"

    def request(self, asked: ScoreRequest, model: str) -> tuple[str, dict[str, Any]]:
        """See :class:`Wire`."""
        return "/v1/completions", {
            "model": model,
            "prompt": _text_only(asked, self.name),
            "max_tokens": 0,
            "temperature": 1.0,
            "echo": True,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def parse(self, reply: Mapping[str, Any], asked: ScoreRequest) -> Tensor:
        """See :class:`Wire`."""
        choice = _only_choice(reply)
        logprobs = field(choice, "logprobs", Mapping)
        values = field(logprobs, "token_logprobs", list)
        tokens = field(logprobs, "tokens", list)
        expected = len(asked.expanded_ids) + len(asked.response_ids)
        if not len(values) == len(tokens) == expected:
            raise ReplyError(f"{len(values)} values for {len(tokens)} tokens, expected {expected} of both")
        ids = [token_id(token) for token in tokens]
        if None in ids:
            ids = choice.get("prompt_token_ids")
            if not isinstance(ids, list):
                raise ReplyError(
                    "the server does not say token ids ('token_id:17' or prompt_token_ids), so nothing can be checked"
                )
        check_ids(ids, asked.expanded_ids, asked.response_ids)
        return checked_logprobs(values[len(asked.expanded_ids) :])


class SGLangGenerate:
    """SGLang's own ``/generate``, with images."""

    name = "sglang"

    def request(self, asked: ScoreRequest, model: str) -> tuple[str, dict[str, Any]]:
        """See :class:`Wire`; a SGLang server serves one model, which this path does not name."""
        body: dict[str, Any] = {
            "input_ids": asked.collapsed_ids + asked.response_ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0, "skip_special_tokens": False},
            "return_logprob": True,
            "logprob_start_len": len(asked.expanded_ids) - 1,
            "top_logprobs_num": 0,
            "return_text_in_logprobs": False,
            "return_prompt_token_ids": True,
            "stream": False,
        }
        if asked.images:
            body["image_data"] = list(asked.images)
        return "/generate", body

    def parse(self, reply: Mapping[str, Any], asked: ScoreRequest) -> Tensor:
        """See :class:`Wire`."""
        meta = field(reply, "meta_info", Mapping)
        finish = meta.get("finish_reason")
        if isinstance(finish, Mapping) and finish.get("type") == "abort":
            raise ReplyError(f"the server aborted: {str(finish.get('message', 'no message'))[:200]}")
        # The ids beside the values do not do: images and the last id of the vocabulary read 0 there.
        check_ids(field(reply, "prompt_token_ids", list), asked.expanded_ids, asked.response_ids)
        expected = len(asked.expanded_ids) + len(asked.response_ids)
        if meta.get("prompt_tokens") != expected:
            raise ReplyError(
                f"the server scored {meta.get('prompt_tokens')} prompt tokens, expected {expected}"
            )
        entries = field(meta, "input_token_logprobs", list)
        if len(entries) != len(asked.response_ids) + 1:
            raise ReplyError(
                f"{len(entries)} values, expected {len(asked.response_ids)} and the empty one before"
            )
        if not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
            raise ReplyError("entries that are not [log-probability, token id, text]")
        if entries[0][0] is not None:
            raise ReplyError("the first entry is not null: the values start at another position than asked")
        for t, (entry, sent) in enumerate(zip(entries[1:], asked.response_ids, strict=True)):
            if entry[1] not in (sent, 0):
                raise ReplyError(f"response ids differ at {t}: sent {sent}, got {entry[1]}")
        return checked_logprobs([entry[0] for entry in entries[1:]])


WIRES: dict[str, type[Wire]] = {
    "vllm": VllmGenerate,
    "vllm_text": VllmCompletions,
    "sglang": SGLangGenerate,
    "openai": OpenAIEcho,
}
"""The wire of each ``server.kind``."""


def png_uri(image: Image) -> str:
    """The picture as a data URI: lossless and RGB, so that the server sees the student's pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG", compress_level=1, icc_profile=None)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _text_only(asked: ScoreRequest, name: str) -> list[int]:
    """All ids of a request without images; AlignmentError for one that has some."""
    if asked.images or asked.collapsed_ids != asked.expanded_ids:
        raise AlignmentError(
            f"server kind '{name}' takes no images, this prompt has {len(asked.images)}. Set server.kind to vllm or "
            f"sglang, or give the teacher a view without images (view: text)."
        )
    return asked.expanded_ids + asked.response_ids


def _only_choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = field(reply, "choices", list)
    if len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise ReplyError(f"{len(choices)} choices, expected 1")
    return choices[0]


def _row_values(reply: Mapping[str, Any], asked: ScoreRequest) -> list[Any]:
    """vLLM's ``prompt_logprobs`` of the response [U]; every id is checked."""
    rows = field(reply, "prompt_logprobs", list)
    ids = reply.get("prompt_token_ids")
    sent = asked.expanded_ids + asked.response_ids
    if ids is not None:
        check_ids(ids, asked.expanded_ids, asked.response_ids)
    if len(rows) != len(sent):
        raise ReplyError(f"{len(rows)} positions scored, expected {len(sent)}")
    if ids is None:
        # Servers that do not know return_token_ids; asked for no alternatives, a row names its own token alone.
        check_ids([sent[0], *(_only_id(row) for row in rows[1:])], asked.expanded_ids, asked.response_ids)
    values = []
    for t, (row, token) in enumerate(zip(rows[len(asked.expanded_ids) :], asked.response_ids, strict=True)):
        entry = row.get(str(token)) if isinstance(row, Mapping) else None
        if not isinstance(entry, Mapping):
            raise ReplyError(f"no value at response position {t} for the token sent, {token}")
        values.append(entry.get("logprob"))
    return values


def _only_id(row: object) -> int | None:
    if not isinstance(row, Mapping) or len(row) != 1:
        raise ReplyError(
            "the server does not say the prompt ids (prompt_token_ids), so nothing can be checked"
        )
    key = str(next(iter(row)))
    return int(key) if key.isdecimal() else None


def _npy_values(encoded: str, asked: ScoreRequest) -> list[float]:
    """A base64 ``.npy`` array [U, 1] as a list."""
    import numpy as np

    try:
        array = np.lib.format.read_array(
            io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False
        )
    except (ValueError, EOFError, OSError) as error:
        raise ReplyError(f"'prompt_token_id_logprobs' is not a base64 .npy array: {error}") from error
    expected = (len(asked.response_ids), 1)
    if array.shape != expected or array.dtype.kind != "f":
        raise ReplyError(f"values of shape {array.shape} and type {array.dtype}, expected {expected} floats")
    return array[:, 0].tolist()
