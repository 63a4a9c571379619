"""A teacher whose weights are behind HTTP servers; template, view and alignment are here.

P prompt tokens, U teacher tokens of a response; log-probabilities in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from uniopd_mm.config import ServerConfig, TeacherConfig
from uniopd_mm.errors import AlignmentError, ConfigError
from uniopd_mm.rollout import Group, Message, Prompt
from uniopd_mm.servers import (
    WIRES,
    ReplyError,
    ScoreRequest,
    ServerError,
    ServerPool,
    VllmGenerate,
    Wire,
    png_uri,
)
from uniopd_mm.servers.serving import find_model, make_pool
from uniopd_mm.teachers.base import AlignedTeacher, Work
from uniopd_mm.teachers.cache import ScoreCache
from uniopd_mm.teachers.probe import Ask, fingerprint, probe_images, probe_text, probe_tokens

if TYPE_CHECKING:
    from uniopd_mm.processors import VLMProcessor

WITH_IMAGES = ("vllm", "sglang")
"""Kinds of servers that take images."""
_REASON_LENGTH = 300  # characters


@dataclass(frozen=True)
class Pending:
    """A request under way."""

    asked: ScoreRequest
    reply: Future[dict[str, Any]]


class TeacherServer:
    """The servers of one teacher.  A context manager."""

    def __init__(self, name: str, settings: TeacherConfig, processor: VLMProcessor) -> None:
        """``name`` and ``settings`` of the teacher, with ``server``; ``processor`` of the model that is served."""
        if settings.server is None:
            raise ConfigError(
                f"teachers.{name} has no `server`; type teachers.{name}.server.urls=[http://HOST:8000]"
            )
        self.name, self.settings, self.processor = name, settings, processor
        self.server: ServerConfig = settings.server
        self.wire: Wire = WIRES[self.server.kind]()
        self.takes_images = self.server.kind in WITH_IMAGES
        self.model = self.server.model or ""
        self.report = "not probed"
        """What :meth:`connect` found, for people."""
        self._where = f"teachers.{name}.server"
        self.pool = make_pool(self._where, self.server)

    def __enter__(self) -> TeacherServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    def connect(self) -> None:
        """Ask every URL which model it serves and probe that it scores what it is asked; :class:`ConfigError`."""
        kind, urls = self.server.kind, self.server.urls
        self.model = find_model(self._where, self.server, self.pool)
        found, report, sparse = "", "", VllmGenerate(sparse=True)
        if kind == "vllm" and all(self._understands(sparse, url) for url in urls):
            self.wire = sparse
            found = "scores the response alone, "
        for url in urls:
            with closing(make_pool(self._where, self.server, [url])) as pool:
                try:
                    report = self._probe(pool)
                except ConfigError as error:
                    raise ConfigError(
                        f"{self._where}: {url} ({kind}): {str(error).rstrip('.')}.\n  {self._advice()}"
                    ) from error
        self.report = f"{kind} at {', '.join(urls)} serves {self.model}; {found}{report}"

    def _understands(self, wire: Wire, url: str) -> bool:
        """Whether a server answers a request in this form."""
        head = self.processor.encode([{"role": "user", "content": "Continue:"}]).input_ids.tolist()
        asked = ScoreRequest(head, head, probe_tokens(self.processor))
        try:
            with closing(make_pool(self._where, self.server, [url])) as pool:
                wire.parse(pool.post(*wire.request(asked, self.model)), asked)
        except ServerError:
            return False
        return True

    def submit(self, asked: ScoreRequest, pool: ServerPool | None = None) -> Pending:
        """Send a request, in a thread of the pool."""
        return Pending(asked, (pool or self.pool).submit(*self.wire.request(asked, self.model)))

    def answer(self, pending: Pending) -> Tensor | str:
        """Wait for [U] float32 log-probabilities, or the reason why there are none."""
        try:
            return self.wire.parse(pending.reply.result(), pending.asked)
        except ReplyError as error:
            return f"reply: {error.reason}"[:_REASON_LENGTH]
        except ServerError as error:
            return f"server: {' '.join(str(error).split())}"[:_REASON_LENGTH]

    def fingerprint(self) -> list[float]:
        """Log-probabilities of a known text, to tell whether the weights are still the same; :class:`ConfigError`."""
        return fingerprint(self._ask(self.pool), self.processor)

    def _probe(self, pool: ServerPool) -> str:
        ask = self._ask(pool)
        found = [probe_text(ask, self.processor, self.settings.dtype)]
        if self.takes_images and self.processor.sees_images and self.settings.view not in ("text", "drop"):
            found.append(probe_images(ask, self.processor))
        return ", ".join(found)

    def _ask(self, pool: ServerPool) -> Ask:
        def ask(requests: list[ScoreRequest]) -> list[Tensor | str]:
            pending = [self.submit(asked, pool) for asked in requests]
            return [self.answer(one) for one in pending]

        return ask

    def _advice(self) -> str:
        text = (
            f"It must serve the model whose tokenizer is teachers.{self.name}.model={self.settings.model} and return "
            "prompt log-probabilities: vLLM (vllm serve MODEL --enable-scale-out for server.kind=vllm) or SGLang; "
            "`transformers serve` and llama-cpp-python cannot."
        )
        if self.processor.sees_images and self.takes_images:
            text += (
                " Where only images differ, give the server the processor settings (min_pixels, max_pixels) that "
                f"teachers.{self.name} has, or the other way round."
            )
        return text


class RemoteTeacher(AlignedTeacher):
    """Scores groups by asking servers, one request for each rollout."""

    def __init__(
        self,
        name: str,
        settings: TeacherConfig,
        server: TeacherServer,
        student: VLMProcessor,
        cache: ScoreCache | None = None,
    ) -> None:
        super().__init__(name, settings, server.processor, student, cache)
        self.server = server
        self._started: dict[tuple[int, ...], tuple[Work, dict[int, Pending]]] = {}

    def messages(self, prompt: Prompt) -> tuple[tuple[Message, ...], bool]:
        """See :class:`uniopd_mm.teachers.base.Teacher`."""
        messages, use_images = super().messages(prompt)
        if use_images and not self.server.takes_images:
            raise AlignmentError(
                f"{prompt.source or prompt.id}: teacher '{self.name}' is to see images, but server kind "
                f"{self.server.server.kind} takes text alone. Type teachers.{self.name}.server.kind=vllm (or sglang), "
                f"or teachers.{self.name}.view=text."
            )
        return messages, use_images

    def score(
        self, groups: list[Group], temperature: float = 1.0, progress: Callable[[int], None] | None = None
    ) -> list[Group]:
        """See :class:`uniopd_mm.teachers.base.Teacher`; ConfigError for a temperature that is not 1."""
        if temperature != 1.0:
            raise ConfigError(
                f"teacher '{self.name}' was asked to score at temperature {temperature}, but servers score prompts at "
                "temperature 1 only. Set loss.score_temperature=1"
            )
        asked = [self._started.pop(_sampled(g), None) or self._send(g) for g in groups]
        scored: list[Group] = []
        try:
            for group, (work, pending) in zip(groups, asked, strict=True):
                work.group = group  # more is known of it now than when it was sent
                for i, one in pending.items():
                    work.answers[i] = self.server.answer(one)
                scored.append(self.finish(work))
                if progress:
                    progress(len(scored))
        finally:
            abandoned = [*asked[len(scored) :], *self._started.values()]
            for one in (one for _, pending in abandoned for one in pending.values()):
                one.reply.cancel()
            self._started.clear()
        return scored

    def start(self, groups: list[Group]) -> None:
        """Send the requests of groups that were just sampled; :meth:`score` waits for the replies."""
        self._started |= {_sampled(g): self._send(g) for g in groups}

    def _send(self, group: Group) -> tuple[Work, dict[int, Pending]]:
        """One request for each rollout with something to score that the cache does not know."""
        work = self.begin(group)
        missing = work.missing()
        if not missing or work.encoded is None:
            return work, {}
        collapsed, expanded = work.encoded.collapsed_ids.tolist(), work.encoded.input_ids.tolist()
        pictures = map(self.processor.resize, group.images if work.encoded.image_spans else ())
        images = tuple(
            map(png_uri, pictures)
        )  # in the size that the server would give them, by our own kernels
        work.encoded = None  # its pixels are no longer needed
        requests = {
            i: ScoreRequest(collapsed, expanded, work.aligned[i].teacher_ids.tolist(), images)
            for i in missing
        }
        return work, {i: self.server.submit(asked) for i, asked in requests.items()}


def _sampled(group: Group) -> tuple[int, ...]:
    """Which sampled responses these are: the tensors themselves, whatever else is known of them by now."""
    return tuple(id(r.response_ids) for r in group.rollouts)
