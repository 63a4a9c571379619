"""The languages of inference servers: a request for n answers to a prompt, and the check of the reply.

Pure: no network.  As in :mod:`uniopd_mm.servers.wire`, the collapsed prompt goes out beside the pictures and what the
server made of it must be our own expansion.  An answer is taken with the ids that the server says it sampled; text is
never tokenised again.  What is wrong with one answer costs that answer, what is wrong with the prompt costs them all.

Every setting is sent, also those that are off: what is left out, servers take from the model's generation_config.json.
Vision tokens are kept away by a bias of -100, and an answer that holds one in spite of that is refused.

At which temperature the log-probabilities are (``logprob_temperature``; none of them knows of top-k, top-p and min-p):
vllm and vllm_text at 1, whatever was sampled at, before any bias (vLLM's default ``--logprobs-mode raw_logprobs``);
sglang as sampled (with SGLANG_RETURN_ORIGINAL_LOGPROB left unset), over what the bias leaves; openai at 1 where 1 or 0
was asked for, else not known: vLLM and SGLang differ there.

C collapsed prompt ids, P expanded prompt ids, T sampled ids.  Log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from uniopd_mm.config import SamplingConfig
from uniopd_mm.errors import AlignmentError
from uniopd_mm.servers.errors import ReplyError
from uniopd_mm.servers.replies import check_ids, check_placeholders, checked_logprobs, field, token_id

if TYPE_CHECKING:
    from torch import Tensor

_NEVER = -100.0  # the strongest bias that servers take


@dataclass(frozen=True)
class SampleRequest:
    """n answers to one prompt."""

    collapsed_ids: list[int]
    """[C] one marker per image: what is sent."""
    expanded_ids: list[int]
    """[P] what the student's own processor makes of it: what must come back."""
    images: tuple[str, ...]
    """Pictures as data URIs."""
    n: int
    sampling: SamplingConfig
    stop_ids: tuple[int, ...]
    """Every id that ends an answer; ``sampling.stop_token_ids`` are among them."""
    suppressed_ids: tuple[int, ...]
    """Ids that must not be sampled."""
    seed: int
    """0 to 2**31 - 1, of the whole group."""
    vocab_size: int | None = None
    """Ids from here on are nobody's; None = not known."""

    @property
    def n_asked(self) -> int:
        """Greedy answers are all the same: one is asked for, which is all that vLLM allows."""
        return 1 if self.sampling.temperature == 0 else self.n


@dataclass(frozen=True)
class Sampled:
    """One answer."""

    ids: list[int]
    """[T] the stop token included when ``finish`` is stop."""
    logprobs: Tensor
    """[T] float32, at the sampler's ``logprob_temperature``."""
    finish: Literal["stop", "length"]
    weight_version: str | None = None
    """Name of the weights that sampled it, where the server says it."""


class Sampler(Protocol):
    """One server's way to be asked for answers."""

    name: str
    takes_images: bool

    def request(self, asked: SampleRequest, model: str) -> tuple[str, dict[str, Any]]:
        """Path and JSON body; ``model`` is the served name."""
        ...

    def parse(self, reply: Mapping[str, Any], asked: SampleRequest) -> list[Sampled | str]:
        """The n answers, or why one cannot be used; :class:`ReplyError` if nothing of the reply can be."""
        ...

    def logprob_temperature(self, sampling: SamplingConfig) -> float | None:
        """Temperature that the log-probabilities are at; None = not known."""
        ...


class VllmGenerateSampler:
    """vLLM, tokens in and tokens out, with images: ``vllm serve MODEL --enable-scale-out``."""

    name = "vllm"
    takes_images = True

    def request(self, asked: SampleRequest, model: str) -> tuple[str, dict[str, Any]]:
        """See :class:`Sampler`."""
        body: dict[str, Any] = {
            "model": model,
            "token_ids": asked.collapsed_ids,
            "sampling_params": {
                **_vllm_sampling(asked),
                "logprobs": 0,  # of the sampled token alone
                "detokenize": False,
            },
            "return_token_ids": True,
        }
        if asked.images:
            body["content_parts"] = [{"type": "image_url", "url": uri} for uri in asked.images]
        return "/inference/v1/generate", body

    def parse(self, reply: Mapping[str, Any], asked: SampleRequest) -> list[Sampled | str]:
        """See :class:`Sampler`."""
        choices = _choices(reply, asked)
        check_ids(field(reply, "prompt_token_ids", list), asked.expanded_ids)
        check_placeholders(reply, asked)
        return _each(choices, asked, self._answer)

    def logprob_temperature(self, sampling: SamplingConfig) -> float | None:
        """See :class:`Sampler`."""
        return 1.0

    def _answer(self, choice: Mapping[str, Any], asked: SampleRequest) -> Sampled:
        content = field(field(choice, "logprobs", Mapping), "content", list)
        return _checked(
            field(choice, "token_ids", list),
            [field(entry, "token_id", int) for entry in content],
            [entry.get("logprob") for entry in content],
            choice.get("finish_reason"),
            _vllm_weights(choice.get("weight_versions")),
            asked,
        )


