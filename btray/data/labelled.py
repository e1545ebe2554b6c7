"""Labelled images: a class-per-folder tree, a manifest or a pack of either, as one table."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import pyarrow as pa

from btray import storage
from btray.core.errors import UserError
from btray.data.config import PreprocessConfig
from btray.data.labels import canonical_label, require_classes
from btray.data.manifests import column_names, kind_of, read_manifest
from btray.data.packs import describe_pack, is_pack, list_pack, require_preprocessing
from btray.data.trees import COLUMNS, LAYOUT, SPLITS, no_class, read_tree, with_remedy
from btray.storage import FileInfo, StorageError
from btray.storage.packed import path_of

_log = logging.getLogger(__name__)

MANIFESTS = ("manifest.parquet", "manifest.csv")
SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
    ]
)
_NAMED = 20


@dataclass(frozen=True)
class Labelled:
    """Labelled images, and what was found beside them."""

    table: pa.Table
    """With SCHEMA."""
    left_out: Mapping[str, str]
    """Why other files, by their paths or URIs, are not in the table."""
    warnings: Sequence[str]
    """Each names folders or labels that are probably not meant so; the last one, what to do about them."""


def read_labelled(
    uri: str, *, classes: Sequence[str] = (), least_classes: int = 2, preprocess: PreprocessConfig | None = None
) -> pa.Table:
    """Return the labelled images of `list_labelled` as a table with SCHEMA, and log what is left out.

    Raises:
        UserError: as `list_labelled`; something is not laid out as it seems to be meant; one of `classes` is not there;
            or there are fewer than `least_classes` classes.
    """
    data = list_labelled(uri, classes, preprocess)
    if data.warnings:
        raise UserError(f"{uri}: {'; '.join(data.warnings)}.")
    if data.left_out:
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(data.left_out.values()).most_common())
        named = ", ".join(islice(data.left_out, _NAMED)) + ", ..." * (len(data.left_out) > _NAMED)
        _log.warning("%d files of %s are left out (%s): %s", len(data.left_out), uri, reasons, named)
    found = data.table["label"].unique().to_pylist()
    require_classes(classes, found, f"nothing in {uri}")
    if len(found) < least_classes:
        raise UserError(
            f"{uri}: all {len(data.table)} images are labelled {found[0]!r}; at least two classes are needed. "
            "Of a tree, name the folder that holds the class folders, no folder below it."
        )
    return data.table


def list_labelled(uri: str, classes: Sequence[str] = (), preprocess: PreprocessConfig | None = None) -> Labelled:
    """List the labelled images of a class-per-folder tree or a manifest.

    What a tree is, `btray.data.trees` says. A manifest is a Parquet or CSV file with uri,label[,split][,patient_id]
    [,source], or a folder that holds one of MANIFESTS (the first that is there); relative URIs start at the manifest's
    folder. A packed archive gives what was packed into it, by the same rules, with member URIs. Labels are canonical;
    split is null, train, val or test; patient_id and source are null in a tree's rows, size (bytes) and etag in a
    manifest's. If `classes` are given, images with other labels are left out. A pack of frames serves who needs no more
    than the frames that `preprocess` gives.

    Raises:
        UserError: there is nothing, it cannot be read, or it is not laid out so; or it is a pack of other frames.
    """
    root = storage.resolve(uri)
    inside = (storage.join(root, name) for name in MANIFESTS)
    manifest = root if kind_of(root) == "manifest" else next((path for path in inside if storage.exists(path)), None)
    if manifest:
        return _read_manifest(manifest, manifest.rpartition("/")[0], {}, classes)
    if is_pack(root):
        require_preprocessing(root, preprocess)
        return _read_pack(root, classes)
    files = {info.uri[len(root) + 1 :]: info for info in storage.list_files(root)}
    if "" in files:
        raise UserError(f"{root} is a file, neither a folder nor a manifest; give {LAYOUT}.")
    return _read_tree(root, files, classes)


def holds_labels(manifest: str) -> bool:
    """Return whether this is a manifest with the columns of a labelled one."""
    try:
        return kind_of(manifest) == "manifest" and {"uri", "label"} <= column_names(manifest).keys()
    except StorageError:
        raise
    except UserError:
        return False


def _table(rows: Iterable[tuple[str, str, object, object, object, object, object]]) -> pa.Table:
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=SCHEMA)


def _read_tree(root: str, files: Mapping[str, FileInfo], classes: Sequence[str]) -> Labelled:
    """Read a tree from its files, by their paths."""
    tree = read_tree(files, root, classes)
    infos = ((files[path], split, label) for path, (split, label) in tree.images.items())
    table = _table((info.uri, label, split, None, None, info.size, info.etag or None) for info, split, label in infos)
    return Labelled(table, tree.left_out, tree.warnings)


def _read_manifest(manifest: str, folder: str, members: Mapping[str, str], classes: Sequence[str]) -> Labelled:
    """Read a manifest whose relative URIs start at `folder`; `members` are the packed ones of its URIs.

    What a pack does not hold keeps its own URI: reading it tells whether it is there.
    """
    rows: dict[str, tuple[int, tuple[str, str | None, str | None, str | None]]] = {}
    for number, (uri, label, split, patient, source) in read_manifest(
        manifest, SCHEMA.names[:5], required=("uri", "label"), folder=folder, known=members
    ):
        known_split = SPLITS.get((split or "").strip().casefold())
        if known_split is None and (split or "").strip():
            raise UserError(
                f"{manifest}, row {number}: split {split!r} is unknown; write train, val or test, or leave it empty."
            )
        facts = (canonical_label(str(label)), known_split, _text(patient), _text(source))
        # a row given twice counts once; two rows that differ are a mistake that nobody but the user can mend
        first, known = rows.setdefault(str(uri), (number, facts))
        if known != facts:
            raise UserError(
                f"{manifest}, row {number}: {uri} has label, split, patient and source {facts}, but {known} in row "
                f"{first}; drop one."
            )
    if not rows:
        raise UserError(f"{manifest} has no rows; list the images with the columns {COLUMNS}.")
    wanted = {canonical_label(name) for name in classes}
    left_out = {uri: "not_in_classes" for uri, (_, (label, *_)) in rows.items() if wanted and label not in wanted}
    if len(left_out) == len(rows):
        raise UserError(f"{manifest} names no image of the classes {', '.join(classes)}; correct --classes.")
    kept = ((members.get(uri, uri), *facts, None, None) for uri, (_, facts) in rows.items() if uri not in left_out)
    table = _table(kept)
    labels = table["label"].unique().to_pylist()
    doubts = [f"label {label!r} looks like {kind}" for label in labels if (kind := no_class(label))]
    return Labelled(table, left_out, [] if wanted else with_remedy(doubts, labels))


def _text(value: str | None) -> str | None:
    return (value or "").strip() or None


def _read_pack(root: str, classes: Sequence[str]) -> Labelled:
    """Read what was packed: by its manifest, or else as a tree."""
    pack = describe_pack(root)
    members = {info.uri: info for info in list_pack(root)}
    inside = (members.get(storage.join(pack.root, name)) for name in MANIFESTS)
    manifest = storage.join(root, pack.manifest) if pack.manifest else next((i.place for i in inside if i), None)
    if manifest is None:
        by_path = {path_of(info.place): replace(info, uri=info.place) for info in members.values()}
        files = {path: by_path[path] for path in sorted(by_path)}  # in the order in which a folder is listed
        return _read_tree(root, files, classes)
    return _read_manifest(manifest, pack.root, {uri: info.place for uri, info in members.items()}, classes)
