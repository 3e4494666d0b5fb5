"""Packages on disk: written whole or not at all, opened with all checks that need no session."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto

from glake_infer.allocators.errors import DigestMismatchError, InputError, PackageError, StoreError
from glake_infer.digest import digest_of, digest_of_file
from glake_infer.models.graph import external_entries, initializers, is_external
from glake_infer.models.manifest import Manifest, read_manifest
from glake_infer.store import MANIFEST, Store, storage_errors, temporary_sibling

SUFFIX = ".glake"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


def default_target(source: Path) -> Path:
    """`model.onnx` -> `model.glake` beside it."""
    return source.with_suffix(SUFFIX)


def check_target(target: Path) -> None:
    """Raise InputError where `target` is something that a package must not replace."""
    try:
        place = target.resolve()
        usable = (
            not place.exists()
            or (place / MANIFEST).is_file()
            or (place.is_dir() and not any(place.iterdir()))
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"a package cannot be written to {str(target)!r}: {error}. Choose another name with -o."
        ) from error
    if not usable:
        raise InputError(
            f"{target} exists and is not a package: it was left alone. Choose another name with -o."
        )
    if not place.parent.is_dir():
        raise InputError(
            f"the folder {place.parent} does not exist. Make it, or choose another place with -o."
        )


def write_package(store: Store, target: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
    """Write a package folder and register it with the store; the caller holds `store.using()`.

    The folder is built beside `target` and exchanged with it in one step, so that `target` is at every
    moment the old package, the new one, or (the first time) absent. Returns the sealed manifest.
    """
    manifest = manifest.sealed()
    target = target.resolve()
    temporary = temporary_sibling(target)
    with store.writing(temporary), storage_errors("writing the package", target):
        try:
            temporary.mkdir()
            for name, data in {**files, MANIFEST: manifest.to_json()}.items():
                with (temporary / name).open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            # registered first: a package without weights is worse than weights without a package
            store.register(target, manifest.identity, manifest.distinct)
            _replace_folder(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def _replace_folder(temporary: Path, target: Path) -> None:
    """Put `temporary` in the place of `target`; afterwards `temporary` holds what was there, or nothing."""
    for _ in range(100):
        try:
            temporary.rename(target)  # works where target is absent or an empty folder
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        libc = ctypes.CDLL(None, use_errno=True)
        arguments = (_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
        if hasattr(libc, "renameat2") and libc.renameat2(*arguments) == 0:
            return
        # A file system without exchange (NFS, some FUSE): a short moment without a package instead.
        with contextlib.suppress(FileNotFoundError):
            target.rename(temporary.with_name(temporary.name + ".old.tmp"))
            shutil.rmtree(temporary.with_name(temporary.name + ".old.tmp"), ignore_errors=True)
    raise PackageError(f"{target} could not be replaced: something else keeps writing to it. Try again.")


class Package:
    """An opened package: its manifest is checked, its graphs are read on demand.

    Opening registers the package with the store, so that a package that was moved or copied keeps its
    weights through the next gc.
    """

    def __init__(self, path: str | os.PathLike[str], store: Store | None = None) -> None:
        """Open `path`; raises PackageError where it is not a sound package of a version that we read."""
        self.path = Path(path)
        self.store = store or Store()
        self.manifest = read_manifest(self.path)
        if not all(self.store.objects.path(digest).exists() for digest in self.manifest.distinct):
            return  # of another store: this one has nothing to keep for it
        with contextlib.suppress(StoreError):  # a read-only store serves its packages all the same
            self.store.register(self.path, self.manifest.identity, self.manifest.distinct)

    @property
    def name(self) -> str:
        """The folder's name without `.glake`, however its path is written."""
        return self.path.resolve().name.removesuffix(SUFFIX)

    def graph(self, variant: str = "onnx") -> ModelProto:
        """Read a variant's graph; raises PackageError where it was altered or does not fit the manifest."""
        entry = self.manifest.variants[variant]
        path = self.path / entry.graph
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PackageError(f"{path} cannot be read: {error.strerror}. {self._again()}") from error
        if digest_of(data) != entry.digest:
            raise PackageError(f"{path} was altered after it was written. {self._again()}")
        try:
            model = onnx.load_model_from_string(data)
        except (DecodeError, ValueError) as error:
            raise PackageError(f"{path} is not an ONNX graph ({error}). {self._again()}") from error
        self._check_weights(model, path, variant)
        return model

    def _check_weights(self, model: ModelProto, path: Path, variant: str) -> None:
        expected = {weight.name: weight for weight in self.manifest.weights_of(variant)}
        found: set[str] = set()
        for item in initializers(model):
            if not is_external(item.tensor):
                continue
            entries = external_entries(item.tensor)
            weight = expected.get(item.tensor.name)
            if weight is None:
                raise PackageError(
                    f"{path} has the weight {item.tensor.name!r}, which the manifest does not list for the "
                    f"variant {variant!r}. {self._again()}"
                )
            if (
                entries
                != {
                    "location": self.store.objects.location(weight.digest),
                    "offset": "0",
                    "length": str(weight.bytes),
                }
                or tuple(item.tensor.dims) != weight.shape
            ):
                raise PackageError(
                    f"the weight {weight.name!r} of {path} does not fit the manifest. {self._again()}"
                )
            found.add(weight.name)
        if extra := sorted(expected.keys() - found):
            raise PackageError(
                f"the manifest lists the weight {extra[0]!r}, which {path} does not use. {self._again()}"
            )

    def check_present(self, needed: Mapping[str, int] | None = None) -> None:
        """Raise unless what is needed lies in the store, of its size and untouched (loading checks the bytes).

        `needed`: digest -> bytes; None: all that the package has. PackageError names a weight, or a part of an engine,
        that is missing or short, DigestMismatchError one that was changed.
        """
        for digest, size in (self.manifest.distinct if needed is None else needed).items():
            state = self.store.objects.state(digest, size)
            if state == "altered":
                raise self.damaged(digest)
            if state != "intact":
                raise self.unusable(digest, state)

    def unusable(self, digest: str, state: str) -> PackageError:
        """The error for an object that is missing, short, or cannot be read."""
        return PackageError(
            f"{self._called(digest)} of {self.path} is {state} in the store: "
            f"{self.store.objects.path(digest)} "
            f"should hold {self.manifest.distinct[digest]} bytes. {self._restore(digest, damaged=state == 'short')}"
        )

    def damaged(self, digest: str) -> DigestMismatchError:
        """The error for an object whose bytes are wrong: names every package that it hurts."""
        hurt = sorted({str(self.path.absolute()), *self.store.users_of(digest)})
        return DigestMismatchError(
            f"{self._called(digest)} was changed on disk: "
            f"{self.store.objects.path(digest)} no longer has "
            f"the digest it is named by. Hurt: {', '.join(hurt)}. {self._restore(digest, damaged=True)}"
        )

    def _called(self, digest: str) -> str:
        for weight in self.manifest.weights:
            if weight.digest == digest:
                return f"the weight {weight.name!r}"
        for kind, engine in self.manifest.engines.items():
            if digest in engine.objects:
                return f"a part of the {kind} engine, {digest[:16]},"
        return f"the weight {digest!r}"

    def verify(self, needed: Mapping[str, int] | None = None) -> Iterator[tuple[str, int]]:
        """Check every graph, and the bytes of what is `needed`, as for `check_present`; yields (digest, bytes) of each."""
        for variant in self.manifest.variants:
            self.graph(variant)
        needed = self.manifest.distinct if needed is None else needed
        self.check_present(needed)
        for digest, size in needed.items():
            if digest_of_file(self.store.objects.path(digest)) != digest:
                raise self.damaged(digest)
            yield digest, size

    def _again(self) -> str:
        return f"Convert {self.manifest.source.name} again."

    def _restore(self, digest: str, *, damaged: bool = False) -> str:
        meanwhile = ""
        if digest not in self.manifest.distinct_of_graphs:
            meanwhile = " Until then engine='onnxruntime' runs the graph, which does not need it."
        first = "Remove it with `glake-infer store verify --remove`, then convert" if damaged else "Convert"
        return (
            f"{first} {self.manifest.source.name} again, or import its archive.{meanwhile} If the package was made with "
            f"another store, set GLAKE_STORE to it (now {self.store.root}). (`glake-infer store gc` takes the weights of a "
            f"package that was moved to another folder and not opened there before.)"
        )
