"""A LLaVA out of parts: a CLIP or SigLIP vision tower, a causal language model with a chat template, a new projector.

The result is a stock Hugging Face folder (``LlavaForConditionalGeneration`` with its processor).  Tower and language
model keep their weights, bit for bit where the precision stays; the projector is random, and has to be trained first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from uniopd_mm.errors import ConfigError
from uniopd_mm.models.stages import stage_of

if TYPE_CHECKING:
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedConfig,
        PreTrainedModel,
    )

Projector = Literal["mlp2x_gelu", "linear"]
Strategy = Literal["default", "full"]
Dtype = Literal["bfloat16", "float32"]

ACTIVATIONS: dict[str, str] = {"mlp2x_gelu": "gelu", "linear": "linear"}
"""Projector -> ``projector_hidden_act``.  The stock class always has two layers, so ``linear`` is two with nothing
between them, the second of them the identity at first: a linear map before, during and after training, but not the same
optimisation problem as one layer, and with the parameters of two.  (vLLM knows no activation of this name.)"""
CLASS_TOKENS: dict[str, int] = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Vision tower -> tokens it puts ahead of the patches; LLaVA's strategy ``default`` drops the first, ``full`` none."""
LAYER_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""What a language model inside LLaVA may be made of: everything that a cache of keys and values is enough for."""
VOCABULARY_MULTIPLE = 64
"""An embedding that has to grow ends at a multiple of this: matrix kernels are slow on odd sizes."""
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}
"""Largest difference of text logits before and after, relative to the largest logit."""

_PROBE = "Kfoiqrnwz"
_PREAMBLE = """\
{#- Contents that are lists become strings, images as IMAGE_TOKEN; the language model's own template follows. -#}
{%- set _llava = namespace(turns=[]) -%}
{%- for message in messages -%}
  {%- if CONDITION -%}
    {%- set _llava.text = '' -%}
    {%- for part in message['content'] -%}
      {%- if part is string -%}
        {%- set _llava.text = _llava.text + part -%}
      {%- elif part['type'] == 'text' -%}
        {%- set _llava.text = _llava.text + part['text'] -%}
      {%- elif part['type'] in ['image', 'image_url'] -%}
        {%- set _llava.text = _llava.text + 'IMAGE_TOKEN\\n' -%}
      {%- else -%}
        {{- raise_exception('LLaVA reads text and image parts, not ' ~ part['type']) -}}
      {%- endif -%}
    {%- endfor -%}
    {%- set _llava.turns = _llava.turns + [dict(message, content=_llava.text)] -%}
  {%- else -%}
    {%- set _llava.turns = _llava.turns + [message] -%}
  {%- endif -%}
{%- endfor -%}
{%- set messages = _llava.turns %}
"""
_IS_LIST = (
    "message['content'] is defined and message['content'] is iterable"
    " and message['content'] is not string and message['content'] is not mapping"
)
_HAS_IMAGE = f"{_IS_LIST} and message['content'] | selectattr('type', 'in', ['image', 'image_url']) | list"


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """What :func:`assemble_llava` made."""

    folder: Path
    vision: str
    """``model_type`` of the tower."""
    language: str
    """``model_type`` of the language model."""
    parameters: dict[str, int]
    """Stage (vision, projector, language) -> number of weights."""
    image_size: int
    """Side of the square that every image becomes, pixels."""
    image_tokens: int
    """Placeholders per image."""
    vision_strategy: Strategy
    image_token: str
    image_token_id: int
    new_rows: int
    """Rows that the embedding has grown by; 0 = it had one to spare."""


def assemble_llava(
    vision: str | Path,
    language: str | Path,
    out: str | Path,
    projector: Projector = "mlp2x_gelu",
    vision_layer: int = -2,
    vision_strategy: Strategy | None = None,
    image_token: str = "<image>",
    dtype: Dtype = "bfloat16",
    seed: int = 0,
    overwrite: bool = False,
) -> Assembly:
    """Write a LLaVA made of these parts (folders or hub ids) to ``out``; raises ConfigError where they do not fit.

    ``vision_layer``: hidden state of the tower that is projected, 0 = its embeddings, -1 = the last.
    ``vision_strategy``: None = without the class token, where the tower has one.
    """
    _check_choice("projector", projector, ACTIVATIONS)
    _check_choice("dtype", dtype, get_args(Dtype))
    folder = Path(out)
    _check_free(folder, overwrite, (vision, language))
    tower_config = _read_tower_config(vision, vision_layer)
    strategy = _choose_strategy(tower_config, vision_strategy)
    _check_language(_read_config(language, "language model"), language)
    processor = _make_processor(vision, language, tower_config, strategy, image_token)

    torch_dtype = getattr(torch, dtype)
    tower = _load(vision, "vision tower", "AutoModel", torch_dtype, config=tower_config)
    lm = _load(language, "language model", "AutoModelForCausalLM", torch_dtype)
    n_old = lm.get_input_embeddings().num_embeddings
    new_rows = add_rows(lm, processor.image_token_id + 1)
    expected = _text_logits(lm, n_old)
    model = _join(_make_config(tower, lm, processor, projector, vision_layer), tower, lm, language, seed)
    made = Assembly(
        folder=folder,
        vision=tower_config.model_type,
        language=lm.config.model_type,
        parameters=_count_parameters(model),
        image_size=tower_config.image_size,
        image_tokens=model.config.image_seq_length,
        vision_strategy=strategy,
        image_token=image_token,
        image_token_id=processor.image_token_id,
        new_rows=new_rows,
    )
    with _made_aside(folder) as aside:
        model.save_pretrained(aside)
        processor.save_pretrained(aside)
        # transformers 4 and what is built on it look here; 5 reads the same settings from processor_config.json.
        processor.image_processor.save_pretrained(aside)
        del model, tower, lm  # so that two copies are never in memory
        _check_saved(aside, made, expected, dtype)
    return made


# ---------------------------------------------------------------------- the parts


def _check_choice(name: str, value: object, known: Any) -> None:
    if value not in known:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(known)}.")


def _check_free(folder: Path, overwrite: bool, parts: tuple[str | Path, ...]) -> None:
    if any(Path(part).exists() and folder.resolve() == Path(part).resolve() for part in parts):
        raise ConfigError(f"{folder} is one of the parts; write the model to a folder of its own.")
    if folder.is_file():
        raise ConfigError(f"{folder} is a file; name a folder to write the model to.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"{folder} is not empty.  Name another folder, or replace it with --overwrite.")
    if not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds no model (no config.json), so it is not overwritten.")


def _read_config(path: str | Path, part: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{part}: no model configuration that transformers can read at {str(path)!r}.  Expected a Hugging Face "
            f"folder with a config.json, or a hub id.  {error}"
        ) from error


def _read_tower_config(path: str | Path, layer: int) -> PreTrainedConfig:
    """Configuration of the vision part, checked."""
    config = _read_config(path, "vision tower")
    tower = config.vision_config if config.model_type in ("clip", "siglip") else config
    if tower.model_type not in CLASS_TOKENS:
        naflex = tower.model_type.startswith("siglip2")
        hint = (
            "  This SigLIP2 takes images of any shape (NaFlex), which LLaVA's square images have no place for; those "
            "of one size, e.g. google/siglip2-so400m-patch14-384, are of type siglip."
        )
        raise ConfigError(
            f"{path} is a {config.model_type} model.  A vision tower can be CLIP or SigLIP, whole or its vision part "
            f"alone: model_type clip, siglip, {', '.join(CLASS_TOKENS)}.{hint if naflex else ''}"
        )
    if not all(isinstance(size, int) for size in (tower.image_size, tower.patch_size)):
        raise ConfigError(
            f"{path} has image_size {tower.image_size} and patch_size {tower.patch_size}; LLaVA needs squares, "
            "given as one number of pixels each."
        )
    n_layers = tower.num_hidden_layers
    if not -n_layers - 1 <= layer <= n_layers:
        raise ConfigError(
            f"vision_layer is {layer}, but {path} has {n_layers} layers: its hidden states are 0 (the embeddings) to "
            f"{n_layers}, or -1 (the last) to {-n_layers - 1}."
        )
    return tower


def _choose_strategy(tower: PreTrainedConfig, wanted: Strategy | None) -> Strategy:
    has_class_token = CLASS_TOKENS[tower.model_type] > 0
    if wanted is None:
        return "default" if has_class_token else "full"
    _check_choice("vision_strategy", wanted, get_args(Strategy))
    if wanted == "default" and not has_class_token:
        raise ConfigError(
            f"vision_strategy default drops the first token of an image, which in a {tower.model_type} is a patch: it "
            "has no class token.  Use full, or leave it out."
        )
    return wanted


def _check_language(config: PreTrainedConfig, path: str | Path) -> None:
    """Refuse what ``LlavaForConditionalGeneration`` cannot hold."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    who = f"{path} ({config.model_type})"
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or hasattr(config, "vision_config"):
        raise ConfigError(f"{who} sees images already: train it as it is (student.model={path}).")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ConfigError(f"{who} is no causal language model; expected one such as Qwen3 or Llama.")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{who} is quantized and could not be trained; name the unquantized weights.")
    kinds = set(getattr(config, "layer_types", None) or ()) - LAYER_KINDS
    if kinds or getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_is_stateful", False):
        found = ", ".join(sorted(kinds)) or "recurrent"
        raise ConfigError(
            f"{who} has {found} layers.  LlavaForConditionalGeneration keeps a cache of keys and values for its "
            f"language model, and no other state; layers can be {', '.join(sorted(LAYER_KINDS))}."
        )


def _load(path: str | Path, part: str, auto: str, dtype: torch.dtype, **options: Any) -> Any:
    """Weights of a part, all of them from its files."""
    import transformers

    model, info = getattr(transformers, auto).from_pretrained(
        path, dtype=dtype, trust_remote_code=False, output_loading_info=True, **options
    )
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:3])
        raise ConfigError(
            f"{part}: {path} lacks {len(info['missing_keys'])} weights of a {type(model).__name__} ({some}, ...), which "
            "would be random.  Its config.json and its weights do not belong together."
        )
    return model.eval()


