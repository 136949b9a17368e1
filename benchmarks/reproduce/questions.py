"""Tables for the paper's open questions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from benchmarks.reproduce import numbers
from benchmarks.reproduce.claims import SHOWN, pairs
from benchmarks.reproduce.stored import NORMS, Stored, number

EPOCHS = (0, 1, 10, 20, 40)
AREA = "area under the ROC curve of detecting misclassified images by "
SCORES = ("margin", "maximum softmax", "logit margin")


def over_estimates(stored: Stored) -> pd.DataFrame:
    """DeepFool's average over the smallest average of another estimator, on test images at each of `EPOCHS`."""
    rows = []
    for group in pairs(stored):
        for run in group.runs[:: max(1, len(group.runs) // 2)]:
            for norm in NORMS:
                row = {"run": run, "norm": SHOWN[norm]}
                for epoch in EPOCHS:
                    row[f"epoch {epoch}"] = _over(stored, run, norm, epoch)
                rows.append(row)
    return pd.DataFrame(rows).drop_duplicates(["run", "norm"]) if rows else pd.DataFrame()


def _over(stored: Stored, run: str, norm: str, epoch: int) -> str:
    own = stored.run(run, "summary")
    rows = own[(own["norm"] == norm) & (own["split"] == "test") & (own["subset"] == "all") & (own["epoch"] == epoch)]
    averages = rows.set_index("estimator")["avg"]
    others = averages.drop(labels="deepfool", errors="ignore")
    if "deepfool" not in averages or not len(others):
        return "–"
    nearest = str(others.idxmin())
    return f"{number(averages['deepfool'] / others.min())} ({nearest.split(':')[0]})"


def changed_verdicts(stored: Stored) -> pd.DataFrame:
    """Claims whose verdict by DeepFool differs from that by another estimator or by the envelope."""
    found = []
    for group in stored.groups():
        table = stored.group(group.name, "verdicts")
        for (claim, run), rows in table.groupby(["claim", "run"], sort=False):
            made = rows[rows[["supported", "not supported", "undecided"]].sum(axis=1) > 0]
            by = made.set_index("estimator")["verdict"]
            if "deepfool" not in by or by.nunique() < 2:
                continue
            others = "; ".join(f"{name}: {verdict}" for name, verdict in by.items() if verdict != by["deepfool"])
            found.append(
                {"group": group.name, "claim": claim, "run": run, "deepfool": by["deepfool"], "others": others}
            )
    return pd.DataFrame(found)


def domains(stored: Stored) -> pd.DataFrame:
    """Ratio of free margins to margins in the box by DeepFool, on test images."""
    rows = []
    for run in stored.study.runs:
        table = stored.run(run, "free")
        if len(table):
            own = table[table["split"] == "test"]
            for norm, part in own.groupby("norm", sort=False):
                ratios = part.set_index("epoch")["ratio"]
                row = {"run": run, "norm": SHOWN[str(norm)]}
                row |= {f"epoch {epoch}": number(ratios.get(epoch, np.nan)) for epoch in EPOCHS}
                last = part.sort_values("epoch").iloc[-1]
                rows.append(row | {"nearer by 1%, last": f"{100 * last['nearer']:.0f}%"})
    return pd.DataFrame(rows)


def directions(stored: Stored) -> pd.DataFrame:
    """Share of random directions that change the class within multiples of the margin; last epoch, test images."""
    rows = []
    for run in stored.study.runs:
        table = stored.run(run, "directions")
        if len(table):
            last = table[table["epoch"] == table["epoch"].max()]
            for norm, part in last.groupby("norm", sort=False):
                shares = {
                    f"{times:.0f}×": f"{100 * share:.1f}%"
                    for times, share in zip(part["times"], part["crossed"], strict=True)
                }
                rows.append({"run": run, "norm": SHOWN[str(norm)]} | shares)
    return pd.DataFrame(rows)


def detection(stored: Stored) -> pd.DataFrame:
    """Areas under the ROC curve for detecting misclassified test images at the last epoch, and tests of differences."""
    rows = []
    for group in pairs(stored):
        table, tests = stored.group(group.name, "descriptions"), stored.group(group.name, "observations")
        for (run, estimator, norm), part in table[table["name"].str.startswith(AREA)].groupby(
            ["run", "estimator", "norm"], sort=False
        ):
            if estimator not in ("deepfool", "cascade"):
                continue
            areas = part.set_index(part["name"].str.removeprefix(AREA))[["split", "value"]]
            areas = areas[areas["split"] == "test"]["value"]
            row = {"run": run, "estimator": estimator, "norm": SHOWN[str(norm)]}
            row |= {score: number(areas.get(score, np.nan)) for score in SCORES}
            for name, claim in (
                ("softmax", "detects better than softmax"),
                ("logits", "detects better than logit margin"),
            ):
                own = tests[(tests["claim"] == claim) & (tests["run"] == run)]
                own = own[(own["estimator"] == estimator) & (own["norm"] == norm)]
                row[f"better than {name}"] = str(own["verdict"].iloc[0]) if len(own) else "–"
            rows.append(row)
    return pd.DataFrame(rows).drop_duplicates(["run", "estimator", "norm"]) if rows else pd.DataFrame()


def calibration(stored: Stored) -> pd.DataFrame:
    """Expected calibration error of the test set at `EPOCHS`, and its correlation with average margins over epochs."""
    rows = []
    for run in stored.study.runs:
        table = stored.run(run, "calibration")
        if not len(table):
            continue
        error = table[table["split"] == "test"].set_index("epoch")["ece"].sort_index()
        row = {"run": run} | {f"epoch {epoch}": number(error.get(epoch, np.nan)) for epoch in EPOCHS}
        for norm in NORMS:
            both = pd.concat([error, stored.curve(run, "deepfool", norm, "test")], axis=1, join="inner")
            both = both[both.index >= 1]
            row[f"r with {SHOWN[norm]}"] = number(float(np.corrcoef(both.T)[0, 1]), 2)
        rows.append(row)
    return pd.DataFrame(rows)


def trainings(stored: Stored, group: str) -> pd.DataFrame:
    """Average margins and test errors of runs with other losses and trainings at epochs 1, 20 and the last."""
    rows = []
    for run in next((g.runs for g in stored.groups() if g.name == group), ()):
        for norm in NORMS:
            curve = stored.curve(run, "deepfool", norm, "test")
            epochs = [1, 20, int(curve.index[-1])]
            row = {"run": run, "norm": SHOWN[norm]}
            row |= {f"epoch {epoch}": number(curve.get(epoch, np.nan)) for epoch in epochs}
            row["last / epoch 1"] = number(numbers.change(stored, run, "deepfool", norm, "test"))
            row["cascade, last"] = _at_last(stored, run, norm, "cascade")
            row["test error"] = f"{100 * stored.errors(run, 'test').iloc[-1]:.1f}%"
            rows.append(row)
    return pd.DataFrame(rows)


def _at_last(stored: Stored, run: str, norm: str, estimator: str) -> str:
    curve: Sequence[float] = list(stored.curve(run, estimator, norm, "test"))
    return number(curve[-1]) if curve else "–"


def brackets(stored: Stored) -> pd.DataFrame:
    """Average certified lower bounds and distances of the same test images at the certified epochs."""
    rows = []
    for run in stored.study.runs:
        table = stored.run(run, "brackets")
        for (certifier, norm), part in (
            table[table["split"] == "test"].groupby(["certifier", "norm"], sort=False) if len(table) else ()
        ):
            row = {"run": run, "certifier": certifier, "norm": SHOWN[str(norm)]}
            for _, at in part.sort_values("epoch").iterrows():
                row[f"epoch {at['epoch']}"] = (
                    f"{number(at['lower'])} to {number(at['upper'])} ({number(at['tightness'], 2)})"
                )
            last = part.sort_values("epoch").iloc[-1]
            row["images"] = f"{last['images']:.0f}"
            row["certainly closer, farther"] = f"{last['closer']:.0f}, {last['farther']:.0f}"
            rows.append(row)
    return pd.DataFrame(rows).fillna("–") if rows else pd.DataFrame()


def certain(stored: Stored) -> pd.DataFrame:
    """Whether the observations hold for all margins within their certified brackets."""
    found = []
    for group in stored.groups():
        table = stored.group(group.name, "proved")
        for _, row in table[table["split"] == "test"].iterrows() if len(table) else ():
            found.append(
                {
                    "observation": row["observation"],
                    "claim": row["claim"],
                    "run": row["run"],
                    "norm": SHOWN[str(row["norm"])],
                    "epochs": row["epochs"],
                    "by distances": number(row["by_upper"]),
                    "by lower bounds": number(row["by_lower"]),
                    "for certain": row["certain"],
                }
            )
    # a run in two groups is listed once
    return pd.DataFrame(found).drop_duplicates(ignore_index=True)
