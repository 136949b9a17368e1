"""The manifest: its shape, what a resumed run may not change, and the environment that it names."""

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

# of what is read back from it, of its options, and of an entry of an estimator
TYPES: dict[str, type] = {
    **dict.fromkeys(("config", "fingerprint", "probes"), dict),
    **dict.fromkeys(("estimators", "certifiers", "notes", "command"), list),
    **{"digest": str, "classes": int},
}
OPTIONS: dict[str, type] = {"training": str, "seed": int, "epochs": int, "keep_checkpoints": int}
ENTRY: dict[str, type] = {"estimator": str, "parameters": dict, "revision": int}
LIBRARIES = ("torch", "torchvision", "foolbox", "torchattacks", "eagerpy", "numpy", "pandas", "pyarrow", "scipy")


def check_shape(path: Path, manifest: dict[str, Any]) -> None:
    """Refuse what was written by hand with other types.

    Raises:
        StoreError: names the entry.
    """
    wrong = _other_types(manifest, TYPES)
    if not wrong:
        wrong = _other_types(manifest.get("config", {}), OPTIONS)
        for name in ("estimators", "certifiers"):
            entries = manifest.get(name, ())
            right = (isinstance(e, dict) and "estimator" in e and not _other_types(e, ENTRY) for e in entries)
            wrong += [] if all(right) else [name]
        ends = manifest.get("fingerprint", {}).get("bounds", [0.0, 1.0])
        if not (isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)):
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
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def probe_checksums(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Split -> checksum of its probe images, as the manifest has them; `MarginTracker`'s fingerprint always did."""
    fingerprint = manifest.get("fingerprint", {})
    found = manifest.get("probes", fingerprint.get("probes", {}))
    return dict(found) if isinstance(found, dict) else {}


def check_probes(before: Mapping[str, Any], after: Mapping[str, str]) -> None:
    """A run measures the same images for ever.

    Raises:
        StoreError: other images; names the split.
    """
    known = probe_checksums(before)
    for split, checksum in after.items():
        if split in known and known[split] != checksum:
            raise StoreError(
                f"expected the probe images of {split} that the run has, {known[split][:12]}, got {checksum[:12]}; "
                "use them, or another folder"
            )


def check_parameters(before: Iterable[dict[str, Any]], after: Iterable[dict[str, Any]]) -> None:
    """A text leaves out parameters at their defaults, which another version may have changed.

    Raises:
        StoreError: an estimator that the run has measured with other parameters.
    """
    known = {entry["estimator"]: entry.get("parameters") for entry in before}
    for entry in after:
        text, now_meant = entry["estimator"], entry.get("parameters")
        if text in known and known[text] != now_meant:
            raise StoreError(
                f"expected {text} with the parameters that the run was measured with, {known[text]}, got {now_meant}; "
                "write them out, or use another folder"
            )


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(f"{name} {after.get(name)!r} (the run has {before.get(name)!r})" for name in names)


def environment(threads: int | None = None) -> dict[str, Any]:
    """Versions and machine, for the manifest."""
    versions = {"python": platform.python_version()}
    for library in ("margin-harness", *LIBRARIES):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    machine = {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()}
    return {"versions": versions, "machine": machine | {"threads": threads}, "command": sys.orig_argv[1:]}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
