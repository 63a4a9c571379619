"""ChartQA -> JSONL rows and an images folder.

    python data/convert/chartqa.py "ChartQA Dataset" --out data/chartqa
    python data/convert/chartqa.py HuggingFaceM4/ChartQA --out data/chartqa --split val --limit 500

SOURCE is the authors' folder (``train/train_human.json``, ``train/train_augmented.json``, ``train/png/``,
``train/tables/``), a Parquet file or folder with the hub's columns (image, query, label, human_or_machine), or the hub
id.  The authors' folder also holds the data table behind each chart: it becomes ``image_text``, which a text-only
teacher reads in place of the picture.

Nothing half-written is left behind: images and the JSONL appear under their names only when they are complete.  Run the
same command again after an interruption; images that are already there are not written again.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES = {"human": "{split}_human.json", "augmented": "{split}_augmented.json"}
KINDS = {"human": "human", "machine": "augmented"}
"""The hub's names of the two halves, and the authors'."""
COLUMNS = ("image", "query", "label")
SUFFIX = "Think step by step, then put your final answer within \\boxed{}."
LISTED = 20


class SourceError(ValueError):
    """The source as a whole cannot be read."""


@dataclass(frozen=True, slots=True)
class Question:
    """One question as published; ``problem`` says why it cannot be used."""

    id: str
    query: str = ""
    answer: str | list[str] = ""
    image: bytes = b""
    table: str | None = None
    problem: str = ""


def read_folder(folder: Path, split: str, part: str) -> Iterator[Question]:
    """Questions of the authors' folder."""
    root = folder / split
    for kind in FILES if part == "all" else [part]:
        path = root / FILES[kind].format(split=split)
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise SourceError(
                f"{path} is missing. SOURCE must hold {split}/{FILES[kind].format(split=split)}."
            ) from error
        except ValueError as error:
            raise SourceError(f"{path} is not valid JSON: {error}") from error
        for number, entry in enumerate(entries, start=1):
            yield _folder_question(root, f"{kind}-{number}", entry)


def _folder_question(root: Path, identity: str, entry: dict[str, Any]) -> Question:
    missing = [key for key in ("imgname", "query", "label") if not entry.get(key)]
    if missing:
        return Question(identity, problem=f"has no {', '.join(missing)}")
    image, table = root / "png" / entry["imgname"], root / "tables" / f"{Path(entry['imgname']).stem}.csv"
    if not image.is_file():
        return Question(identity, problem=f"its image {image} is missing")
    text = table.read_text(encoding="utf-8", errors="replace").strip() if table.is_file() else None
    return Question(identity, entry["query"], str(entry["label"]), image.read_bytes(), text or None)


def read_dataset(source: str, split: str, part: str) -> Iterator[Question]:
    """Questions of a Parquet file, a folder of Parquet files, or a hub id."""
    dataset = _load(source, split)
    absent = [name for name in COLUMNS if name not in dataset.column_names]
    if absent:
        found = ", ".join(dataset.column_names)
        raise SourceError(
            f"{source} has no column {', '.join(absent)}; expected {', '.join(COLUMNS)}, found {found}."
        )
    names = getattr(dataset.features.get("human_or_machine"), "names", None)
    if names is None and part != "all":
        raise SourceError(
            f"{source} does not say which questions are {part} (no human_or_machine). Use --part all."
        )
    for number, row in enumerate(dataset, start=1):
        kind = KINDS[names[row["human_or_machine"]]] if names else "row"
        if part in ("all", kind):
            yield _dataset_question(f"{kind}-{number}", row)


def _load(source: str, split: str) -> Any:
    try:
        from datasets import Image, load_dataset
    except ImportError:
        raise SourceError('Parquet and hub sources need `datasets`: pip install "uniopd-mm[train]"') from None
    try:
        if Path(source).is_file():
            dataset = load_dataset("parquet", data_files=source, split="train")
        else:
            dataset = load_dataset(source, split=split)
    except Exception as error:  # network, pyarrow and `datasets` errors alike mean: not readable
        raise SourceError(
            f"cannot load split '{split}' of {source}: {type(error).__name__}: {error}"
        ) from error
    return dataset.cast_column("image", Image(decode=False)) if "image" in dataset.column_names else dataset


