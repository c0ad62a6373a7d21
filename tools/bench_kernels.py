"""Measures the CUDA kernels of the loss and the LM head beside what others do, on this machine's GPU.

    python tools/bench_kernels.py [--rows 8192] [--columns 128256] [--output FILE.json] [--markdown FILE.md]

Forward and backward passes over bf16 logits. Each way runs in turns, after a copy of the same logits that is measured
by itself and whose time is taken off; medians. The copy is also the bandwidth that the others are compared with.
Without a GPU it says so and ends with status 77.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reporting import append_line, command_line, environment, write_json

from distill_pretrain.contracts import SparseTargets
from distill_pretrain.kernels.chunked_head.op import chunked_head
from distill_pretrain.kernels.cuda.backend import Backend
from distill_pretrain.kernels.sparse_kd import stages
from distill_pretrain.kernels.sparse_kd.loss import Loss
from distill_pretrain.kernels.sparse_kd.op import sparse_kd
from distill_pretrain.kernels.sparse_kd.problem import MAX_COLUMNS, MAX_ENTRIES
from distill_pretrain.kernels.sparse_kd.settings import LossSettings
from distill_pretrain.losses.backend import LossBackend
from distill_pretrain.losses.sparse_kd import prepare_loss

NO_GPU = 77
ROUNDS, ENTRIES, HEAD_TOKENS, HIDDEN = 15, 50, 4096, 4096
Way = Callable[[torch.Tensor], Any]


def timed(action: Callable[[], Any]) -> float:
    """Milliseconds on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turns(actions: dict[str, Callable[[], Any]]) -> dict[str, dict[str, Any]]:
    """Median milliseconds and peak bytes of each; what cannot run says why."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    found: dict[str, dict[str, Any]] = {name: {} for name in actions}
    for number in range(ROUNDS + 3):
        for name, action in actions.items():
            if "failed" in found[name]:
                continue
            try:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                ms = timed(action)
                found[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                continue
            if number >= 3:
                times[name].append(ms)
    for name, some in times.items():
        if some and "failed" not in found[name]:
            found[name] |= {"ms": statistics.median(some), "fastest_ms": min(some)}
    return found


def make_targets(
    rows: int, columns: int, device: str = "cuda"
) -> tuple[torch.Tensor, SparseTargets]:
    """Labels, and `ENTRIES` distinct ids per row."""
    step = columns // ENTRIES
    offsets = torch.randint(0, step, (rows, ENTRIES), device=device)
    ids = offsets + step * torch.arange(ENTRIES, device=device)
    probs = torch.rand(rows, ENTRIES, device=device).softmax(-1)
    labels = torch.randint(0, columns, (rows,), device=device)
    return labels, SparseTargets(ids=ids, probs=probs)


def make_loss(
    labels: torch.Tensor,
    targets: SparseTargets | None,
    columns: int,
    backend: Backend = "cuda",
) -> Loss:
    return prepare_loss(
        labels,
        targets,
        LossSettings(ce_weight=0.3, kd_weight=0.7),
        vocab_size=columns,
        tensor_group=None,
        num_columns=columns,
        backend=LossBackend(name=backend),
    )


def both_passes(losses: Callable[[torch.Tensor], torch.Tensor], logits: torch.Tensor) -> None:
    z = logits.requires_grad_()
    losses(z.view_as(z)).sum().backward()
    z.grad = None
    z.requires_grad_(False)


def plain(labels: torch.Tensor, targets: SparseTargets, logits: torch.Tensor) -> torch.Tensor:
    """CE + sparse KL as one writes it in torch."""
    log_p = logits.float().log_softmax(-1)
    ce = -log_p.gather(1, labels[:, None])[:, 0]
    cross = (targets.probs * log_p.gather(1, targets.ids)).sum(-1)
    return 0.3 * ce + 0.7 * (torch.special.xlogy(targets.probs, targets.probs).sum(-1) - cross)


def eager_offline_kd(
    labels: torch.Tensor, targets: SparseTargets, logits: torch.Tensor
) -> torch.Tensor:
    """The passes of an eager vocabulary-parallel top-K KL beside a cross-entropy: about 88 bytes per logit."""
    z = logits.float()
    shifted = z - z.amax(-1, keepdim=True).detach()
    log_sum = shifted.exp().sum(-1, keepdim=True).log()
    log_p = shifted - log_sum
    probs = targets.probs
    kl = (probs * (probs.clamp(min=1e-9).log() - log_p.gather(1, targets.ids))).sum(-1)
    ce = torch.nn.functional.cross_entropy(z, labels, reduction="none")
    return 0.3 * ce + 0.7 * kl


def others(labels: torch.Tensor) -> dict[str, Way]:
    """Cross-entropy kernels of other projects that can be imported here; they know no sparse KL."""
    ways: dict[str, Way] = {}
    try:
        from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

        def transformer_engine(logits: torch.Tensor) -> torch.Tensor:
            return parallel_cross_entropy(
                logits.unsqueeze(0), labels.unsqueeze(0), 0.0, False, None
            )

        ways["Transformer Engine Triton, CE alone"] = partial(both_passes, transformer_engine)
    except Exception as error:
        print(f"Transformer Engine is not compared: {error}")
    try:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        def liger(logits: torch.Tensor) -> torch.Tensor:
            return LigerCrossEntropyFunction.apply(logits, labels, None)[0]

        ways["Liger, CE alone"] = partial(both_passes, liger)
    except Exception as error:
        print(f"Liger is not compared: {error}")
    return ways


def loss_ways(rows: int, columns: int) -> dict[str, Way]:
    labels, targets = make_targets(rows, columns)
    kernels = make_loss(labels, targets, columns)
    compiled = torch.compile(partial(plain, labels, targets))

    def three_stages(logits: torch.Tensor) -> None:
        seen = stages.forward(logits, kernels)
        stages.gradient_(logits, kernels, seen.saved, torch.ones_like(seen.losses))

    return {
        "three stages, CE + KL": three_stages,
        "fused, CE + KL": partial(stages.loss_and_gradient_, loss=kernels),
        "operation with autograd, CE + KL": partial(
            both_passes, lambda logits: sparse_kd(logits, kernels)[0]
        ),
        "reference, CE + KL": partial(
            both_passes, lambda z: sparse_kd(z, replace(kernels, backend="reference"))[0]
        ),
        "torch.compile, CE + KL": partial(both_passes, compiled),
        "eager offline KD, CE + KL": partial(
            both_passes, partial(eager_offline_kd, labels, targets)
        ),
        **others(labels),
    }


def bench_loss(rows: int, columns: int) -> dict[str, Any]:
    """Every way over [rows, columns] bf16, with the bytes per logit that its time is worth at the copy's bandwidth."""
    torch.manual_seed(0)
    original = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) * 3
    logits = torch.empty_like(original)

    def after_copy(way: Way) -> None:
        logits.copy_(original)
        way(logits)

    actions: dict[str, Callable[[], Any]] = {"copy": lambda: logits.copy_(original)}
    actions |= {name: partial(after_copy, way) for name, way in loss_ways(rows, columns).items()}
    found = in_turns(actions)
    copy = found["copy"]["ms"]
    bandwidth = 2 * original.nbytes / copy / 1e6
    for name, result in found.items():
        if "ms" in result and name != "copy":
            result["ms"] -= copy
            result["fastest_ms"] -= copy
            result["bytes_per_logit"] = result["ms"] * bandwidth * 1e6 / original.numel()
    return {"shape": [rows, columns], "copy_GB_per_s": bandwidth, "ways": found}


