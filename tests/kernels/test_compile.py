"""Every kernel compiles for every architecture that is promised, and keeps its registers; no GPU is needed."""

from __future__ import annotations

import pytest

from distill_pretrain.kernels.cuda import nvrtc
from tools import compile_kernels


@pytest.fixture(scope="module", autouse=True)
def _compiler():
    try:
        nvrtc.load()
    except nvrtc.NvrtcMissing as error:
        pytest.skip(f"no NVRTC: {error}")


@pytest.mark.parametrize("architecture", compile_kernels.ARCHITECTURES)
@pytest.mark.parametrize("source", compile_kernels.SOURCES, ids=lambda source: source.folder)
def test_kernels_compile_without_spills(source, architecture):
    # The other dtypes are the same templates: once, for the architecture that most users have.
    if architecture != "sm_90" or source is compile_kernels.CAPPED:
        source = compile_kernels.restricted(source, "bf16")
    usages = list(compile_kernels.compiled(source, architecture))
    assert [usage.kernel for usage in usages] == list(source.kernels)
    assert not compile_kernels.spilling(usages), compile_kernels.table(usages)


def test_spills_are_seen(monkeypatch):
    usage = compile_kernels.Usage(
        kernel="k", architecture="sm_90", registers=64, stack=0, spilled=33
    )
    assert compile_kernels.spilling([usage]) == [usage]
    log = (
        "ptxas info    : Compiling entry function 'name' for 'sm_90'\n"
        "ptxas info    : Function properties for name\n"
        "ptxas         .     48 bytes stack frame, 40 bytes spill stores, 44 bytes spill loads\n"
        "ptxas info    : Used 64 registers, used 1 barriers\n"
    )
    match = compile_kernels.USAGE.search(log)
    assert match is not None
    assert (match["registers"], match["stack"], match["stores"], match["loads"]) == (
        *("64", "48", "40", "44"),
    )
