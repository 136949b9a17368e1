"""Headlines: one sentence with numbers per claim and run; and sentences on estimators."""

from __future__ import annotations

import pandas as pd

from harness.report.content import Headline
from harness.report.figures.view import norm_name
from harness.statistics.envelope import ENVELOPE
from harness.statistics.observations import observation1, observation2, observation3
from harness.statistics.observations.verdicts import NOT_SUPPORTED, SUPPORTED, UNDECIDED
from harness.statistics.trust import contradictions

# in the order of the page; the first claim of each observation is the observation itself
CLAIMS = {
    1: {
        observation1.DECLINE: "margins shrink from epoch 1 to the last",
        observation1.JUMP: "margins jump up in the first epoch",
        observation1.LATE: "margins still shrink in the last quarter of the epochs",
        observation1.SPLITS_AGREE: "training and test images have the same average margin, within 2%",
    },
    2: {
        observation2.RATIO: "adversarial training gives larger margins in the norm that it trains in",
        observation2.TRANSFER: "the gain transfers to L2",
        observation2.DAMPED: "adversarial training keeps a larger share of its epoch-1 margins",
        observation2.SLOPE: "the average margin falls less per epoch under adversarial training",
    },
    3: {
        observation3.CLOSER: "misclassified images lie closer to the boundary",
        observation3.STAY: "most misclassified images were misclassified one epoch before",
        observation3.NEWCOMERS: "newly correct images lie closer than those that stayed correct",
        observation3.BEATS_SOFTMAX: "the margin detects misclassified test images better than the maximum softmax",
        observation3.BEATS_LOGITS: "the margin detects misclassified test images better than the logit margin",
    },
}
NOT_TESTED = {
    1: "no run with standard training was measured",
    2: "this needs two runs that differ in their training only, one standard and one adversarial",
    3: "nothing was measured",
}


def headlines(findings: pd.DataFrame) -> dict[int, list[Headline]]:
    """Observation -> one headline per claim and run, in the order of `CLAIMS`."""
    lines: dict[int, list[Headline]] = {}
    for observation, claims in CLAIMS.items():
        tests = findings[findings["observation"] == observation]
        lines[observation] = [
            _headline(observation, words, str(run), rows)
            for claim, words in claims.items()
            for run, rows in tests[tests["claim"] == claim].groupby("run", sort=False)
        ] or [Headline(observation, "not tested", _sentence(NOT_TESTED[observation]), [])]
    return lines


def trust_sentences(biases: pd.DataFrame, findings: pd.DataFrame) -> list[str]:
    """Sentences on each estimator's ratio to the envelope on test images, and on verdicts that depend on it.

    Args:
        biases: rows of `harness.statistics.trust.BIAS_COLUMNS`.
        findings: rows of `harness.statistics.observations.verdicts.FINDING_COLUMNS`.
    """
    if not len(biases):
        return ["One estimator alone cannot be compared: add others with python -m harness.compare."]
    shown = biases[biases["split"] == "test"] if (biases["split"] == "test").any() else biases
    lines = []
    for (run, estimator), rows in shown.groupby(["run", "estimator"], sort=False):
        lines.append(f"{estimator} ({run}): {'; '.join(_bias(row) for _, row in rows.iterrows())}.")
    differing = [
        f"The verdict depends on the estimator for observation {observation}, {claim} ({run}): {line}."
        for (observation, claim, run), rows in findings.groupby(["observation", "claim", "run"], sort=False)
        for line in contradictions(rows)
    ]
    return [*lines, *(differing or ["No verdict is supported by one estimator and contradicted by another."])]


def _bias(row: pd.Series) -> str:
    ends = f"{row['first']:.3f} times the envelope at epoch {row['first_epoch']}, {row['last']:.3f} times at epoch"
    apart = " (part of its curve is its own bias)" if row["apart"] else ""
    return f"{norm_name(row['norm'])} {ends} {row['last_epoch']}{apart}"


