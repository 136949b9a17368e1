"""Checks of the manifest: types of its entries, changes that a resumed run may not make; the environment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.store.identity import StoreError

# types of the entries that are read back, of options, and of the entry of an estimator
TYPES: dict[str, type] = {
    **dict.fromkeys(("config", "fingerprint", "probes", "pool"), dict),
    **dict.fromkeys(("estimators", "certifiers", "notes", "command"), list),
    **{"digest": str, "classes": int},
}
OPTIONS: dict[str, type] = {"training": str, "seed": int, "epochs": int, "keep_checkpoints": int}
ENTRY: dict[str, type] = {"estimator": str, "parameters": dict, "revision": int}
LIBRARIES = ("torch", "torchvision", "foolbox", "torchattacks", "eagerpy", "numpy", "pandas", "pyarrow", "scipy")


def check_shape(path: Path, manifest: dict[str, Any]) -> None:
    """Check the types of the entries that are read back; a manifest edited by hand may have others.

    Raises:
        StoreError: an entry has another type; the message names it.
    """
    wrong = _other_types(manifest, TYPES)
    if not wrong:
        wrong = _other_types(manifest.get("config", {}), OPTIONS)
        for name in ("estimators", "certifiers"):
            entries = manifest.get(name, ())
            valid = (isinstance(e, dict) and "estimator" in e and not _other_types(e, ENTRY) for e in entries)
            wrong += [] if all(valid) else [name]
        bounds = manifest.get("fingerprint", {}).get("bounds", [0.0, 1.0])
        if not (isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, int | float) for b in bounds)):
            wrong.append("bounds")
        if not all(isinstance(value, str) for value in probe_checksums(manifest).values()):
            wrong.append("probes")
    if wrong:
        raise StoreError(
            f"expected {wrong[0]} in {path} as a run writes it, got a value of another type or without a key; "
            "restore it"
        )


def _other_types(values: Mapping[str, Any], types: Mapping[str, type]) -> list[str]:
    return [n for n, kind in types.items() if n in values and not isinstance(values[n], kind)]


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 of the manifest's canonical JSON, without its checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def probe_checksums(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Checksums of the probe images by split; a run of `MarginTracker` has them in its fingerprint."""
    fingerprint = manifest.get("fingerprint", {})
    checksums = manifest.get("probes", fingerprint.get("probes", {}))
    return dict(checksums) if isinstance(checksums, dict) else {}


def check_probes(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Check that the probe images of a resumed run, and which of them are the pool, are those that it began with.

    Args:
        before: the run's manifest.
        after: the manifest to continue it with; it may name no pool.

    Raises:
        StoreError: they differ; the message names the split.
    """
    known = probe_checksums(before)
    for split, checksum in after.get("probes", {}).items():
        if split in known and known[split] != checksum:
            raise StoreError(
                f"expected the probe images of {split} that the run has, {known[split][:12]}, got {checksum[:12]}; "
                "use them, or another folder"
            )
    pools = [manifest["pool"] for manifest in (before, after) if "pool" in manifest]
    if len(pools) == 2 and pools[0] != pools[1]:
        first, other = (pool.get("split") for pool in pools)
        raise StoreError(
            f"expected the images of {first} as the pool of the run, got those of {other}; give {first} as the first "
            "split, or use another folder"
        )


def check_parameters(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> None:
    """Check that estimators have the parameters that the run was measured with.

    An estimator's text leaves out parameters at their defaults, which another version may have changed.

    Args:
        before: entries of the run's manifest.
        after: entries of the estimators that are asked for.

    Raises:
        StoreError: the run has measured an estimator with other parameters.
    """
    known = {entry["estimator"]: entry.get("parameters") for entry in before}
    for entry in after:
        text, parameters = entry["estimator"], entry.get("parameters")
        if text in known and known[text] != parameters:
            raise StoreError(
                f"expected {text} with the parameters that the run was measured with, {known[text]}, got {parameters}; "
                "write them out, or use another folder"
            )


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The entries that differ between two fingerprints, as text; empty if they are equal."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {after.get(name)!r} (the run has {before.get(name)!r})" for name in names)


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions of libraries, the machine and the command line, for the manifest."""
    versions = {"python": platform.python_version()}
    for library in ("margin-harness", *LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    machine = {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    return {"versions": versions, "machine": machine | {"threads": threads}, "command": sys.orig_argv[1:]}


def now() -> str:
    """The time in UTC as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
