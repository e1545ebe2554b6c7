"""Labelled images: a class-per-folder tree, a manifest or a pack of either, as one table."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import pyarrow as pa

from btray import storage
from btray.core.errors import UserError
from btray.data.labels import canonical_label
from btray.data.manifests import column_names, kind_of, read_manifest
from btray.data.packs import describe_pack, is_pack, list_pack
from btray.storage import FileInfo, StorageError
from btray.storage.packed import path_of

_log = logging.getLogger(__name__)

SPLITS = {
    **dict.fromkeys(("training", "train"), "train"),
    **dict.fromkeys(("validation", "valid", "val"), "val"),
    **dict.fromkeys(("testing", "test"), "test"),
}
"""Names of split folders, and in a manifest's column split, with what they mean."""
MANIFESTS = ("manifest.parquet", "manifest.csv")
SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("patient_id", pa.string()),
        pa.field("size", pa.int64()),
        pa.field("etag", pa.string()),
    ]
)
_LAYOUT = "one folder per class, or a manifest (.parquet or .csv) with the columns uri,label[,split][,patient_id]"


def read_labelled(uri: str, *, least_classes: int = 2) -> pa.Table:
    """Return the labelled images of a class-per-folder tree or a manifest, as a table with SCHEMA.

    A tree is `CLASS/**/FILE`, or `SPLIT/CLASS/**/FILE` with the split folders of SPLITS in any case; every file counts,
    whatever its name, but hidden ones. A manifest is a Parquet or CSV file with uri,label[,split][,patient_id], or a
    folder that holds one of MANIFESTS (the first that is there); relative URIs start at the manifest's folder. A packed
    archive gives what was packed into it, by the same rules, with member URIs. Labels are canonical; split is null,
    train, val or test; size (bytes) and etag are null in a manifest's rows.

    Raises:
        UserError: there is nothing, it cannot be read, it is not laid out so, or it has fewer than
            `least_classes` classes.
    """
    root = storage.resolve(uri)
    inside = (storage.join(root, name) for name in MANIFESTS)
    manifest = root if kind_of(root) == "manifest" else next((path for path in inside if storage.exists(path)), None)
    if manifest:
        table = _manifest_table(manifest, manifest.rpartition("/")[0], {})
    elif is_pack(root):
        table = _pack_table(root)
    else:
        table = _tree_table(root, ((info.uri.removeprefix(root), info) for info in storage.list_files(root)))
    classes = table["label"].unique().to_pylist()
    if len(classes) < least_classes:
        hint = "" if manifest else " Name the folder that holds the class folders, no folder above or below it."
        raise UserError(
            f"{manifest or root}: all {len(table)} images are labelled {classes[0]!r}; at least two classes are needed."
            + hint
        )
    return table


def holds_labels(manifest: str) -> bool:
    """Return whether this is a manifest with the columns of a labelled one."""
    try:
        return kind_of(manifest) == "manifest" and {"uri", "label"} <= column_names(manifest).keys()
    except StorageError:
        raise
    except UserError:
        return False


def class_of(path: str) -> tuple[str | None, str] | None:
    """Return split and label of a file at `path` below the root of a tree; None if it is in no class folder."""
    first, *rest = [part for part in path.split("/") if part]
    split = SPLITS.get(first.casefold()) if rest else None
    label, *below = rest if split else [first, *rest]
    return (split, canonical_label(label)) if below else None


def _table(rows: Iterable[tuple[object, ...]]) -> pa.Table:
    return pa.table(list(map(list, zip(*rows, strict=True))), schema=SCHEMA)


# ---- folder trees


def _tree_table(root: str, files: Iterable[tuple[str, FileInfo]]) -> pa.Table:
    """Return the table of a tree, from the paths of its files below its root."""
    rows, loose = [], []
    for path, info in files:
        if info.uri == root:
            raise UserError(f"{root} is a file, neither a folder nor a manifest; give {_LAYOUT}.")
        if known := class_of(path):
            split, label = known
            rows.append((info.uri, label, split, None, info.size, info.etag or None))
        else:
            loose.append(info.uri)
    if not rows and not loose:
        raise UserError(f"{root} holds no file; give {_LAYOUT}.")
    if not rows:
        raise UserError(
            f"{root} holds {len(loose)} files (such as {storage.name(loose[0])}) but no class folders; give {_LAYOUT}."
        )
    if loose:
        _log.warning("%d files lie in no class folder of %s and are left out, such as %s.", len(loose), root, loose[0])
    return _table(rows)


# ---- manifests and packed archives


def _manifest_table(manifest: str, folder: str, members: dict[str, str]) -> pa.Table:
    """Return the table of a manifest whose relative URIs start at `folder`; `members` are the packed ones of its URIs.

    What a pack does not hold keeps its own URI: reading it tells whether it is there.
    """
    rows: dict[str, tuple[int, tuple[str, str | None, str | None]]] = {}
    for number, (uri, label, split, patient) in read_manifest(
        manifest, SCHEMA.names[:4], required=("uri", "label"), folder=folder, known=members
    ):
        known_split = SPLITS.get((split or "").strip().casefold())
        if known_split is None and (split or "").strip():
            raise UserError(
                f"{manifest}, row {number}: split {split!r} is unknown; write train, val or test, or leave it empty."
            )
        facts = (canonical_label(str(label)), known_split, (patient or "").strip() or None)
        # a row given twice counts once; two rows that differ are a mistake that nobody but the user can mend
        first, known = rows.setdefault(str(uri), (number, facts))
        if known != facts:
            raise UserError(
                f"{manifest}, row {number}: {uri} has label, split and patient {facts}, but {known} in row {first}; "
                "drop one."
            )
    if not rows:
        raise UserError(f"{manifest} has no rows; list the images with the columns uri,label[,split][,patient_id].")
    return _table((members.get(uri, uri), *facts, None, None) for uri, (_, facts) in rows.items())


def _pack_table(root: str) -> pa.Table:
    """Return the table of what was packed: by its manifest, or else as a tree."""
    pack = describe_pack(root)
    members = {info.uri: info for info in list_pack(root)}
    inside = (members.get(storage.join(pack.root, name)) for name in MANIFESTS)
    manifest = storage.join(root, pack.manifest) if pack.manifest else next((i.place for i in inside if i), None)
    if manifest is None:
        return _tree_table(root, ((path_of(info.place), replace(info, uri=info.place)) for info in members.values()))
    return _manifest_table(manifest, pack.root, {uri: info.place for uri, info in members.items()})
