"""Ways to break sparse_kd.cuh, each of which the cases must notice."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_pretrain.kernels.cuda.launcher import KERNELS, KernelSource, Launcher
from distill_pretrain.kernels.sparse_kd import launch
from tests.kernels.sparse_kd_cases import (
    Case,
    Expected,
    capped_checks,
    check,
    mutation_checks,
    run,
)
from tests.support.emulation import EmulationError, emulated

Checks = Sequence[tuple[Case, Expected, str, int]]
SYNC = "    __syncthreads();\n"

# Name: the texts to replace (each is there once), and what replaces them.
MUTANTS: dict[str, list[tuple[str, str]]] = {
    "no barrier at the start of a cluster": [
        ("    cluster_arrive();  // a block's shared", "    // a block's shared"),
        ("    cluster_wait();\n    if", "    if"),
    ],
    "no barrier after the blocks of a cluster exchanged statistics": [
        ("    cluster_synchronise();\n", "")
    ],
    "no barrier between warps' partials and their sum": [
        (
            SYNC + "    if (thread >= WARP_SIZE) return partial;",
            "    if (thread >= WARP_SIZE) return partial;",
        )
    ],
    "no barrier between clearing and setting kept bits": [
        (
            SYNC + "    for (i32 entry = threadIdx.x; entry",
            "    for (i32 entry = threadIdx.x; entry",
        )
    ],
    "no barrier between setting and reading kept bits": [
        (
            "1u << (position - begin) % 32);\n    }\n" + SYNC,
            "1u << (position - begin) % 32);\n    }\n",
        )
    ],
    "no barrier between reading and merging entries (fused)": [
        (SYNC + "    merge_entries(", "    merge_entries(")
    ],
    "no barrier between reading and merging entries (combine)": [
        ("    __syncwarp();\n    merge_entries(", "    merge_entries(")
    ],
    "no barrier before the scalars are read (fused)": [
        (SYNC + "    const float incoming", "    const float incoming")
    ],
    "no barrier between bulk and entries (fused)": [
        (
            SYNC + "    write_entries<GENERAL, CAPPED>(a, row, view, begin, end, picks, subtracted",
            "    write_entries<GENERAL, CAPPED>(a, row, view, begin, end, picks, subtracted",
        )
    ],
    "no barrier between bulk and entries (gradient)": [
        (SYNC + "    const i64 first_pick", "    const i64 first_pick")
    ],
    "others are relative to the row's maximum": [
        ("scalars.outside.max = anchor(whole.outside_max);", "")
    ],
    "the others' share of the CE is not lowered": [
        ("scalars.kept.plain * lowered", "scalars.kept.plain")
    ],
    "the others' share of the target's mass is not lowered": [
        ("(target_mass * tempered_lowered - ", "(target_mass - ")
    ],
    "the others' sum is not lowered": [("whole.outside * tempered_lowered;", "whole.outside;")],
    "the others' sum is lowered without the temperature": [
        ("tempered_lowered = exp_approx(distance * inverse_tau)", "tempered_lowered = lowered")
    ],
    "the others' maximum is missing from the KL": [("(distance * inverse_tau + logf", "(logf")],
    "columns of -inf are divided by": [("fmaxf(whole.outside, 1.0f)", "whole.outside")],
    "kept sums are relative to their own maximum": [
        ("        move_to<GENERAL>(kept, whole.max, settings);\n", "")
    ],
    "kept columns count among the others too": [
        ("        vector.set(i, Format<T>::from_bits(Format<T>::MINUS_INFINITY));\n", "")
    ],
    "only the last part knows the others' maximum": [
        (
            "fmaxf(whole.outside_max, parts.first[i * parts.stride].outside_max)",
            "parts.first[i * parts.stride].outside_max",
        )
    ],
    "a maximum of -inf is subtracted": [("max == -infinity() ? 0.0f : max", "max")],
    "the sum is not rescaled": [("    sums.plain *= exp_approx(distance);\n", "")],
    "the tempered sum is not rescaled": [
        ("    if (GENERAL) sums.tempered *= exp_approx(distance * settings.inverse_tau);\n", "")
    ],
    "the tempered sum is rescaled without the temperature": [
        ("exp_approx(distance * settings.inverse_tau)", "exp_approx(distance)")
    ],
    "the total is not moved": [("partial.count * (anchor", "0.0f * (anchor")],
    "warps' totals are not moved": [("a.count * (anchor(a.others.max) - base)", "0.0f")],
    "kept columns count as outside": [("    if (kept == 0) return;\n", "    return;\n")],
    "kept sums of a warp are not merged": [
        ("        merged<GENERAL>(a.kept, b.kept, settings),\n", "        a.kept,\n")
    ],
    "no column is tempered": [
        ("settings.is_tempered ? tempered.of(logit) : exponential", "exponential")
    ],
    "padding counts in the total": [
        ("settings.has_floor && (real >> j & 1)", "settings.has_floor")
    ],
    "padding counts as columns": [("float(__popc(real))", "float(Vector<T>::SIZE)")],
    "the label's logit is not shifted": [("picks[0] - base", "picks[0]")],
    "the targets' logits are not shifted": [("(picks[1 + entry] - base)", "picks[1 + entry]")],
    "parts' sums are not rescaled": [("part.sum * scale", "part.sum")],
    "parts' inside sums are not rescaled": [("part.inside * inside_scale", "part.inside")],
    "parts' outside sums are rescaled without the temperature": [
        ("(part.outside_max - outside_base) * inverse_tau", "part.outside_max - outside_base")
    ],
    "parts' totals are not moved": [("part.total + columns * moved", "part.total")],
    "parts' targets are not moved": [("part.cross + part.mass * moved", "part.cross")],
    "the label's part is not moved": [("part.label + moved", "part.label")],
    "duplicates do not add up": [("prob += entries[j].prob;", "prob = entries[j].prob;")],
    "duplicates count twice": [("if (j < i) is_first = false;", "")],
    "any ids count as ascending": [("(id >= 0 && id < next)", "true")],
    "the floor is not in the entropy": [("x_log_x(prob + floor)", "x_log_x(prob)")],
    "kept ids count among the floor's": [("(a.vocab_size - num_kept)", "(a.vocab_size)")],
    "the floor's logits are missing from the KL": [("whole.total * inverse_tau - ", "0.0f - ")],
    "the bucket's student mass is missing from the KL": [
        ("bucket * (distance * inverse_tau + logf(whole.outside) - log_tempered_sum)", "0.0f")
    ],
    "the targets' logits are not tempered": [("whole.cross * inverse_tau", "whole.cross")],
    "z-loss without its square": [("a.z_loss * lse * lse;\n", "a.z_loss * lse;\n")],
    "z-loss gradient halved": [("2.0f * a.z_loss * lse)", "a.z_loss * lse)")],
    "the gradient's 1 / tau is missing": [("kd_scale * inverse_tau;", "kd_scale;")],
    "the bucket does not push its columns up": [
        ("(target_mass * tempered_lowered - bucket * odds)", "target_mass * tempered_lowered")
    ],
    "the bucket does not push kept columns down": [("(target_mass + bucket)", "target_mass")],
    "the floor has no mass": [("mass + a.vocab_size * floor", "mass")],
    "the floor is not subtracted": [(" + tempered * other - floor;", " + tempered * other;")],
    "the floor's gradient lacks the target's weight": [("at_target * floor;", "floor;")],
    "a kept label is not subtracted": [("(is_label ? a.ce_weight : 0.0f)", "0.0f")],
    "a kept label is written twice": [("has_label && !label_is_kept ?", "has_label ?")],
    "the label's column counts as kept": [("GENERAL && i > 0 ? times", "GENERAL ? times")],
    "entries ignore the incoming gradient": [("bulk - taken * incoming", "bulk - taken")],
    "the floor ignores the incoming gradient": [
        ("scalars.floor * incoming, 1.0f}", "scalars.floor, 1.0f}")
    ],
    "rows that take no part are computed": [
        ("if (scalars.is_active == 0.0f) loaded[i] = Vector<T>::filled(0);", "")
    ],
    "rows that take no part are read": [
        (
            "scalars.is_active != 0.0f ? view.load(vector) : Vector<T>::filled(0)",
            "view.load(vector)",
        )
    ],
    "tiles of rows that take no part are read": [
        ("if (scalars.is_active != 0.0f && past <= end", "if (past <= end")
    ],
    "vectors before a row count as whole": [("begin * SIZE >= offset && end", "end")],
    "vectors after a row count as whole": [(" && end * SIZE <= real_end;", ";")],
    "a tile is not cut at a chunk's end": [("past <= end && view", "view")],
    "the sum is not moved to a tile's maximum": [
        (
            "        others.plain *= exp2_approx(__fmul_rn(others.max, LOG2_E) - Exponent(max, LOG2_E).shift);\n",
            "",
        )
    ],
    "the tempered sum is not moved to a tile's maximum": [
        (
            "exp2_approx(__fmul_rn(others.max, tempered_scale) - Exponent(max, tempered_scale).shift)",
            "1.0f",
        )
    ],
    "what an exponent's rounding left out stays out of the sums": [
        ("    others.plain *= Exponent(others.max, LOG2_E).correction(others.max);\n", "")
    ],
    "what an exponent's rounding left out stays out of the tempered sums": [
        (
            "Exponent(others.max, LOG2_E * settings.inverse_tau).correction(others.max)",
            "1.0f",
        )
    ],
    "what an exponent's rounding left out stays out of the gradient": [
        ("plain(bulk.plain * plain_exponent.correction(bulk.max))", "plain(bulk.plain)")
    ],
    "what an exponent's rounding left out stays out of the tempered gradient": [
        (
            "tempered(bulk.tempered * tempered_exponent.correction(bulk.max))",
            "tempered(bulk.tempered)",
        )
    ],
    "padding of a vector is read": [
        ("position + i < real_end) partial.set", "position + i < end) partial.set")
    ],
    "padding within a vector gets a gradient": [
        ("position + i < real_end ? values.get(i) : T{}", "values.get(i)")
    ],
    "padding vectors get a gradient": [
        ("if (position >= real_end) values =", "if (false) values =")
    ],
    "what lies before a row is overwritten": [
        (
            "if (position + i < offset || position + i >= end) continue;",
            "if (position + i >= end) continue;",
        )
    ],
    "rows count as aligned": [("offset = i32(((u64)first & 15) / sizeof(T));", "offset = 0;")],
    "a second tempered exponential is left out": [
        (
            "settings.is_tempered ? tempered_exponent.of(logit) : exponential",
            "exponential",
        )
    ],
}

CAPPED_MUTANTS: dict[str, list[tuple[str, str]]] = {
    "sums are of logits that are not capped": [
        ("const float logit = seen<CAPPED>(values[j], settings);", "const float logit = values[j];")
    ],
    "kept logits are not capped": [
        (
            "seen<CAPPED>(Format<T>::value(vector.get(i)), settings)",
            "Format<T>::value(vector.get(i))",
        )
    ],
    "the gradient is at logits that are not capped": [
        ("const float logit = seen<CAPPED>(values[i], settings);", "const float logit = values[i];")
    ],
    "the entries' logits are not capped": [
        (
            "seen<CAPPED>(Format<T>::value(view.aligned[position]), settings)",
            "Format<T>::value(view.aligned[position])",
        )
    ],
    "the gradient stops before the cap": [
        ("        if (CAPPED) values[i] *= slope<CAPPED>(logit, settings);\n", "")
    ],
    "the entries' gradient stops before the cap": [
        ("CAPPED ? gradient * slope<CAPPED>(picks[i], settings) : gradient", "gradient")
    ],
    "the slope is not squared": [("1.0f - share * share", "1.0f - share")],
    "columns of -inf are capped": [("!CAPPED || logit == -infinity()", "!CAPPED")],
}
"""Those of the kernels that cap logits."""
MUTANTS |= CAPPED_MUTANTS


@dataclass(frozen=True)
class Renamed:
    """A launcher of kernels that are in another namespace."""

    launcher: Launcher
    namespace: str

    def launch(self, kernel: str, arguments: ctypes.Structure, **shape: Any) -> None:
        self.launcher.launch(in_namespace(kernel, self.namespace), arguments, **shape)


def in_namespace(text: str, namespace: str) -> str:
    return text.replace("sparse_kd::", f"{namespace}::")


def mutated(name: str | None) -> str:
    """The source with one mutation, or none."""
    text = (KERNELS / launch.SOURCE.folder / launch.SOURCE.entry).read_text("utf-8")
    for old, new in MUTANTS[name] if name else ():
        assert text.count(old) == 1, f"{name}: {old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def noticed(names: Sequence[str | None], folder: Path) -> Iterator[str | None]:
    """For each mutation (None for the right source): which case shows that it is wrong, and how; None if none does.

    They are compiled together, each in a namespace of its own, into an empty folder.
    """
    kernels: list[str] = []
    text = ""
    for number, name in enumerate(names):
        space = f"mutant_{number}"
        source = launch.CAPPED if name in CAPPED_MUTANTS else launch.SOURCE
        text += mutated(name).replace("namespace sparse_kd", f"namespace {space}")
        kernels += [
            in_namespace(kernel, space)
            for kernel in source.kernels
            if "bf16" in kernel or "<" not in kernel
        ]
    shutil.copytree(KERNELS / "cuda", folder / "cuda", ignore=shutil.ignore_patterns("*.py", "__*"))
    (folder / "mutants").mkdir()
    (folder / "mutants/all.cuh").write_text(text, "utf-8")
    source = KernelSource(folder="mutants", entry="all.cuh", kernels=tuple(kernels))
    for number, name in enumerate(names):
        checks = capped_checks() if name in CAPPED_MUTANTS else mutation_checks()
        yield first_failure(source, f"mutant_{number}", folder, checks)


def first_failure(source: KernelSource, namespace: str, folder: Path, checks: Checks) -> str | None:
    for case, expected, layout, schedule in checks:
        launcher = emulated(source, schedule=schedule, folder=folder, optimised=False)
        # Where rows are a multiple of eight apart, padding vectors are whole.
        gap, start = (8, 0) if schedule % 2 == 0 else (3, 1)
        try:
            result = run(Renamed(launcher, namespace), case, layout, gap=gap, start=start)
            check(result, expected)
        except (AssertionError, EmulationError) as error:
            message = " ".join(str(error).split())
            reason = "loss or its terms" if message.startswith("Tensor") else message[:90]
            return f"{layout}, schedule {schedule}: {reason}"
    return None


def poison_buffers() -> None:
    """Make the host code's buffers start as NaN."""
    empty = launch._floats
    launch._floats = lambda *shape: empty(*shape).fill_(float("nan"))
