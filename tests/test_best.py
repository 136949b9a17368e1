"""The envelope as an estimator: each image has its nearest member; a failing member does not affect the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from attacks import registry
from attacks.estimator import Margins, Settings, Status, setting
from attacks.estimators.best import Best, refined_distance
from attacks.isolation import frozen_view
from attacks.measure import measure
from attacks.registry import Entry, create, text_form
from attacks.types import DOMAINS, NORMS, Domain, EstimatorError, Norm
from tests import oracles
from tests.test_cascade import digits


@dataclass(frozen=True, kw_only=True)
class Brittle(Settings):
    """Witnesses at twice the margin for every image; raises for images whose first pixel is below ``limit``."""

    name: ClassVar[str] = "brittle"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {}
    batch_invariant: ClassVar[bool] = True

    limit: float = setting(0.5)
    leave_training: bool = setting(False)

    def perturb(
        self,
        model: torch.nn.Module,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        if (images.flatten(1)[:, 0] < self.limit).any():
            raise RuntimeError("too dark")
        if self.leave_training:
            model.train()
        return 1 - images


@pytest.fixture(autouse=True)
def brittle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.ESTIMATORS, "brittle", Entry("tests.test_best:Brittle", NORMS, DOMAINS, "1", "raises"))


def alone(text: str, norm: Norm) -> Margins:
    network, images = digits()
    return measure(network, images[:24], create(text), norm)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", pytest.param("linf", marks=pytest.mark.slow)])
def test_every_image_has_the_margin_of_its_nearest_member(norm: Norm) -> None:
    """An estimator gives the same candidates alone and as a member, even if it draws random numbers."""
    texts = ["deepfool", "pgd:rounds=3,restarts=2", "fmn:steps=15,gamma=0.2", "torchattacks:PGDL2:steps=5"]
    able = [text for text in texts if norm in create(text).norms]
    members = {text: alone(text, norm) for text in able}
    best = alone("best:of=" + "+".join(text.replace(",", "/") for text in texts) + ",polish=false,agreement=0.0", norm)
    table = torch.stack([m.distance for m in members.values()])
    least = table.amin(0)
    torch.testing.assert_close(best.distance, least, rtol=1e-4, atol=0)
    assert (best.distance < table[0]).any(), "the first member is not always the nearest"
    assert len(set(best.message)) >= 2
    for row, winner in enumerate(best.message):
        own = members[winner]
        assert best.distance[row] == own.distance[row]
        assert best.attack_distance[row] == own.attack_distance[row]
        assert torch.equal(best.witness[row], own.witness[row])


def test_members_after_two_that_agree_are_not_run() -> None:
    texts = ["cascade:budget=60", "fmn", "linear"]
    of = "best:of=" + "+".join(texts) + ",polish=false"
    network, images = digits()
    members = [measure(network, images[:12], create(text), "l2") for text in texts]
    whole, early = (measure(network, images[:12], create(text), "l2") for text in (f"{of},agreement=0.0", of))
    first, second, third = (m.distance for m in members)
    agree = torch.maximum(first, second) <= torch.minimum(first, second) * 1.001
    assert 2 < agree.sum() < 10
    saved = (whole.forwards + whole.backwards) - (early.forwards + early.backwards)
    assert (saved[~agree] == 0).all()
    # the clean pass is shared, and the comparison costs up to 15
    spent = members[2].forwards + members[2].backwards
    assert (saved[agree] >= spent[agree] / 2).all()
    torch.testing.assert_close(early.distance[~agree], whole.distance[~agree], rtol=0, atol=0)
    least = torch.where(agree, torch.minimum(first, second), torch.stack([first, second, third]).amin(0))
    torch.testing.assert_close(early.distance, least, rtol=1e-4, atol=0)


@pytest.mark.slow
def test_passes_are_the_sum_over_members_plus_a_small_overhead() -> None:
    best = alone("best:of=deepfool+fmn:steps=15,polish=false", "l2")
    spent = sum(
        float((m.forwards + m.backwards).mean()) for m in (alone("deepfool", "l2"), alone("fmn:steps=15", "l2"))
    )
    mine = float((best.forwards + best.backwards).mean())
    assert spent - 20 <= mine <= spent + 20


@pytest.mark.slow
def test_a_raising_member_affects_neither_other_members_nor_its_other_rows() -> None:
    """Inverted images are witnesses of this network; images with a dark corner raise."""
    truth = oracles.affine(2)
    dark = truth.images.flatten(1)[:, 0] < 0.5
    assert 8 < dark.sum() < 56
    margins = measure(truth.model, truth.images, Best(of="brittle+deepfool", polish=False), "l2")
    assert set(margins.status) == {Status.FOUND}
    assert (margins.distance / truth.exact["l2"]).max() <= 1.001
    assert set(margins.message) == {"deepfool"}
    only = measure(truth.model, truth.images, Best(of="brittle+deepfool:steps=1/overshoot=0.0", polish=False), "l2")
    assert {m for m, d in zip(only.message, dark.tolist(), strict=True) if d} <= {"deepfool:steps=1,overshoot=0.0"}


@pytest.mark.slow
def test_a_row_fails_only_where_all_members_raise() -> None:
    truth = oracles.affine(2)
    dark = truth.images.flatten(1)[:, 0] < 0.5
    margins = measure(truth.model, truth.images, Best(of="brittle+brittle:limit=0.45"), "l2", noise_retries=0)
    black = truth.images.flatten(1)[:, 0] < 0.45
    assert 0 < black.sum() < dark.sum()
    for row, status in enumerate(margins.status):
        assert (status is Status.FAILED) == bool(black[row])
        assert (margins.message[row] == "RuntimeError: too dark") == bool(black[row])


def test_every_member_receives_an_unchanged_view() -> None:
    model = torch.nn.Sequential(oracles.affine_model(3), torch.nn.Dropout(0.5))
    images = oracles.grey_images(16)
    left = measure(model.eval(), images, Best(of="brittle:limit=0.0/leave_training=true+deepfool"), "l2")
    plain = measure(model, images, create("deepfool"), "l2")
    torch.testing.assert_close(left.distance, plain.distance, rtol=1e-3, atol=0)


def test_candidates_that_are_not_witnesses_have_infinite_distance() -> None:
    truth = oracles.boxed(3)
    images = truth.images[:4]
    labels = truth.model(images).argmax(1)
    witness = measure(truth.model, images, create("deepfool"), "l2").witness
    bad = torch.stack([images[0], torch.full_like(images[1], torch.nan), witness[2], images[3] + 1e-7])
    with frozen_view(truth.model, (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(4)
        distance = refined_distance(view, images, labels, bad, "l2")
    assert distance.isinf().tolist() == [True, True, False, True]
    assert distance[2] == pytest.approx(float(truth.exact["l2"][2]), rel=1e-3)


# The text form.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("best", "best"),
        ("best:of=deepfool + fmn", "best:of=deepfool+fmn"),
        ("best:polish=false,of=deepfool:refine=polish+fmn", "best:of=deepfool:refine=polish+fmn,polish=false"),
        ("best:of=fmn:gamma=0.2/steps=200+apgd", "best:of=fmn:steps=200/gamma=0.2+apgd"),
        ("best:of=fmn:gamma=1e+16+fab", "best:of=fmn:gamma=1e+16+fab"),
        ("best:of=foolbox:L2PGD:steps=5/epsilon=0.5+fmn:steps=60", "best:of=foolbox:L2PGD:epsilon=0.5/steps=5+fmn"),
    ],
)
def test_the_text_form_is_canonical(text: str, canonical: str) -> None:
    assert text_form(create(text)) == canonical
    assert create(canonical) == create(text)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("best:of=", "expected an estimator of deepfool, fmn"),
        ("best:of=fnm+apgd", "got 'fnm'; did you mean 'fmn'?"),
        ("best:of=fmn:step=3", "expected a parameter of fmn"),
        ("best:of=fmn:steps=0", "expected steps to be an integer of at least 1, got 0"),
        ("best:of=fmn,steps=3", "expected a parameter of best (of: str"),
        ("best:of=fmn+fmn:steps=60", "expected every member once, got fmn+fmn; leave the others out"),
        ("best:of=best:of=fmn", "expected members other than best"),
    ],
)
def test_settings_that_cannot_run_are_refused(text: str, part: str) -> None:
    with pytest.raises(EstimatorError) as caught:
        create(text)
    assert part in str(caught.value)


def test_capabilities_are_those_of_the_members() -> None:
    assert create("best:of=ddn+cw").norms == {"l2"}
    both = create("best:of=foolbox:DDNAttack+fab")
    assert (both.norms, both.domains, both.batch_invariant) == (set(NORMS), {"box"}, False)
    assert both.tightness == {"l2": 1.0002, "linf": 1.0002}
    assert create("best:of=deepfool+cw").domains == {"box", "free"}
