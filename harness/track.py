"""``python -m harness.track``: train, measure margins at every epoch, keep everything in a run folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attacks.registry import known
from harness.command import DONE, FAILED, exit_code, print_error, run_command
from harness.config.options import ConfigError, OneLineParser, add_options
from harness.config.run_config import RunConfig, from_namespace, parse_normalize
from harness.models.checkpoints import existing_checkpoints, mapping_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.data.dataset import Dataset
    from harness.data.probes import Probe
    from harness.measuring.plan import Plan
    from harness.store import RunFolder
    from harness.tasks import Engine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = _parser().parse_args(argv)
    if options.list_estimators:
        _print_estimators()
        return DONE

    def work() -> int:
        before = _options_before(options) or {}
        config = from_namespace(options, before)
        left_out = [text for text in before.get("estimator", ()) if text not in config.estimator]
        return _track(config, options.out, options.resume, left_out, options.no_report)

    resume = "to resume, run the same command with --resume and its --out"
    return exit_code("track", work, resume=resume, debug=options.debug)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m harness.track",
        description="Train a classifier and measure, at every epoch, how far images are from its decision boundary.",
        epilog="Exit codes: 0 done, 1 failed, 2 bad usage, 130 interrupted (continue with --resume).",
        allow_abbrev=False,
    )
    add_options(parser, fields(RunConfig))
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/<data set>-<model>-<training>-<time>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out, if there is one")
    parser.add_argument("--no-report", action="store_true", help="draw no figures and no report at the end")
    parser.add_argument("--list-estimators", action="store_true", help="list the estimators and end")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _print_estimators() -> None:
    """The estimators with norms, domains and cost; needs no torch."""
    print(f"{'name':<13} {'norms':<8} {'domains':<9} {'passes/image':<13} what")
    for name, entry in known().items():
        norms, domains = " ".join(entry.norms) or "?", " ".join(entry.domains) or "?"
        print(f"{name:<13} {norms:<8} {domains:<9} {entry.cost:<13} {entry.about}")


def _options_before(given: argparse.Namespace) -> dict[str, Any] | None:
    """The options of the run that is resumed, so that the command line need not repeat them."""
    if not given.resume or given.out is None:
        return None
    from harness.store import RunFolder

    folder = RunFolder(Path(given.out))
    before = folder.read_manifest().get("config") if folder.exists() else None
    return before if isinstance(before, dict) else None


def _track(config: RunConfig, out: str | None, resume: bool, left_out: Sequence[str], silent: bool) -> int:
    """Check everything that can be checked, then start the folder and run."""
    if resume and out is None:
        raise ConfigError("expected --out with --resume, got none; name the run folder to continue")
    import torch

    from attacks.registry import create, text_form
    from harness.config.devices import choose_device, set_up, sized
    from harness.data.load import load_data, probes_of
    from harness.data.probes import check_probes, checksum
    from harness.engines import create_engine
    from harness.loggers import check_logger
    from harness.measuring.plan import make_plan, measure_options
    from harness.models.build import build
    from harness.store import RunFolder
    from harness.tracking.manifest import manifest_of, notes_of, pool_entry

    for text in config.log:
        check_logger(text)
    named = {text_form(e): e for e in map(create, config.estimator)}
    plan = make_plan(named, config.norm, config.domain, warm_start=config.warm_start)  # type: ignore[arg-type]
    lines = list(plan.lines)
    device = choose_device(config.device)
    existing = existing_checkpoints(config.checkpoints) if config.checkpoints else {}
    lines += [mapping_line(existing)] if existing else []
    config = sized(replace(config, epochs=max(existing)) if existing else config, device)
    set_up(config)
    dataset = load_data(config)
    notes: list[str] = []
    model = build(
        config.model,
        dataset.shape,
        dataset.classes,
        config.seed,
        normalize=parse_normalize(config.normalize),
        weights=Path(config.weights) if config.weights else None,
        say=notes.append,
        binary=config.binary,
    )
    folder, probes = RunFolder(Path(out) if out else _default_folder(config)), probes_of(config, dataset)
    check_probes(probes, model, measure_options(config))
    notes += notes_of(model, config, device)
    lines += [f"{text} is not named and not continued" for text in left_out] + notes
    manifest = {"notes": notes, "probes": {name: checksum(probe) for name, probe in probes.items()}}
    manifest |= pool_entry(probes, plan.estimators)
    manifest |= manifest_of(config, dataset, plan.estimators, torch.get_num_threads(), device)
    engine = create_engine(
        config.engine,
        config.workers,
        device,
        gpus=config.gpus_per_worker,
        threads=config.threads,
        unit_timeout=config.unit_timeout,
    )
    try:
        with folder.locked():
            folder.start(manifest, resume=resume)
            return _run(config, folder, dataset, probes, model, device, plan, lines, existing, silent, engine)
    finally:
        engine.close()


def _run(
    config: RunConfig,
    folder: RunFolder,
    dataset: Dataset,
    probes: Mapping[str, Probe],
    model: nn.Module,
    device: torch.device,
    plan: Plan,
    lines: Sequence[str],
    existing: Mapping[int, Path],
    silent: bool,
    engine: Engine,
) -> int:
    """Track, report unless ``silent``, and print; ``lines`` first."""
    from harness.tracking.terminal import Terminal, open_console, print_summary
    from harness.tracking.tracker import MarginTracker
    from harness.tracking.training_run import TrackedRun

    console = open_console()
    with Terminal(console, config.epochs or 0) as terminal:
        for line in lines:
            terminal.say(line)
        how = f"{len(existing)} checkpoints" if existing else f"{config.training} training"
        terminal.say(f"{config.dataset}, {config.model}, {how}, on {device}, into {folder.path}")
        tracker = MarginTracker(
            folder,
            probes,
            plan,
            config.norm,  # type: ignore[arg-type]
            domain=config.domain,  # type: ignore[arg-type]
            noise_retries=config.noise_retries,
            batch_size=config.measure_batch or 128,
            seed=config.seed,
            expect_over=config.expect_over,
            binary=config.binary,
            cold_every=config.cold_every,
            certifiers=config.certify,
            certify_every=config.certify_every,
            certify_probe=config.certify_probe,
            loggers=config.log,
            engine=engine,
            listener=terminal,
        )
        run = TrackedRun(config, dataset, model, device, tracker, existing)
        try:
            run.go(terminal)
        finally:
            tracker.close()
    summary, epochs = tracker.summary(), run.epoch_table()
    said = [] if silent else _report(folder)
    print_summary(console, summary, folder, epochs)
    for line in said:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for line in tracker.failures:
        print_error("track", line)
    return FAILED if tracker.failures else DONE


def _default_folder(config: RunConfig) -> Path:
    dataset, model = (text.replace(":", ".").replace("/", ".").strip(".") for text in (config.dataset, config.model))
    return Path("runs") / f"{dataset}-{model}-{config.training}-{datetime.now():%Y%m%d-%H%M%S}"


def _report(folder: RunFolder) -> list[str]:
    """Write the run's figures and report; what there is to say of it."""
    from harness.report.build import evaluate, write_report
    from harness.runs import read_run

    finished = [read_run(folder.path)]
    content = evaluate(finished)
    return [*write_report(finished, content, folder.report), *content.warm]


if __name__ == "__main__":
    sys.exit(run_command(main))
