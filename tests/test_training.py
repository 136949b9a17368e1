"""Training: bitwise resumable, PGD within its ball, evaluation without side effects."""

import copy
import io
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from harness.data.builtin import load
from harness.data.dataset import Split
from harness.models.build import build
from harness.training.objectives import TrainingOptions, augmented, loss_function, pgd
from harness.training.trainer import Trainer, TrainerState, epochs, evaluate

CPU = torch.device("cpu")
LAST = 4


def small_split(count: int = 33) -> Split:
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 4, 4), generator=draws, dtype=torch.uint8)
    return Split(images, torch.randint(3, (count,), generator=draws), levels=255)


def noisy_model(seed: int = 0) -> nn.Module:
    """Dropout draws from the global generator; batch norm refuses a batch of one."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)
    )


def options(**fields: object) -> TrainingOptions:
    return TrainingOptions(**({"batch_size": 8, "pgd_steps": 2, "pgd_epsilon": 0.1} | fields))  # type: ignore[arg-type]


class Named(NamedTuple):
    """Output of torchvision's GoogLeNet in training mode."""

    logits: Tensor
    auxiliary: Tensor | None


class Training(nn.Module):
    """The noisy model, with logits in a tuple in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = noisy_model()

    def forward(self, images: Tensor) -> Tensor | Named:
        logits: Tensor = self.inner(images)
        return Named(logits, None) if self.training else logits


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def through_a_file(state: TrainerState) -> TrainerState:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: TrainerState = torch.load(file, weights_only=True)
    return loaded


def trained(run: TrainingOptions) -> tuple[list[dict[str, Tensor]], list[TrainerState]]:
    """Train without interruption; return the weights and the trainer's state of every epoch."""
    trainer = Trainer(noisy_model(), small_split(), run, CPU)
    weights: list[dict[str, Tensor]] = []
    states: list[TrainerState] = []
    for epoch in epochs(trainer, LAST):
        assert epoch == trainer.epoch == len(weights)
        weights.append(weights_of(trainer.model))
        states.append(trainer.state_dict())
    return weights, states


@pytest.mark.parametrize("training", ["standard", "pgd", "gaussian"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw"])
def test_resuming_after_any_epoch_is_exact(training: str, optimizer: str) -> None:
    run = options(training=training, optimizer=optimizer)
    weights, states = trained(run)
    for epoch, state in enumerate(states):
        trainer = Trainer(noisy_model(seed=99), small_split(), run, CPU)
        trainer.model.load_state_dict(weights[epoch])
        trainer.load_state_dict(through_a_file(state))
        for reached in epochs(trainer, LAST):
            assert equal(trainer.model.state_dict(), weights[reached])
        assert trainer.epoch == LAST


@pytest.mark.parametrize("training", ["standard", "pgd", "gaussian"])
def test_resuming_without_the_state_differs(training: str) -> None:
    run = options(training=training)
    weights, states = trained(run)
    forgotten: list[Callable[[Trainer], None]] = [
        lambda trainer: None,
        # control: the epoch without the optimizer, and the optimizer without the epoch
        lambda trainer: setattr(trainer, "epoch", 2),
        lambda trainer: trainer.load_state_dict({"epoch": 0, "optimizer": states[2]["optimizer"]}),
    ]
    for restore in forgotten:
        trainer = Trainer(noisy_model(), small_split(), run, CPU)
        trainer.model.load_state_dict(weights[2])
        restore(trainer)
        trainer.run_epoch()
        assert not equal(trainer.model.state_dict(), weights[3])


def test_training_and_the_callers_random_draws_are_independent() -> None:
    run = options(training="pgd")
    weights, _ = trained(run)
    trainer = Trainer(noisy_model(), small_split(), run, CPU)
    for epoch in range(1, LAST + 1):
        torch.manual_seed(1000 + epoch)
        evaluate(trainer.model.eval(), small_split(), "hinge", CPU)
        before = torch.get_rng_state()
        with torch.no_grad():
            trainer.run_epoch()
        assert torch.equal(torch.get_rng_state(), before)
        assert equal(trainer.model.state_dict(), weights[epoch])


@pytest.mark.parametrize("training", ["standard", "pgd", "trades", "gaussian"])
def test_logits_in_a_tuple_are_trained_as_logits(training: str) -> None:
    plain, wrapped = (
        Trainer(model, small_split(), options(training=training), CPU) for model in (noisy_model(), Training())
    )
    plain.run_epoch()
    wrapped.run_epoch()
    assert equal(plain.model.state_dict(), weights_of(wrapped.model.inner))  # type: ignore[arg-type]
    assert not equal(plain.model.state_dict(), noisy_model().state_dict())


def test_a_single_logit_is_trained_as_a_binary_classifier() -> None:
    split = small_split(32)
    labels = (split.images[:, 0, 0, 0] > 127).long()
    split = Split(split.images, labels, levels=255)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))
    run = options(binary=True, learning_rate=0.1, training="trades")
    for _ in epochs(Trainer(model, split, run, CPU), 12):
        pass
    evaluation = evaluate(model, split, "cross-entropy", CPU, binary=True)
    with torch.no_grad():
        logit = model(split.pixels(torch.arange(32)))[:, 0]
    assert torch.equal(evaluation.prediction, (logit > 0).long())
    expected = nn.functional.binary_cross_entropy_with_logits(logit, labels.float(), reduction="none")
    assert torch.allclose(evaluation.loss, expected, atol=1e-6)
    assert (evaluation.prediction == labels).float().mean() > 0.8