def _headline(observation: int, words: str, run: str, rows: pd.DataFrame) -> Headline:
    tested = rows[rows["effect"] != ""]
    if not len(tested):
        return Headline(observation, UNDECIDED, _sentence(f"{words} ({run}): {rows['reason'].iloc[0]}"), [])
    counts = tested["verdict"].value_counts()
    untested = len(rows) - len(tested)
    # a claim that can mostly not be tested has no plain verdict
    verdict = str(counts.index[0]) if len(counts) == 1 and untested <= len(rows) / 2 else "mixed"
    parts = [f"{int(counts[name])} {name}" for name in (SUPPORTED, NOT_SUPPORTED, UNDECIDED) if name in counts]
    # a network is one draw of training: other seeds may have other results
    scope = "" if " seeds of " in run else " for these two networks" if observation == 2 else " for this network"
    tests = "the only test" if len(tested) == 1 else f"all {len(tested)} tests"
    count = f"{counts.index[0]}{scope} in {tests}" if len(counts) == 1 else f"{' and '.join(parts)}{scope}"
    missing = f" that can be made; {untested} cannot" if untested else ""
    words = f"{words} ({run}): {count}{missing}. {_numbers(tested)}"
    return Headline(observation, verdict, _sentence(words), _details(rows))


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def _numbers(tested: pd.DataFrame) -> str:
    """Effects at the last epoch, of the envelope or else the first estimator, on test images if there are any."""
    for column, wanted in (("measure", "distance"), ("estimator", ENVELOPE), ("split", "test")):
        if (tested[column] == wanted).any():
            tested = tested[tested[column] == wanted]
    tested = tested[(tested["estimator"] == tested["estimator"].iloc[0]) & (tested["split"] == tested["split"].iloc[0])]
    shown = tested.drop_duplicates("norm", keep="last")
    effect = str(shown["effect"].iloc[0])
    who = ", ".join(str(name) for name in (shown["estimator"].iloc[0], shown["split"].iloc[0]) if name)
    effects = "; ".join(_effect(row) for _, row in shown.iterrows())
    return f"{effect[:1].upper()}{effect[1:]} ({who}): {effects}"


def _effect(row: pd.Series) -> str:
    norm = f"{norm_name(row['norm'])} " if row["norm"] else ""
    epochs = f"epoch {row['epochs']}" if "→" not in row["epochs"] else f"epochs {row['epochs']}"
    interval = f"corrected interval {row['low']:.3g} to {row['high']:.3g}"
    images = f"{int(row['images'])} images"
    if row["smaller_group"] < row["images"]:
        images += f", {int(row['smaller_group'])} of them in the smaller group"
    return f"{norm}{row['value']:.3g} ({interval}; {epochs}, {images})"


def _details(rows: pd.DataFrame) -> list[str]:
    """The tests that are not supported, and whether the verdict depends on the estimator."""
    lines = [f"The verdict depends on the estimator: {line}." for line in contradictions(rows)]
    others = rows[rows["verdict"] != SUPPORTED]
    for (verdict, reason), group in others.groupby(["verdict", "reason"], sort=False):
        lines.append(f"{str(verdict).capitalize()}, because {reason}: {_which(group)}.")
    return lines


def _which(group: pd.DataFrame) -> str:
    """The tests of a group in short form: all epochs of one curve together, at most eight curves."""
    named = []
    for (estimator, norm, split), rows in group.groupby(["estimator", "norm", "split"], sort=False):
        curve = " ".join(str(word) for word in (estimator, norm_name(str(norm)), split) if word)
        measures = set(rows["measure"])
        curve += " (as the attack left it)" if measures == {"attack_distance"} else ""
        epochs = list(dict.fromkeys(rows["epochs"]))
        single = [int(epoch) for epoch in epochs if epoch.isdigit()]
        named.append(f"{curve} at {len(single)} epochs" if len(single) > 1 else curve)
    return ", ".join(named) if len(named) <= 8 else f"{', '.join(named[:8])} and {len(named) - 8} more"
