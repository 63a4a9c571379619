"""Real inference servers around tiny models, for the tests marked ``servers``: ``make test-servers``.

Each is a process of its own from .venv-servers, up for the whole session and stopped with everything it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import rooms
import tiny

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-servers" / "bin" / "python"
SITE = Path(__file__).parent / "server_site"
START_S = 600
"""A busy machine with two cores takes minutes to import vLLM and warm it up."""
STOP_S = 20
TELL_S = 15
"""Seconds between two lines about a server that is still starting."""
NAME = "tiny"
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--max-logprobs", "-1"),
    *("--enforce-eager", "--enable-scale-out"),
)
IMAGE_OPTIONS = ("--limit-mm-per-prompt", json.dumps({"image": 2, "video": 0}))
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(SITE),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # what makes it load other weights when it is asked to
}


@dataclass(frozen=True)
class Served:
    """A model and the server that serves it."""

    folder: Path
    url: str
    log: Path
    name: str = NAME


@pytest.fixture(scope="session")
def vllm_text(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    """vLLM around a tiny Qwen3."""
    with _vllm(_wide_text, tmp_path_factory.mktemp("vllm_text"), request) as served:
        yield served


@pytest.fixture(scope="session")
def vllm_image(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Served]:
    """vLLM around a tiny Qwen2.5-VL, two images per prompt at most."""
    with _vllm(_wide_qwen2_5_vl, tmp_path_factory.mktemp("vllm_image"), request, *IMAGE_OPTIONS) as served:
        yield served


def _wide_text(folder: Path) -> Path:
    """A tiny Qwen3 with heads of 32.  With smaller ones vLLM on a CPU starts, and dies at the first request."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny.build_text(folder)
    config = AutoConfig.from_pretrained(model, head_dim=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        wide = AutoModelForCausalLM.from_config(config)
        for parameter in wide.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=0.08)
    wide.save_pretrained(model)
    return model


def _wide_qwen2_5_vl(folder: Path) -> Path:
    """A tiny Qwen2.5-VL with heads of 32 in its language model."""
    narrow = tiny.build_qwen2_5_vl(folder / "narrow")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope}
    return rooms.rebuild(narrow, folder / "model", heads)


@contextlib.contextmanager
def _vllm(
    build: Callable[[Path], Path], folder: Path, request: pytest.FixtureRequest, *options: str
) -> Iterator[Served]:
    if not PYTHON.exists():
        pytest.skip(f"there is no vLLM in {PYTHON.parents[1]}: `make test-servers` installs it")
    model, port = build(folder / "weights"), _free_port()
    served = Served(model, f"http://127.0.0.1:{port}", folder / "server.log")
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", port, *OPTIONS, *options]
    with served.log.open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=folder,  # away from the checkout, whose `processors` it must not import
            env=os.environ | ENVIRONMENT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, served, request)
        yield served
    finally:
        _stop(process)


def _wait_until_healthy(
    process: subprocess.Popen[bytes], served: Served, request: pytest.FixtureRequest
) -> None:
    start = told = time.monotonic()
    while not _is_healthy(served.url):
        now = time.monotonic()
        if process.poll() is not None:
            pytest.fail(f"vLLM ended with {process.returncode} before it was up.  {_end_of(served.log)}")
        if now - start > START_S:
            pytest.fail(f"vLLM was not up after {START_S} s.  {_end_of(served.log)}")
        if now - told >= TELL_S:
            told = now
            _tell(
                request, f"vLLM is starting: {now - start:.0f} s of at most {START_S} s, log in {served.log}"
            )
        time.sleep(1)
    _tell(request, f"vLLM is up after {time.monotonic() - start:.0f} s at {served.url}")


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _tell(request: pytest.FixtureRequest, line: str) -> None:
    """Shown at once, although pytest keeps what tests print."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{line}", end="", flush=True)


def _end_of(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:]
    return "\n".join([f"The end of {log}:", *lines])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """The server, then whatever of its process group outlives it (vLLM's engine is a process of its own)."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
