"""Make the tables and the plot of a result of gpu_speed.py: `python benchmarks/gpu_speed_report.py RESULT.json`.

They are written beside the result, as .md and .png. A second file, {"runs": [results]}, holds those of other machines.
The plot needs matplotlib.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

BASELINE = "NVIDIA recipe"


def case_of(row: dict[str, Any]) -> str:
    sequences = f"{row['sequences']} sequences" if row["sequences"] > 1 else "one sequence"
    return f"{row['model']}, {row['tokens']:,} tokens in {sequences}, {row['mode']}"


def speed_up(row: dict[str, Any], baseline: float | None) -> str:
    return f"{baseline / row['ms']:.2f}" if baseline and row["ms"] else ""


def times_the_recipe(record: dict[str, Any]) -> dict[tuple[str, str], str]:
    """By case and side of the te engine: the time of the recipe of the same precision over ours."""
    rows = {(case_of(row), row["side"]): row for row in record["rows"]}
    ratios = {}
    for (case, side), row in rows.items():
        recipe = rows.get((case, f"{BASELINE}, fp8" if "fp8" in side else BASELINE))
        ratio = speed_up(row, recipe["ms"]) if recipe and side.startswith("te engine") else ""
        if ratio:
            ratios[case, side] = ratio
    return ratios


def summary(record: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """Markdown: the te engine beside the recipe, on this machine and on others."""
    here, *elsewhere = (times_the_recipe(run) for run in (record, *others))
    lines = ["| case | side | ms | x recipe of its precision | on other machines |", "|---" * 5 + "|"]
    for row in record["rows"]:
        key = case_of(row), row["side"]
        if key in here:
            others_found = ", ".join(run[key] for run in elsewhere if key in run)
            lines.append(f"| {key[0]} | {key[1]} | {row['ms']:.1f} | {here[key]} | {others_found} |")
    return "\n".join(lines) + "\n"


def table(record: dict[str, Any]) -> str:
    """Markdown: one block a case, each side's median, and its ratio to NVIDIA's recipe and to the padded original."""
    lines = []
    for case, rows in groupby(record["rows"], case_of):
        sides = {row["side"]: row for row in rows}
        first = next(iter(sides.values()))
        lines += [f"\n**{case}** (floor {first['floor_ms']:.1f} ms)\n"]
        lines += ["| side | ms | host ms | real tokens/s | x NVIDIA recipe | x original | peak GB |", "|---" * 7 + "|"]
        recipe, padded = (sides.get(name, {}).get("ms") for name in (BASELINE, "original padded"))
        for name, row in sides.items():
            if row["ms"] is None:
                lines.append(f"| {name} | {row['note']} | | | | | |")
                continue
            numbers = [f"{row['ms']:.2f}", f"{row['host_ms']:.2f}", f"{row['tokens_per_s']:,.0f}"]
            ratios = [speed_up(row, recipe), speed_up(row, padded), f"{row['peak_gb']:.1f}"]
            lines.append("| " + " | ".join([name, *numbers, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def plot(record: dict[str, Any], file: Path) -> None:
    """Real tokens a second of every side, one panel a case."""
    from matplotlib import pyplot

    cases = [(case, list(rows)) for case, rows in groupby(record["rows"], case_of)]
    figure, panels = pyplot.subplots(len(cases), 1, figsize=(9, 2.6 * len(cases)), layout="constrained")
    for panel, (case, rows) in zip(panels, cases, strict=True):
        shown = [row for row in rows if row["ms"]]
        colours = ["tab:green" if "engine" in row["side"] else "tab:gray" for row in shown]
        panel.barh([row["side"] for row in shown], [row["tokens_per_s"] / 1e3 for row in shown], color=colours)
        panel.axvline(shown[0]["tokens"] / shown[0]["floor_ms"], color="black", linestyle=":", label="bf16 floor")
        panel.invert_yaxis()
        panel.set_title(case, fontsize=10)
        panel.set_xlabel("thousand real tokens a second", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=7, loc="lower right")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    result, *more = (Path(argument) for argument in sys.argv[1:])
    measured = json.loads(result.read_text(encoding="utf-8"))
    runs = [run for file in more for run in json.loads(file.read_text(encoding="utf-8"))["runs"]]
    versions = ", ".join(f"{name} {version}" for name, version in measured["versions"].items())
    head = f"{measured['device']}, {versions}; medians; bf16 unless said.\n\n"
    result.with_suffix(".md").write_text(head + summary(measured, runs) + table(measured), encoding="utf-8")
    plot(measured, result.with_suffix(".png"))
