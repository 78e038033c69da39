"""The results as pictures: `python -m perf.peers.plot perf/results/….json` draws them anew."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from perf.measure import ROOT, Measure
from perf.peers.measures import IDLE, PACED, SATURATED, SETUP, SINGLE, SPREAD
from perf.peers.table import NAMES, OURS, ours

FIGURES: dict[str, tuple[Measure, ...]] = {
    "peers-cpu": (SATURATED[0], SINGLE[0]),
    "peers-latency": (PACED[0], SPREAD[0]),
    "peers-connections": (SETUP[0], IDLE[0]),
}
COLOURS = {"ours": "#c2410c", "bare": "#9ca3af", "peer": "#2563eb"}


def bars(result: dict[str, Any], transport: str, measure: Measure) -> list[tuple[str, float | None]]:
    """Names and numbers, the least first; who failed last."""
    mine = ours(result["parts"], transport, measure)[0]
    found: list[tuple[str, float | None]] = [(OURS, statistics.median(mine))] if mine else []
    for part in result["parts"]:
        if part["transport"] == transport and part["peer"] != OURS and "" not in part["failed"]:
            cell = part["cells"].get(measure.key)
            found.append((part["peer"], statistics.median(cell["theirs"]) if cell else None))
    return sorted(found, key=lambda bar: (bar[1] is None, bar[1] or 0))


def draw(result: dict[str, Any], directory: Path) -> list[Path]:
    """One PNG a figure: transports from left to right, measures from top to bottom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, wanted in FIGURES.items():
        figure, grid = pyplot.subplots(len(wanted), len(NAMES), figsize=(16, 4.2 * len(wanted)), squeeze=False)
        for line, measure in zip(grid, wanted, strict=True):
            for axes, (transport, title) in zip(line, NAMES.items(), strict=True):
                found = bars(result, transport, measure)
                if any(number is not None for _, number in found):
                    _panel(axes, found, f"{title}\n{measure.label} [{measure.unit}]", measure)
                else:  # nobody was asked for it
                    axes.set_visible(False)
        figure.text(0.01, 0.005, _foot(result), fontsize=7, color="#6b7280")
        figure.tight_layout(rect=(0, 0.02, 1, 1))
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=110, metadata={"Software": None})
        pyplot.close(figure)
    return paths


def _panel(axes: Any, found: list[tuple[str, float | None]], title: str, measure: Measure) -> None:
    names = [name for name, _ in found]
    numbers = [number or 0 for _, number in found]
    colours = [
        COLOURS["ours" if name.startswith(OURS) else "bare" if name.startswith("bare") else "peer"] for name in names
    ]
    axes.barh(range(len(names)), numbers, color=colours)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9, loc="left")
    # One that is a hundred times as large would leave nothing to see of the others.
    middle = sorted(number for number in numbers if number)
    edge = min(middle[-1], 6 * statistics.median(middle)) * 1.15 if middle else 1
    axes.set_xlim(0, edge)
    for place, (_, number) in enumerate(found):
        label = "fails" if number is None else f"{number:,.{measure.digits}f}"
        inside = number is not None and number > 0.9 * edge
        axes.text(
            min(number, edge) - edge * 0.01 if inside and number else (number or 0) + edge * 0.01,
            place,
            f"{label} →" if number is not None and number > edge else label,
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else "black",
            fontsize=8,
        )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _foot(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{machine['time'][:10]}, {machine['cores']} cores of {machine['cpu']}, server on one, load on the other; "
        "1,000 readers, 150-byte updates. Less is better. perf/README.md says how."
    )


if __name__ == "__main__":
    for path in draw(json.loads(Path(sys.argv[1]).read_text()), ROOT / "docs/img"):
        print(path)
