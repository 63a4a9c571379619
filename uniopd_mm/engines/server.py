"""The engine behind HTTP servers: one request per group, answers checked, weights loaded from a folder.

Log-probabilities in nats.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, as_completed
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from uniopd_mm.config import RolloutServerConfig, SamplingConfig, TrainConfig
from uniopd_mm.engines.base import EngineError, answered
from uniopd_mm.errors import ConfigError
from uniopd_mm.rollout import Group, Rollout
from uniopd_mm.servers import (
    SAMPLERS,
    ReplyError,
    Sampled,
    Sampler,
    SampleRequest,
    ServerError,
    ServerPool,
    SGLangSampler,
    png_uri,
)
from uniopd_mm.servers.serving import find_context, find_model, make_pool, setting

if TYPE_CHECKING:
    from uniopd_mm.processors import VLMProcessor

WHERE = "rollout.server"
_REASON_LENGTH = 400  # characters
_MOST_BIASED = 1024  # entries of logit_bias that vLLM has room for
_PROBE_SIZE = (64, 48)  # width and height, pixels

Order = tuple[str, dict[str, Any], bool]
"""Path, body, and whether a server without that path may do without it."""


class ServerEngine:
    """Samples from servers that hold a copy of the student.  A context manager.

    The same seed gives the same answers from vLLM as far as its kernels do not depend on the batch; SGLang looks at
    seeds only with --enable-deterministic-inference.
    """

    matches_trainer = False

    def __init__(
        self,
        settings: RolloutServerConfig,
        processor: VLMProcessor,
        vocab_size: int | None = None,
        where: str = WHERE,
    ) -> None:
        """``vocab_size``: rows of the model's head; ids that it does not have need not be suppressed, and those beyond
        the tokenizer are.  None = as many as the tokenizer has ids.  ``where`` the settings are, for messages."""
        self.settings, self.processor, self.where = settings, processor, where
        self.sampler: Sampler = SAMPLERS[settings.kind]
        self.suppressed = _suppressed(processor, vocab_size)
        self.model = settings.model or ""
        self.weight_version = 0
        """Optimizer steps taken by the weights that the servers hold."""
        self.synced = False
        """The servers were given their weights by this run: answers of other weights are refused."""
        self.failed: list[str] = []
        """Why rollouts of the last :meth:`sample` are missing, one reason for each."""
        self.context: int | None = None
        """Tokens that prompt and answer may have together; None = the servers do not say."""
        self.report = "not connected"
        """What :meth:`connect` found, for people."""
        self.pool = make_pool(self.where, settings)

    def __enter__(self) -> ServerEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    def connect(self) -> None:
        """Ask every URL which model it serves and for a short answer, with and without a picture; ConfigError."""
        kind, urls = self.settings.kind, self.settings.urls
        # SGLang's /model_info would name the folder that it loaded weights from last.
        self.model = find_model(self.where, self.settings, self.pool, "/v1/models")
        self.context = find_context(self.pool)
        if kind == "sglang":
            replies = [reply for _, reply in self.pool.get("/server_info")]
            seeded = any(isinstance(r, dict) and r.get("enable_deterministic_inference") for r in replies)
            self.sampler = SGLangSampler(seeded)
        for url in urls:
            with closing(make_pool(self.where, self.settings, [url])) as pool:
                self._probe(pool, url)
        self.report = f"{kind} at {', '.join(urls)} serves {self.model}"

    def logprob_temperature(self, sampling: SamplingConfig) -> float | None:
        """Temperature that ``sampler_logprobs`` are at; None = not known, so that they must not be used."""
        return self.sampler.logprob_temperature(sampling)

    def sample(
        self,
        groups: list[Group],
        n: int,
        sampling: SamplingConfig,
        seed: tuple[int, ...],
        progress: Callable[[int], None] | None = None,
        finished: Callable[[list[Group]], None] | None = None,
    ) -> list[Group]:
        """See :class:`uniopd_mm.engines.base.Engine`; EngineError past ``max_failed_share``."""
        self.failed = []
        self._require_sight(groups)
        pending: dict[Future[dict[str, Any]], tuple[int, SampleRequest]] = {}
        done: dict[int, Group] = {}
        try:
            for i, group in enumerate(groups):
                asked = self._request(group, n, sampling, seed)
                pending[self.pool.submit(*self.sampler.request(asked, self.model))] = i, asked
            for number, future in enumerate(as_completed(pending), 1):
                i, asked = pending[future]
                rollouts = self._rollouts(asked, future)
                self._stop_past_share(len(groups) * n)
                if rollouts:
                    group = replace(groups[i], weight_version=self.weight_version)
                    done[i] = answered(self.processor, group, rollouts)
                    if finished:
                        finished([done[i]])
                if progress:
                    progress(number * n)
        finally:
            for future in pending:
                future.cancel()
        return [done[i] for i in range(len(groups)) if i in done]

    def load_weights(self, folder: str, version: int) -> None:
        """Let every server load the weights in ``folder``, and forget what it computed with the old ones.

        No request may be under way.  EngineError names the servers that did not; their state is then not known.
        """
        orders = _sglang_orders if self.settings.kind == "sglang" else _vllm_orders
        urls, problems = list(self.settings.urls), []
        for path, body, optional in orders(folder, str(version)):
            failed = []
            for url, reply in self.pool.post_each(path, body, urls):
                problem = _problem(reply, path)
                if problem and not (optional and "HTTP 404" in problem):
                    failed.append(url)
                    problems.append(f"  {url}: {problem}")
            urls = [url for url in urls if url not in failed]
        if problems:
            head = f"servers did not load the weights of step {version} from {folder}:"
            raise EngineError("\n".join([head, *problems, *self._sync_advice(problems)]))
        self.weight_version, self.synced = version, True

    def _sync_advice(self, problems: list[str]) -> list[str]:
        advice = [
            f"Can the servers read that folder? Type {setting(self.where, 'sync_folder', 'FOLDER')}, on a disk that trainer and servers "
            "share. A server that failed to load weights has to be started again."
        ]
        if any("/collective_rpc: HTTP 404" in problem for problem in problems):
            advice.insert(
                0, "Start vLLM with VLLM_SERVER_DEV_MODE=1 in its environment: only then it loads weights."
            )
        return advice

    def _require_sight(self, groups: Iterable[Group]) -> None:
        if self.sampler.takes_images:
            return
        for group in groups:
            if group.encoded.image_spans:
                raise ConfigError(
                    f"{group.prompt.source or group.prompt.id} has images, but server kind {self.settings.kind} takes "
                    f"text alone. Type {setting(self.where, 'kind', 'vllm')} (or sglang)."
                )

    def _request(self, group: Group, n: int, sampling: SamplingConfig, seed: Sequence[int]) -> SampleRequest:
        encoded = group.encoded
        return self._ask_for(
            encoded.collapsed_ids.tolist(),
            encoded.input_ids.tolist(),
            tuple(png_uri(self.processor.resize(image)) for image in group.images)
            if encoded.image_spans
            else (),
            n,
            sampling,
            group_seed(seed, group.slot),
        )

    def _ask_for(
        self,
        collapsed: list[int],
        expanded: list[int],
        images: tuple[str, ...],
        n: int,
        sampling: SamplingConfig,
        seed: int,
    ) -> SampleRequest:
        stops = tuple(dict.fromkeys([*self.processor.stop_token_ids(), *sampling.stop_token_ids]))
        size = len(self.processor.tokenizer)
        return SampleRequest(collapsed, expanded, images, n, sampling, stops, self.suppressed, seed, size)

    def _rollouts(self, asked: SampleRequest, future: Future[dict[str, Any]]) -> tuple[Rollout, ...]:
        """The answers of one request; what is wrong with the others goes to ``failed``."""
        try:
            answers = self.sampler.parse(future.result(), asked)
        except ReplyError as error:
            answers = [f"reply: {error.reason}"] * asked.n
        except ServerError as error:
            answers = [f"server: {' '.join(str(error).split())}"] * asked.n
        rollouts = []
        for index, answer in enumerate(answers):
            answer = self._fresh(answer)
            if isinstance(answer, str):
                self.failed.append(answer[:_REASON_LENGTH])
            else:
                rollouts.append(self._rollout(answer, index))
        return tuple(rollouts)

    def _fresh(self, answer: Sampled | str) -> Sampled | str:
        """The answer, or the reason why it is not used when it is of other weights."""
        if isinstance(answer, str) or not self.synced or answer.weight_version is None:
            return answer
        if answer.weight_version == str(self.weight_version):
            return answer
        return (
            f"sampled by the weights '{answer.weight_version}', not by those of step {self.weight_version}: was the server "
            "started again?"
        )

    def _rollout(self, answer: Sampled, index: int) -> Rollout:
        import torch

        return Rollout(
            response_ids=torch.tensor(answer.ids, dtype=torch.long),
            sampler_logprobs=answer.logprobs,
            finish=answer.finish,
            index=index,
        )

    def _stop_past_share(self, total: int) -> None:
        limit = self.settings.max_failed_share
        if len(self.failed) <= limit * total:
            return
        allowed = setting(self.where, "max_failed_share", f"{limit:g}")
        lines = [
            f"{len(self.failed)} of {total} rollouts could not be sampled, more than {allowed} lets pass:"
        ]
        lines += [f"  {count} x {reason}" for reason, count in Counter(self.failed).most_common(3)]
        if any("prompt ids differ" in reason or "prompt tokens" in reason for reason in self.failed):
            lines.append(
                "Do the servers serve the student, with the same processor settings (student.min_pixels, max_pixels)?"
            )
        lines.append(
            f"Look at the servers, or raise {setting(self.where, 'max_failed_share')} to go on with fewer; the same "
            "command continues."
        )
        raise EngineError("\n".join(lines))

    def _probe(self, pool: ServerPool, url: str) -> None:
        """A short answer to a text, and to a picture where pictures are taken; ConfigError if it cannot be used."""
        from PIL import Image

        contents: list[tuple[Any, tuple[Any, ...]]] = [("Hello", ())]
        if self.sampler.takes_images and self.processor.sees_images:
            content = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
            contents.append((content, (Image.linear_gradient("L").convert("RGB").resize(_PROBE_SIZE),)))
        for content, images in contents:
            encoded = self.processor.encode([{"role": "user", "content": content}], list(images))
            asked = self._ask_for(
                encoded.collapsed_ids.tolist(),
                encoded.input_ids.tolist(),
                tuple(map(png_uri, images)),
                2,
                SamplingConfig(max_new_tokens=1),
                0,
            )
            try:
                answers = self.sampler.parse(pool.post(*self.sampler.request(asked, self.model)), asked)
                problem = next((answer for answer in answers if isinstance(answer, str)), None)
            except ServerError as error:
                problem = str(error)
            if problem:
                about = "a picture" if images else "a text"
                raise ConfigError(
                    f"{self.where}: {url} ({self.settings.kind}) gave no usable answer to {about}: {problem.rstrip('.')}.\n"
                    "  It must serve the student, with its processor settings (min_pixels, max_pixels), and say token ids "
                    "and log-probabilities: vLLM (vllm serve MODEL --enable-scale-out for kind vllm) or SGLang."
                )


def group_seed(seed: Sequence[int], slot: int) -> int:
    """31 bits that belong to one group of one step, whatever rank asks for it."""
    return int(np.random.SeedSequence([*seed, slot]).generate_state(1)[0] >> 1)


def _suppressed(processor: VLMProcessor, vocab_size: int | None) -> tuple[int, ...]:
    """Vision tokens, and the padding of the head as far as servers have room for it."""
    n_ids = len(processor.tokenizer)
    n_rows = n_ids if vocab_size is None else vocab_size
    vision = [token for token in processor.suppress_token_ids() if token < n_rows]
    # Padding that does not fit is as good as never sampled; an answer with one in spite of that is refused.
    padding = range(n_ids, min(n_rows, n_ids + _MOST_BIASED - len(vision)))
    return (*vision, *padding)


def _vllm_orders(folder: str, version: str) -> list[Order]:
    """The encoder cache first: between loading and that, a known picture would bring the server down."""
    return [
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}, False),
        ("/reset_encoder_cache", {}, False),
        ("/reset_mm_cache", {}, False),
        ("/reset_prefix_cache?reset_running_requests=true", {}, False),
        ("/update_weight_version", {"new_version": version}, True),
    ]


def _sglang_orders(folder: str, version: str) -> list[Order]:
    body = {"model_path": folder, "flush_cache": True, "weight_version": version}
    return [("/update_weights_from_disk", body, False)]


def _problem(reply: dict[str, Any] | ServerError, path: str) -> str | None:
    """Why an order was not carried out; None = it was."""
    if isinstance(reply, ServerError):
        return " ".join(str(reply).split())
    if reply.get("success", True) is not True:
        return (
            f"{path} says success: {reply.get('success')} ({str(reply.get('message', 'no message'))[:200]})"
        )
    return None


def require_comparable(engine: ServerEngine, config: TrainConfig) -> None:
    """ConfigError unless the servers' log-probabilities are at the temperature that the trainer scores at: the
    correction of the train-inference mismatch compares the two."""
    found, wanted = engine.logprob_temperature(config.rollout), config.loss.score_temperature
    if config.loss.mismatch_cap is None or found == wanted:
        return
    said = "at an unknown temperature" if found is None else f"at temperature {found:g}"
    raise ConfigError(
        f"{engine.where}: kind {engine.settings.kind} gives log-probabilities {said}, the trainer scores at {wanted:g}, and what "
        f"differs would be taken for a mismatch of kernels. Type rollout.temperature={wanted:g}, or loss.mismatch_cap=null "
        "to train without the correction."
    )
