"""Build of the C extension lineas._core; everything else about the package stands in pyproject.toml.

Environment switches, for developers:
  LINEAS_DEBUG=1      -O1 and live assertions
  LINEAS_SANITIZE=1   the same under AddressSanitizer and UndefinedBehaviorSanitizer
  LINEAS_WERROR=1     warnings are errors
"""

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

if sys.platform == "win32":
    raise SystemExit(
        "lineas does not build on Windows: its C engine uses POSIX threads and the vector types of GCC and Clang. "
        "Use it in the Windows Subsystem for Linux."
    )

import numpy as np
import scipy_openblas32 as openblas
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildExt(build_ext):
    """build_ext that puts OpenBLAS beside the extension, where its run path looks for it."""

    def _openblas(self) -> tuple[Path, Path]:
        library = Path(openblas.get_lib_dir(), openblas.get_library(fullname=True))
        return library, Path(self.get_ext_fullpath("lineas._core")).parent / "_libs" / library.name

    def run(self):
        super().run()  # an editable build sets `inplace` in here: ask for the destination only afterwards
        library, home = self._openblas()
        home.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library, home)

    def build_extensions(self):
        # Some Pythons hand on the run path that they were linked with, which would be searched before ours.
        self.compiler.linker_so = [word for word in self.compiler.linker_so if not word.startswith("-Wl,-rpath")]
        # setuptools compiles the files of an extension one after the other.
        compile_one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda source: compile_one([source], **options), sources))
            return [path for paths in objects for path in paths]

        self.compiler.compile = compile_all
        super().build_extensions()

    def get_outputs(self):
        return [*super().get_outputs(), str(self._openblas()[1])]


sanitize = os.environ.get("LINEAS_SANITIZE") == "1"
debug = sanitize or os.environ.get("LINEAS_DEBUG") == "1"

# No contraction into FMA and never -ffast-math: every build of the kernels gives the same bits.
compile_args = [
    "-std=c11",
    "-O3",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wpedantic",
]
# As system headers: NumPy's macros turn object pointers into function pointers, which -Wpedantic would report as ours.
for folder in (np.get_include(), openblas.get_include_dir()):
    compile_args += ["-isystem", folder]
link_args = []
if debug:
    compile_args += ["-O1", "-g", "-UNDEBUG", "-fno-omit-frame-pointer"]
else:
    compile_args += ["-g0"]  # Python's own flags often say -g: 17 MB, and paths of the machine that built it
if sanitize:
    compile_args += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    link_args += ["-fsanitize=address,undefined"]
if os.environ.get("LINEAS_WERROR") == "1":
    compile_args += ["-Werror"]

sources = sorted(str(path) for path in Path("csrc").rglob("*.c"))
headers = sorted(str(path) for path in Path("csrc").rglob("*.h"))

setup(
    ext_modules=[
        Extension(
            "lineas._core",
            sources=sources,
            depends=headers,
            include_dirs=["csrc"],
            define_macros=[
                ("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"),
                ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION"),
                ("LNS_BLAS_SCIPY", "1"),
                ("LNS_API", ""),  # the extension hands none of the engine's functions on
            ],
            library_dirs=[openblas.get_lib_dir()],
            libraries=[openblas.get_library(), "m"],
            runtime_library_dirs=["@loader_path/_libs" if sys.platform == "darwin" else "$ORIGIN/_libs"],
            extra_compile_args=compile_args,
            extra_link_args=[*link_args, "-pthread"],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
