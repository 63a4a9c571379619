"""Servers that all serve the same, behind one blocking call: load, retries and outages are handled here.

Each URL has a bounded number of requests in flight and a circuit breaker.  The breaker opens after three failures
in a row; then the URL rests, and one trial request at a time finds out whether it is back.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from uniopd_mm.errors import ConfigError
from uniopd_mm.servers.errors import ServerError

FAILURES_TO_OPEN = 3
LONGEST_PAUSE_S = 30.0
CONNECT_TIMEOUT_S = 10.0
_RETRIED = frozenset({408, 425, 429})

_START = {
    "/inference/v1/generate": "vllm serve MODEL --enable-scale-out --port {port}",
    "/v1/completions": "vllm serve MODEL --port {port}",
    "/generate": "python -m sglang.launch_server --model-path MODEL --port {port}",
}
_ADVICE_BY_TEXT = (
    ("scale-out", "Start the server with --enable-scale-out: vllm serve MODEL --enable-scale-out"),
    (
        "V2 model runner",
        "Start the server with VLLM_USE_V2_MODEL_RUNNER=1, or don't ask for the sparse route.",
    ),
    ("max_num_seqs", "Start the server with a --max-num-seqs of at least rollout.n (8 for evaluations)."),
    ("max allowed", "Start the server with a larger --max-logprobs."),
    ("context length", "Start the server with a larger --max-model-len, or sample shorter responses."),
    ("does not exist", "Set server.model to the name it serves (GET /v1/models lists it), or leave it out."),
)
_ADVICE_BY_STATUS = {
    401: "Set server.api_key_env to the name of the environment variable that holds the server's key.",
    403: "Start the server with --enable-scale-out (vLLM), or look at its access rules.",
    404: "The server has no such path: does server.kind say what it is, and is it new enough?",
    413: "A picture is too large for the server or for a proxy before it: lower max_pixels.",
    429: "Lower server.concurrency.",
}


@dataclass(eq=False)
class _Endpoint:
    """What is known of one URL; guarded by the pool's condition."""

    url: str
    in_flight: int = 0
    failures: int = 0
    """In a row."""
    pause_s: float = 0.0
    """How long it rests when its breaker opens next."""
    rest_until: float = 0.0
    """Monotonic seconds before which it is not asked."""
    on_trial: bool = False
    last_used: int = 0
    last_problem: str = ""

    @property
    def is_open(self) -> bool:
        return self.failures >= FAILURES_TO_OPEN


class _Failure(Exception):
    """One attempt that failed."""

    def __init__(
        self, problem: str, advice: str = "", retry=True, rest_s: float = 0.0, alive=False, lost=False
    ):
        super().__init__(problem)
        self.lost = lost
        """The connection broke off."""
        self.problem, self.advice, self.retry, self.rest_s = problem, advice, retry, rest_s
        self.alive = alive
        """The server answered and is in order: nothing for its breaker."""


@dataclass
class _Job:
    path: str
    payload: Mapping[str, Any]
    future: Future[dict[str, Any]] = field(default_factory=Future)


