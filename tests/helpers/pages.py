"""Pages of the documentation whose code is run."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_blocks(page):
    """The blocks of Python code of a page, by its path in the repository."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
