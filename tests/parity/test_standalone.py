"""The processors in other people's hands: a plain ``generate``, TRL's trainer, an environment with little in it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import families
import pytest
import tiny
import torch
from PIL import Image

from uniopd_mm.processors import VLMProcessor, get_processor

ROOT = Path(__file__).parents[2]
SCENES = [tiny.random_image(90, 60, 1), tiny.random_image(40, 120, 2), tiny.random_image(64, 64, 3)]


def user(*parts: Any) -> dict[str, Any]:
    """A user turn; strings are text, images are images."""
    content = [
        {"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts
    ]
    return {"role": "user", "content": content}


def images_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    return [part["image"] for turn in messages for part in turn["content"] if part["type"] == "image"]


MIXED = [
    [user("how many shapes are there?")],
    [user(SCENES[0], "what colour is the square?")],
    [user(SCENES[1], "above", SCENES[2], "below")],
    [user("hi")],
]


@pytest.fixture(scope="module", params=families.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    module = families.family(request.param)
    return module, module.build(tmp_path_factory.mktemp("model"), chat_template=module.CHAT_TEMPLATE)


# ---- transformers


def test_generate_takes_the_batch_as_it_is_and_answers_as_with_the_familys_own_processor(
    folder: tuple[Any, Path],
) -> None:
    from transformers import AutoModelForImageTextToText

    module, path = folder
    adapter, reference = get_processor(path), module.reference(path)
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    prompts = [adapter.encode(messages, images_of(messages)) for messages in MIXED]
    reference.tokenizer.padding_side = "left"
    theirs = reference.apply_chat_template(
        MIXED, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    options = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}
    answers = model.generate(**adapter.collate(prompts), **options)
    assert torch.equal(answers, model.generate(**theirs, **options))
    assert len({tuple(answer[-8:].tolist()) for answer in answers}) == len(MIXED)
    for answer, prompt in zip(answers, prompts, strict=True):  # whoever stands beside it in the batch
        alone = model.generate(**adapter.collate([prompt]), **options)[0]
        assert answer[-8:].tolist() == alone[-8:].tolist()


# ---- TRL


@dataclass(frozen=True)
class AnswerCollator:
    """Rows with ``messages`` and a column of pictures -> a batch to train on; only the last turn is learnt.

    This is the code that somebody else writes.
    """

    processor: VLMProcessor
    pictures: str

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        encode = self.processor.encode
        whole = [encode(r["messages"], r[self.pictures], add_generation_prompt=False) for r in rows]
        prompts = [encode(r["messages"][:-1], r[self.pictures]) for r in rows]
        batch = self.processor.collate(whole, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for k, (example, prompt) in enumerate(zip(whole, prompts, strict=True)):
            labels[k, : len(example.input_ids)][example.vision_mask] = -100
            labels[k, : len(prompt.input_ids)] = -100
        return {**batch, "labels": labels}


ANSWERS = ["a red square.", "three.", "the left triangle", "no"]


def dataset(pictures: str) -> Any:
    """As it lies on a disk: Arrow gives every part all keys, and pictures are decoded when a row is read."""
    from datasets import Dataset, Features, Image, List, Value

    part = {"type": Value("string"), "text": Value("string")}
    features = Features(
        {"messages": List({"role": Value("string"), "content": List(part)}), pictures: List(Image())}
    )
    rows = []
    for messages, answer in zip(MIXED, ANSWERS, strict=True):
        turns = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        rows.append({
            "messages": [
                {"role": t["role"], "content": [{"type": p["type"], "text": p.get("text")} for p in t["content"]]}
                for t in turns
            ],
            pictures: images_of(messages),
        })  # fmt: skip
    return Dataset.from_list(rows, features=features)


@pytest.mark.parametrize(
    ("name", "pictures"),
    # TRL wants the family's own processor for a column named images; beside torchvision Qwen has one.
    [("llava", "images"), ("qwen2_5_vl", "pictures")],
)
def test_trl_trains_on_our_batches(name: str, pictures: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from transformers import AutoModelForImageTextToText

    module = families.family(name)
    path = module.build(tmp_path / "model", chat_template=module.CHAT_TEMPLATE)
    adapter = get_processor(path)
    collator, rows = AnswerCollator(adapter, pictures), dataset(pictures)
    batch = collator(list(rows))
    taught = [
        adapter.tokenizer.decode([token for token in labels if token != -100]).strip()
        for labels in batch["labels"].tolist()
    ]
    assert [text.removesuffix("<|im_end|>").strip() for text in taught] == ANSWERS

    settings = trl.SFTConfig(
        output_dir=str(tmp_path / "run"),
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        max_length=None,
        per_device_train_batch_size=len(rows),
        max_steps=5,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        dataloader_pin_memory=False,
    )
    trainer = trl.SFTTrainer(
        AutoModelForImageTextToText.from_pretrained(path),
        args=settings,
        data_collator=collator,
        train_dataset=rows,
        processing_class=module.reference(path) if pictures == "images" else adapter.tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5 and all(later < earlier for earlier, later in pairwise(losses))

    labels = batch.pop("labels")
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(path)(**batch).logits
    by_hand = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert losses[0] == pytest.approx(by_hand.item(), abs=1e-4)


# ---- an environment with torch, transformers and Pillow

# All that the library or somebody beside it may have, but yaml: transformers itself needs it.
ABSENT = [
    "accelerate", "datasets", "deepspeed", "latex2sympy2_extended", "math_verify", "matplotlib", "pandas", "peft",
    "psutil", "pydantic", "qwen_vl_utils", "rich", "scipy", "sglang", "sklearn", "torchvision", "trl", "vllm",
]  # fmt: skip
BARE = """
import sys
from pathlib import Path

class RestOfTheLibrary:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("uniopd_mm.") and name.split(".")[1] != "processors":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

absent, folders = %r, %r
sys.modules.update(dict.fromkeys(absent))  # import and find_spec treat a None as a package that is not there
sys.meta_path.insert(0, RestOfTheLibrary())

from PIL import Image
from uniopd_mm.processors import get_processor
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
for folder in folders:
    processor = get_processor(folder)
    prompt = processor.encode(messages, [Image.new("RGB", (90, 60), "red")])
    batch = processor.collate([prompt, processor.encode([{"role": "user", "content": "hi"}])])
    processor.save_pretrained(Path(folder) / "saved")
    print(prompt.input_ids.tolist(), *batch)
assert not any(sys.modules[name] for name in absent)
"""


def test_torch_transformers_and_pillow_are_enough(tmp_path: Path) -> None:
    folders = [families.family(name).build(tmp_path / name) for name in ("llava", "qwen2_5_vl")]
    done = subprocess.run(
        [sys.executable, "-c", BARE % (ABSENT, [str(path) for path in folders])],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = []
    for path in folders:
        adapter = get_processor(path)
        prompt = adapter.encode([user(SCENES[0], "what is it?")], [Image.new("RGB", (90, 60), "red")])
        expected.append(f"{prompt.input_ids.tolist()} {' '.join(adapter.collate([prompt]))}")
    assert done.stdout.splitlines() == expected