def _dataset_question(identity: str, row: dict[str, Any]) -> Question:
    labels = row["label"] if isinstance(row["label"], list) else [row["label"]]
    answers = [str(label) for label in labels if label is not None and str(label).strip()]
    data = (row["image"] or {}).get("bytes")
    if not row["query"] or not answers or not data:
        empty = [
            name for name, value in zip(COLUMNS, (data, row["query"], answers), strict=True) if not value
        ]
        return Question(identity, problem=f"has no {', '.join(empty)}")
    return Question(identity, row["query"], answers[0] if len(answers) == 1 else answers, data)


def image_name(data: bytes) -> str:
    """File name from the content's hash, so that questions about one chart share one file; ValueError if undecodable."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
            suffix = (image.format or "png").lower().replace("jpeg", "jpg")
    except Exception as error:  # decoders fail with anything at all on damaged bytes
        raise ValueError(f"its image cannot be decoded: {type(error).__name__}: {error}") from error
    return f"{hashlib.sha1(data).hexdigest()[:16]}.{suffix}"


def save_image(data: bytes, path: Path) -> None:
    """Write the image unless it is there already."""
    if path.is_file() and path.stat().st_size == len(data):
        return
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data)
    os.replace(part, path)


def to_row(question: Question, image: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of ``data/README.md``."""
    text = f"<image>\n{question.query}" + (f"\n{options.suffix}" if options.suffix else "")
    row: dict[str, Any] = {
        "id": question.id,
        "messages": [{"role": "user", "content": text}],
        "images": [f"images/{image}"],
        "answer": question.answer,
        "domain": options.domain,
        "verifier": options.verifier,
    }
    if question.table is not None:
        row["image_text"] = f"A chart of the following data:\n{question.table}"
    return row


def convert(questions: Iterator[Question], out: Path, options: argparse.Namespace) -> int:
    """Write ``out/SPLIT.jsonl``; returns the number of rows.  SourceError when too many questions are unusable."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    target = out / f"{options.split}.jsonl"
    part, bad, n_rows = target.with_name(f"{target.name}.{os.getpid()}.part"), [], 0
    try:
        with open(part, "w", encoding="utf-8") as file:
            for question in questions:
                if options.limit is not None and n_rows == options.limit:
                    break
                try:
                    if question.problem:
                        raise ValueError(question.problem)
                    name = image_name(question.image)
                except ValueError as error:
                    bad.append(f"{question.id} {error}")
                    continue
                save_image(question.image, images / name)
                file.write(json.dumps(to_row(question, name, options), ensure_ascii=False) + "\n")
                n_rows += 1
        _report(bad, n_rows, options.max_bad_share)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return n_rows


def _report(bad: Sequence[str], n_rows: int, max_bad_share: float) -> None:
    total = n_rows + len(bad)
    if not n_rows and not bad:
        raise SourceError("the source holds no questions.")
    lines = [f"{len(bad)} of {total} questions cannot be used:", *bad[:LISTED]]
    lines += [f"... and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
    if not n_rows or len(bad) > max_bad_share * total:
        raise SourceError(
            "\n  ".join([*lines, "Nothing was written. Repair the source or raise --max-bad-share."])
        )
    if bad:
        print("\n  ".join(lines), file=sys.stderr)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="the authors' folder, a Parquet file or folder, or a hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder for SPLIT.jsonl and images/")
    parser.add_argument("--split", default="train", help="train, val or test (default: train)")
    parser.add_argument(
        "--part", choices=["all", "human", "augmented"], default="all", help="which questions"
    )
    parser.add_argument("--limit", type=int, help="stop after so many rows")
    parser.add_argument("--suffix", default=SUFFIX, help="text after the question; '' for none")
    parser.add_argument("--domain", default="chart", help="domain of all rows")
    parser.add_argument("--verifier", default="chart", help="verifier of all rows")
    parser.add_argument(
        "--max-bad-share", type=float, default=0.01, help="share of unusable questions to accept"
    )
    options = parser.parse_args(argv)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_args(argv)
    try:
        splits = sorted(path.parent.name for path in Path(options.source).glob("*/png"))
        if splits and options.split not in splits:
            raise SourceError(
                f"{options.source} has no split '{options.split}'. Use --split {' or '.join(splits)}."
            )
        if splits:
            questions = read_folder(Path(options.source), options.split, options.part)
        else:
            questions = read_dataset(options.source, options.split, options.part)
        n_rows = convert(questions, options.out, options)
    except SourceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out / options.split}.jsonl: {n_rows} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
