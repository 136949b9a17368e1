"""One table per problem: our estimator against every other side on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from attacks.estimators.deepfool import DeepFool
from attacks.types import Norm
from benchmarks.speed.agreement import ROUNDING, Agreement, agree, judge
from benchmarks.speed.memory import peak_bytes
from benchmarks.speed.problems import Problem
from benchmarks.speed.sides import Ours, Side, ours
from benchmarks.speed.timing import PassCosts, Spread, Timed, pass_costs, ratio, spread, take_turns

# smallest processor time / wall time of one thread; less means that other processes interfered
OWN = 0.9
# a gradient growth beyond any network's, so that every class is considered in every step
EXHAUSTIVE = 1e9


@dataclass(frozen=True)
class Row:
    """One side's times on one problem in one norm.

    Attributes:
        side: our estimator's text, or the side's name.
        images: number of the problem's images. timed: number of images that the side received.
        seconds, processor: wall and processor seconds of each round, for all timed images.
        an_image: wall seconds per image.
        ratio: time per image relative to ours; None for ours.
        agreement: its margins against ours; None for ours.
        memory: peak bytes; None if not measured.
    """

    problem: str
    classes: int
    unreachable: bool
    norm: Norm
    estimator: str
    side: str
    about: str
    images: int
    timed: int
    seconds: tuple[float, ...]
    processor: tuple[float, ...]
    an_image: Spread
    ratio: Spread | None
    agreement: Agreement | None
    memory: int | None


@dataclass(frozen=True)
class Floor:
    """The cost of DeepFool's passes alone, at the times of the bare network's passes in the same rounds.

    ``steps + 1`` forwards and a gradient for every class and step.

    Attributes:
        steps: average per image.
        an_image: seconds.
        over: time of ours relative to the floor.
    """

    steps: float
    forward: float
    backward: float
    an_image: float
    over: Spread


@dataclass(frozen=True)
class Table:
    """Ours first, then the sides that were timed.

    Attributes:
        forwards, backwards: per image of ours, without refinement.
        floor: for DeepFool only.
        remarks: excluded sides, and reasons to doubt the times.
    """

    rows: tuple[Row, ...]
    forwards: float
    backwards: float
    floor: Floor | None
    remarks: tuple[str, ...]


def compare(
    problem: Problem, text: str, norm: Norm, sides: Sequence[Side], *, repeats: int, memory: bool, images: int
) -> Table:
    """Time ours and the sides alternately on the problem's first images.

    Args:
        text: our estimator's text form.
        sides: the sides that support the norm.
        repeats: number of rounds.
        memory: whether to measure peak memory with one more run of each side in a separate process.
    """
    estimator, here = ours(text), problem.first(images)
    able, remarks = _able(sides, here, norm)
    estimator.solve(here.first(2), norm)
    runs: dict[str, Callable[[], Tensor]] = {text: partial(estimator.solve, here, norm)}
    runs |= {side.name: partial(side.solve, here.first(side.images(here)), norm) for side in able}
    costs: list[PassCosts] = []
    candidates = _candidates(estimator, here)

    def between() -> None:
        # leftovers of a library must not affect the time of another side
        problem.model.eval().zero_grad()

    def after_round() -> None:
        if candidates:
            costs.append(pass_costs(problem, candidates))

    timed = take_turns(runs, repeats, problem.images.device, between=between, after_round=after_round)
    distances = judge(here, timed[text].result, norm)
    peak = partial(_peak, remarks=remarks, text=text, norm=norm, problem=here) if memory else lambda _: None
    rows = [_row(here, norm, text, estimator, timed, None, peak(estimator))]
    for side in able:
        count = side.images(here)
        points, own = timed[side.name].result, here.first(count)
        near = None if side.same else judge(own, points, norm, rounding=ROUNDING)
        agreement = agree(distances[:count], judge(own, points, norm), same=side.same, near=near)
        rows.append(_row(here, norm, text, side, timed, agreement, peak(side)))
    _, forwards, backwards = estimator.counted(here, norm)
    floor = _floor(rows[0], costs, _steps(estimator, here, norm, candidates - 1), candidates - 1) if costs else None
    share = min(busy / wall for row in rows for busy, wall in zip(row.processor, row.seconds, strict=True))
    if share < OWN and not here.images.is_cuda:
        remarks.append(f"other processes took up to {1 - share:.0%} of a round: repeat on a quiet machine")
    return Table(tuple(rows), float(forwards.mean()), float(backwards.mean()), floor, tuple(remarks))


def _able(sides: Sequence[Side], problem: Problem, norm: Norm) -> tuple[list[Side], list[str]]:
    """The sides that work, after a first call each, and a line for every failing one."""
    able, remarks = [], []
    for side in sides:
        if problem.unreachable and side.images(problem) < len(problem.images):
            remarks.append(f"{side.name} is left out: its {side.images(problem)} images would not stand for all")
            continue
        try:
            side.solve(problem.first(2), norm)
        except Exception as error:  # a library may raise any exception
            text = " ".join(str(error).split())
            remarks.append(f"{side.name} is left out: it raised {type(error).__name__}: {text}")
            continue
        able.append(side)
        if side.images(problem) < len(problem.images):
            remarks.append(f"{side.name} was given {side.images(problem)} images: its time an image is extrapolated")
    return able, remarks


def _candidates(side: Ours, problem: Problem) -> int:
    """The number of classes that our DeepFool considers; 0 for an estimator without a floor."""
    if isinstance(side.estimator, DeepFool) and side.estimator.engine == "batched":
        return min(side.estimator.candidates, problem.classes)
    return 0


def _row(
    problem: Problem,
    norm: Norm,
    text: str,
    side: Side | Ours,
    timed: dict[str, Timed[Tensor]],
    agreement: Agreement | None,
    memory: int | None,
) -> Row:
    own = [second / len(problem.images) for second in timed[text].seconds]
    if isinstance(side, Ours):
        name, about, count = text, "ours", len(problem.images)
    else:
        name, about, count = side.name, f"{side.library}: {side.about}", side.images(problem)
    times = timed[name]
    an_image = [second / count for second in times.seconds]
    return Row(
        problem=problem.name,
        classes=problem.classes,
        unreachable=problem.unreachable,
        norm=norm,
        estimator=text,
        side=name,
        about=about,
        images=len(problem.images),
        timed=count,
        seconds=times.seconds,
        processor=times.processor,
        an_image=spread(an_image),
        ratio=None if agreement is None else ratio(an_image, own),
        agreement=agreement,
        memory=memory,
    )


def _steps(side: Ours, problem: Problem, norm: Norm, others: int) -> float:
    """DeepFool's average steps per image, from its gradients when it considers every class."""
    assert isinstance(side.estimator, DeepFool)
    _, _, backwards = Ours(estimator=replace(side.estimator, growth=EXHAUSTIVE)).counted(problem, norm)
    # one per other class and step, and one at the point where the class has changed
    return float(((backwards - 1) / others).ceil().mean())


def _floor(row: Row, costs: Sequence[PassCosts], steps: float, others: int) -> Floor:
    floors = [cost.floor(steps, others) for cost in costs]
    return Floor(
        steps=steps,
        forward=spread([cost.forward for cost in costs]).median,
        backward=spread([cost.backward for cost in costs]).median,
        an_image=spread(floors).median,
        over=ratio([second / row.timed for second in row.seconds], floors),
    )


def _peak(side: Side | Ours, *, remarks: list[str], text: str, norm: Norm, problem: Problem) -> int | None:
    count = len(problem.images) if isinstance(side, Ours) else side.images(problem)
    try:
        return peak_bytes(side, text, problem.first(count), norm)
    except RuntimeError as error:
        remarks.append(str(error))
        return None