def add_rows(model: Any, n_tokens: int) -> int:
    """Make the embeddings of ``model`` hold ``n_tokens`` tokens; returns the number of new rows, each the mean of the old."""
    n_old = model.get_input_embeddings().num_embeddings
    if n_tokens <= n_old:
        return 0
    model.resize_token_embeddings(n_tokens, pad_to_multiple_of=VOCABULARY_MULTIPLE, mean_resizing=False)
    for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:  # one, if tied
        weight.data[n_old:] = weight.data[:n_old].float().mean(0)
    return model.get_input_embeddings().num_embeddings - n_old


# ---------------------------------------------------------------------- processor and chat template


def _make_processor(
    vision: str | Path, language: str | Path, tower: PreTrainedConfig, strategy: Strategy, image_token: str
) -> LlavaProcessor:
    """The tower's image processor, and the language model's tokenizer and chat template taught the placeholder."""
    from transformers import AddedToken, AutoImageProcessor, AutoTokenizer, LlavaProcessor

    try:
        images = AutoImageProcessor.from_pretrained(vision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{vision} has no image processor.  Put the preprocessor_config.json that the tower was trained with beside "
            f"its config.json.  {error}"
        ) from error
    _check_image_size(images, tower, vision)
    tokenizer = AutoTokenizer.from_pretrained(language, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{language} has no chat template.  Use the instruction-tuned model, or put the template of its family into "
            "its folder as chat_template.jinja."
        )
    tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, e.g. one for tools
        template = {name: teach_images(text, tokenizer, image_token) for name, text in template.items()}
    else:
        template = teach_images(template, tokenizer, image_token)
    tokenizer.chat_template = template
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=CLASS_TOKENS[tower.model_type],
        image_token=image_token,
        chat_template=template,
    )
    if processor.image_token != image_token:
        raise ConfigError(
            f"The tokenizer of {language} names {processor.image_token!r} as its image token.  Use it: "
            f"image_token={processor.image_token!r}."
        )
    return processor


