"""Instructions per logit: the counting, on code written by hand; and no kernel issues more than recorded."""

from __future__ import annotations

import json

import pytest

from distill_pretrain.kernels.cuda import nvrtc
from tools import compile_kernels, kernel_budget, sass

KERNEL = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
.L_x_1:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
        /*0040*/                   STL [R1], R4 ;
        /*0050*/                   MUFU.EX2 R9, R8 ;
        /*0060*/                   FADD R9, R9, R8 ;
.L_x_2:
        /*0070*/                   MUFU.EX2 R5, R4 ;
        /*0080*/                   MUFU.EX2 R5, R4 ;
        /*0090*/                   MUFU.EX2 R5, R4 ;
        /*00a0*/               @P2 BRA `(.L_x_3) ;
        /*00b0*/                   MUFU.EX2 R5, R4 ;
        /*00c0*/               @P3 STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_3:
        /*00d0*/               @P1 BRA `(.L_x_1) ;
.L_x_4:
        /*00e0*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*00f0*/               @P1 BRA `(.L_x_4) ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   BRA `(.L_x_5) ;
"""


def code() -> sass.Code:
    return sass.read_code(KERNEL)["kernel"]


def test_loops_are_backward_branches():
    assert sass.loops(code()) == [(2, 13), (14, 15), (17, 17)]


def test_the_main_path_has_every_access_and_exponential_and_nothing_rare():
    path = sass.main_path(code(), 4, in_loop=True)
    # Not the three of .L_x_1's rare branch, whose exponential is not one of the four values'.
    assert (path.instructions, path.accesses, path.local) == (9, 2, 0)
    # Twice as many values want more exponentials than there are: half as many do, packed in pairs.
    assert sass.main_path(code(), 2, in_loop=True).instructions == 9


def test_a_whole_kernel_ends_at_its_exit_with_each_loop_once():
    path = sass.main_path(code(), 4, in_loop=False)
    assert (path.instructions, path.accesses) == (14, 2)


def test_the_stack_on_the_main_path_is_seen_and_a_kernel_without_the_loop_refused():
    changed = KERNEL.replace("@P0 BRA `(.L_x_2)", "@P0 NOP")
    path = sass.main_path(sass.read_code(changed)["kernel"], 4, in_loop=True)
    assert (path.instructions, path.local) == (12, 1)
    with pytest.raises(ValueError, match="no loop"):
        sass.main_path(sass.read_code(KERNEL.replace(".128", ""))["kernel"], 4, in_loop=True)


def test_a_pass_takes_the_longer_of_moving_and_issuing(monkeypatch):
    card = kernel_budget.Card(
        name="X", architecture="sm_90", multiprocessors=100, clock_ghz=1.0, gb_per_s=1000
    )
    # 12.8 T lanes/s and 2 bytes a logit: 25.6 instructions are free.
    assert kernel_budget.free_instructions("row_statistics", "bf16", card) == pytest.approx(25.6)
    for instructions, ms in ((10.0, 2.0), (51.2, 4.0)):
        monkeypatch.setattr(
            kernel_budget,
            "counted",
            lambda n=instructions: {"sm_90": {"row_statistics<bf16, false>": n}},
        )
        found = kernel_budget.predicted_ms("row_statistics", "bf16", 1000, 10**6, card)
        assert found == pytest.approx(ms)
    assert kernel_budget.predicted_ms("gradient", "bf16", 1, 1, card) is None
    assert kernel_budget.Card.named("NVIDIA H200").gb_per_s == 4300


def test_no_kernel_issues_more_per_logit_than_recorded():
    recorded = json.loads(kernel_budget.COUNTED.read_text())
    try:
        sass.find_disassembler()
        version = nvrtc.load().version
        paths = compile_kernels.main_paths("sm_90", ("bf16",))
    except (nvrtc.NvrtcMissing, sass.DisassemblerMissing) as error:
        pytest.skip(f"{error}")
    if "{}.{}".format(*version) != recorded["nvrtc"]:
        pytest.skip(f"the record is of NVRTC {recorded['nvrtc']}, here is {version}")
    for kernel, path in paths.items():
        found = compile_kernels.per_logit(kernel, path)
        most = recorded["per_logit"]["sm_90"][kernel] + 0.1
        assert found <= most, f"{kernel} issues {found} per logit, {most} are recorded"
        assert path.local == 0 or not path.is_loop, f"{kernel} uses the stack in its main loop"