class CompletionsSampler:
    """``/v1/completions`` of servers that say token ids; text alone, and no word of the weights."""

    takes_images = False

    def __init__(self, name: str) -> None:
        """``vllm_text``, or ``openai`` for other servers."""
        self.name = name

    def request(self, asked: SampleRequest, model: str) -> tuple[str, dict[str, Any]]:
        """See :class:`Sampler`."""
        if asked.images or asked.collapsed_ids != asked.expanded_ids:
            raise AlignmentError(f"server kind '{self.name}' takes no images")
        body = {"model": model, "prompt": asked.expanded_ids, **_vllm_sampling(asked)}
        if self.name == "openai":
            del body["ignore_eos"]  # elsewhere it would switch off every stop token
        return "/v1/completions", {
            **body,
            "logprobs": 1,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        }

    def parse(self, reply: Mapping[str, Any], asked: SampleRequest) -> list[Sampled | str]:
        """See :class:`Sampler`."""
        choices = _choices(reply, asked)
        said = reply.get("prompt_token_ids")
        for ids in (said, *(choice.get("prompt_token_ids") for choice in choices)):
            if ids is not None:
                check_ids(ids, asked.expanded_ids)
        usage = reply.get("usage")
        n_prompt = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        if n_prompt is not None and n_prompt != len(asked.expanded_ids):
            raise ReplyError(f"the server read {n_prompt} prompt tokens, expected {len(asked.expanded_ids)}")
        return _each(choices, asked, self._answer)

    def logprob_temperature(self, sampling: SamplingConfig) -> float | None:
        """See :class:`Sampler`."""
        return 1.0 if self.name == "vllm_text" or sampling.temperature in (0, 1) else None

    def _answer(self, choice: Mapping[str, Any], asked: SampleRequest) -> Sampled:
        logprobs = field(choice, "logprobs", Mapping)
        named = [token_id(token) for token in field(logprobs, "tokens", list)]
        ids = choice.get("token_ids")
        if ids is None:
            ids = named
        if not isinstance(ids, list) or None in ids:
            raise ReplyError("the server does not say token ids (token_ids, or tokens as 'token_id:17')")
        return _checked(
            ids,
            ids if None in named else named,
            field(logprobs, "token_logprobs", list),
            choice.get("finish_reason"),
            None,
            asked,
        )


class SGLangSampler:
    """SGLang's own ``/generate``, with images."""

    name = "sglang"
    takes_images = True

    def __init__(self, seeded: bool = False) -> None:
        """``seeded``: the server runs with --enable-deterministic-inference; only then it looks at seeds, and then
        the n answers to one request would all be the same, so that each is asked for by itself."""
        self.seeded = seeded

    def request(self, asked: SampleRequest, model: str) -> tuple[str, dict[str, Any]]:
        """See :class:`Sampler`; always a batch: one row of a request for several answers cannot have two images."""
        s = asked.sampling
        sampling: dict[str, Any] = {
            "max_new_tokens": s.max_new_tokens,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or -1,
            "min_p": s.min_p,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(asked.stop_ids),
            "skip_special_tokens": False,
            "no_stop_trim": True,
            "n": asked.n_asked,
        }
        if asked.suppressed_ids:
            sampling["logit_bias"] = _bias(asked)
        rows = [sampling]
        if self.seeded:
            rows = [{**sampling, "n": 1, "sampling_seed": asked.seed + i} for i in range(asked.n_asked)]
        body: dict[str, Any] = {
            "input_ids": [asked.collapsed_ids] * len(rows),
            "sampling_params": rows,
            "return_logprob": True,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "return_text_in_logprobs": False,
            "return_prompt_token_ids": True,
            "stream": False,
        }
        if asked.images:
            body["image_data"] = [list(asked.images)] * len(rows)
        return "/generate", body

    def parse(self, reply: Mapping[str, Any], asked: SampleRequest) -> list[Sampled | str]:
        """See :class:`Sampler`; a list of replies comes as ``{"items": [...]}``."""
        items = field(reply, "items", list)
        if len(items) != asked.n_asked:
            raise ReplyError(f"{len(items)} answers, expected {asked.n_asked}")
        return _each(items, asked, self._answer)

    def logprob_temperature(self, sampling: SamplingConfig) -> float | None:
        """See :class:`Sampler`."""
        return sampling.temperature or 1.0

    def _answer(self, item: Mapping[str, Any], asked: SampleRequest) -> Sampled:
        meta = field(item, "meta_info", Mapping)
        finish = field(meta, "finish_reason", Mapping)
        if finish.get("type") == "abort":
            raise ReplyError(f"the server aborted: {str(finish.get('message', 'no message'))[:200]}")
        if isinstance(finish.get("matched"), str):
            raise ReplyError(f"the server stopped at a text, {finish['matched'][:50]!r}")
        check_ids(field(item, "prompt_token_ids", list), asked.expanded_ids)
        if meta.get("prompt_tokens") != len(asked.expanded_ids):
            raise ReplyError(
                f"the server read {meta.get('prompt_tokens')} prompt tokens, expected {len(asked.expanded_ids)}"
            )
        entries = field(meta, "output_token_logprobs", list)
        if not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
            raise ReplyError("entries that are not [log-probability, token id, text]")
        version = meta.get("weight_version")
        return _checked(
            field(item, "output_ids", list),
            [entry[1] for entry in entries],
            [entry[0] for entry in entries],
            finish.get("type"),
            None if version is None else str(version),
            asked,
        )