def bench_head(tokens: int, hidden_size: int, columns: int) -> dict[str, Any]:
    """Chunked and full heads, and the three products alone."""
    labels, targets = make_targets(tokens, columns)
    loss = make_loss(labels, targets, columns)
    hidden = torch.randn(tokens, hidden_size, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, hidden_size, device="cuda", dtype=torch.bfloat16) * 0.02

    def run(function: Callable[..., torch.Tensor]) -> None:
        inputs = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        function(*inputs).backward()

    def products() -> None:
        logits = hidden @ weight.t()
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)

    actions: dict[str, Callable[[], Any]] = {
        "three products": products,
        "full head": lambda: run(lambda x, w: sparse_kd(x @ w.t(), loss)[0].sum()),
    }
    for chunk in (1024, 2048, 4096):
        actions[f"chunks of {chunk}"] = partial(
            run, lambda x, w, chunk=chunk: chunked_head(x, w, loss, chunk_tokens=chunk)[0]
        )
    return {"shape": [tokens, hidden_size, columns], "ways": in_turns(actions)}


def append_ways(path: Path | None, part: str, found: dict[str, Any]) -> None:
    """A line of JSON for every way."""
    for name, way in found["ways"].items():
        figures = {"figure": "way", "part": part, "way": name, "shape": found["shape"], **way}
        if "peak_bytes" in way:
            figures["peak_gb"] = round(way["peak_bytes"] / 1e9, 3)
        append_line(path, figures)


def markdown(report: dict[str, Any]) -> str:
    """Tables of what was measured."""
    lines = [f"{report['environment']['gpu']}, {report['environment']['date']}"]
    for part in ("loss", "head"):
        result = report[part]
        lines += ["", f"{part}, {' x '.join(map(str, result['shape']))}, bf16", ""]
        if "copy_GB_per_s" in result:
            lines += [f"copy: {result['copy_GB_per_s']:.0f} GB/s", ""]
        lines += [
            "| | ms | peak GB | bytes per logit at the copy's bandwidth |",
            "|---|---|---|---|",
        ]
        for name, way in result["ways"].items():
            if "failed" in way:
                lines.append(f"| {name} | {way['failed'].splitlines()[0]} | | |")
                continue
            per_logit = f"{way['bytes_per_logit']:.1f}" if "bytes_per_logit" in way else ""
            lines.append(
                f"| {name} | {way['ms']:.3f} | {way['peak_bytes'] / 1e9:.2f} | {per_logit} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = command_line(__doc__, recipe=False, figures=True)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=128_256)
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels: no GPU that torch can use; nothing was measured")
        sys.exit(NO_GPU)
    report = {
        "environment": {**environment("torch"), "gpu": torch.cuda.get_device_name()},
        "limits": {"entries": MAX_ENTRIES, "columns": MAX_COLUMNS},
    }
    # The head first: in the other part torch.compile may take long.
    report["head"] = bench_head(HEAD_TOKENS, HIDDEN, args.columns)
    append_ways(args.figures, "head", report["head"])
    report["loss"] = bench_loss(args.rows, args.columns)
    append_ways(args.figures, "loss", report["loss"])
    text = markdown(report)
    print(text)
    write_json(args.output, report)
    if args.markdown:
        args.markdown.write_text(text)


if __name__ == "__main__":
    main()