def _check_image_size(images: Any, tower: PreTrainedConfig, path: str | Path) -> None:
    """Every image becomes the square that the tower's position embeddings are made for."""
    side = tower.image_size
    found = {tuple(blank_pixels(images, w, h).shape[-2:]) for w, h in ((side, side), (97, 61), (61, 97))}
    if found != {(side, side)}:
        sizes = ", ".join(f"{height} x {width}" for height, width in sorted(found))
        raise ConfigError(
            f"{path}: its image processor makes images of {sizes} pixels, the position embeddings of its tower are for "
            f"{side} x {side}.  Correct size and crop_size in preprocessor_config.json."
        )


def blank_pixels(images: Any, width: int, height: int) -> Tensor:
    """[1, 3, H, W] what an image processor makes of a white image of ``width`` x ``height`` pixels."""
    from PIL import Image

    return images([Image.new("RGB", (width, height), "white")], return_tensors="pt")["pixel_values"]


def teach_images(template: str, tokenizer: Any, image_token: str) -> str:
    """A chat template that renders image parts as ``image_token``; unchanged if it does already.

    Contents that are strings render as they did.  So do lists of text, where the template takes lists at all; where it
    does not, a list becomes one string.
    """
    from jinja2 import TemplateError

    def render(*contents: Any, of: str = template) -> str | None:
        roles = ("system", "user", "assistant", "user")[-len(contents) :]
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            return tokenizer.apply_chat_template(turns, chat_template=of, tokenize=False)
        except (TemplateError, TypeError, AttributeError, KeyError, ValueError):
            return None

    def counts(text: str | None) -> tuple[int, int]:
        return ((text or "").count(image_token), (text or "").count(_PROBE))

    part = {"type": "text", "text": _PROBE}
    picture = [{"type": "image"}, part]
    if counts(render(picture)) == (1, 1):
        return template
    n_turns = 4 if render(*[_PROBE] * 4) is not None else 3  # some templates refuse system turns
    as_strings, as_lists = render(*[_PROBE] * n_turns), render(*[[part]] * n_turns)
    takes_lists = as_strings is not None and as_strings == as_lists
    condition = _HAS_IMAGE if takes_lists else _IS_LIST
    preamble = _PREAMBLE.replace("CONDITION", condition).replace("IMAGE_TOKEN", image_token)
    taught = preamble + template
    if counts(render(picture, of=taught)) != (1, 1):
        raise ConfigError(
            "The chat template of the language model does not render a user's turn as it is given, so no image can be "
            f"placed in it.  Put a template that writes {image_token} for an image part into chat_template.jinja."
        )
    return taught


