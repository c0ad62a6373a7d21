"""The Markdown of `bench_rivals.py`."""

from __future__ import annotations

from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """All tables of a report."""
    teacher = report["teacher"]
    parts = [
        f"{report['tokens']:,} positions, V = {teacher['vocab_size']:,}; the teacher's mean entropy "
        f"{teacher['entropy']:.2f} nats, mean largest probability {teacher['top1']:.3f}.",
        layout_table(report),
        *(f"Not measured: {name}: {reason}." for name, reason in report["missing"].items()),
        matched_table(report),
        step_table(report),
    ]
    if report["students"]:
        parts.append(student_table(report))
    return "\n\n".join(parts)


def layout_table(report: dict[str, Any]) -> str:
    """What is kept, its bytes and times, and how far it is from the teacher."""
    lines = [
        "| kept as | B/token | ids | kept mass | write s/Mtok | read s/Mtok | squared error | squared bias "
        "| gradient: error | bias |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in sorted(report["layouts"].items(), key=lambda item: item[1]["bytes_per_token"]):
        truth = row["gradient_squared"]
        gradient = {key: value / truth for key, value in row["gradient"].items()}
        lines.append(
            f"| {titled(name, row)} | {row['bytes_per_token']:.1f} | {row['entries_per_token']:.1f} "
            f"| {row['kept_mass']:.3f} | {row['write_s_per_mtok']:,.0f} | {row['read_s_per_mtok']:.1f} "
            f"| {row['target']['squared_error']:.1e} | {bias(row['target'])} "
            f"| {gradient['squared_error']:.1e} | {bias(gradient)} |"
        )
    return "\n".join(lines)


def within(report: dict[str, Any], size: float) -> str | None:
    """The largest sample of ours in at most so many bytes per token."""
    ours = {
        name: row["bytes_per_token"]
        for name, row in report["layouts"].items()
        if row["use"] == "as drawn" and row["bytes_per_token"] <= size
    }
    return max(ours, key=ours.__getitem__) if ours else None


def matched_table(report: dict[str, Any]) -> str:
    """Each other layout beside a sample of ours in its bytes, and in a tenth of them."""
    lines = [
        "| gradient's squared error, relative | B/token | error, all bias | ours in as many bytes | error, no bias "
        "| ours in a tenth | error, no bias |",
        "|---|--:|--:|---|--:|---|--:|",
    ]
    rows = report["layouts"]
    for name, row in rows.items():
        if row["basis"] == "this project":
            continue
        cells = [name, f"{row['bytes_per_token']:.1f}", f"{relative(row):.1e}"]
        for share in (1.0, 0.1):
            ours = within(report, share * row["bytes_per_token"])
            size = f"{ours}: {rows[ours]['bytes_per_token']:.1f}" if ours else "none"
            cells += [size, f"{relative(rows[ours]):.1e}" if ours else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def relative(row: dict[str, Any]) -> float:
    """Squared error of the gradient over its own square."""
    return float(row["gradient"]["squared_error"] / row["gradient_squared"])


def titled(name: str, row: dict[str, Any]) -> str:
    """Whose layout it is, with its name."""
    return f"ours, {name}" if row["basis"] == "this project" else name


def bias(figures: dict[str, float]) -> str:
    """A squared bias; 0 with its error where it is within two of them."""
    error = figures.get("squared_bias_standard_error")
    if error is None:
        return f"{figures['squared_bias']:.1e}"
    if abs(figures["squared_bias"]) < 2 * error:
        return f"0 ± {error:.0e}"
    return f"{figures['squared_bias']:.1e} ± {error:.0e}"


def step_table(report: dict[str, Any]) -> str:
    """What the losses cost, and whether ours is theirs."""
    step = report["step"]
    lines = [
        f"| loss, forward and backward, {step['rows']:,} positions, one core | ms | least - most | of cross-entropy |",
        "|---|--:|--:|--:|",
    ]
    for name, row in step["losses"].items():
        lines.append(
            f"| {name} | {1e3 * row['median_s']:,.0f} | {1e3 * row['least_s']:,.0f} - {1e3 * row['most_s']:,.0f} "
            f"| {row['ratio']:.2f} |"
        )
    for name, gap in report.get("same_loss", {}).items():
        lines.append(
            f"\nOur loss with the ghost token less `topk_kl_div` on the targets of {name}: at most {gap['loss']:.0e} "
            f"of a position's loss, {gap['gradient']:.0e} in any component of the gradient."
        )
    return "\n".join(lines)


def student_table(report: dict[str, Any]) -> str:
    """Held-out figures of students, by KL, with the bytes of our cache and of the rival's own files."""
    found = report["students"]
    lines = [
        f"Students after {found['steps']} equal steps ({found['tokens']:,} tokens), seeds "
        f"{', '.join(map(str, found['seeds']))}; the teacher's held-out CE is {found['teacher']['ce']:.3f}.",
        "",
        "| targets | held-out KL | CE | ECE | B/token, our format | the other's own |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    cells = found["cells"].items()
    for name, cell in sorted(cells, key=lambda item: item[1]["kl"]["mean"]):
        other = report["layouts"].get(cell["stands_for"] or "")
        whose = f"{name} ({cell['stands_for']})" if cell["stands_for"] else name
        size, theirs = cell["bytes_per_token"], other and other["bytes_per_token"]
        lines.append(
            f"| {whose} | {figure(cell['kl'], 3)} | {figure(cell['ce'], 3)} | {figure(cell['ece'], 3)} "
            f"| {'' if size is None else f'{size:.1f}'} | {'' if theirs is None else f'{theirs:.1f}'} |"
        )
    return "\n".join(lines)


def figure(mean: dict[str, float | None], places: int) -> str:
    """A mean, with the spread over seeds where there are several."""
    spread = "" if mean["spread"] is None else f" ± {mean['spread']:.{places}f}"
    return f"{mean['mean']:.{places}f}{spread}"