def test_seeds_and_epochs_draw_differently() -> None:
    final = [trained(options(seed=seed))[0][-1] for seed in (0, 0, 1)]
    assert equal(final[0], final[1])
    assert not equal(final[0], final[2])
    orders = []
    recorder = Recorder()
    trainer = Trainer(recorder, small_split(), options(batch_size=33), CPU)
    for _ in range(2):
        trainer.run_epoch()
        orders.append(recorder.seen.pop())
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0].sort(0).values, orders[1].sort(0).values)


def test_a_snapshot_is_independent_of_the_trainer() -> None:
    trainer = Trainer(noisy_model(), small_split(), options(), CPU)
    trainer.run_epoch()
    state = trainer.state_dict()
    kept = copy.deepcopy(state)
    trainer.load_state_dict(state)
    trainer.run_epoch()
    assert str(state) == str(kept)
    assert str(trainer.state_dict()) != str(kept)


def test_a_foreign_state_is_refused() -> None:
    trainer = Trainer(noisy_model(), small_split(), options(), CPU)
    with pytest.raises(ValueError, match=r"^expected a trainer state of epoch and optimizer, got \['model'\]; load"):
        trainer.load_state_dict({"model": {}})  # type: ignore[typeddict-item]


def test_the_last_batch_is_kept_and_never_a_single_row_for_batch_norm() -> None:
    def sizes(model: nn.Module, count: int) -> list[int]:
        rows: list[int] = []
        model.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
        calls: list[tuple[int, int]] = []
        Trainer(model, small_split(count), options(), CPU).run_epoch(lambda *call: calls.append(call))
        assert calls == [(done, len(rows)) for done in range(1, len(rows) + 1)]
        return rows

    assert sizes(noisy_model(), 33) == [8, 8, 8, 9]
    assert sizes(noisy_model(), 34) == [8, 8, 8, 8, 2]
    assert sizes(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), 33) == [8, 8, 8, 8, 1]


