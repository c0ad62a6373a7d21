"""A checkpoint is read by every version of megatron-core that is supported, whichever of them wrote it.

Needs a second environment with the package's requirements: its interpreter is named by the
variable DISTILL_PRETRAIN_OTHER_PYTHON, as `launch/test.sh --matrix` does.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed import run_distributed
from tests.support.versions import CASES, read_all, run_under, write_all

OTHER = os.environ.get("DISTILL_PRETRAIN_OTHER_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not OTHER, reason="no second environment (launch/test.sh --matrix)"),
]
TOLERANCE = 3e-7  # under another layout; of terms of about 5
TOLERANCE_BF16 = 3e-3  # of bf16 under another torch, whose products are summed in another order


@pytest.fixture(scope="module", params=["written there, read here", "written here, read there"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How runs went on where they were written, how where they were read, and whether one torch computed both."""
    folder: Path = tmp_path_factory.mktemp("versions")
    if request.param.startswith("written there"):
        unbroken, other_torch = run_under(OTHER, "write", folder)
        resumed = run_distributed(read_all, 2, folder=str(folder))
    else:
        unbroken = run_distributed(write_all, 2, folder=str(folder))
        resumed, other_torch = run_under(OTHER, "read", folder)
    own, other = (version.split("+")[0] for version in (torch.__version__, other_torch))
    return unbroken, resumed, own == other


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_under_another_version(runs: Any, name: str) -> None:
    unbroken, resumed, is_one_torch = runs
    if is_one_torch:
        assert resumed[name]["same"] == unbroken[name]
    is_coarse = CASES[name].precision == "bf16" and not is_one_torch
    tolerance = TOLERANCE_BF16 if is_coarse else TOLERANCE
    for which in ("same", "other"):
        for step, expected in zip(resumed[name][which], unbroken[name], strict=True):
            assert step == pytest.approx(expected, rel=0, abs=tolerance), which