class ServerPool:
    """The least loaded of several servers answers; thread-safe."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        concurrency: int = 32,
        timeout_s: float = 300.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """``concurrency``: requests in flight per URL.  ``retries``: attempts of one request after the first."""
        self._endpoints = [_Endpoint(url, pause_s=2 * backoff_s) for url in _base_urls(urls)]
        self._concurrency, self._retries = concurrency, retries
        self._timeout_s, self._backoff_s = timeout_s, backoff_s
        self._client = httpx2.Client(
            headers=dict(headers or {}),
            limits=httpx2.Limits(
                max_keepalive_connections=concurrency * len(self._endpoints),
                keepalive_expiry=2.0,  # servers hang up on idle connections after 5 s; be first
            ),
        )
        self._random = random.Random()  # its own: a run's random numbers must not depend on the network
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._n_threads = 0
        self._turn = 0

    def post(self, path: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON object that a server replied (a list of objects as ``{"items": [...]}``); :class:`ServerError` when none did, or at once for a 4xx."""
        body = json.dumps(dict(payload)).encode()
        failed: Counter[str] = Counter()
        advice: list[str] = []
        for attempt in range(self._retries + 1):
            endpoint, trial = self._acquire(failed)
            if endpoint is not None:
                try:
                    return self._attempt(endpoint, trial, path, body)
                except _Failure as failure:
                    if not failure.retry:
                        raise ServerError(
                            f"POST {endpoint.url}{path}: {failure.problem}. {failure.advice}".rstrip()
                        ) from failure.__cause__
                    failed[endpoint.url] += 1
                    advice.append(failure.advice)
            if attempt < self._retries:
                self._closed.wait(self._delay(attempt))
        raise ServerError(self._summary(path, failed, advice))

    def get(self, path: str) -> list[tuple[str, dict[str, Any] | ServerError]]:
        """What each URL replies to one GET, without retries; an empty reply (health checks) is ``{}``."""
        replies: list[tuple[str, dict[str, Any] | ServerError]] = []
        for endpoint in self._endpoints:
            try:
                replies.append((endpoint.url, self._send("GET", endpoint.url, path, may_be_empty=True)))
            except _Failure as failure:
                message = f"GET {endpoint.url}{path}: {failure.problem}. {failure.advice}".rstrip()
                replies.append((endpoint.url, ServerError(message)))
        return replies

    def post_each(
        self,
        path: str,
        payload: Mapping[str, Any],
        urls: Sequence[str] | None = None,
        timeout_s: float = 1800.0,
    ) -> list[tuple[str, dict[str, Any] | ServerError]]:
        """What each URL (or each of ``urls``) replies to one POST, all at once and whatever their load; an empty reply
        is ``{}``.  For orders to servers that do no harm given twice, such as to load weights: they are sent once more
        where the connection breaks off (servers hang up after an error), and not retried otherwise."""
        body = json.dumps(dict(payload)).encode()
        chosen = [e.url for e in self._endpoints] if urls is None else list(urls)

        def order(url: str, again: bool = True) -> dict[str, Any] | ServerError:
            try:
                return self._send("POST", url, path, body, timeout_s=timeout_s, may_be_empty=True)
            except _Failure as failure:
                if again and failure.lost:
                    return order(url, again=False)
                return ServerError(f"POST {url}{path}: {failure.problem}. {failure.advice}".rstrip())

        with ThreadPoolExecutor(max(1, len(chosen))) as threads:
            return list(zip(chosen, threads.map(order, chosen), strict=True))

    def submit(self, path: str, payload: Mapping[str, Any]) -> Future[dict[str, Any]]:
        """:meth:`post` in a thread of the pool."""
        job = _Job(path, payload)
        with self._changed:
            self._raise_if_closed()
            if self._n_threads < self._concurrency * len(self._endpoints):
                self._n_threads += 1
                # Daemons: after Ctrl-C nobody waits for a server that takes its time.
                threading.Thread(target=self._work, name="server-pool", daemon=True).start()
            self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Give up what waits, at once, and what is under way, when its server replies or runs out of time.

        The futures of both then hold a :class:`ServerError`.
        """
        with self._changed:
            if self._closed.is_set():
                return
            self._closed.set()
            self._changed.notify_all()
        for _ in range(self._n_threads):
            self._jobs.put(None)
        self._client.close()

    def __enter__(self) -> ServerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(self.post(job.path, job.payload))
            except BaseException as error:  # whoever asks the future gets it
                job.future.set_exception(error)

    def _raise_if_closed(self) -> None:
        if self._closed.is_set():
            raise ServerError("the server pool is closed")

    def _acquire(self, failed: Counter[str]) -> tuple[_Endpoint | None, bool]:
        """A URL to ask now, and whether this is the trial of its breaker; None when all of them rest.

        URLs that failed this request less often come first, even if that means to wait for room there: a server
        that fails fast is the least loaded one and would draw every retry.
        """
        with self._changed:
            while True:
                self._raise_if_closed()
                now = time.monotonic()
                usable = [e for e in self._endpoints if e.rest_until <= now and not e.on_trial]
                fewest = min((failed[e.url] for e in usable), default=0)
                ready = [e for e in usable if failed[e.url] == fewest and e.in_flight < self._concurrency]
                if ready:
                    endpoint = min(ready, key=lambda e: (e.in_flight, e.last_used))
                    self._turn += 1
                    endpoint.in_flight, endpoint.last_used = endpoint.in_flight + 1, self._turn
                    endpoint.on_trial = endpoint.is_open
                    return endpoint, endpoint.on_trial
                if not usable and not any(e.on_trial for e in self._endpoints):
                    return None, False
                resting = [e.rest_until - now for e in self._endpoints if e.rest_until > now]
                self._changed.wait(min(resting, default=None))

    def _attempt(self, endpoint: _Endpoint, trial: bool, path: str, body: bytes) -> dict[str, Any]:
        """One request to one URL, with its outcome written into the URL's record."""
        failure: _Failure | None = None
        answered = False
        try:
            reply = self._send("POST", endpoint.url, path, body)
            answered = True
            return reply
        except _Failure as error:
            failure, answered = error, error.alive
            self._raise_if_closed()
            raise
        finally:
            with self._changed:
                endpoint.in_flight -= 1
                if trial:
                    endpoint.on_trial = False
                if answered:
                    endpoint.failures, endpoint.pause_s = 0, 2 * self._backoff_s
                if failure is not None:
                    self._record(endpoint, failure, trial)
                self._changed.notify_all()

    def _record(self, endpoint: _Endpoint, failure: _Failure, trial: bool) -> None:
        now = time.monotonic()
        endpoint.last_problem = failure.problem
        endpoint.rest_until = max(endpoint.rest_until, now + failure.rest_s)
        if failure.alive:
            return
        endpoint.failures += 1
        if trial or endpoint.failures == FAILURES_TO_OPEN:
            rest_s = endpoint.pause_s * self._random.uniform(0.75, 1.25)
            endpoint.rest_until = max(endpoint.rest_until, now + rest_s)
            endpoint.pause_s = min(2 * endpoint.pause_s, LONGEST_PAUSE_S)

    def _delay(self, attempt: int) -> float:
        """Seconds before the next attempt: growing, jittered, and not before one URL at least may be asked."""
        backoff = min(self._backoff_s * 2**attempt, LONGEST_PAUSE_S) * self._random.uniform(0.5, 1.5)
        with self._changed:
            return max(backoff, min(e.rest_until for e in self._endpoints) - time.monotonic())

    def _send(
        self,
        method: str,
        url: str,
        path: str,
        body: bytes | None = None,
        *,
        timeout_s: float | None = None,
        may_be_empty: bool = False,
    ) -> dict[str, Any]:
        """The JSON object of one exchange, or a _Failure that says what to do about it."""
        timeout_s = timeout_s or self._timeout_s
        timeout = httpx2.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S), pool=None)
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            response = self._client.request(
                method, url + path, content=body, headers=headers, timeout=timeout
            )
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise _Failure(f"cannot connect ({error})", _start_advice(url, path)) from error
        except httpx2.TimeoutException as error:
            advice = "Raise server.timeout_s, or lower server.concurrency."
            raise _Failure(f"no answer within {timeout_s:g} s", advice) from error
        except httpx2.RequestError as error:
            raise _Failure(f"connection lost ({type(error).__name__}: {error})", lost=True) from error
        except RuntimeError:  # the client was closed by another thread
            self._raise_if_closed()
            raise
        if not response.is_success:
            raise _status_failure(response, self._timeout_s)
        if may_be_empty and not response.content:
            return {}
        try:
            reply = response.json()
        except ValueError as error:
            raise _Failure(f"invalid JSON ({error})", "Is this URL the server itself?") from error
        if isinstance(reply, list) and reply and all(isinstance(item, dict) for item in reply):
            return {"items": reply}
        if not isinstance(reply, dict):
            raise _Failure(f"a JSON {type(reply).__name__}, expected an object")
        return reply

    def _summary(self, path: str, failed: Counter[str], advice: list[str]) -> str:
        lines = [f"no server answered POST {path} in {self._retries + 1} attempts:"]
        for endpoint in self._endpoints:
            times = failed[endpoint.url]
            count = f"failed {times} time{'s' * (times != 1)}" if times else "not asked, it was resting"
            lines.append(f"  {endpoint.url}: {count}; last: {endpoint.last_problem or 'nothing'}")
        return "\n".join(lines + [text for text in dict.fromkeys(advice) if text])


