"""Processor adapters: chat messages and images in, exactly the model's own token ids and tensors out.

    from uniopd_mm.processors import get_processor
    processor = get_processor("Qwen/Qwen2.5-VL-3B-Instruct")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.encode(messages, [image])

Importing this package loads neither torch nor transformers.  At the root of a checkout ``import processors``
hands out the very module objects of ``uniopd_mm.processors``.
"""

import sys

if __name__ == "uniopd_mm.processors":
    from uniopd_mm.processors.base import EncodedPrompt, VLMProcessor
    from uniopd_mm.processors.errors import ProcessorError
    from uniopd_mm.processors.registry import get_processor, register_processor
else:
    # Two copies of one module would mean two ProcessorError classes and two registries.
    import importlib
    import pkgutil

    import uniopd_mm.processors as _package

    for _module in pkgutil.iter_modules(_package.__path__):
        _name = f"{_package.__name__}.{_module.name}"
        sys.modules[f"{__name__}.{_module.name}"] = importlib.import_module(_name)
    sys.modules[__name__] = _package

__all__ = ["EncodedPrompt", "ProcessorError", "VLMProcessor", "get_processor", "register_processor"]
