"""The data of a run: the data set that its options name, as many images as they ask for, and the probes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from harness.config.registry import DATASETS
from harness.config.run_config import RunConfig
from harness.data.builtin import load
from harness.data.dataset import Dataset, Split, draw_probe
from harness.data.own import load_source
from harness.data.probes import Probe


def load_data(config: RunConfig) -> Dataset:
    """The data set that the options name, with as many images as they ask for.

    Raises:
        DataError: it is missing or damaged.
    """
    read = load if config.dataset in DATASETS else load_source
    return _fewer(read(config.dataset, Path(config.data_root), config.download), config)


def _fewer(dataset: Dataset, config: RunConfig) -> Dataset:
    """The data set with as many images as asked for."""

    def some(split: Split, count: int | None) -> Split:
        return split if count is None else split.subset(draw_probe(split, count, config.probe_seed))

    train, test = some(dataset.train, config.train_images), some(dataset.test, config.test_images)
    return replace(dataset, train=train, test=test)


def probes_of(config: RunConfig, dataset: Dataset) -> dict[str, Probe]:
    """The images of both splits that are tracked."""
    probes = {}
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        index = draw_probe(split, config.probe, config.probe_seed)
        probes[name] = Probe(split.pixels(index), split.labels[index], split.ids[index])
    return probes
