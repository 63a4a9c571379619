"""Lets torchvision be imported beside the CPU build of torch; on PYTHONPATH of the test servers only.

The torchvision that PyPI has is built for CUDA.  Beside a CPU torch its compiled operators do not load, and its module
``_meta_registrations``, which describes them to torch, then fails at import ("operator torchvision::nms does not
exist").  vLLM's image processors use none of those operators, only torchvision's transforms, which are plain
torch.  So an empty module stands in for the one that fails.  A torchvision built for the CPU works with it too.

Never a way to run torchvision for real: detection operators are missing without a word.
"""

import sys
import types

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))
