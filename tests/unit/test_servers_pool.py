"""The pool: load, retries, breakers and what it says when nobody answers; against real sockets on this machine."""

import concurrent.futures
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from uniopd_mm.errors import ConfigError
from uniopd_mm.servers import ServerError, ServerPool
from uniopd_mm.servers.pool import _retry_after_s


class Server:
    """Answers with what ``answer(number of the request, payload)`` says: (status, body bytes, headers), or None
    to hang up."""

    def __init__(self, answer):
        self.seen, self.headers, self.times = [], [], []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                size = int(self.headers.get("Content-Length", 0))
                payload = json.loads(self.rfile.read(size)) if size else None
                with outer.lock:
                    number = len(outer.seen)
                    outer.seen.append((self.path, payload))
                    outer.headers.append(dict(self.headers))
                    outer.times.append(time.monotonic())
                    outer.in_flight += 1
                    outer.most_in_flight = max(outer.most_in_flight, outer.in_flight)
                said = answer(number, payload)
                with outer.lock:
                    outer.in_flight -= 1
                if said is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                status, body, headers = said
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_):
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.thread = threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        )
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def ok(**said):
    return 200, json.dumps(said).encode(), {}


def error(status, message="", **headers):
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return status, json.dumps({"error": {"message": message}}).encode(), headers


def unused_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def quick(*urls, **settings):
    return ServerPool(urls, **{"backoff_s": 0.01, "timeout_s": 5.0, **settings})


def test_a_request_goes_out_as_json_with_the_headers_and_comes_back_as_an_object():
    with (
        Server(lambda n, payload: ok(got=payload)) as server,
        quick(server.url + "/v1/", headers={"Authorization": "Bearer secret"}) as pool,
    ):
        assert pool.post("/v1/completions", {"prompt": [1, 2]}) == {"got": {"prompt": [1, 2]}}
        assert server.seen == [("/v1/completions", {"prompt": [1, 2]})]
        assert server.headers[0]["Authorization"] == "Bearer secret"


