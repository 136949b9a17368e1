"""The claims of Mickisch et al. 2020, sentence by sentence, with the criterion of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.reproduce import numbers
from benchmarks.reproduce.claims import USUAL, Claim, by_test, read_off
from benchmarks.reproduce.stored import Stored
from benchmarks.reproduce.study import Group


def _long(stored: Stored) -> Iterator[Group]:
    """Groups of runs with more than the usual epochs."""
    return (group for group in stored.groups() if stored.options(group.runs[0])["epochs"] > USUAL)


def _below(limit: float) -> Callable[[float], bool]:
    return lambda value: value < limit


def _above(limit: float) -> Callable[[float], bool]:
    return lambda value: value > limit


PLAIN, PGD = "standard", "pgd"
CLAIMS = (
    Claim(
        "jump",
        1,
        "section 3, observation 1; Fig. 1",
        "At initialisation images lie very close to the boundary; after the first epoch margins jump to a "
        "higher level.",
        "test: median of the images' own changes, epoch 0 to 1",
        by_test("jump"),
    ),
    Claim(
        "peak",
        1,
        "observation 1; Fig. 1",
        "Average margins never get back to the peak of the first epoch.",
        "highest later average over that of epoch 1: supported where below 1",
        read_off(numbers.later_peak, _below(1), PLAIN),
    ),
    Claim(
        "decline",
        1,
        "observation 1; Fig. 1, 7",
        "After the first epoch margins have a clear downward trend, on MNIST a small but visible one.",
        "test: median of the images' own changes, epoch 1 to the last",
        by_test("decline"),
    ),
    Claim(
        "late",
        1,
        "observation 1; Fig. 1",
        "They still decrease noticeably in the late epochs.",
        "test: the same over the last quarter",
        by_test("late decline"),
    ),
    Claim(
        "splits",
        1,
        "observation 1; Fig. 1",
        "There is no significant difference between the margins of training and test images.",
        "test: difference of averages at the last epoch, wholly inside 2% of the average at epoch 1: a "
        "stronger claim than "
        "the paper's, which a difference that is merely not significant would satisfy",
        by_test("train and test agree"),
    ),
    Claim(
        "errors-small",
        1,
        "observation 1",
        "Standard errors remain relatively small.",
        "largest standard error over average from epoch 1 on: supported where below 0.05",
        read_off(numbers.largest_error, _below(0.05), PLAIN),
    ),
    Claim(
        "errors-stable",
        1,
        "observation 1",
        "Standard errors remain stable throughout the training.",
        "largest over smallest standard error from epoch 1 on: supported where below 2",
        read_off(numbers.errors_apart, _below(2), PLAIN),
    ),
    Claim(
        "accuracy",
        1,
        "observation 1",
        "Average margin and accuracy have a strong negative correlation.",
        "Pearson's r over epochs from 1 on: supported where below −0.5",
        read_off(numbers.with_accuracy, _below(-0.5), PLAIN),
    ),
    Claim(
        "no-overfitting",
        1,
        "observation 1",
        "Margins fall while the test error still falls, which overfitting does not explain.",
        "average at the epoch of the least test error over that at epoch 1: supported where below 1",
        read_off(numbers.while_error_falls, _below(1), PLAIN),
    ),
    Claim(
        "beyond",
        1,
        "section 3",
        "The observations continue to hold beyond 40 epochs.",
        "standard training to epoch 100: last average over that at epoch 40, supported where below 1",
        read_off(numbers.beyond_forty, _below(1), PLAIN, groups=_long),
    ),
    Claim(
        "pgd-jump",
        2,
        "observation 2; Fig. 2",
        "The jump after the first epoch is there under PGD training too.",
        "average at epoch 1 over that at epoch 0: supported where above 1",
        read_off(numbers.jump, _above(1), PGD),
    ),
    Claim(
        "pgd-level",
        2,
        "observation 2; Fig. 2",
        "Under PGD training margins stay at a high level compared with standard training (L∞, the norm trained in).",
        "test: ratio of averages at the last epoch",
        by_test("larger margins"),
    ),
    Claim(
        "pgd-transfer",
        2,
        "observation 2; section 4",
        "L∞ training also enlarges L2 margins.",
        "test: ratio of averages at the last epoch",
        by_test("transfer to L2"),
    ),
    Claim(
        "pgd-milder",
        2,
        "observation 2; Fig. 2",
        "The downward trend under PGD training is not as severe.",
        "test: the share of the epoch-1 average that is kept, over that of standard training",
        by_test("smaller share lost"),
    ),
    Claim(
        "pgd-later",
        2,
        "observation 2; Fig. 2",
        "The downward trend starts in later epochs.",
        "epoch of the highest average over that of standard training: supported where above 1",
        read_off(numbers.against_standard(numbers.peak_epoch), _above(1), PGD),
    ),
    Claim(
        "pgd-errors",
        2,
        "observation 2",
        "Standard errors are comparable to those of standard training.",
        "largest standard error over average, over that of standard training: supported between 0.5 and 2",
        read_off(numbers.against_standard(numbers.largest_error), lambda x: 0.5 < x < 2, PGD),
    ),
    Claim(
        "mnist-twice",
        2,
        "appendix A; Fig. 8",
        "On MNIST (dense) PGD training gives nearly twice the L2 margins.",
        "ratio of averages at the last epoch: supported between 1.5 and 2.5",
        read_off(
            numbers.against_standard(numbers.last_average), lambda x: 1.5 < x < 2.5, PGD, dataset="mnist", norms=("l2",)
        ),
    ),
    Claim(
        "mnist-rise",
        2,
        "appendix A; Fig. 9",
        "On MNIST the L∞ average rises steadily under PGD training.",
        "Kendall's tau of the average with epochs from 1 on: supported where above 0.5",
        read_off(numbers.tau, _above(0.5), PGD, dataset="mnist", norms=("linf",)),
    ),
    Claim(
        "mnist-upward",
        2,
        "observation 2; Fig. 8",
        "On MNIST there is even a slight upward trend under PGD training (L2).",
        "average at the last epoch over that at epoch 1: supported where above 1",
        read_off(numbers.change, _above(1), PGD, dataset="mnist", norms=("l2",)),
    ),
    Claim(
        "closer",
        3,
        "observation 3; Fig. 3, 4, 6, 10, 11",
        "Misclassified images lie closer to the boundary, standard training.",
        "test at every epoch: Cliff's delta",
        by_test("closer", PLAIN),
    ),
    Claim(
        "closer-pgd",
        3,
        "observation 3; Fig. 3, 6, 11",
        "They do under PGD training.",
        "test at every epoch: Cliff's delta",
        by_test("closer", PGD),
    ),
    Claim(
        "variance",
        3,
        "observation 3; Fig. 3",
        "Misclassified images' margins have the smaller variance.",
        "ratio of variances at the last epoch: supported where below 1",
        read_off(numbers.spread_of_incorrect, _below(1), PLAIN),
    ),
    Claim(
        "variance-pgd",
        3,
        "observation 3; Fig. 3",
        "The same under PGD training.",
        "ratio of variances at the last epoch: supported where below 1",
        read_off(numbers.spread_of_incorrect, _below(1), PGD),
    ),
    Claim(
        "incorrect-fall",
        3,
        "observation 3; Fig. 4",
        "Misclassified images come closer over the epochs.",
        "their average at the last epoch over that at epoch 1: supported where below 1",
        read_off(numbers.change_of("incorrect"), _below(1), PLAIN),
    ),
    Claim(
        "incorrect-fall-pgd",
        3,
        "observation 3; Fig. 6",
        "They do also under PGD training.",
        "the same",
        read_off(numbers.change_of("incorrect"), _below(1), PGD),
    ),
    Claim(
        "correct-stable-pgd",
        3,
        "observation 3; Fig. 6",
        "Correct images' margins rise or stay stable under PGD training.",
        "their average at the last epoch over that at epoch 1: supported where above 0.98",
        read_off(numbers.change_of("correct"), _above(0.98), PGD),
    ),
    Claim(
        "stay",
        3,
        "observation 3; Fig. 5",
        "Most misclassified images of an epoch were misclassified in the one before.",
        "whole sets, median over epochs of that share: supported where above 0.5",
        read_off(numbers.still_incorrect, _above(0.5), PLAIN, by_estimator=False),
    ),
    Claim(
        "mended",
        3,
        "observation 3; Fig. 5",
        "The boundary reaches large parts of the initially misclassified images, which become correct.",
        "whole sets: share of the images incorrect at epoch 1 that are correct at the last, supported where above 0.5",
        read_off(numbers.first_mistakes_mended, _above(0.5), PLAIN, by_estimator=False),
    ),
    Claim(
        "newcomers",
        3,
        "observation 3",
        "Newly correct images lie close and pull the correct images' average down.",
        "test: average gap to those that stayed correct",
        by_test("newcomers are closer", PLAIN),
    ),
    Claim(
        "own-trend",
        3,
        "observation 3",
        "Correct images also come closer of themselves, not only by such newcomers.",
        "what the stayers' own changes add up to from epoch 1 on, over the average at epoch 1: supported where below 0",
        read_off(numbers.own_change, _below(0), PLAIN),
    ),
    Claim(
        "mnist-errors",
        3,
        "appendix A; Fig. 10",
        "On MNIST the standard error of misclassified images is larger, because they are few.",
        "over that of correct images, last epoch: supported where above 1",
        read_off(numbers.incorrect_errors, _above(1), PLAIN, dataset="mnist"),
    ),
    Claim(
        "confident",
        3,
        "section 4",
        "The network is confident on misclassified images too.",
        "whole sets, average confidence of incorrect images at the last epoch: supported where above 0.7",
        read_off(numbers.confidence_of_incorrect, _above(0.7), PLAIN, by_estimator=False),
    ),
    Claim(
        "directions",
        1,
        "section 2.1",
        "The boundary is near in few directions: random ones rarely change the class.",
        "share of random directions that do within ten times DeepFool's margin, test images: supported "
        "where below 0.05",
        read_off(numbers.crossed, _below(0.05), PLAIN, splits=("test",)),
    ),
)
