#!/usr/bin/env python
"""Make a multimodal student out of the language model you have.

    python scripts/assemble_llava.py --vision google/siglip2-so400m-patch14-384 --language Qwen/Qwen3-1.7B --out runs/my-llava
    python scripts/assemble_llava.py --vision CLIP_FOLDER --language LLM_FOLDER --out runs/my-llava --projector linear

Vision tower and language model keep their weights; between them comes a new, random projector.  The result is a normal
Hugging Face folder: LlavaForConditionalGeneration, AutoProcessor and the recipes take it.  Train its projector first
(scripts/recipes/projector_first.yaml): until then it does not see.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout works without installation

from uniopd_mm.errors import UniOPDError


def main() -> int:
    args = parse_args()
    # transformers imports DeepSpeed where it finds it, and that looks for a GPU; nothing here needs one.
    for variable, value in (("TRANSFORMERS_VERBOSITY", "error"), ("DS_ACCELERATOR", "cpu")):
        os.environ.setdefault(variable, value)
    from transformers.utils.logging import disable_progress_bar  # torch from here on

    from uniopd_mm.models.assemble import assemble_llava

    if not sys.stderr.isatty():
        disable_progress_bar()

    made = assemble_llava(
        args.vision,
        args.language,
        args.out,
        projector=args.projector,
        vision_layer=args.vision_layer,
        vision_strategy=args.strategy,
        image_token=args.image_token,
        dtype=args.dtype,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    kinds = {
        "vision": made.vision,
        "projector": f"{args.projector}, seed {args.seed}",
        "language": made.language,
    }
    for stage, n in made.parameters.items():
        print(f"{stage:<11} {n / 1e6:10,.2f} M  {kinds[stage]}")
    row = (
        f"{made.new_rows} new rows in the embedding" if made.new_rows else "the embedding had a row to spare"
    )
    print(
        f"image       {made.image_tokens} tokens for {made.image_size} x {made.image_size} pixels "
        f"(hidden state {args.vision_layer}, {made.vision_strategy})"
    )
    print(f"placeholder {made.image_token} = {made.image_token_id} ({row})")
    print(f"model       {made.folder}")
    print(
        f"next        deepspeed scripts/train_mm.py scripts/recipes/projector_first.yaml student.model={made.folder}"
    )
    return 0


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--vision",
        required=True,
        metavar="DIR_OR_ID",
        help="CLIP or SigLIP model, whole or its vision part alone",
    )
    add("--language", required=True, metavar="DIR_OR_ID", help="causal language model with a chat template")
    add("--out", required=True, metavar="DIR", help="folder to write the model to")
    add(
        "--projector",
        choices=("mlp2x_gelu", "linear"),
        default="mlp2x_gelu",
        help="mlp2x_gelu: two layers with GELU between them, as in LLaVA 1.5 (default); linear: the same two with "
        "nothing between them, because the stock class always has two",
    )
    add(
        "--vision-layer",
        type=int,
        default=-2,
        metavar="N",
        help="hidden state of the tower that is projected: 0 = its embeddings, -1 = the last (default: -2)",
    )
    add(
        "--strategy",
        choices=("default", "full"),
        help="default: drop the class token; full: keep all tokens (default: by the tower; SigLIP has no class token)",
    )
    add(
        "--image-token",
        default="<image>",
        metavar="TOKEN",
        help="placeholder, added to the tokenizer where it is not there yet (default: <image>)",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of all weights (default: bfloat16)",
    )
    add("--seed", type=int, default=0, help="of the projector's weights (default: 0)")
    add("--overwrite", action="store_true", help="replace the model in --out")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UniOPDError as error:
        sys.exit(f"error: {error}")