FAULTS = {
    "500": error(500),
    "503": error(503),
    "408": error(408),
    "425": error(425),
    "429": error(429),
    "hung up": None,
    "truncated JSON": (200, b'{"a": ', {}),
    "a list": (200, b"[]", {}),
    "truncated body": (200, b'{"a": 1}', {"Content-Length": "99", "Connection": "close"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_tried_again(fault):
    with (
        Server(lambda n, _: ok(n=n) if n >= 2 else FAULTS[fault]) as server,
        quick(server.url, timeout_s=1) as pool,
    ):
        assert pool.post("/generate", {}) == {"n": 2}


def test_a_server_that_says_nothing_in_time_is_tried_again():
    release = threading.Event()
    with (
        Server(lambda n, _: ok(n=n) if n else (release.wait(5), ok())[1]) as server,
        quick(server.url, timeout_s=0.2) as pool,
    ):
        assert pool.post("/generate", {}) == {"n": 1}
        release.set()


@pytest.mark.parametrize("status", [302, 400, 401, 403, 404, 413, 422])
def test_a_request_that_is_wrong_is_told_at_once(status):
    with Server(lambda n, _: error(status, "bad thing")) as server, quick(server.url) as pool:
        with pytest.raises(ServerError, match=rf"POST {server.url}/generate: HTTP {status}: bad thing"):
            pool.post("/generate", {})
        assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("status", "message", "advice"),
    [
        (403, "Scale-out endpoints are disabled. Restart vllm serve with it.", "--enable-scale-out"),
        (401, "Unauthorized", "server.api_key_env"),
        (404, "The model `x` does not exist.", "server.model"),
        (404, "Not Found", "server.kind"),
        (400, "prompt_logprob_token_ids requires the V2 model runner", "VLLM_USE_V2_MODEL_RUNNER=1"),
        (400, "maximum context length is 256 tokens", "--max-model-len"),
        (400, "Requested prompt logprobs of 100, greater than max allowed: 20", "--max-logprobs"),
    ],
)
def test_an_http_error_says_what_to_type(status, message, advice):
    with Server(lambda n, _: error(status, message)) as server, quick(server.url) as pool:
        with pytest.raises(ServerError) as caught:
            pool.post("/inference/v1/generate", {})
        assert message.rstrip(".") in str(caught.value) and advice in str(caught.value)


def test_when_nobody_answers_the_error_lists_what_every_url_said_and_how_to_start_one():
    nobody = unused_url()
    with (
        Server(lambda n, _: error(503, "loading")) as server,
        quick(nobody, server.url) as pool,
        pytest.raises(ServerError) as caught,
    ):
        pool.post("/inference/v1/generate", {})
    said = str(caught.value)
    assert "no server answered POST /inference/v1/generate in 5 attempts" in said
    assert f"{nobody}: failed " in said and "cannot connect" in said
    assert f"{server.url}: failed " in said and "HTTP 503: loading" in said
    assert f"vllm serve MODEL --enable-scale-out --port {nobody.rpartition(':')[2]}" in said


@pytest.mark.parametrize(
    ("path", "command"),
    [("/generate", "sglang.launch_server"), ("/v1/completions", "vllm serve MODEL --port")],
)
def test_each_kind_of_server_is_started_its_own_way(path, command):
    with quick(unused_url(), retries=0) as pool, pytest.raises(ServerError, match=command):
        pool.post(path, {})


def test_a_failure_moves_the_request_to_another_url():
    with (
        Server(lambda n, _: error(500)) as sick,
        Server(lambda n, _: ok(well=True)) as well,
        quick(sick.url, well.url, retries=1) as pool,
    ):
        assert [pool.post("/generate", {}) for _ in range(12)] == [{"well": True}] * 12
        assert len(sick.seen) >= 1


def test_a_retry_waits_for_room_elsewhere_rather_than_going_back_to_the_url_that_failed():
    both = threading.Barrier(2)

    def slow(n, _):
        if n == 0:
            both.wait(5)
            time.sleep(0.2)
        return ok(well=True)

    def sick(n, _):
        both.wait(5)
        return error(500)

    with (
        Server(sick) as bad,
        Server(slow) as good,
        quick(bad.url, good.url, concurrency=1, retries=1) as pool,
    ):
        futures = [pool.submit("/generate", {}) for _ in range(2)]
        assert [f.result(5) for f in futures] == [{"well": True}] * 2
        assert len(bad.seen) == 1


def test_a_url_that_failed_three_times_in_a_row_rests_and_comes_back_after_one_trial():
    down = threading.Event()
    down.set()
    with (
        Server(lambda n, _: error(500) if down.is_set() else ok(back=True)) as server,
        Server(lambda n, _: ok(back=False)) as other,
        quick(server.url, other.url, backoff_s=0.1) as pool,
    ):
        while len(server.seen) < 3:
            pool.post("/generate", {})
        down.clear()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not pool.post("/generate", {})["back"]:
            time.sleep(0.001)
        assert server.times[3] - server.times[2] >= 0.14
        assert {pool.post("/generate", {})["back"] for _ in range(4)} == {True, False}


def test_one_trial_at_a_time_finds_out_that_a_url_is_back_and_then_all_may_ask_it():
    def answer(n, _):
        if n < 3:
            return error(500)
        time.sleep(0.1)
        return ok(n=n)

    with Server(answer) as server, quick(server.url, retries=2, concurrency=8) as pool:
        with pytest.raises(ServerError):
            pool.post("/generate", {})
        futures = [pool.submit("/generate", {}) for _ in range(8)]
        assert all(f.result(5)["n"] >= 3 for f in futures)
        assert server.times[4] - server.times[3] >= 0.09
        assert server.most_in_flight > 1


def test_the_rest_of_a_url_grows_with_every_trial_that_fails():
    with (
        Server(lambda n, _: error(500)) as sick,
        Server(lambda n, _: ok()) as well,
        quick(sick.url, well.url, backoff_s=0.02) as pool,
    ):
        deadline = time.monotonic() + 5
        while len(sick.seen) < 6 and time.monotonic() < deadline:
            pool.post("/generate", {})
    rests = [b - a for a, b in zip(sick.times[2:], sick.times[3:], strict=False)]
    assert [rest >= least for rest, least in zip(rests, [0.029, 0.059, 0.119], strict=False)] == [True] * 3


def test_retry_after_is_honoured():
    with (
        Server(lambda n, _: ok() if n else error(429, "busy", Retry_After="0.4")) as server,
        quick(server.url) as pool,
    ):
        pool.post("/generate", {})
        assert server.times[1] - server.times[0] >= 0.39


def test_retry_after_is_a_number_a_date_or_nonsense():
    assert _retry_after_s("7") == 7
    assert 50 < _retry_after_s(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert [_retry_after_s(text) for text in ("", "soon", "-3", "nan", formatdate(0))] == [0, 0, 0, 0, 0]


def test_no_url_gets_more_requests_at_once_than_allowed_and_all_urls_share_the_load():
    def slow(n, _):
        time.sleep(0.02)
        return ok()

    with (
        Server(slow) as a,
        Server(slow) as b,
        quick(a.url, b.url, concurrency=3) as pool,
        concurrent.futures.ThreadPoolExecutor(15) as callers,
    ):
        list(callers.map(lambda i: pool.post("/generate", {"i": i}), range(30)))
        assert len(a.seen) + len(b.seen) == 30
        assert a.most_in_flight <= 3 and b.most_in_flight <= 3
        assert a.most_in_flight > 1 and abs(len(a.seen) - len(b.seen)) <= 6


def test_the_least_loaded_url_is_asked():
    hold = threading.Event()
    with (
        Server(lambda n, _: (hold.wait(5), ok(name="a"))[1]) as a,
        Server(lambda n, _: ok(name="b")) as b,
        quick(a.url, b.url, concurrency=4) as pool,
    ):
        stuck = pool.submit("/generate", {})
        while not a.seen:
            time.sleep(0.005)
        assert [pool.post("/generate", {})["name"] for _ in range(5)] == ["b"] * 5
        hold.set()
        assert stuck.result(5) == {"name": "a"}


def test_answers_belong_to_their_requests_when_they_come_out_of_order():
    def answer(n, payload):
        time.sleep(0.002 * (7 - payload["i"] % 8))
        return ok(i=payload["i"])

    with Server(answer) as server, quick(server.url, concurrency=8) as pool:
        futures = [pool.submit("/generate", {"i": i}) for i in range(40)]
        assert [f.result(10)["i"] for f in futures] == list(range(40))


def test_get_tells_of_every_url():
    def health(n, _):
        return 200, b"", {}

    nobody = unused_url()
    with (
        Server(health) as well,
        Server(lambda n, _: error(401, "who are you")) as shut,
        quick(well.url, shut.url, nobody) as pool,
    ):
        replies = dict(pool.get("/health"))
    assert replies[well.url] == {}
    assert isinstance(replies[shut.url], ServerError) and "api_key_env" in str(replies[shut.url])
    assert isinstance(replies[nobody], ServerError) and "cannot connect" in str(replies[nobody])


def test_a_closed_pool_gives_up_what_waits_and_takes_nothing_more():
    hold = threading.Event()
    with Server(lambda n, _: (hold.wait(5), ok())[1]) as server:
        pool = quick(server.url, concurrency=1)
        running, waiting = pool.submit("/generate", {}), pool.submit("/generate", {})
        while not server.seen:
            time.sleep(0.005)
        pool.close()
        hold.set()
        for future in (running, waiting):
            with pytest.raises(ServerError, match="closed"):
                future.result(5)
        for call in (pool.post, pool.submit):
            with pytest.raises(ServerError, match="closed"):
                call("/generate", {})
        pool.close()


def test_random_numbers_of_the_program_do_not_depend_on_the_network():
    random.seed(3)
    expected = random.random()
    random.seed(3)
    with Server(lambda n, _: ok() if n > 1 else error(500)) as server, quick(server.url) as pool:
        pool.post("/generate", {})
    assert random.random() == expected


@pytest.mark.parametrize(
    "urls", [[], "http://one:8000", ["10.0.0.5:8000"], ["ftp://x"], ["http://"]], ids=lambda urls: str(urls)
)
def test_what_is_no_url_is_an_error_before_anything_is_sent(urls):
    with pytest.raises(ConfigError, match=r"server\.urls"):
        ServerPool(urls)


SCRIPT = """
import signal, sys
from uniopd_mm.servers import ServerPool
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may be born deaf to it
pool = ServerPool([sys.argv[1]], backoff_s=60)
future = pool.submit("/slow", {})
try:
    pool.post(sys.argv[2], {}) if sys.argv[2] != "future" else future.result()
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("where", ["/slow", "/broken", "future"])
def test_ctrl_c_leaves_a_waiting_request_and_the_program_ends(where):
    """While a server takes its time, while a request waits to be tried again, and while a future is waited for."""
    hold, n_seen = threading.Event(), 1 if where == "future" else 2

    def answer(n, payload):
        path = server.seen[n][0]
        return error(500) if path == "/broken" else (hold.wait(20), ok())[1]

    with Server(answer) as server:
        program = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, server.url, where],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        try:
            deadline = time.monotonic() + 20
            while len(server.seen) < n_seen and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            started = time.monotonic()
            program.send_signal(signal.SIGINT)
            said, _ = program.communicate(timeout=10)
        finally:
            program.kill()
            hold.set()
        assert said.strip() == "interrupted"
        assert time.monotonic() - started < 3