# ---------------------------------------------------------------------- the whole


def _make_config(
    tower: PreTrainedModel,
    lm: PreTrainedModel,
    processor: Any,
    projector: Projector,
    vision_layer: int,
) -> LlavaConfig:
    from transformers import LlavaConfig

    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    dropped = int(processor.vision_feature_select_strategy == "default")
    return LlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        image_token_index=processor.image_token_id,
        image_seq_length=patches + processor.num_additional_image_tokens - dropped,
        projector_hidden_act=ACTIVATIONS[projector],
        vision_feature_layer=vision_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=lm.config.tie_word_embeddings,
    )


def _join(
    config: LlavaConfig, tower: Any, lm: Any, path: str | Path, seed: int
) -> LlavaForConditionalGeneration:
    """The stock class around the parts' own modules: nothing is copied."""
    from transformers import LlavaForConditionalGeneration

    body = lm.base_model
    if config.tie_word_embeddings and not hasattr(body, "embed_tokens"):
        raise ConfigError(
            f"{path}: {type(lm).__name__} ties its head to an embedding that is not called embed_tokens, where "
            "LlavaForConditionalGeneration would look for it.  Choose another language model."
        )
    with torch.device("meta"):
        model: Any = LlavaForConditionalGeneration(config)
    if type(body) is not type(model.model.language_model):
        raise ConfigError(
            f"{path}: {type(lm).__name__} is built on {type(body).__name__}, LlavaForConditionalGeneration would make a "
            f"{type(model.model.language_model).__name__} of it, so it cannot hold this language model."
        )
    model.model.vision_tower, model.model.language_model = tower, body
    model.lm_head = lm.get_output_embeddings()
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    init_projector(projector, seed, is_linear=config.projector_hidden_act == "linear")
    projector.to(lm.dtype)
    model.generation_config = lm.generation_config  # the stop tokens, above all
    return model.eval()


def init_projector(projector: Any, seed: int, is_linear: bool) -> None:
    """PyTorch's own initialisation of linear layers, from ``seed`` alone; ``is_linear``: the second is the identity."""
    generator = torch.Generator().manual_seed(seed)
    for layer in (projector.linear_1, projector.linear_2):
        bound = layer.in_features**-0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    if is_linear:
        nn.init.eye_(projector.linear_2.weight)
        nn.init.zeros_(projector.linear_2.bias)


def _count_parameters(model: PreTrainedModel) -> dict[str, int]:
    counts = {"vision": 0, "projector": 0, "language": 0}
    for name, parameter in model.named_parameters():
        counts[stage_of("llava", name)] += parameter.numel()
    return counts


# ---------------------------------------------------------------------- files


@contextlib.contextmanager
def _made_aside(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of ``folder`` once it is complete."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _text_logits(model: PreTrainedModel, n: int) -> Tensor:
    """[16, n] float32 logits of the first ``n`` ids on a text of arbitrary tokens."""
    ids = torch.arange(16)[None] * 7 % n
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0, :, :n].float()


def _check_saved(folder: Path, made: Assembly, expected: Tensor, dtype: Dtype) -> None:
    """What was written loads as a stock LLaVA, gives the language model's logits on text, and takes an image."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    loaded: Any = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    model, info = loaded[0].eval(), loaded[1]
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    difference = (_text_logits(model, expected.shape[1]) - expected).abs().max() / expected.abs().max()
    if lost or not difference <= TOLERANCE[dtype]:
        reason = (
            f"weights that do not go over: {', '.join(lost[:3])}"
            if lost
            else f"they differ by {difference:.1%}"
        )
        raise ConfigError(
            f"Inside LlavaForConditionalGeneration this {made.language} would give other logits on text ({reason}): its "
            "head does more than multiply by a matrix, e.g. scales or caps the logits.  Choose another language model."
        )
    images = AutoProcessor.from_pretrained(folder).image_processor
    pixels = blank_pixels(images, made.image_size, made.image_size)
    with torch.no_grad():
        features = model.get_image_features(pixels.to(model.dtype)).pooler_output
    if [len(image) for image in features] != [made.image_tokens]:
        raise ConfigError(
            f"The tower gives {len(features[0])} features for an image, {made.image_tokens} were expected of "
            f"{made.image_size} x {made.image_size} pixels; its config.json does not describe its weights."
        )
