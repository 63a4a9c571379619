"""A teacher whose weights are behind HTTP servers; template, view and alignment are here.

P prompt tokens, U teacher tokens of a response; log-probabilities in nats.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import TYPE_CHECKING, Any

from torch import Tensor

from uniopd_mm.alignment import AlignedResponse
from uniopd_mm.config import ServerConfig, TeacherConfig
from uniopd_mm.errors import AlignmentError, ConfigError
from uniopd_mm.rollout import Group, Message, Prompt
from uniopd_mm.servers import WIRES, ReplyError, ScoreRequest, ServerError, ServerPool, png_uri
from uniopd_mm.teachers.base import AlignedTeacher
from uniopd_mm.teachers.probe import probe_images, probe_text

if TYPE_CHECKING:
    from uniopd_mm.processors import VLMProcessor

WITH_IMAGES = ("vllm", "sglang")
"""Kinds of servers that take images."""
_AHEAD = 4  # requests prepared for each one that may be under way, so that a slow one holds nobody up
_REASON_LENGTH = 300  # characters


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
        self.wire = WIRES[self.server.kind]()
        self.takes_images = self.server.kind in WITH_IMAGES
        self.model = self.server.model or ""
        self.report = "not probed"
        """What :meth:`connect` found, for people."""
        self._headers = _headers(name, self.server)
        self.pool = self._make_pool(self.server.urls)

    def __enter__(self) -> TeacherServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    def connect(self) -> None:
        """Ask every URL which model it serves and probe that it scores what it is asked; :class:`ConfigError`."""
        where = f"teachers.{self.name}.server"
        kind, urls = self.server.kind, self.server.urls
        path = "/model_info" if kind == "sglang" else "/v1/models"
        served = {url: _served_models(where, url, path, reply) for url, reply in self.pool.get(path)}
        self.model = _choose_model(where, served, self.server.model)
        found = ""
        for url in urls:
            with closing(self._make_pool([url])) as pool:
                try:
                    found = self._probe(pool)
                except ConfigError as error:
                    raise ConfigError(
                        f"{where}: {url} ({kind}): {str(error).rstrip('.')}.\n  {self._advice()}"
                    ) from error
        self.report = f"{kind} at {', '.join(urls)} serves {self.model}; {found}"

    def ask(self, requests: Iterable[ScoreRequest]) -> Generator[Tensor | str, None, None]:
        """The answers in order: [U] float32 log-probabilities, or the reason why there are none."""
        yield from self._ask(self.pool, requests, _AHEAD * self.server.concurrency * len(self.server.urls))

    def _ask(self, pool: ServerPool, requests: Iterable[ScoreRequest], ahead: int) -> Iterator[Tensor | str]:
        pending: deque[tuple[ScoreRequest, Future[dict[str, Any]]]] = deque()
        try:
            for asked in requests:
                pending.append((asked, pool.submit(*self.wire.request(asked, self.model))))
                if len(pending) >= ahead:
                    yield self._answer(*pending.popleft())
            while pending:
                yield self._answer(*pending.popleft())
        finally:
            for _, future in pending:
                future.cancel()

    def _answer(self, asked: ScoreRequest, future: Future[dict[str, Any]]) -> Tensor | str:
        try:
            return self.wire.parse(future.result(), asked)
        except ReplyError as error:
            return f"reply: {error.reason}"[:_REASON_LENGTH]
        except ServerError as error:
            return f"server: {' '.join(str(error).split())}"[:_REASON_LENGTH]

    def _probe(self, pool: ServerPool) -> str:
        def ask(requests: list[ScoreRequest]) -> list[Tensor | str]:
            return list(self._ask(pool, requests, len(requests)))

        found = [probe_text(ask, self.processor, self.settings.dtype)]
        if self.takes_images and self.processor.sees_images and self.settings.view in (None, "image"):
            found.append(probe_images(ask, self.processor))
        return ", ".join(found)

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

    def _make_pool(self, urls: list[str]) -> ServerPool:
        server = self.server
        return ServerPool(
            urls,
            concurrency=server.concurrency,
            timeout_s=server.timeout_s,
            retries=server.retries,
            headers=self._headers,
        )


class RemoteTeacher(AlignedTeacher):
    """Scores groups by asking servers, one request for each rollout."""

    def __init__(
        self, name: str, settings: TeacherConfig, server: TeacherServer, student: VLMProcessor
    ) -> None:
        super().__init__(name, settings, server.processor, student)
        self.server = server

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
        aligned = [self.align(g) for g in groups]
        answers = self.server.ask(self._requests(groups, aligned))
        scored: list[Group] = []
        with closing(answers):
            for group, row in zip(groups, aligned, strict=True):
                scored.append(self.fill(group, row, answers))
                if progress:
                    progress(len(scored))
        return scored

    def _requests(self, groups: list[Group], aligned: list[list[AlignedResponse]]) -> Iterator[ScoreRequest]:
        """One for each rollout with something to score, in order; a prompt is encoded once."""
        for group, row in zip(groups, aligned, strict=True):
            responses = [a.teacher_ids.tolist() for a in row if len(a.teacher_ids)]
            if not responses:
                continue
            encoded = self.encode(group)
            collapsed, expanded = encoded.collapsed_ids.tolist(), encoded.input_ids.tolist()
            images = tuple(map(png_uri, group.images)) if encoded.image_spans else ()
            for response_ids in responses:
                yield ScoreRequest(collapsed, expanded, response_ids, images)


def _headers(name: str, server: ServerConfig) -> dict[str, str]:
    if server.api_key_env is None:
        return {}
    key = os.environ.get(server.api_key_env)
    if not key:
        raise ConfigError(
            f"teachers.{name}.server.api_key_env names the environment variable {server.api_key_env}, which is not set. "
            f"Type export {server.api_key_env}=KEY, or leave api_key_env out."
        )
    return {"Authorization": f"Bearer {key}"}


def _served_models(where: str, url: str, path: str, reply: dict[str, Any] | ServerError) -> list[str]:
    """Names under which a server knows its models; :class:`ConfigError` if it does not say."""
    if isinstance(reply, ServerError):
        raise ConfigError(f"{where}: {reply}") from reply
    listed = reply.get("data")
    names = [m.get("id") for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
    names += [reply.get("model_path"), reply.get("served_model_name")]
    known = [n for n in dict.fromkeys(names) if isinstance(n, str) and n]
    if not known:
        raise ConfigError(
            f"{where}: {url}{path} does not say which model it serves (found {str(reply)[:200]}). "
            "Check server.kind and server.urls."
        )
    return known


def _choose_model(where: str, served: dict[str, list[str]], wanted: str | None) -> str:
    """The served name to ask for: ``wanted``, or the only one there is at every URL."""
    if wanted is not None:
        for url, names in served.items():
            if wanted not in names:
                raise ConfigError(
                    f"{where}: {url} serves {', '.join(names)}, not '{wanted}'. Type {where}.model={names[0]}, or start "
                    f"the server with --served-model-name {wanted}"
                )
        return wanted
    different = {names[0] for names in served.values()}
    if len(different) > 1 or any(len(names) > 1 for names in served.values()):
        listed = "; ".join(f"{url}: {', '.join(names)}" for url, names in served.items())
        first = next(iter(served.values()))[0]
        raise ConfigError(
            f"{where}: the URLs serve several models ({listed}). Type {where}.model={first}, for example"
        )
    return different.pop()
