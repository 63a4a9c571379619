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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from uniopd_mm.errors import AlignmentError
from uniopd_mm.servers.errors import ReplyError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

_VLLM_MINUS_INFINITY = -9999.0
_ROUNDING = 1e-3  # nats; a log-probability this far above 0 is still the rounding of a sum of exponentials


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
            values = _npy_values(_field(reply, "prompt_token_id_logprobs", str), asked)
            _check_ids(_field(reply, "prompt_token_ids", list), asked)
        else:
            values = _row_values(reply, asked)
        _check_placeholders(reply, asked)
        return _checked(values)


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
        return _checked(_row_values(_only_choice(reply), asked))


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
        logprobs = _field(choice, "logprobs", Mapping)
        values = _field(logprobs, "token_logprobs", list)
        tokens = _field(logprobs, "tokens", list)
        expected = len(asked.expanded_ids) + len(asked.response_ids)
        if not len(values) == len(tokens) == expected:
            raise ReplyError(f"{len(values)} values for {len(tokens)} tokens, expected {expected} of both")
        ids = [_token_id(token) for token in tokens]
        if None in ids:
            ids = choice.get("prompt_token_ids")
            if not isinstance(ids, list):
                raise ReplyError(
                    "the server does not say token ids ('token_id:17' or prompt_token_ids), so nothing can be checked"
                )
        _check_ids(ids, asked)
        return _checked(values[len(asked.expanded_ids) :])


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
        meta = _field(reply, "meta_info", Mapping)
        finish = meta.get("finish_reason")
        if isinstance(finish, Mapping) and finish.get("type") == "abort":
            raise ReplyError(f"the server aborted: {str(finish.get('message', 'no message'))[:200]}")
        # The ids beside the values do not do: images and the last id of the vocabulary read 0 there.
        _check_ids(_field(reply, "prompt_token_ids", list), asked)
        expected = len(asked.expanded_ids) + len(asked.response_ids)
        if meta.get("prompt_tokens") != expected:
            raise ReplyError(
                f"the server scored {meta.get('prompt_tokens')} prompt tokens, expected {expected}"
            )
        entries = _field(meta, "input_token_logprobs", list)
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
        return _checked([entry[0] for entry in entries[1:]])


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
    image.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _text_only(asked: ScoreRequest, name: str) -> list[int]:
    """All ids of a request without images; AlignmentError for one that has some."""
    if asked.images or asked.collapsed_ids != asked.expanded_ids:
        raise AlignmentError(
            f"server kind '{name}' takes no images, this prompt has {len(asked.images)}. Set server.kind to vllm or "
            f"sglang, or give the teacher a view without images (view: text)."
        )
    return asked.expanded_ids + asked.response_ids


def _field(reply: object, name: str, kind: type) -> Any:
    """``reply[name]`` if it is a ``kind``; else ReplyError with the server's own error message if there is one."""
    if not isinstance(reply, Mapping):
        raise ReplyError(f"expected a JSON object with '{name}', got {type(reply).__name__}")
    value = reply.get(name)
    if isinstance(value, kind):
        return value
    error = reply.get("error")
    if error:
        message = error.get("message", error) if isinstance(error, Mapping) else error
        raise ReplyError(f"the server says: {str(message)[:200]}")
    raise ReplyError(f"'{name}' is {'null or missing' if value is None else 'a ' + type(value).__name__}")


def _only_choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = _field(reply, "choices", list)
    if len(choices) != 1 or not isinstance(choices[0], Mapping):
        raise ReplyError(f"{len(choices)} choices, expected 1")
    return choices[0]


def _row_values(reply: Mapping[str, Any], asked: ScoreRequest) -> list[Any]:
    """vLLM's ``prompt_logprobs`` of the response [U]; every id is checked."""
    rows = _field(reply, "prompt_logprobs", list)
    ids = reply.get("prompt_token_ids")
    sent = asked.expanded_ids + asked.response_ids
    if ids is not None:
        _check_ids(ids, asked)
    if len(rows) != len(sent):
        raise ReplyError(f"{len(rows)} positions scored, expected {len(sent)}")
    if ids is None:
        # Servers that do not know return_token_ids; asked for no alternatives, a row names its own token alone.
        _check_ids([sent[0], *(_only_id(row) for row in rows[1:])], asked)
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


