"""The stub server: a real HTTP server in a thread, whose model is a Python function."""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self

from uniopd_mm.errors import ConfigError
from uniopd_mm.testing import sglang, unfit, vllm
from uniopd_mm.testing.answers import spoil_answers
from uniopd_mm.testing.faults import EVERY, Faults, disturb, refusal, spoil
from uniopd_mm.testing.scoring import Ids, Images, Refusal, Scored, Span, Teacher, decode_bytes, encode_bytes

Kind = Literal["vllm", "vllm_text", "sglang", "openai", "transformers_serve", "llama_cpp"]

_HTML = b"<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>"


@dataclass(frozen=True)
class Request:
    """One POST request that a stub server got."""

    call: int
    """Its number, from 0."""
    path: str
    payload: Any
    """The JSON body, parsed; None = it was no JSON."""


class StubServer:
    """An inference server around a scoring function; a context manager, listening on 127.0.0.1 from the start.

    ``vllm`` runs with --enable-scale-out, ``vllm_text`` and ``openai`` are the same server without it.
    ``score(expanded ids, images)`` gives log p of ids[1:]; ``expand(collapsed ids, n_images)`` the expanded ids, or
    (ids, spans).  ``marker``, the id of one image in collapsed ids, is needed where it cannot be told from ``expand``
    (SGLang's check of the number of markers needs it always).  ``vocab_size`` makes SGLang clip the last id, and brings
    the likeliest tokens where a request asks for some: each id at each position scored by itself, which is slow for a
    ``score`` that is, unless ``distribution(expanded ids, images)`` gives log p [P-1, V] at once.
    ``sample(expanded ids, images, params)`` gives [(token ids, logprobs)] of each of the n answers; one whose last id is
    among the request's stop ids, or that is shorter than asked, has stopped.  With ``dev_mode`` vLLM takes orders to load
    weights, SGLang does so always; ``on_load(folder, version)`` is called then (version None: vLLM is told it later), and
    replies name ``teacher.weights.version`` where the real ones do.
    Leaving the context raises what ``score`` and its like raised, for a client sees only status 500.
    """

    def __init__(
        self,
        kind: Kind,
        score: Callable[[Ids, Images], Sequence[float]],
        *,
        expand: Callable[[Ids, int], Ids | tuple[Ids, Sequence[Span]]] | None = None,
        model: str = "teacher",
        faults: Faults | None = None,
        distribution: Callable[[Ids, Images], Sequence[Sequence[float]]] | None = None,
        sample: Callable[[Ids, Images, dict[str, Any]], list[tuple[Ids, list[float]]]] | None = None,
        marker: int | None = None,
        vocab_size: int | None = None,
        max_logprobs: int = 20,
        max_model_len: int = 4096,
        encode: Callable[[str], Ids] = encode_bytes,
        decode: Callable[[Ids], str] = decode_bytes,
        api_key: str | None = None,
        delay_s: float = 0.0,
        dev_mode: bool = False,
        on_load: Callable[[str, str | None], None] = lambda folder, version: None,
    ) -> None:
        if kind not in EVERY:
            raise ConfigError(f"Unknown kind of stub server {kind!r}; there are {', '.join(EVERY)}.")
        self.teacher = Teacher(
            score=score,
            expand=expand,
            distribution=distribution,
            sample=sample,
            model=model,
            marker=marker,
            vocab_size=vocab_size,
            max_logprobs=max_logprobs,
            max_model_len=max_model_len,
            encode=encode,
            decode=decode,
        )
        self.kind, self.faults, self.api_key, self.delay_s = kind, faults or Faults(), api_key, delay_s
        self.dev_mode, self.on_load = dev_mode, on_load
        self.requests: list[Request] = []
        """Every POST request, in order of arrival."""
        self.applied: list[tuple[int, str]] = []
        """(call number, fault) of every call that really went wrong."""
        self.errors: list[Exception] = []
        """What ``score`` and its like raised."""
        self.peak_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.stub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None and self.errors:
            raise self.errors[0]

    def close(self) -> None:
        """Stop listening; clients that wait get their connection closed."""
        if not self._closing.is_set():
            self._closing.set()
            self._server.shutdown()
            self._server.server_close()

    def _arrive(self, path: str, payload: Any) -> Request:
        with self._lock:
            request = Request(len(self.requests), path, payload)
            self.requests.append(request)
            self._in_flight += 1
            self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
            return request

    def _leave(self) -> None:
        with self._lock:
            self._in_flight -= 1

    def _note(self, request: Request, fault: str | None) -> None:
        with self._lock:
            if fault and (request.call, fault) not in self.applied:
                self.applied.append((request.call, fault))

    def _answer(self, request: Request, fault: str | None) -> Any:
        """The reply as JSON values; Refusal for an error status."""
        if not isinstance(request.payload, dict):
            raise Refusal.openai(400, "Request body is not a JSON object.")
        refused = refusal(fault, request.path, request.payload) if fault else None
        if refused is not None:
            self._note(request, fault)
            raise refused
        reply = self._route(request, fault)
        if spoil(reply, fault) or spoil_answers(reply, fault, request.payload):
            self._note(request, fault)
        if isinstance(reply, dict):
            vllm.encode_sparse(reply)
        return reply

    def _route(self, request: Request, fault: str | None) -> Any:
        def disturbed(scored: Scored) -> Scored:
            changed = disturb(scored, fault)
            if changed is not scored:
                self._note(request, fault)
            return changed

        route, teacher, payload = (self.kind, request.path), self.teacher, request.payload
        if self.kind in ("vllm", "vllm_text", "openai"):
            if request.path == "/inference/v1/generate":
                return vllm.generate(teacher, payload, disturbed, scale_out=self.kind == "vllm")
            if request.path == "/v1/completions":
                return vllm.completions(teacher, payload, disturbed)
            if self.dev_mode:
                return vllm.order(teacher, request.path.partition("?")[0], payload, self.on_load)
        if route == ("sglang", "/generate"):
            return sglang.generate(teacher, payload, disturbed)
        if route == ("sglang", "/update_weights_from_disk"):
            return sglang.load(teacher, payload, self.on_load)
        if route == ("transformers_serve", "/v1/completions"):
            return unfit.transformers_serve(teacher, payload)
        if route == ("llama_cpp", "/v1/completions"):
            return unfit.llama_cpp(teacher, payload)
        raise Refusal(404, {"detail": "Not Found"})

    def _get(self, path: str) -> Any:
        """The reply to a GET request, None = an empty body."""
        if path == "/health" and self.kind != "llama_cpp":
            return {"status": "ok"} if self.kind == "transformers_serve" else None
        if path == "/v1/models":
            return vllm.models(self.teacher)
        if path == "/version" and self.kind in ("vllm", "vllm_text", "openai"):
            return {"version": "0.33.0"}
        if path == "/weight_info" and self.dev_mode and self.kind in ("vllm", "vllm_text", "openai"):
            return {"weight_version": self.teacher.weights.version}
        if path in ("/model_info", "/get_model_info") and self.kind == "sglang":
            return sglang.model_info(self.teacher)
        raise Refusal(404, {"detail": "Not Found"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256
    stub: StubServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is no news here."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """The requests are kept in ``StubServer.requests`` instead of on the console."""

    def do_GET(self) -> None:
        try:
            self._authorize()
            reply = self.server.stub._get(self.path)
        except Refusal as refused:
            self._send(refused.status, refused.body)
        else:
            self._send(200, b"" if reply is None else reply)

    def do_POST(self) -> None:
        stub = self.server.stub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = stub._arrive(self.path, _parse(body))
        try:
            stub._closing.wait(stub.delay_s)
            self._serve(request, stub.faults.pick(request.call))
        finally:
            stub._leave()

    def _serve(self, request: Request, fault: str | None) -> None:
        stub = self.server.stub
        if fault in _CONNECTION:
            stub._note(request, fault)
            _CONNECTION[fault](self)
            return
        status, reply = 200, None
        try:
            self._authorize()
            reply = stub._answer(request, fault)
        except Refusal as refused:
            status, reply = refused.status, refused.body
        except Exception as error:  # raised again where the server's context ends
            stub.errors.append(error)
            status, reply = 500, Refusal.openai(500, f"{type(error).__name__}: {error}").body
        if fault in _CUT and status == 200:
            stub._note(request, fault)
            self._cut(json.dumps(reply).encode(), declared_whole=fault == "truncated_body")
            return
        self._send(status, b"" if reply is None else reply)

    def _authorize(self) -> None:
        key = self.server.stub.api_key
        if key and self.path != "/health" and self.headers.get("Authorization") != f"Bearer {key}":
            raise Refusal(401, {"error": "Unauthorized"})

    def _send(self, status: int, reply: Any, content_type: str = "application/json") -> None:
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def _cut(self, body: bytes, declared_whole: bool) -> None:
        sent = body[: len(body) // 2]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body if declared_whole else sent)))
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = declared_whole

    def _hang(self) -> None:
        stub = self.server.stub
        stub._closing.wait(stub.faults.hang_s)
        self.close_connection = True

    def _reset(self) -> None:
        """Close with a reset instead of an orderly end: linger on for 0 seconds."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())
        self.close_connection = True


_CONNECTION: dict[str | None, Callable[[_Handler], None]] = {
    "timeout": _Handler._hang,
    "reset": _Handler._reset,
    "empty_reply": lambda handler: handler._send(200, b""),
    "html_200": lambda handler: handler._send(200, _HTML, "text/html"),
    "http_502_html": lambda handler: handler._send(502, _HTML, "text/html"),
}
_CUT = ("truncated_json", "truncated_body")


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
