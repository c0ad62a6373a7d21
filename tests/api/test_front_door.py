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
import torch.distributed
import torch.utils.data

def state():
    names = {}
    for module in (torch, torch.cuda, torch.cuda.random, torch.distributed, torch.nn.functional, torch.Tensor):
        for name in dir(module):
            if not name.startswith("_"):
                names[module.__name__, name] = getattr(module, name)
    return names, (
        dict(os.environ),
        list(warnings.filters),
        {number: signal.getsignal(number) for number in signal.valid_signals()},
        (sys.excepthook, sys.stdout, sys.stderr, list(sys.path)),
        (list(logging.root.handlers), logging.root.level),
        (torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device()),
        (torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        torch.get_rng_state().tolist(),
        str(numpy.random.get_state()),
        torch.multiprocessing.get_sharing_strategy(),
    )

names, values = state()
for name in distill_pretrain.__all__:
    getattr(distill_pretrain, name)

from distill_pretrain import *

plan = SequencePlan(TokenIndex.open(sys.argv[1] + "/train"), seq_len=32, seed=1)
data = DistillationDataset(plan, sys.argv[1] + "/cache")
batch = next(iter(torch.utils.data.DataLoader(data, batch_size=4, collate_fn=collate_distillation)))
targets = [batch[name] for name in ("labels", "ids", "probs")]
linear_sparse_kd_loss(torch.zeros(4, 32, 8), torch.zeros(64, 8, requires_grad=True), *targets).backward()
sparse_kd_loss(torch.zeros(4, 32, 64, requires_grad=True), *targets).backward()

again, found = state()
# A DataLoader draws the base seed of its workers.
assert values[:-3] == found[:-3], (values, found)
assert values[-2:] == found[-2:]
moved = [name for name, value in names.items() if again[name] is not value]
moved = [name for name in moved if callable(names[name])]
foreign = {name.split(".")[0] for name in sys.modules} & {"megatron", "transformers", "deepspeed", "accelerate"}
assert not foreign, foreign
print("moved", [name for name in moved if again[name] != names[name]])
"""


def test_nothing_is_changed_and_nothing_heavy_imported_before_its_time(folder):
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "moved []\n"


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
