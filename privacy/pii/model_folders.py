"""Models that are folders of files, in an installed package or the user's own: told by one digest over all of them."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from privacy.pii.findings import MissingDetector
from privacy.pii.onnx_models import MEND


def folder_digest(folder: Path) -> str:
    """Hex SHA-256 over the path and the bytes of every file below `folder`, links followed; caches of Python apart.

    A copy of the folder has the same one, and any other file, name or byte gives another.
    """
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        if "__pycache__" not in path.parts:
            with path.open("rb") as file:
                total.update(hashlib.sha256(name.encode()).digest() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def users_folder(detector: str, folder: str, digest: str) -> Path:
    """The model folder that policy.<detector> names, where it has the `digest` that it names.

    Raises MissingDetector where it is absent or another one.
    """
    path = Path(folder)
    if not path.is_dir():
        raise MissingDetector(f"policy.{detector}.model is {folder!r}, which is no folder: give the model's folder")
    if (found := folder_digest(path)) != digest:
        raise MissingDetector(
            f"policy.{detector}.digest is {digest}, and {folder} has {found}: restore the folder, or write the latter "
            "where it is the model that you mean"
        )
    return path


def packaged_folder(detector: str, package: str, folder: str, digest: str) -> Path:
    """`folder` in an installed `package`, which is not imported, where it has the `digest` pinned in the code.

    Raises MissingDetector where it is absent or another one.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0], folder) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_dir():
        raise MissingDetector(f"the detector {detector!r} needs {folder} of the package {package}, absent: {MEND}")
    if (found := folder_digest(path)) != digest:
        raise MissingDetector(
            f"the detector {detector!r} was measured with {folder} of SHA-256 {digest}, and {path} has {found}: "
            f"install the version of {package} that has it ({MEND})"
        )
    return path
