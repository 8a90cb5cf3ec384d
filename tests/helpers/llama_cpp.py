"""llama.cpp, out of the package xllamacpp: next tokens of GGUF files, for tests and benchmarks/gguf_parity.py."""

import ctypes
import json

import numpy as np


class LlamaCpp:
    """A model of llama.cpp on the CPU, with keys and values in float32; close it, or use it in a with statement.

    Parameters
    ----------
    path : path
        A GGUF file.
    loras : mapping from path to float, optional
        LoRA adapters and their scales.
    context : int
        The most tokens of a text.
    """

    def __init__(self, path, *, loras=None, context=64, threads=1):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel = context, 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.warmup = settings.fit_params = False
        settings.verbosity = 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.lora_adapters = [
            xllamacpp.CommonAdapterLoraInfo(str(lora), scale) for lora, scale in (loras or {}).items()
        ]
        self._server = xllamacpp.Server(settings)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self._server = None

    def _ask(self, tokens, **settings):
        asked = {"prompt": [int(token) for token in tokens], "temperature": 0.0, "cache_prompt": False, **settings}
        answer = self._server.handle_completions(asked)
        answer = answer if isinstance(answer, dict) else json.loads(answer)
        if "choices" not in answer:
            raise RuntimeError(f"llama.cpp answers {answer}")
        return answer["choices"][0]

    def log_probabilities(self, tokens, size, count=None):
        """Those [size] of the next token after some, of a vocabulary of this size.

        With `count` only those of so many of the likeliest tokens, -inf of the others: numbers travel as text here.
        """
        found = np.full(size, -np.inf)
        (first,) = self._ask(tokens, n_predict=1, n_probs=count or size)["logprobs"]["content"]
        for one in first["top_logprobs"]:
            found[one["id"]] = one["logprob"]
        return found

    def greedy(self, tokens, count):
        """The next `count` tokens, or fewer where the text ends, each the likeliest."""
        answer = self._ask(tokens, n_predict=count, n_probs=1, top_k=1)
        return [one["id"] for one in answer["logprobs"]["content"]]


class Space(ctypes.Structure):
    """Room for a structure of llama.h that is only passed on: larger than any, so that its layout need not be known."""

    _fields_ = (("bytes", ctypes.c_byte * 4096),)


class _Batch(ctypes.Structure):
    """llama_batch: a number of tokens and six pointers."""

    _fields_ = (("count", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6))


def with_control_vector(path, directions, tokens, size):
    """Log-probabilities [size] of the next token, under the directions of a control vector, by name.

    The functions of llama.h, which the extension of xllamacpp exports; AttributeError where it does not.
    """
    import xllamacpp

    pointer, number, single = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_float)
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)

    def function(name, result, *arguments):
        found = getattr(library, name)
        found.restype, found.argtypes = result, arguments
        return found

    log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)
    silent = log(lambda *_: None)
    function("llama_log_set", None, log, pointer)(silent, None)
    model = function("llama_model_load_from_file", pointer, ctypes.c_char_p, Space)(
        str(path).encode(), function("llama_model_default_params", Space)()
    )
    context = function("llama_init_from_model", pointer, pointer, Space)(
        model, function("llama_context_default_params", Space)()
    )
    try:
        # As common_control_vector_load does it: block 1 first, block 0 has none.
        last = max(int(name.removeprefix("direction.")) for name in directions)
        width = len(next(iter(directions.values())))
        data = np.zeros((last, width), np.float32)
        for name, direction in directions.items():
            data[int(name.removeprefix("direction.")) - 1] += direction
        apply = function("llama_set_adapter_cvec", number, pointer, single, ctypes.c_size_t, number, number, number)
        assert apply(context, data.ctypes.data_as(single), data.size, width, 1, last) == 0
        row = (number * len(tokens))(*tokens)
        batch = function("llama_batch_get_one", _Batch, ctypes.POINTER(number), number)(row, len(tokens))
        assert function("llama_decode", number, pointer, _Batch)(context, batch) == 0
        logits = function("llama_get_logits_ith", single, pointer, number)(context, -1)
        found = np.ctypeslib.as_array(logits, (size,)).astype(np.float64)
        return found - np.logaddexp.reduce(found)
    finally:
        function("llama_free", None, pointer)(context)
        function("llama_model_free", None, pointer)(model)
        function("llama_log_set", None, pointer, pointer)(None, None)
