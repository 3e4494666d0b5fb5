"""Packages of one node, for many processes that begin there: archives taken once, models found by name."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path

from glake_infer.allocators.errors import InputError, PackageError, StoreError
from glake_infer.digest import digest_of
from glake_infer.models.archive import import_archive
from glake_infer.models.manifest import MAXIMUM_BYTES
from glake_infer.models.package import SUFFIX, Package
from glake_infer.store import MANIFEST, Store

Reference = str | os.PathLike[str]
"""A package, or an archive of one, as a path that every node has."""


class UnknownModelError(InputError):
    """A request names a model that the deployment does not have."""


def local_package(reference: Reference, store: Store | None = None) -> Path:
    """Return the path of a package on this node; an archive is taken into the node's store first, once.

    Processes that ask for the same archive at the same time wait for the first of them. Archives are told apart by
    what is in them: one that was replaced is taken anew. Raises PackageError, StoreError, StorageFullError.
    """
    path = Path(reference)
    if not path.is_file():
        return path
    store = store or Store()
    identity = _archived_manifest(path)
    name = _name_of(path)
    target = store.root / "archives" / identity[:32] / (name + SUFFIX)
    with store.locked(f"archives/{identity[:32]}.lock", exclusive=True):
        if not _is_whole(target, store):
            target.parent.mkdir(parents=True, exist_ok=True)
            import_archive(path, target, store=store)
    return target


def _archived_manifest(path: Path) -> str:
    """The digest of the manifest in an archive."""
    try:
        with tarfile.open(path, "r:") as archive:
            first = archive.next()
            if first is not None and first.name == MANIFEST and first.size <= MAXIMUM_BYTES:
                content = archive.extractfile(first)
                if content is not None:
                    return digest_of(content.read())
    except tarfile.TarError as error:
        raise PackageError(
            f"{path} is not a glake-infer archive, or it is truncated ({error}). Copy it again."
        ) from error
    raise PackageError(f"{path} is not a glake-infer archive: it does not begin with {MANIFEST}.")


def _is_whole(target: Path, store: Store) -> bool:
    try:
        Package(target, store).check_present()
    except (PackageError, StoreError):
        return False
    return True


class Packages:
    """The models of a deployment: one, several by name, or whatever a folder has."""

    def __init__(self, packages: Reference | Mapping[str, Reference]) -> None:
        """Raise InputError (an empty mapping), PackageError (nothing is there)."""
        self._named: dict[str, Reference] | None = None
        self._folder: Path | None = None
        self.only: str | None = None
        """The name of the model for requests that name none."""
        if isinstance(packages, Mapping):
            if not packages:
                raise InputError("a deployment needs a package at least, and received an empty mapping.")
            self._named = {str(name): reference for name, reference in packages.items()}
            self.only = next(iter(self._named)) if len(self._named) == 1 else None
            return
        path = Path(packages)
        if path.is_dir() and not (path / MANIFEST).is_file():
            self._folder = path
            return
        if not path.exists():
            raise PackageError(
                f"{path} does not exist on this node. Expected a package, an archive, or a folder of them, at a path "
                "that every node has."
            )
        self.only = _name_of(path)
        self._named = {self.only: packages}

    def names(self) -> list[str]:
        """Of all models that there are now."""
        if self._named is not None:
            return list(self._named)
        assert self._folder is not None
        names = (re.sub(r"\.glake(\.tar)?$|\.tar$", "", entry.name) for entry in self._folder.iterdir()
                 if re.search(r"\.glake$|\.tar$", entry.name) and not entry.name.startswith("."))  # fmt: skip
        return sorted(set(names))

    def find(self, name: str) -> Reference:
        """The package of a name. Raises UnknownModelError."""
        if self._named is not None and name in self._named:
            return self._named[name]
        if self._folder is not None and name == Path(name).name and not name.startswith("."):
            for ending in (SUFFIX, SUFFIX + ".tar", ".tar"):
                if (path := self._folder / (name + ending)).exists():
                    return path
        names = self.names()
        asked = f"there is no model {name!r} here" if name else "the request names no model"
        listed = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise UnknownModelError(
            f"{asked}; there are {listed or 'none'}. Name one in the header "
            "serve_multiplexed_model_id, or by handle.options(multiplexed_model_id=...)."
        )


def _name_of(path: Path) -> str:
    return re.sub(r"(\.glake)?(\.tar|\.archive)?$", "", path.name)
