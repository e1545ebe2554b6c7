"""The folder of a bundle: which files it holds, and whether one may be written there. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from btray import storage
from btray.core.errors import UserError
from btray.model.config import MANIFEST, NO_BUNDLE
from btray.model.manifest import Manifest, is_plain_name, sha256
from btray.storage import StorageError

WEIGHTS = "model.safetensors"
FINGERPRINTS = "fingerprints.safetensors"
"""Fingerprints of all images that were trained on or validated with; see `btray.data.fingerprint`."""
# Lists the files of a bundle that is being written: what a killed writer left is recognised by it and may be replaced.
WRITING = "_writing.json"


def require_free(uri: str) -> None:
    """Raise UserError unless `uri` can take a bundle: not there, empty, a bundle, or only names that begin with `_`."""
    if storage.is_remote(uri):
        bucket = "/".join(uri.split("/")[:3])
        try:
            bucket_exists = storage.is_folder(bucket)
        except StorageError:  # whoever may write below a prefix may be forbidden to list the bucket
            bucket_exists = True
        if not bucket_exists:
            raise UserError(f"--out {uri}: there is no bucket {bucket}; make it, or name another")
    elif storage.exists(uri) and not storage.is_folder(uri):
        raise UserError(f"--out {uri} is a file; name a folder")
    if foreign := visible_names(uri) - own_names(uri):
        raise UserError(
            f"--out {uri} is not empty and holds {min(foreign)}, which is not part of a bundle; name an empty folder"
        )


def own_names(uri: str) -> set[str]:
    """Return the files in `uri` that a bundle lists, or a writer that was killed. Raises UserError for a bad list."""
    own: set[str] = set()
    names = storage.list_names(uri, missing_ok=True)
    if MANIFEST in names:
        own |= {MANIFEST, WEIGHTS, *read_manifest(uri).files}
    if WRITING in names:
        own |= {str(name) for name in storage.read_json(storage.join(uri, WRITING))}
    for name in own:  # they will be deleted, so none may lead out of the folder
        if not is_plain_name(name):
            raise UserError(f"{uri}: {WRITING} lists {name!r}, which is not a plain file name; name an empty folder")
    return own


def visible_names(uri: str) -> set[str]:
    """Return the names in `uri` but those that begin with `_` or a dot."""
    return {name for name in storage.list_names(uri, missing_ok=True) if not name.startswith(("_", "."))}


def read_manifest(uri: str) -> Manifest:
    """Read the bundle.json of `uri`. Raises UserError if there is none, or if it is damaged."""
    with _missing_means(NO_BUNDLE.format(uri)):
        text = storage.read_text(storage.join(uri, MANIFEST))
    return Manifest.from_text(text, uri)


def read_files(uri: str, *, model_id: str | None = None) -> tuple[Manifest, dict[str, bytes]]:
    """Read and verify the manifest and files of a bundle, by name; `model_id` pins which model is meant.

    Fingerprints are left out: a kilobyte for each training image, which nobody who classifies needs. Raises UserError
    for whatever is missing, changed, unlisted, newer than this btray or not the pinned model.
    """
    manifest = read_manifest(uri)
    if model_id is not None and model_id != manifest.model_id:
        raise UserError(f"{uri} holds model {manifest.model_id}, not the pinned --model-id {model_id}")
    digests = {WEIGHTS: manifest.weights_sha256, **manifest.files}
    files = {name: read_verified(uri, name, digest) for name, digest in digests.items() if name != FINGERPRINTS}
    names = visible_names(uri)
    if FINGERPRINTS in digests.keys() - names:
        raise UserError(f"{uri} is incomplete: {FINGERPRINTS} is missing; copy the bundle again")
    if unlisted := names - {MANIFEST, *digests}:
        raise UserError(
            f"{uri} holds {min(unlisted)}, which {MANIFEST} does not list; remove it or copy the bundle again"
        )
    if manifest.model_id != manifest.identity_digest():
        raise UserError(f"{uri}: {MANIFEST} was changed: its model_id is not that of its content; train or copy again")
    return manifest, files


def read_verified(uri: str, name: str, digest: str) -> bytes:
    """Read a file of a bundle. Raises UserError if it is missing or has another digest."""
    with _missing_means(f"{uri} is incomplete: {name} is missing; copy the bundle again"):
        body = storage.read_bytes(storage.join(uri, name))
    if sha256(body) != digest:
        raise UserError(f"{uri}: {name} was changed or damaged: its SHA-256 is not the one in {MANIFEST}")
    return body


@contextmanager
def _missing_means(message: str) -> Iterator[None]:
    """Raise UserError with `message` for a file that is not there."""
    with storage.suppress_missing():
        yield
        return
    raise UserError(message)
