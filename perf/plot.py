"""What `perf.bench` measured, as pictures: `python -m perf.plot perf/results/….json` draws them anew."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

from perf.features import FEATURES
from perf.measure import ROOT
from perf.sweep import READERS

OURS, BARE, OTHERS = "#c2410c", "#9ca3af", ("#c2410c", "#f59e0b", "#2563eb", "#0f766e")
# The lines of a feature: what of it is drawn, by how its label begins.
COSTS: Final = {
    "one publish": "server CPU per publish, one by one",
    "one of a batch": "server CPU per publish, in batches",
    "a delivery": "server CPU per delivery",
    "a connection": "server CPU per connection",
}


def row(result: dict[str, Any], scenario: str, label: str) -> dict[str, Any] | None:
    """The line of a scenario whose label begins so, if it was measured."""
    for line in result["rows"]:
        if line["scenario"] == scenario and line["measure"]["label"].startswith(label):
            return dict(line)
    return None


def deliveries(result: dict[str, Any], transport: str) -> dict[str, list[tuple[int, float]]]:
    """CPU of a delivery by the number of readers: ours, and the bare loop's."""
    found: dict[str, list[tuple[int, float]]] = {"server": [], "bare": []}
    for number in READERS:
        line = row(result, f"{transport}, {number:,} readers", "server CPU per delivery, against the loop alone")
        if line is not None:
            for side in found:
                found[side].append((number, statistics.median(line[side])))
    return found


def publishes(result: dict[str, Any]) -> list[tuple[str, float]]:
    """CPU of an update that is published, by every way there is, the least first."""
    found = [
        (line["scenario"], statistics.median(line["server"]))
        for line in result["rows"]
        if line["measure"]["label"] in ("server CPU per publish", "server CPU per update")
    ]
    return sorted(found, key=lambda way: way[1])


def features(result: dict[str, Any]) -> dict[str, list[float | None]]:
    """By feature: how many times each of `COSTS` it is of what it is without."""
    found: dict[str, list[float | None]] = {}
    for feature in FEATURES:
        lines = [row(result, f"{feature.name} (second column: without)", label) for label in COSTS.values()]
        if any(lines):
            found[feature.name] = [line["ratio"] if line else None for line in lines]
    return found


def draw(result: dict[str, Any], path: Path) -> None:
    """One PNG with all three."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), width_ratios=(1, 1.25, 1.25))
    for transport, style in (("WebSocket", "-"), ("SSE", "--")):
        for side, points in deliveries(result, transport).items():
            name, colour = ("statuswire", OURS) if side == "server" else ("bare loop", BARE)
            numbers, costs = [number for number, _ in points], [cost for _, cost in points]
            left.plot(numbers, costs, style, marker="o", color=colour, label=f"{name}, {transport}")
    left.set_xscale("log")
    left.set_ylim(bottom=0)
    left.set_xlabel("readers", fontsize=8)
    left.set_title("CPU of a delivery, one update in flight [µs]", fontsize=9, loc="left")
    if left.lines:
        left.legend(fontsize=7, frameon=False)

    ways = publishes(result)
    middle.barh([name for name, _ in ways], [cost for _, cost in ways], color=OURS)
    for place, (_, cost) in enumerate(ways):
        middle.text(cost, place, f" {cost:,.1f}", va="center", fontsize=7)
    middle.invert_yaxis()
    middle.set_title("CPU of an update published, nobody watches [µs]", fontsize=9, loc="left")

    height = 0.8 / len(COSTS)
    by_feature = features(result)
    for number, (label, colour) in enumerate(zip(COSTS, OTHERS, strict=True)):
        ratios = [values[number] or 0 for values in by_feature.values()]
        places = [place + number * height for place in range(len(ratios))]
        right.barh(places, ratios, height, color=colour, label=label)
    right.set_yticks([place + 0.4 - height / 2 for place in range(len(by_feature))], list(by_feature))
    right.invert_yaxis()
    right.axvline(1, color="black", linewidth=0.8)
    right.set_title("What is switched on: CPU, times without", fontsize=9, loc="left")
    if by_feature:
        right.legend(fontsize=7, frameon=False)

    for axes in (left, middle, right):
        axes.tick_params(labelsize=7)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
    machine = result["machine"]
    figure.text(
        0.005,
        0.005,
        f"{machine['time'][:10]}, {machine['cores']} cores of {machine['cpu']}, server on one, load on the other. "
        "Less is better. perf/README.md says how.",
        fontsize=7,
        color="#6b7280",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), ROOT / "docs/img/self.png")