SAMPLERS: dict[str, Sampler] = {
    "vllm": VllmGenerateSampler(),
    "vllm_text": CompletionsSampler("vllm_text"),
    "sglang": SGLangSampler(),
    "openai": CompletionsSampler("openai"),
}
"""The sampler of each ``server.kind``."""


def _vllm_sampling(asked: SampleRequest) -> dict[str, Any]:
    """``ignore_eos``: our stop ids are all there are, and the server has its own idea of the end otherwise."""
    s = asked.sampling
    params: dict[str, Any] = {
        "n": asked.n_asked,
        "max_tokens": s.max_new_tokens,
        "temperature": s.temperature,
        "top_p": s.top_p,
        "top_k": s.top_k or -1,
        "min_p": s.min_p,
        "repetition_penalty": 1.0,
        "seed": asked.seed,
        "stop_token_ids": list(asked.stop_ids),
        "ignore_eos": True,
    }
    if asked.suppressed_ids:
        params["logit_bias"] = _bias(asked)
    return params


def _bias(asked: SampleRequest) -> dict[str, float]:
    return {str(token): _NEVER for token in asked.suppressed_ids}


def _choices(reply: Mapping[str, Any], asked: SampleRequest) -> list[Mapping[str, Any]]:
    """The choices in the order of their indices; ReplyError unless there is one for each."""
    choices = field(reply, "choices", list)
    indices = [field(choice, "index", int) for choice in choices]
    if sorted(indices) != list(range(asked.n_asked)):
        raise ReplyError(f"answers with the indices {indices[:9]}, expected 0 to {asked.n_asked - 1}")
    return sorted(choices, key=lambda choice: choice["index"])


def _each(parts: list[Any], asked: SampleRequest, read: Any) -> list[Sampled | str]:
    """Each part read, or the reason why it cannot be used; n of them, also for greedy ones."""
    answers: list[Sampled | str] = []
    for part in parts:
        try:
            answers.append(read(part, asked))
        except ReplyError as error:
            answers.append(error.reason)
    return answers * (asked.n // asked.n_asked)


def _checked(
    ids: list[Any],
    named: list[Any],
    values: list[Any],
    finish: object,
    version: str | None,
    asked: SampleRequest,
) -> Sampled:
    """The answer; ReplyError at the first thing that cannot be.  ``named``: the ids that the values are said to be of."""
    limit = asked.sampling.max_new_tokens
    if finish not in ("stop", "length"):
        raise ReplyError(f"the server ended the answer with '{finish}'")
    if not ids or not all(type(token) is int and token >= 0 for token in ids):
        raise ReplyError(f"{len(ids)} token ids, expected some and all of them whole numbers")
    if not len(ids) == len(named) == len(values):
        raise ReplyError(f"{len(values)} log-probabilities for {len(ids)} tokens")
    if named != ids:
        at = next(t for t, pair in enumerate(zip(ids, named, strict=True)) if pair[0] != pair[1])
        raise ReplyError(f"value {at} is said to be of token {named[at]}, sampled was {ids[at]}")
    if len(ids) > limit:
        raise ReplyError(f"{len(ids)} tokens, max_new_tokens is {limit}")
    forbidden = next((token for token in ids if token in asked.suppressed_ids), None)
    if forbidden is not None:
        raise ReplyError(f"token {forbidden} was sampled, which was suppressed (a vision token, or padding)")
    if asked.vocab_size is not None and max(ids) >= asked.vocab_size:
        raise ReplyError(f"token {max(ids)} was sampled; the vocabulary has {asked.vocab_size}")
    early = next((t for t, token in enumerate(ids[:-1]) if token in asked.stop_ids), None)
    if early is not None:
        raise ReplyError(f"the answer goes on after the stop token at {early}")
    stopped = ids[-1] in asked.stop_ids
    if finish == "stop" and not stopped:
        raise ReplyError(
            f"the answer stopped with token {ids[-1]}, which is no stop token here; if it is one, type "
            f"rollout.stop_token_ids=[{ids[-1]}]"
        )
    if not stopped and len(ids) < limit:
        raise ReplyError(
            f"the answer was cut at {len(ids)} tokens, max_new_tokens is {limit}: start the server with room for more "
            "(vLLM: --max-model-len, SGLang: --context-length)"
        )
    # SGLang calls it length when the stop token is the last one that fits.
    return Sampled(ids, checked_logprobs(values).clamp_(max=0), "stop" if stopped else "length", version)


def _vllm_weights(spans: object) -> str | None:
    """The version that all tokens were sampled by; several are named one after the other."""
    if not isinstance(spans, list) or not spans:
        return None
    return ", ".join(dict.fromkeys(str(field(span, "version", str)) for span in spans))
