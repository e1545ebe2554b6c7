"""What is to be read, and what is known of it: a labelled folder tree or manifest as one table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from btray import storage
from btray.core.errors import UserError
from btray.data.labels import canonical_label
from btray.data.manifests import locate
from btray.data.packs import describe_pack, is_pack, list_pack
from btray.storage import FileInfo, StorageError
from btray.storage.packed import path_of

_log = logging.getLogger(__name__)

SPLITS = {
    "training": "train",
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "testing": "test",
    "test": "test",
}
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
    """The labelled images of a class-per-folder tree or a manifest, as a table with SCHEMA.

    A tree is `CLASS/**/FILE`, or `SPLIT/CLASS/**/FILE` with the split folders of SPLITS in any case; every file counts,
    whatever its name, but hidden ones. A manifest is a .parquet or .csv file with uri,label[,split][,patient_id], or a
    folder that holds one of MANIFESTS (the first that is there); relative URIs start at the manifest's folder. A packed
    archive gives what was packed into it, by the same rules, with member URIs. Labels are canonical; split is null,
    train, val or test; size (bytes) and etag are null in a manifest's rows.

    Raises:
        UserError: there is nothing, it cannot be read, it is not laid out so, or it has fewer than
            `least_classes` classes.
    """
    root = storage.resolve(uri)
    try:
        manifest = _find_manifest(root)
        if manifest:
            table = _read_manifest(manifest)
        elif is_pack(root):
            table = _read_pack(root)
        else:
            table = _tree_table(root, ((_below(root, info.uri), info) for info in storage.list_files(root)))
    except StorageError as error:
        raise storage.user_error(error) from error
    classes = table["label"].unique().to_pylist()
    if len(classes) < least_classes:
        hint = "" if manifest else " Name the folder that holds the class folders, no folder above or below it."
        raise UserError(
            f"{manifest or root}: all {len(table)} images are labelled {classes[0]!r}; at least two classes are needed."
            + hint
        )
    return table


def holds_labels(manifest: str) -> bool:
    """Whether a .parquet or .csv file has the columns of a labelled manifest."""
    if not manifest.lower().endswith((".parquet", ".csv")):
        return False
    try:
        _load(manifest, storage.read_bytes(manifest))
    except UserError:
        return False
    return True


def _find_manifest(root: str) -> str | None:
    if root.lower().endswith((".parquet", ".csv")) and not storage.is_folder(root):
        return root
    inside = (storage.join(root, name) for name in MANIFESTS)
    return next((path for path in inside if storage.exists(path)), None)


# ---- folder trees


def _below(root: str, uri: str) -> str:
    if uri == root:
        raise UserError(f"{root} is a file, neither a folder nor a manifest; give {_LAYOUT}.")
    return uri.removeprefix(root)


def _tree_table(root: str, files: Iterable[tuple[str, FileInfo]]) -> pa.Table:
    """From the paths of files below the root of a tree."""
    columns: dict[str, list[object]] = {name: [] for name in SCHEMA.names}
    loose: list[str] = []
    for path, info in files:
        parts = [part for part in path.split("/") if part]
        split = SPLITS.get(parts[0].casefold()) if len(parts) > 1 else None
        inner = parts[1:] if split else parts
        if len(inner) < 2:
            loose.append(info.uri)
            continue
        row = (info.uri, canonical_label(inner[0]), split, None, info.size, info.etag or None)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    if not columns["uri"]:
        raise UserError(_explain_empty(root, loose))
    if loose:
        _log.warning("%d files lie in no class folder of %s and are left out, such as %s.", len(loose), root, loose[0])
    return pa.table(columns, schema=SCHEMA)


def _explain_empty(root: str, loose: Sequence[str]) -> str:
    if not loose:
        return f"{root} holds no file; give {_LAYOUT}."
    return f"{root} holds {len(loose)} files (such as {storage.name(loose[0])}) but no class folders; give {_LAYOUT}."


# ---- manifests


def _read_manifest(manifest: str) -> pa.Table:
    rows = _manifest_rows(manifest, manifest.rpartition("/")[0], storage.read_bytes(manifest))
    known = [(uri, *said, None, None) for uri, said in rows.items()]
    return pa.table(list(map(list, zip(*known, strict=True))), schema=SCHEMA)


def _manifest_rows(manifest: str, folder: str, data: bytes) -> dict[str, tuple[str, str | None, str | None]]:
    """URI -> label, split and patient; relative URIs start at `folder`."""
    source = _load(manifest, data)
    rows: dict[str, tuple[int, str, str | None, str | None]] = {}
    for number, (raw_uri, raw_label, raw_split, patient) in enumerate(_rows(source), start=1):
        where = f"{manifest}, row {number}"
        if not (raw_uri or "").strip() or not (raw_label or "").strip():
            column = "label" if (raw_uri or "").strip() else "uri"
            raise UserError(
                f"{where}: {column} is empty (uri {raw_uri!r}, label {raw_label!r}); fill it or drop the row."
            )
        split = SPLITS.get((raw_split or "").strip().casefold())
        if split is None and (raw_split or "").strip():
            raise UserError(f"{where}: split {raw_split!r} is unknown; write train, val or test, or leave it empty.")
        try:
            uri = locate(folder, str(raw_uri))
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        said = (canonical_label(str(raw_label)), split, (patient or "").strip() or None)
        first = rows.setdefault(uri, (number, *said))
        if first[1:] != said:
            raise UserError(
                f"{where}: {uri} has label, split and patient {said}, but {first[1:]} in row {first[0]}; drop one."
            )
    if not rows:
        raise UserError(f"{manifest} has no rows; list the images with the columns uri,label[,split][,patient_id].")
    return {uri: (label, split, patient) for uri, (_, label, split, patient) in rows.items()}


def _load(manifest: str, data: bytes) -> pa.Table:
    """The columns of the manifest that count, as strings, absent ones null."""
    try:
        read = _load_csv if manifest.lower().endswith(".csv") else _load_parquet
        table = read(data)
        by_name = {name.strip().casefold(): index for index, name in reversed(list(enumerate(table.column_names)))}
        missing = [name for name in ("uri", "label") if name not in by_name]
        if missing:
            raise UserError(
                f"{manifest} has no column {' and '.join(missing)} (it has {', '.join(table.column_names)}); "
                "the columns are uri,label[,split][,patient_id]."
            )
        wanted = {name: table[by_name[name]] for name in SCHEMA.names[:4] if name in by_name}
        return pa.table({name: column.cast(pa.string()) for name, column in wanted.items()})
    except (pa.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{manifest} cannot be read as a manifest ({reason}); write it as UTF-8 CSV or Parquet."
        ) from error


def _load_csv(data: bytes) -> pa.Table:
    source = pa.BufferReader(data)
    header = pa.csv.open_csv(source).schema.names
    source.seek(0)
    return pa.csv.read_csv(
        source,
        parse_options=pa.csv.ParseOptions(newlines_in_values=True),
        # as text: a patient 007 is not patient 7, and a label "NA" is no absent label
        convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string())),
    )


def _load_parquet(data: bytes) -> pa.Table:
    return pa.parquet.read_table(pa.BufferReader(data))


def _rows(table: pa.Table) -> Iterator[tuple[str | None, str | None, str | None, str | None]]:
    nothing = [None] * len(table)
    columns = [table[name].to_pylist() if name in table.column_names else nothing for name in SCHEMA.names[:4]]
    return zip(*columns, strict=True)


# ---- packed archives


def _read_pack(root: str) -> pa.Table:
    """As what was packed: by its manifest, or else as a tree."""
    said = describe_pack(root)
    members = {info.uri: info for info in list_pack(root)}
    beside = storage.join(root, said["manifest"]) if said["manifest"] else None
    inside = (members.get(storage.join(said["root"], name)) for name in MANIFESTS)
    manifest = beside or next((info.place for info in inside if info), None)
    if manifest is None:
        return _tree_table(root, ((path_of(info.place), replace(info, uri=info.place)) for info in members.values()))
    rows = _manifest_rows(manifest, said["root"], storage.read_bytes(manifest))
    # what the pack does not hold keeps its own URI: reading it tells whether it is there
    known = [(members[uri].place if uri in members else uri, *values, None, None) for uri, values in rows.items()]
    return pa.table(list(map(list, zip(*known, strict=True))), schema=SCHEMA)
