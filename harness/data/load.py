"""Load the data set of a run's options, reduce it to the number of images asked for, and draw the probes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.config.registry import DATASETS
from harness.config.run_config import RunConfig
from harness.data.builtin import load
from harness.data.dataset import Dataset, Split, draw_probe
from harness.data.probes import Probe
from harness.data.sources import load_source


def load_data(config: RunConfig) -> Dataset:
    """Load the data set of the options, with at most ``train_images`` and ``test_images`` images.

    Raises:
        DataError: the data set is missing or damaged.
    """
    read = load if config.dataset in DATASETS else load_source
    return _fewer(read(config.dataset, Path(config.data_root), config.download), config)


def _fewer(dataset: Dataset, config: RunConfig) -> Dataset:
    """The data set with at most ``train_images`` and ``test_images`` images, drawn by ``probe_seed``."""

    def drawn(split: Split, count: int | None) -> Split:
        return split if count is None else split.subset(draw_probe(split, count, config.probe_seed))

    train, test = drawn(dataset.train, config.train_images), drawn(dataset.test, config.test_images)
    return replace(dataset, train=train, test=test)


def probes_of(config: RunConfig, dataset: Dataset) -> dict[str, Probe]:
    """Draw the probe images of both splits."""
    probes = {}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        index = draw_probe(split, config.probe, config.probe_seed)
        probes[name] = Probe(split.pixels(index), split.labels[index], split.ids[index])
    return probes
