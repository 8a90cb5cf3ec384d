"""Planted error: `make asan` fails unless AddressSanitizer reports that the extension reads past this array."""

import numpy as np

from lineas import _core

memory = np.zeros((4, 64), np.float32)
claims = np.lib.stride_tricks.as_strided(memory, shape=(4096, 64))
_core.sort_columns([claims], ["claims"], 1)
print("not reported")