class Recorder(nn.Module):
    """A linear classifier that records the images of its training passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen.append(images.detach().clone())
        logits: Tensor = self.linear(images.flatten(1))
        return logits


def test_pgd_training_replaces_half_of_every_batch() -> None:
    split = small_split(20)
    model = Recorder()
    Trainer(model, split, options(training="pgd", batch_size=15), CPU).run_epoch()
    originals = split.pixels()
    for images, half in zip(model.seen, [7, 2], strict=True):
        distances = torch.cdist(images.flatten(1), originals.flatten(1), p=torch.inf).min(1).values
        assert int((distances == 0).sum()) == len(images) - half
        assert float(distances.max()) == pytest.approx(0.1, abs=1e-6)
        assert float(images.min()) >= 0
        assert float(images.max()) <= 1


@pytest.mark.parametrize("sigma", [0.01, 0.25])
def test_gaussian_training_adds_noise_to_every_image(sigma: float) -> None:
    split = small_split(400)
    models = {training: Recorder() for training in ("standard", "gaussian")}
    for training, model in models.items():
        Trainer(model, split, options(training=training, noise_sigma=sigma, batch_size=400), CPU).run_epoch()
    noise = models["gaussian"].seen[0] - models["standard"].seen[0]
    assert float(noise.std()) == pytest.approx(sigma, rel=0.05)
    assert abs(float(noise.mean())) < 4 * sigma / noise.numel() ** 0.5
    assert (noise != 0).flatten(1).any(1).all()
    # different noise for each image
    assert float(torch.corrcoef(noise[:50].flatten(1)).triu(1).abs().mean()) < 0.4


@pytest.mark.parametrize("epsilon", [0.0, 0.03, 0.3])
def test_pgd_stays_in_the_ball_and_the_box_and_raises_the_loss(epsilon: float) -> None:
    split = small_split()
    trainer = Trainer(noisy_model(), split, options(), CPU)
    trainer.run_epoch()
    model, images, labels = trainer.model, split.pixels(), split.labels
    model.zero_grad()
    next(model.modules()).training = False
    flags = [module.training for module in model.modules()]
    buffers = weights_of(model)
    before = torch.get_rng_state()
    run = options(pgd_epsilon=epsilon, pgd_steps=10, pgd_step_size=epsilon / 4)
    with torch.no_grad():
        adversarials = pgd(model, images, labels, run, torch.Generator().manual_seed(0))
    assert not adversarials.requires_grad
    assert float((adversarials - images).abs().max()) == pytest.approx(epsilon, abs=1e-6)
    assert float(adversarials.min()) >= 0
    assert float(adversarials.max()) <= 1
    # the model has not changed
    assert [module.training for module in model.modules()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert equal(model.state_dict(), buffers)
    assert torch.equal(torch.get_rng_state(), before)
    loss = loss_function("cross-entropy")
    model.eval()
    rise = (loss(model(adversarials), labels) - loss(model(images), labels)).detach()
    if epsilon:
        assert float(rise.min()) > 0
    else:
        assert torch.equal(adversarials, images)


def test_pgd_finds_the_corner_that_is_worst_for_a_linear_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    weights = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 0.0, 0.0, 0.0]])
    model.load_state_dict({"1.weight": weights})
    images = torch.tensor([0.5, 0.5, 0.02, 0.98]).reshape(1, 1, 2, 2)
    run = options(pgd_epsilon=0.1, pgd_steps=10, pgd_step_size=0.025)
    adversarials = pgd(model, images, torch.tensor([0]), run, torch.Generator().manual_seed(0))
    assert adversarials.flatten().tolist() == pytest.approx([0.4, 0.6, 0.0, 1.0])


def test_losses_match_hand_calculation() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.5], [0.0, 3.0, 1.0], [1.0, 0.5, 0.0]])
    labels = torch.tensor([0, 2, 0])
    # 1 + 1 - 2, 1 + 3 - 1, 1 + 0.5 - 1
    assert loss_function("hinge")(logits, labels).tolist() == pytest.approx([0.0, 3.0, 0.5])
    logs = [math.log(math.exp(value) / sum(map(math.exp, (2.0, 1.0, 0.5)))) for value in (2.0, 1.0, 0.5)]
    first = loss_function("cross-entropy")(logits, labels)[0]
    assert float(first) == pytest.approx(-logs[0])
    smoothed = loss_function("label-smoothing")(logits, labels)[0]
    assert float(smoothed) == pytest.approx(-0.9 * logs[0] - 0.1 * sum(logs) / 3)


def test_hinge_gradient_pushes_the_two_classes_apart() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 0.0]], requires_grad=True)
    loss = loss_function("hinge")(logits, torch.tensor([2, 0])).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.tolist() == [[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]]


class Restless(nn.Module):
    """Draws from the global generator, also in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = noisy_model()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return logits + 1e-3 * torch.rand(())


