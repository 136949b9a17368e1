"""The flow of images between correct and incorrect classification, as a Sankey diagram (Figure 5)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from harness.figures.flow import RIBBONS
from harness.figures.style import SUBSETS
from harness.report.figures.graph import Graph, Key, Panel, Trace
from harness.report.figures.view import View
from harness.report.tables import Table
from harness.statistics.figure_tables import FLOW_COLUMNS, flow_epochs, image_flow
from harness.store.tables import concatenate

COLUMNS = ["run", "split", *FLOW_COLUMNS]
EPOCHS = 12  # largest number of epochs shown
GAP = 0.06  # between the two streams, as a share of the height


def flow(view: View) -> Graph:
    """Images of the whole sets that change sides between the shown epochs, at most twelve (Figure 5)."""
    parts = [_flow(run.name, split, table) for run in view.content.runs for split, table in run.correctness.items()]
    rows = concatenate(parts, COLUMNS)
    graph = Graph(
        "flow",
        "Flow of images between correct and incorrect classification",
        "Whole sets. Each column is an epoch; each band is the number of images that change sides, or stay. At most "
        "twelve epochs are shown, more of the early ones. A band between two of them compares just these two.",
        tables=[Table("flow", "Flow between correct and incorrect", rows)],
        reason="" if len(rows) else "The flow cannot be shown: it needs predictions of the whole sets at two epochs.",
    )
    if graph.reason:
        return graph
    panels = [
        _panel(view, run, split, part)
        for split in view.splits
        for run in view.runs
        if len(part := rows[(rows["run"] == run) & (rows["split"] == split)])
    ]
    keys = [Key(f"{before} → {after}", colour, area=True) for (before, after), colour in RIBBONS.items()]
    return replace(graph, panels=panels, keys=keys)


def _flow(run: str, split: str, correctness: pd.DataFrame) -> pd.DataFrame:
    epochs = flow_epochs([int(epoch) for epoch in correctness.columns], EPOCHS) if len(correctness) else []
    return image_flow(correctness, epochs).assign(run=run, split=split)[COLUMNS]


def _panel(view: View, run: str, split: str, rows: pd.DataFrame) -> Panel:
    epochs = sorted({*rows["epoch"], *rows["next_epoch"]})
    total = int(rows[rows["epoch"] == epochs[0]]["count"].sum())
    nodes = [(epoch, subset) for epoch in epochs for subset in SUBSETS]
    sizes = _sizes(rows, epochs)
    places = {node: place for place, node in enumerate(nodes)}
    drawn = rows[rows["count"] > 0]
    pairs = list(zip(drawn["before"], drawn["after"], strict=True))
    plotly: dict[str, Any] = {
        "type": "sankey",
        "arrangement": "fixed",
        "node": {
            "x": [_along(epochs.index(epoch), len(epochs)) for epoch, _ in nodes],
            "y": [_middle(subset, sizes[epoch, "correct"] / total) for epoch, subset in nodes],
            "color": [SUBSETS[subset] for _, subset in nodes],
            "customdata": [f"{subset} at epoch {epoch}: {sizes[epoch, subset]} of {total}" for epoch, subset in nodes],
            "label": [""] * len(nodes),
            "thickness": 7,
            "pad": 14,
            "line": {"width": 0},
            "hovertemplate": "%{customdata}<extra></extra>",
        },
        "link": {
            "source": [places[e, before] for e, (before, _) in zip(drawn["epoch"], pairs, strict=True)],
            "target": [places[e, after] for e, (_, after) in zip(drawn["next_epoch"], pairs, strict=True)],
            "value": list(drawn["count"]),
            "color": [RIBBONS[pair] for pair in pairs],
            "customdata": [
                f"{count} images: {before} at epoch {epoch}, {after} at epoch {later}"
                for epoch, later, before, after, count in drawn[COLUMNS[2:]].itertuples(index=False)
            ],
            "hovertemplate": "%{customdata}<extra></extra>",
        },
    }
    layout = {"annotations": [_tick(place, len(epochs), epoch) for place, epoch in enumerate(epochs)]}
    first, last = epochs[0], epochs[-1]
    say = (
        f"of {total} images {sizes[first, 'correct']} are correct at epoch {first} and {sizes[last, 'correct']} at "
        f"epoch {last}; between shown epochs {_moved(rows, 'incorrect')} times an image becomes correct and "
        f"{_moved(rows, 'correct')} times incorrect"
    )
    label = f"Flow of {split} images between correct and incorrect"
    where = {"run": run, "split": split}
    return Panel(
        view.heading(run, f"{split} images over epochs"), label, where, layout, [Trace(plotly, {"split": split}, say)]
    )


def _sizes(rows: pd.DataFrame, epochs: list[int]) -> dict[tuple[int, str], int]:
    """Number of images of each side at each epoch: those that leave it or, at the last epoch, those that reach it."""
    leaving = rows.groupby(["epoch", "before"])["count"].sum()
    reaching = rows.groupby(["next_epoch", "after"])["count"].sum()
    sides = [(epoch, subset) for epoch in epochs for subset in SUBSETS]
    return {side: int((reaching if side[0] == epochs[-1] else leaving)[side]) for side in sides}


def _moved(rows: pd.DataFrame, before: str) -> int:
    """Number of changes away from the side ``before``."""
    return int(rows[(rows["before"] == before) & (rows["after"] != before)]["count"].sum())


def _along(place: int, epochs: int) -> float:
    # plotly reads 0 and 1 as missing positions
    return min(max(place / (epochs - 1), 0.001), 0.999)


def _middle(subset: str, correct: float) -> float:
    """The middle of a node, as a share of the height from the top; correct images are above incorrect ones."""
    height = 1 - GAP
    middle = height * correct / 2 if subset == "correct" else GAP + height * (1 + correct) / 2
    return min(max(middle, 0.001), 0.999)


def _tick(place: int, epochs: int, epoch: int) -> dict[str, Any]:
    where = {"xref": "paper", "yref": "paper", "x": place / (epochs - 1), "y": 0, "yshift": -16}
    return where | {"text": str(epoch), "showarrow": False, "font": {"size": 12}}
