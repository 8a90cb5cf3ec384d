"""What setup.py says where the package cannot be built."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_windows_is_refused():
    script = "import runpy, shutil, sys; sys.platform = 'win32'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "lineas does not build on Windows: its C engine uses POSIX threads and the vector types"
    )
