"""Margins of a finished model as a table, from any container of images."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils import data

from attacks.affine import affine_margins
from attacks.types import InputError
from harness import MarginTracker, measure_margins
from harness.store import RunFolder, Unit
from harness.store.tables import read_part
from tests.runs import ONE_LINE


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


@pytest.fixture
def images() -> torch.Tensor:
    return 0.3 + 0.4 * torch.rand(5, 1, 3, 4, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 3, 0])


class Pairs(data.Dataset):  # type: ignore[type-arg]
    """Map-style: an image and its label."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


def test_margins_of_images_alone_are_exact_on_an_affine_model(model: nn.Module, images: torch.Tensor) -> None:
    rows = measure_margins(model, images, ["deepfool", "cascade"])
    assert len(rows) == 5 * 2 * 2
    assert "label" not in rows
    assert "epoch" not in rows
    for (_, norm), own in rows.groupby(["estimator", "norm"]):
        exact = affine_margins(model[1].weight, model[1].bias, images, norm, domain="box")  # type: ignore[index,arg-type]
        np.testing.assert_allclose(own["distance"], exact, rtol=2e-2)
        assert (own["distance"] >= exact.numpy() * (1 - 1e-6)).all()


def test_every_container_of_the_same_images_gives_the_same_rows(model: nn.Module, images: torch.Tensor) -> None:
    wanted = measure_margins(model, (images, LABELS), ["fmn:steps=10"], ["l2"])
    assert wanted["label"].tolist() == LABELS.tolist()
    pairs = Pairs(images, LABELS)
    for container in (
        (images.numpy(), LABELS.numpy()),
        pairs,
        data.DataLoader(pairs, batch_size=2),
        data.TensorDataset(images, LABELS),
    ):
        pd.testing.assert_frame_equal(measure_margins(model, container, ["fmn:steps=10"], ["l2"]), wanted)


def test_the_ids_of_a_subset_are_its_indices(model: nn.Module, images: torch.Tensor) -> None:
    whole = measure_margins(model, (images, LABELS), ["fmn:steps=10"], ["linf"])
    part = measure_margins(model, data.Subset(Pairs(images, LABELS), [4, 1]), ["fmn:steps=10"], ["linf"])
    assert part["image"].tolist() == [4, 1]
    # seeds belong to the images, so that the results are equal
    np.testing.assert_allclose(part["distance"], whole["distance"].to_numpy()[[4, 1]], rtol=1e-6)


def test_margins_match_those_of_a_tracker(tmp_path: object, model: nn.Module, images: torch.Tensor) -> None:
    tracker = MarginTracker(str(tmp_path), {"test": data.DataLoader(Pairs(images, LABELS))}, ["pgd:rounds=2,steps=5"])
    tracker.update(0, model)
    rows = measure_margins(model, (images, LABELS), ["pgd:rounds=2,steps=5"])
    for norm in ("l2", "linf"):
        theirs = read_part(RunFolder(tracker.folder.path).margins(0, Unit("pgd:steps=5,rounds=2", norm)))[0]
        ours = rows[rows["norm"] == norm].reset_index(drop=True)
        pd.testing.assert_frame_equal(ours, theirs[list(ours)], check_exact=True)


def test_input_that_cannot_be_tracked_gives_a_one_line_error(model: nn.Module, images: torch.Tensor) -> None:
    pairs = Pairs(images, LABELS)

    class Pictures(Pairs):
        def __getitem__(self, index: int) -> tuple[object, int]:  # type: ignore[override]
            return object(), 0

    for container, words in (
        (data.DataLoader(pairs, shuffle=True), "shuffle=False"),
        (Pictures(images, LABELS), r"ToTensor\(\)"),
        (Pairs(images[:0], LABELS[:0]), "got none; give at least one"),
        ((images, LABELS + 4), "expected labels of test"),
        ((images,), "give two or three"),
    ):
        with pytest.raises(InputError, match=words) as caught:
            measure_margins(model, container)
        assert ONE_LINE.fullmatch(str(caught.value))