def test_evaluate_leaves_flags_buffers_and_generators_unchanged() -> None:
    model = Restless()
    model.inner.get_submodule("2").eval()
    flags = [module.training for module in model.modules()]
    weights = weights_of(model)
    before = torch.get_rng_state()
    first = evaluate(model, small_split(), "cross-entropy", CPU, batch_size=10)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == flags
    assert equal(model.state_dict(), weights)
    torch.rand(3)
    again = evaluate(model, small_split(), "cross-entropy", CPU, batch_size=10)
    assert torch.equal(first.loss, again.loss)


@pytest.mark.parametrize("loss", ["cross-entropy", "label-smoothing", "hinge"])
def test_evaluate_agrees_with_a_plain_forward_pass(loss: str) -> None:
    split = small_split()
    model = noisy_model()
    result = evaluate(model, split, loss, CPU, batch_size=10)
    model.eval()
    logits = model(split.pixels()).detach()
    assert torch.equal(result.prediction, logits.argmax(1))
    assert torch.allclose(result.confidence, logits.softmax(1).amax(1))
    assert torch.allclose(result.loss, loss_function(loss)(logits, split.labels))
    assert [column.dtype for column in vars(result).values()] == [torch.int64, torch.float32, torch.float32]
    assert [len(column) for column in vars(result).values()] == [33, 33, 33]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"loss": "hinge"}, {"training": "pgd", "pgd_steps": 2}])
def test_digits_are_learned(fields: dict[str, object]) -> None:
    digits = load("digits")
    model = build("cnn", digits.shape, digits.classes, seed=0)
    trainer = Trainer(model, digits.train, options(batch_size=32, pgd_step_size=0.05, **fields), CPU)
    error = [
        float((evaluate(model, digits.test, "cross-entropy", CPU).prediction != digits.test.labels).float().mean())
        for _ in epochs(trainer, 6)
    ]
    assert error[0] > 0.7
    assert error[-1] < 0.1


class Amplified(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 3)
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.linear(images.flatten(1) * self.factor)
        return logits


def test_a_nonfinite_loss_gives_a_one_line_error() -> None:
    run = options(optimizer="sgd", learning_rate=1e30)
    trainer = Trainer(Amplified(1e9), small_split(), run, CPU)
    expected = r"^expected a finite loss, got (nan|inf) in epoch 1, batch \d; lower the learning rate$"
    with pytest.raises(ValueError, match=expected):
        trainer.run_epoch()
    assert trainer.epoch == 0


def test_nonfinite_weights_give_a_one_line_error() -> None:
    run = options(optimizer="sgd", learning_rate=1e38, batch_size=33)
    trainer = Trainer(Amplified(1e3), small_split(), run, CPU)
    expected = r"^expected finite weights, got NaN or infinity after epoch 1; lower the learning rate$"
    with pytest.raises(ValueError, match=expected):
        trainer.run_epoch()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training": "fgsm"}, "expected training of standard, pgd, trades, gaussian, got 'fgsm'; choose one of them"),
        (
            {"loss": "mse"},
            "expected loss of cross-entropy, label-smoothing, hinge, squared-error, got 'mse'; choose one of them",
        ),
        ({"optimizer": "lion"}, "expected optimizer of adam, sgd, adamw, got 'lion'; choose one of them"),
        ({"batch_size": 0}, "expected batch_size of at least 1, got 0; choose a larger one"),
        ({"pgd_epsilon": -0.1}, "expected pgd_epsilon of at least 0, got -0.1; choose a larger one"),
        ({"learning_rate": math.nan}, "expected learning_rate of at least 0, got nan; choose a larger one"),
        ({"seed": -1}, "expected seed of at least 0, got -1; choose a larger one"),
    ],
)
def test_bad_options_give_a_one_line_error(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^expected ") as caught:
        options(**fields)
    assert str(caught.value).endswith(message)


# further objectives


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 3.0])
def test_l2_pgd_stays_in_the_ball_and_the_box_and_raises_the_loss(epsilon: float) -> None:
    split = small_split()
    model = noisy_model().eval()
    images, labels = split.pixels(), split.labels
    run = options(pgd_norm="l2", pgd_epsilon=epsilon, pgd_steps=7, pgd_step_size=epsilon / 3)
    adversarials = pgd(model, images, labels, run, torch.Generator().manual_seed(0))
    length = (adversarials - images).flatten(1).norm(dim=1)
    assert (length <= epsilon * (1 + 1e-5)).all()
    if epsilon < 1:  # where the box does not bind, the full radius is used
        assert length.mean() > 0.8 * epsilon
    assert adversarials.min() >= 0
    assert adversarials.max() <= 1
    loss = torch.nn.functional.cross_entropy
    assert loss(model(adversarials), labels) > loss(model(images), labels)


