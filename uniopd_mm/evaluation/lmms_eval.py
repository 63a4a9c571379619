"""Our models in lmms-eval: the plug-in that it finds through the entry points ``lmms_eval.models``.

    python -m lmms_eval --model uniopd_mm --model_args model=FOLDER --tasks chartqa --batch_size 16

Nothing in this package imports this module, and lmms-eval is no dependency: it loads the module when it looks for models.
``eval/README.md`` says how to install it beside torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms

from uniopd_mm.config import ModelConfig, SamplingConfig
from uniopd_mm.errors import ConfigError

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelManifest

    from uniopd_mm.rollout import Message, Prompt

MAX_NEW_TOKENS = 1024
"""Where a task says nothing."""
_MODEL_SETTINGS = ("revision", "dtype", "attention", "min_pixels", "max_pixels", "template")


def manifest() -> ModelManifest:
    """What lmms-eval registers: the model name ``uniopd_mm``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="uniopd_mm", chat_class_path=f"{__name__}.UniOPDModel")


class UniOPDModel(lmms):
    """A model folder or hub id, sampled by our own engine; images, several of them, and text."""

    is_simple = False

    def __init__(
        self,
        model: str = "",
        pretrained: str = "",
        batch_size: int | str = 16,
        seed: int = 0,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """``settings``: ``dtype``, ``min_pixels``, ``max_pixels``, ... of :class:`uniopd_mm.config.ModelConfig`;
        ``pretrained`` is another word for ``model``."""
        super().__init__()
        from uniopd_mm.distributed import World
        from uniopd_mm.evaluation.session import Answerer

        unknown = [name for name in settings if name not in (*_MODEL_SETTINGS, "max_batch_size")]
        if unknown or not (model or pretrained):
            wrong = f"unknown: {', '.join(unknown)}" if unknown else "model is missing"
            raise ConfigError(
                f"--model_args: {wrong}. Type --model_args model=FOLDER, and if need be "
                f"{', '.join(f'{name}=...' for name in _MODEL_SETTINGS)}"
            )
        import torch

        self.batch, self.seed = int(batch_size), seed
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        config = ModelConfig(
            model=model or pretrained, **{k: v for k, v in settings.items() if k in _MODEL_SETTINGS}
        )
        answerer = Answerer(config, World(0, 1, 0, chosen), batch=self.batch)
        self.engine, self.processor = answerer.__enter__().parts()  # lmms-eval never closes a model

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests, cut at the task's stop texts."""
        answers: dict[int, str] = {}
        grouped: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            grouped.setdefault(repr(sorted(request.args[2].items())), []).append(i)
        for members in grouped.values():
            for start in range(0, len(members), self.batch):
                some = members[start : start + self.batch]
                options = requests[some[0]].args[2]
                texts = self._answer([self._prompt(i, requests[i]) for i in some], some, options)
                answers |= dict(zip(some, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError(
            "uniopd_mm answers one turn; tasks of several rounds need another model of lmms-eval"
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "uniopd_mm samples answers; tasks that compare likelihoods need another model of lmms-eval"
        )

    def _prompt(self, i: int, request: Instance) -> Prompt:
        """The document's chat turns, images taken out of them."""
        from uniopd_mm.rollout import Prompt

        _, doc_to_messages, _, doc_id, task, split = request.args
        turns, images = as_turns(doc_to_messages(self.task_dict[task][split][doc_id]))
        return Prompt(f"{task}/{doc_id}/{i}", turns, images, source=f"{task}[{split}]:{doc_id}")

    def _answer(self, prompts: Sequence[Prompt], slots: Sequence[int], options: dict[str, Any]) -> list[str]:
        from uniopd_mm.engines import encode_groups
        from uniopd_mm.evaluation.generate import EVALUATION_SEED
        from uniopd_mm.prompts import open_images

        groups = encode_groups(
            [(slot, prompt, open_images(prompt)) for slot, prompt in zip(slots, prompts, strict=True)],
            self.processor,
        )
        done = self.engine.sample(groups, 1, sampling_of(options), (EVALUATION_SEED, self.seed))
        return [until(group.rollouts[0].text, options.get("until")) for group in done]


def as_turns(messages: Sequence[dict[str, Any]]) -> tuple[tuple[Message, ...], tuple[Any, ...]]:
    """lmms-eval's chat messages in our form, and their images in order."""
    turns, images = [], []
    for message in messages:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(part["url"])
                parts.append({"type": "image"})
            elif part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
            else:
                raise ConfigError(f"uniopd_mm takes images and text; the task has {part['type']}")
        turns.append({"role": message["role"], "content": parts})
    return tuple(turns), tuple(images)


def sampling_of(options: dict[str, Any]) -> SamplingConfig:
    """A task's ``generation_kwargs``; greedy unless ``do_sample`` or a temperature says otherwise."""
    temperature = options.get("temperature") or 0.0
    if options.get("do_sample") and not temperature:
        temperature = 1.0
    if options.get("do_sample") is False:
        temperature = 0.0
    if (options.get("num_beams") or 1) > 1:
        raise ConfigError("uniopd_mm does not search with beams. Type --gen_kwargs num_beams=1")
    return SamplingConfig(
        temperature=temperature,
        top_p=options.get("top_p") or 1.0,
        top_k=options.get("top_k") or 0,
        max_new_tokens=options.get("max_new_tokens") or MAX_NEW_TOKENS,
    )


def until(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to the first of the stop texts."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.split(stop)[0] if stop else text
    return text
