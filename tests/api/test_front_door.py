"""What `import distill_pretrain` and its public names do to a process: nothing but import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import distill_pretrain

FRESH = """
import os, signal, sys, warnings
import distill_pretrain

heavy = {"torch", "numpy", "megatron", "pydantic"} & set(sys.modules)
assert not heavy, heavy
assert set(distill_pretrain.__all__) <= set(dir(distill_pretrain))

import logging
import numpy
import torch
import torch._dynamo  # torch loads it at a library's first operation, and changes itself by that
import torch.distributed
import torch.utils.data

def state():
    names = {}
    for module in (torch, torch.cuda, torch.cuda.random, torch.distributed, torch.nn.functional, torch.Tensor):
        for name in dir(module):
            if not name.startswith("_"):
                names[module.__name__, name] = getattr(module, name)
    return names, {
        # torch's compiler, which torch loads at the first operation of a library, leaves these two.
        "environment": {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"},
        "warnings": [entry for entry in warnings.filters if "sympy" not in str(entry)],
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "sys": (sys.excepthook, sys.stdout, sys.stderr, list(sys.path)),
        "logging": (list(logging.root.handlers), logging.root.level),
        "defaults": (torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()),
        "determinism": (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        "torch random": torch.get_rng_state().tolist(),
        "numpy random": str(numpy.random.get_state()),
        "sharing": torch.multiprocessing.get_sharing_strategy(),
    }

names, values = state()
for name in distill_pretrain.__all__:
    getattr(distill_pretrain, name)

from distill_pretrain import *

plan = SequencePlan(TokenIndex.open(sys.argv[1] + "/train"), seq_len=32, seed=1)
data = DistillationDataset(plan, sys.argv[1] + "/cache")
batch = collate_distillation([data[number] for number in range(4)])
targets = [batch[name] for name in ("labels", "ids", "probs")]
linear_sparse_kd_loss(torch.zeros(4, 32, 8), torch.zeros(64, 8, requires_grad=True), *targets).backward()
sparse_kd_loss(torch.zeros(4, 32, 64, requires_grad=True), *targets).backward()

again, found = state()
changed = {name: (value, found[name]) for name, value in values.items() if found[name] != value}
assert not changed, changed
moved = [name for name, value in names.items() if again[name] is not value and again[name] != value]
assert not moved, moved
foreign = {name.split(".")[0] for name in sys.modules} & {"megatron", "transformers", "deepspeed", "accelerate"}
assert not foreign, foreign
"""


def test_nothing_is_changed_and_nothing_heavy_imported_before_its_time(folder):
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_names_that_are_none_are_refused_as_of_any_module():
    with pytest.raises(AttributeError, match="module 'distill_pretrain' has no attribute 'cache_'"):
        distill_pretrain.cache_  # noqa: B018


def test_every_name_has_a_docstring_and_the_package_says_that_it_is_typed():
    for name in distill_pretrain.__all__:
        assert name == "__version__" or getattr(distill_pretrain, name).__doc__, name
    assert Path(distill_pretrain.__file__).with_name("py.typed").exists()


def test_no_public_name_is_also_a_folder_of_the_package():
    # The folder, once imported, would take the name's place.
    root = Path(distill_pretrain.__file__).parent
    assert not {p.stem for p in root.iterdir()} & set(distill_pretrain.__all__)