def _token_id(token: object) -> int | None:
    """17 of ``token_id:17``; None of a token that is given as text."""
    prefix, _, digits = token.partition(":") if isinstance(token, str) else ("", "", "")
    return int(digits) if prefix == "token_id" and digits.isdecimal() else None


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


def _check_ids(ids: object, asked: ScoreRequest) -> None:
    """ReplyError unless ``ids`` are exactly the expanded prompt and the response."""
    sent = asked.expanded_ids + asked.response_ids
    if ids == sent:
        return
    if not isinstance(ids, Sequence):
        raise ReplyError(f"prompt_token_ids is a {type(ids).__name__}")
    n_prompt = len(asked.expanded_ids)
    at = next((i for i, pair in enumerate(zip(sent, ids, strict=False)) if pair[0] != pair[1]), None)
    if at is None:
        raise ReplyError(f"the server has {len(ids)} ids, expected {len(sent)}")
    lengths = "" if len(ids) == len(sent) else f"; the server has {len(ids)} ids, expected {len(sent)}"
    part, t = ("prompt", at) if at < n_prompt else ("response", at - n_prompt)
    raise ReplyError(f"{part} ids differ at {t}: sent {sent[at]}, got {ids[at]}{lengths}")


def _check_placeholders(reply: Mapping[str, Any], asked: ScoreRequest) -> None:
    """ReplyError unless each image stands where its marker stood (vLLM's ``mm_placeholders``)."""
    said = reply.get("mm_placeholders")
    if said is None:
        # Without them, only an expansion that changed the prompt's length proves that the images were seen.
        unproved = reply.get("prompt_token_ids") is not None or len(asked.expanded_ids) == len(
            asked.collapsed_ids
        )
        if asked.images and unproved:
            raise ReplyError(f"'mm_placeholders' is null for {len(asked.images)} images: were they ignored?")
        return
    spans = _image_spans(said)
    if len(spans) != len(asked.images):
        raise ReplyError(f"the server placed {len(spans)} images, expected {len(asked.images)}")
    text, end = [], 0
    for start, length in spans:
        if start < end or length < 1:
            raise ReplyError(f"image at {start} with {length} tokens, after one that ends at {end}")
        text += asked.expanded_ids[end:start]
        end = start + length
    if end > len(asked.expanded_ids):
        raise ReplyError(f"an image ends at {end}, the prompt at {len(asked.expanded_ids)}")
    text += asked.expanded_ids[end:]
    n_text = len(asked.collapsed_ids) - len(asked.images)
    stray = next((i for i in _placeholder_ids(asked, spans) if i in text), None)
    if stray is not None:
        raise ReplyError(f"placeholders {stray} outside the images at (offset, length) {spans[:4]}")
    # Some tokenizers merge the newlines on either side of an image with those of the text.
    if not n_text - 2 * len(spans) <= len(text) <= n_text:
        raise ReplyError(
            f"images at (offset, length) {spans[:4]} leave {len(text)} text tokens, expected {n_text}"
        )


def _placeholder_ids(asked: ScoreRequest, spans: list[tuple[int, int]]) -> set[int]:
    """The id that fills most of each span: its features; the rest are row ends and the like."""
    fillings = (Counter(asked.expanded_ids[start : start + length]) for start, length in spans)
    return {filling.most_common(1)[0][0] for filling in fillings}


def _image_spans(said: object) -> list[tuple[int, int]]:
    """(offset, length) of all placeholders; ReplyError for anything but images."""
    if not isinstance(said, Mapping) or not set(said) <= {"image"}:
        raise ReplyError("'mm_placeholders' tells of something else than images")
    spans = said.get("image", [])
    if not isinstance(spans, list):
        raise ReplyError(f"'mm_placeholders' holds a {type(spans).__name__}, expected a list")
    pairs = [(_field(span, "offset", int), _field(span, "length", int)) for span in spans]
    return sorted(pairs)


def _checked(values: list[Any]) -> Tensor:
    """The values [U] float32; ReplyError at the first that is no log-probability."""
    import torch

    for t, value in enumerate(values):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ReplyError(f"value {t} is {'null' if value is None else 'a ' + type(value).__name__}")
        if not _VLLM_MINUS_INFINITY < value <= _ROUNDING:  # false of nan as well
            raise ReplyError(f"value {t} is {value}, not a finite log-probability")
    return torch.tensor(values, dtype=torch.float32)
