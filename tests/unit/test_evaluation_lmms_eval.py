"""The lmms-eval plug-in, against the few classes of lmms-eval that it uses, written down here: lmms-eval itself is not
installed for tests.  They have the signatures of lmms-eval 0.7.3."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import tiny
from PIL import Image

from uniopd_mm.errors import ConfigError

FAKE = {
    "lmms_eval/__init__.py": "",
    "lmms_eval/api/__init__.py": "",
    "lmms_eval/api/model.py": (
        "import abc\n"
        "class lmms(abc.ABC):\n"
        "    is_simple = True\n"
        "    def __init__(self):\n"
        "        self._rank, self._world_size, self.task_dict = 0, 1, {}\n"
        "    @abc.abstractmethod\n"
        "    def loglikelihood(self, requests): ...\n"
        "    @abc.abstractmethod\n"
        "    def generate_until(self, requests): ...\n"
        "    @abc.abstractmethod\n"
        "    def generate_until_multi_round(self, requests): ...\n"
    ),
    "lmms_eval/models/__init__.py": "",
    "lmms_eval/models/registry_v2.py": (
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class ModelManifest:\n"
        "    model_id: str\n"
        "    simple_class_path: str | None = None\n"
        "    chat_class_path: str | None = None\n"
        "    aliases: tuple = ()\n"
    ),
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    for name, text in FAKE.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    ours = "uniopd_mm.evaluation.lmms_eval"
    kept = {
        n: sys.modules.pop(n) for n in list(sys.modules) if n == ours or n.partition(".")[0] == "lmms_eval"
    }
    yield importlib.import_module(ours)
    for name in list(sys.modules):
        if name == ours or name.partition(".")[0] == "lmms_eval":
            del sys.modules[name]
    sys.modules.update(kept)


def request(doc_id: int, **options: Any) -> Any:
    def doc_to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        pictures = [{"type": "image", "url": image} for image in doc["images"]]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": doc["question"]}]}]

    return SimpleNamespace(args=("context", doc_to_messages, options, doc_id, "toy", "test"))


def test_answers_are_those_of_our_engine_in_the_order_of_the_requests(
    plugin: ModuleType, tiny_models: Mapping[str, Path]
) -> None:
    made = plugin.UniOPDModel(model=str(tiny_models["llava"]), dtype="float32", batch_size="2")
    docs = [
        {"question": f"what is {i} ?", "images": [tiny.random_image(60, 60, i)] * (i % 3)} for i in range(5)
    ]
    made.task_dict = {"toy": {"test": docs}}
    answers = made.generate_until([request(i, max_new_tokens=6, do_sample=False) for i in range(5)])
    backwards = made.generate_until([request(i, max_new_tokens=6, do_sample=False) for i in (4, 3, 2, 1, 0)])
    assert answers == backwards[::-1] and len(set(answers)) > 1
    docs[2]["images"] = [Image.new("RGB", (60, 60), "white")] * 2
    changed = made.generate_until([request(i, max_new_tokens=6, do_sample=False) for i in range(5)])
    assert [a == b for a, b in zip(changed, answers, strict=True)] == [True, True, False, True, True]
    short = made.generate_until([request(0, max_new_tokens=6), request(1, max_new_tokens=2)])
    assert short[0] == answers[0] and answers[1].startswith(short[1]) and short[1] != answers[1]
    with pytest.raises(NotImplementedError, match="likelihoods"):
        made.loglikelihood([])


def test_the_model_is_registered_as_one_that_takes_chat(plugin: ModuleType) -> None:
    found = plugin.manifest()
    assert found.model_id == "uniopd_mm"
    module, _, name = found.chat_class_path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert cls is plugin.UniOPDModel and cls.is_simple is False


def test_settings_of_a_task_become_ours(plugin: ModuleType) -> None:
    assert plugin.sampling_of({}).temperature == 0
    assert plugin.sampling_of({"do_sample": True}).temperature == 1
    assert plugin.sampling_of({"do_sample": False, "temperature": 0.7}).temperature == 0
    found = plugin.sampling_of({"temperature": 0.6, "top_p": None, "top_k": 20, "max_new_tokens": 16})
    assert (found.temperature, found.top_p, found.top_k, found.max_new_tokens) == (0.6, 1.0, 20, 16)
    with pytest.raises(ConfigError, match="num_beams=1"):
        plugin.sampling_of({"num_beams": 3})
    assert plugin.until("a b\n\nQ: c", ["\n\n", "Q:"]) == "a b"
    assert plugin.until("a b", None) == "a b"


def test_wrong_model_arguments_and_unknown_media_are_refused(plugin: ModuleType) -> None:
    with pytest.raises(ConfigError, match="model=FOLDER"):
        plugin.UniOPDModel()
    with pytest.raises(ConfigError, match="unknown: dtyp"):
        plugin.UniOPDModel(model="m", dtyp="float32")
    with pytest.raises(ConfigError, match="video"):
        plugin.as_turns([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])


def test_without_lmms_eval_only_the_plugin_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "uniopd_mm.evaluation.lmms_eval", raising=False)
    importlib.reload(importlib.import_module("uniopd_mm.evaluation.session"))
    with pytest.raises(ImportError, match="lmms_eval"):
        importlib.import_module("uniopd_mm.evaluation.lmms_eval")
