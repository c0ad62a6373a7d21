"""What pyproject.toml cannot say: the C part, the tag of the wheel, and prebuilt CUDA kernels.

DISTILL_PRETRAIN_SLOW_CODER=1 leaves the C part out; the package then codes caches in Python, where the same variable
asks for it, hundreds of times slower. DISTILL_PRETRAIN_PREBUILD=1 puts compiled CUDA kernels into the package.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
PREBUILT = "distill_pretrain/kernels/cuda/prebuilt"
# Loaded with ctypes: it calls nothing of Python's, so that one build serves every version.
CODER = Extension(
    "distill_pretrain.cache.codec.hc._hc",
    ["distill_pretrain/cache/codec/hc/_hc.c"],
    extra_compile_args=["-O3"],
)


class BuildPython(build_py):
    """With DISTILL_PRETRAIN_PREBUILD=1 and a CUDA toolkit, compiled kernels go into the package; see prebuild.py."""

    def run(self):
        """Needs torch: pip install --no-build-isolation."""
        super().run()
        if os.environ.get("DISTILL_PRETRAIN_PREBUILD") == "1":
            root = ROOT if self.editable_mode else Path(self.build_lib)
            command = [sys.executable, "-m", "distill_pretrain.kernels.cuda.prebuild"]
            subprocess.run([*command, str((root / PREBUILT).absolute())], cwd=ROOT, check=True)


class BuildLibrary(build_ext):
    """Builds a plain shared library, whose name has no version of Python in it."""

    def get_ext_filename(self, fullname):
        """_hc.so, where Python's own extensions would be _hc.cpython-312-x86_64-linux-gnu.so."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext):
        """Build it, or say what can be done where it cannot be built."""
        try:
            super().build_extension(ext)
        except Exception as error:
            raise SystemExit(
                f"distill-pretrain: error: {ext.sources[0]}, the fast coder of caches, could not be compiled: {error}\n"
                "remedy: put a C compiler (such as gcc) on PATH; or set DISTILL_PRETRAIN_SLOW_CODER=1, now and "
                "whenever the package runs, to code caches in Python, hundreds of times slower"
            ) from error


class TagWheel(bdist_wheel):
    """Tags the wheel for the platform and for no version of Python."""

    def get_tag(self):
        """py3-none-PLATFORM, or py3-none-any without the C part."""
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[] if os.environ.get("DISTILL_PRETRAIN_SLOW_CODER") == "1" else [CODER],
    cmdclass={"build_py": BuildPython, "build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
