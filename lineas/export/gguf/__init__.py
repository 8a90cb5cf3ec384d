"""Maps for llama.cpp: folded into a GGUF file, as a GGUF control vector, as a GGUF LoRA adapter; needs no torch.

`container` reads a file's header and copies files, `families` knows the norms of a model family and what reads
them, `sites` finds the tensors that a map is about; `folding`, `vectors` and `adapter` are what users call.
"""

from ...maps.digest import digest
from .adapter import lora
from .families import architectures, module_name, tensor_name
from .folding import fold
from .vectors import control_vector, read_control_vector

__all__ = [
    "architectures",
    "control_vector",
    "digest",
    "fold",
    "lora",
    "module_name",
    "read_control_vector",
    "tensor_name",
]