def _base_urls(urls: Sequence[str]) -> list[str]:
    """The URLs without a final / or /v1 (paths bring their own); ConfigError if there is none or one is no URL."""
    if isinstance(urls, str) or not urls:
        raise ConfigError(f"server.urls is {urls!r}, expected a list such as ['http://10.0.0.5:8000'].")
    bases = [url.strip().rstrip("/").removesuffix("/v1").rstrip("/") for url in urls]
    for base in bases:
        try:
            parsed = httpx2.URL(base)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"server.urls: '{base}' is not a URL ({error}).") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ConfigError(f"server.urls: '{base}' must look like http://10.0.0.5:8000.")
    return list(dict.fromkeys(bases))


def _start_advice(url: str, path: str) -> str:
    port = httpx2.URL(url).port or 8000
    command = _START.get(path, _START["/inference/v1/generate"]).format(port=port)
    return f"Is the server running, and is this its address? Start one there: {command}"


def _status_failure(response: httpx2.Response, longest_rest_s: float) -> _Failure:
    """An HTTP error with the server's own message."""
    status = response.status_code
    message = _error_message(response)
    advice = next((a for text, a in _ADVICE_BY_TEXT if text.lower() in message.lower()), None)
    return _Failure(
        f"HTTP {status}" + (f": {message}" if message else ""),
        advice or _ADVICE_BY_STATUS.get(status, ""),
        retry=status >= 500 or status in _RETRIED,
        rest_s=min(_retry_after_s(response.headers.get("Retry-After", "")), longest_rest_s),
        alive=status < 500,
    )


def _error_message(response: httpx2.Response) -> str:
    """Of ``{"error": {"message": ...}}``, ``{"message": ...}`` or ``{"detail": ...}``; else the beginning of the text."""
    try:
        found: Any = response.json()
    except ValueError:
        found = response.text or response.headers.get("Location", "")
    for key in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(key):
            found = found[key]
    return " ".join(str(found).split())[:300].rstrip(".")


def _retry_after_s(header: str) -> float:
    """Seconds that a Retry-After header asks for, written as a number or as a date; 0 without one."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0
