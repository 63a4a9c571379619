"""Stub inference servers for tests: real HTTP, the shapes of vLLM 0.33 and SGLang 0.5.23, a Python function as model.

>>> import json, urllib.request
>>> from uniopd_mm.testing import Faults, StubServer
>>> asked = {"token_ids": [5, 6, 7], "sampling_params": {"max_tokens": 1, "prompt_logprobs": 0}}
>>> with StubServer("vllm", lambda ids, images: [-0.1 * t for t in ids[1:]], faults=Faults(schedule={1: "nan"})) as server:
...     reply = urllib.request.urlopen(server.url + "/inference/v1/generate", json.dumps(asked).encode())
>>> [entry["logprob"] for [entry] in (list(one.values()) for one in json.load(reply)["prompt_logprobs"][1:])]
[-0.6000000000000001, -0.7000000000000001]

``FAULTS`` lists what can go wrong and what a client has to do about it; ``names("refuse", "sglang")`` is made for
``pytest.mark.parametrize`` (``names("refuse", "sglang", "sample")`` for sampled answers).  ``server.requests`` holds what came in, ``server.applied`` which calls went wrong.
With images, ``expand`` does what the processor of a real server does: ``expand(collapsed ids, n_images)``.
"""

from uniopd_mm.testing.faults import FAULTS, Effect, Fault, Faults, names
from uniopd_mm.testing.stub import Kind, Request, StubServer

__all__ = ["FAULTS", "Effect", "Fault", "Faults", "Kind", "Request", "StubServer", "names"]