def test_l2_pgd_finds_the_direction_that_is_worst_for_a_linear_model() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    images, labels = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    run = options(pgd_norm="l2", pgd_epsilon=0.1, pgd_steps=20, pgd_step_size=0.05)
    move = pgd(model, images, labels, run, torch.Generator().manual_seed(0)) - images
    worst = model[1].weight[1] - model[1].weight[0]  # type: ignore[index]
    torch.testing.assert_close(move.flatten(), 0.1 * worst / worst.norm(), rtol=1e-3, atol=1e-4)


def test_squared_error_matches_hand_calculation() -> None:
    logits, labels = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 0.0]]), torch.tensor([2, 0])
    expected = torch.tensor([(0.25 + 1.0 + 1.0) / 3, 0.0])
    torch.testing.assert_close(loss_function("squared-error")(logits, labels), expected)


def after_an_epoch(**fields: object) -> dict[str, Tensor]:
    model = noisy_model()
    trainer = Trainer(model, small_split(), options(**fields), CPU)
    trainer.run_epoch()
    return weights_of(model)


def test_trades_without_its_divergence_is_standard_training() -> None:
    # a network without dropout: the divergence takes another pass, which draws
    def run(**fields: object) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        Trainer(model, small_split(), options(**fields), CPU).run_epoch()
        return weights_of(model)

    assert equal(run(training="trades", trades_beta=0.0), run(training="standard"))
    assert not equal(run(training="trades", trades_beta=6.0), run(training="standard"))


@pytest.mark.slow
def test_trades_brings_the_outputs_of_attacked_images_together() -> None:
    def apart(training: str) -> float:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
        split, run = small_split(), options(training=training, learning_rate=0.02, pgd_steps=5, pgd_step_size=0.05)
        trainer = Trainer(model, split, run, CPU)
        for _ in range(40):
            trainer.run_epoch()
        images, labels = split.pixels(), split.labels
        attacked = pgd(model, images, labels, run, torch.Generator().manual_seed(0))
        with torch.no_grad():
            return float((model(images).softmax(1) - model(attacked).softmax(1)).abs().sum(1).mean())

    assert apart("trades") < 0.5 * apart("standard")


@pytest.mark.parametrize("fields", [{"training": "trades"}, {"augment": "flip"}, {"training": "pgd", "pgd_norm": "l2"}])
def test_further_trainings_are_repeatable(fields: dict[str, object]) -> None:
    assert equal(after_an_epoch(**fields), after_an_epoch(**fields))
    assert not equal(after_an_epoch(**fields), after_an_epoch())


def test_augmentation_moves_and_mirrors_and_nothing_else() -> None:
    images = torch.arange(1.0, 3 * 2 * 16 * 16 + 1).view(3, 2, 16, 16)
    for how in ("shift", "flip"):
        seen = set()
        for seed in range(40):
            moved = augmented(images, how, torch.Generator().manual_seed(seed))
            assert moved.shape == images.shape
            for row, (image, one) in enumerate(zip(images, moved, strict=True)):
                found = [
                    (top, left, mirrored)
                    for top in range(-2, 3)
                    for left in range(-2, 3)
                    for mirrored in ((False, True) if how == "flip" else (False,))
                    if torch.equal(one, placed(image.flip(2) if mirrored else image, top, left))
                ]
                assert len(found) == 1, (how, seed, row)
                seen.add(found[0])
        # all or nearly all offsets
        assert len(seen) > (35 if how == "flip" else 20)
    assert augmented(images, "none", torch.Generator()) is images


def placed(image: Tensor, top: int, left: int) -> Tensor:
    """The shifted image, padded with zeros."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    rows = slice(max(0, top), min(height, height + top)), slice(max(0, -top), min(height, height - top))
    columns = slice(max(0, left), min(width, width + left)), slice(max(0, -left), min(width, width - left))
    result[:, rows[0], columns[0]] = image[:, rows[1], columns[1]]
    return result
