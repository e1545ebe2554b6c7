"""The sources of a data set: a Kaggle data set, an archive, a folder or a manifest becomes a list of labelled files."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from btray import storage
from btray.acquire.config import AcquireConfig
from btray.acquire.download import digest, download, without_secrets
from btray.acquire.unpack import SUFFIXES, LeftOut, UnpackLimits, unpack
from btray.core.errors import UserError
from btray.data.labelled import MANIFESTS, SPLITS, read_labelled
from btray.data.labels import CANONICAL, canonical_label
from btray.storage.errors import storage_errors_for

Kind = Literal["kaggle", "http", "archive", "folder", "manifest"]

_MANIFESTS = (".parquet", ".csv")
_ARCHIVES = {".zip", ".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".rar", ".7z", ".gz", ".bz2", ".xz", ".zst"}
# What stands beside images in published data sets. No list of image suffixes: DICOM files have any suffix or none.
_NO_IMAGES = {
    ".csv", ".tsv", ".txt", ".md", ".rst", ".json", ".jsonl", ".xml", ".html", ".htm", ".yaml", ".yml", ".log",
    ".pdf", ".doc", ".docx", ".xls", ".xlsx", ".ppt", ".pptx", ".rtf", ".parquet", ".sqlite",
    ".py", ".pyc", ".ipynb", ".m", ".r", ".sh", ".bat", ".exe", ".dll",
    ".mat", ".npy", ".npz", ".h5", ".hdf5", ".pkl", ".pickle", ".pt", ".pth", ".onnx", ".keras", ".safetensors",
    ".db", ".ini", ".lnk", ".url", ".bib", ".tex", ".mp4", ".avi", ".mov", ".svg",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """One --source."""

    uri: str
    """As it is fetched: kaggle:OWNER/NAME, an http(s) address, or a resolved path or s3:// URI."""
    kind: Kind
    name: str
    """Its folder below OUT/images, and its entry in the manifest."""
    sha256: str | None
    license: str | None

    @property
    def shown(self) -> str:
        """The URI without what is secret in it."""
        return without_secrets(self.uri)


@dataclass(frozen=True, kw_only=True)
class LabelledFile:
    """One image that a source brings."""

    uri: str
    path: str
    """Where it goes, below the source's folder."""
    label: str
    split: str | None
    patient_id: str | None


@dataclass(kw_only=True)
class Contents:
    """What a source holds; its files can be read for as long as the source is open."""

    files: list[LabelledFile] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    sha256: str | None = None
    """Of an archive."""


def parse_sources(config: AcquireConfig, out: str) -> list[Source]:
    """Raises `UserError` for a source that is not there, that overlaps `out`, or that has no SHA-256 to check."""
    sources: list[Source] = []
    taken: set[str] = set()
    licenses = config.license * len(config.source) if len(config.license) == 1 else config.license
    for index, given in enumerate(config.source):
        uri, kind = _kind_of(given)
        sha256 = config.sha256[index] if index < len(config.sha256) else "-"
        if sha256 != "-" and kind not in {"http", "archive"}:
            raise UserError(f"--sha256 {sha256}: {given} is no archive, so there is nothing to compare; give - for it")
        overlap = f"{uri}/".startswith(f"{out}/") or f"{out}/".startswith(f"{uri}/")
        if overlap and kind in {"folder", "manifest"}:
            raise UserError(f"--source {given} and --out {out} overlap; write the data set elsewhere")
        source = Source(
            uri=uri,
            kind=kind,
            name=_free_name(config.name[index] if index < len(config.name) else _default_name(uri), taken),
            sha256=None if sha256 == "-" else sha256,
            license=licenses[index] if index < len(licenses) else None,
        )
        sources.append(source)
    return sources


def _kind_of(given: str) -> tuple[str, Kind]:
    if given.startswith("kaggle:"):
        if not re.fullmatch(r"kaggle:\w[\w.-]*/\w[\w.-]*(/versions/\d+)?", given):
            raise UserError(f"--source {given}: write kaggle:OWNER/NAME, as in the address of the data set")
        return given, "kaggle"
    if given.lower().startswith(("http://", "https://")):
        try:
            host = urlsplit(given).hostname
        except ValueError:
            host = None
        if not host:
            raise UserError(f"--source {given} names no server; write http(s)://SERVER/PATH")
        return given, "http"
    uri = storage.resolve(given)
    if not storage.exists(uri):
        raise UserError(f"--source {given}: nothing is there; check the spelling (a comma separates sources)")
    if storage.is_folder(uri):
        return uri, "folder"
    if uri.lower().endswith(_MANIFESTS):
        return uri, "manifest"
    return uri, "archive"


def _default_name(uri: str) -> str:
    if uri.startswith("kaggle:"):
        last = uri.split("/")[1]
    else:
        last = unquote(urlsplit(uri).path) if uri.lower().startswith(("http://", "https://")) else uri
        last = storage.name(last)
    for suffix in (*SUFFIXES, *_MANIFESTS):
        if last.lower().endswith(suffix):
            last = last[: -len(suffix)]
            break
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("._-")[:80] or "source"


def _free_name(name: str, taken: set[str]) -> str:
    candidate, number = name, 1
    while candidate.casefold() in taken:
        number += 1
        candidate = f"{name}-{number}"
    taken.add(candidate.casefold())
    return candidate


@contextmanager
def opened(source: Source, *, cache: Path, limits: UnpackLimits) -> Iterator[Contents]:
    """Fetch and unpack `source` below the local folder `cache` and find its labelled images.

    Raises `UserError` where the source cannot be fetched, is unsafe or holds no labelled images.
    """
    if source.kind == "kaggle":
        yield _tree(_from_kaggle(source.uri), source.shown)
    elif source.kind == "folder":
        yield _folder(source.uri, source.shown)
    elif source.kind == "manifest":
        yield _manifest(source.uri)
    else:
        with storage_errors_for(str(cache)):
            cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as folder:
            archive = _archive_of(source, cache, Path(folder))
            sha256 = digest(archive)
            if source.sha256 not in {None, sha256}:
                raise UserError(f"{source.shown} has the SHA-256 {sha256}, expected {source.sha256}")
            below = Path(folder) / "content"
            below.mkdir()
            left_out = unpack(archive, below, limits=limits, shown=source.shown, leave_out=reason_to_leave_out)
            contents = _tree(str(below), source.shown)
            contents.left_out += left_out
            contents.sha256 = sha256
            yield contents


def _archive_of(source: Source, cache: Path, folder: Path) -> Path:
    if source.kind == "http":
        return download(source.uri, cache / "downloads", sha256=source.sha256)
    if not storage.is_remote(source.uri):
        return Path(source.uri)
    filesystem, path = storage.arrow_filesystem(source.uri)
    target = folder / "archive"
    with storage_errors_for(source.uri), filesystem.open_input_stream(path) as stream, target.open("wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    return target


def _from_kaggle(uri: str) -> str:
    try:
        import kagglehub
    except ImportError as error:
        raise UserError(f"{uri} needs the Kaggle client: pip install 'btray[kaggle]'") from error
    try:
        return str(kagglehub.dataset_download(uri.removeprefix("kaggle:")))
    except Exception as error:  # kagglehub's exceptions have no base in common
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{uri} cannot be fetched: {why}; check name, network and Kaggle credentials") from error


# ---- what is in a source


def reason_to_leave_out(path: str) -> str | None:
    """Why the file `path`, relative to its source, is no image to take; None where it may be one."""
    if any(part.startswith((".", "_")) for part in path.split("/")):
        return "hidden"
    suffix = PurePosixPath(path).suffix.lower()
    if suffix in _ARCHIVES and not path.lower().endswith(".nii.gz"):
        return "archive_inside"
    return "no_image" if suffix in _NO_IMAGES else None


def _folder(uri: str, shown: str) -> Contents:
    """A folder of the user's: what its manifest names, if it has one at its top, else a class tree."""
    manifest = next((name for name in MANIFESTS if storage.exists(storage.join(uri, name))), None)
    if manifest is None:
        return _tree(uri, shown)
    contents = _manifest(storage.join(uri, manifest))
    named = {file.uri for file in contents.files}
    for info in storage.list_files(uri):
        name = info.uri[len(uri) + 1 :]
        if info.uri not in named and name != manifest:
            contents.left_out.append(LeftOut(name=name, reason=reason_to_leave_out(name) or "not_in_manifest"))
    return contents


def _tree(folder: str, shown: str) -> Contents:
    """The class tree at `folder` or somewhere below it.

    What a tree is stands in `btray.data.labelled`; unlike `read_labelled` this takes one class too, for other sources
    may bring the others, and no manifest: one inside a downloaded archive could name any file of this machine.
    """
    names = [info.uri[len(folder) + 1 :] for info in storage.list_files(folder)]
    reasons = {name: reason for name in names if (reason := reason_to_leave_out(name))}
    images = [name for name in names if name not in reasons]
    if not images:
        raise UserError(f"{shown} holds no images")
    root = class_root(images, shown)
    contents = Contents()
    for name in images:
        if not _is_below(name, root):
            reasons[name] = "outside_class_tree"
            continue
        path = name.removeprefix(f"{root}/") if root else name
        first, *rest = path.split("/")
        split = SPLITS.get(first.casefold()) if rest else None
        label = rest[0] if split else first
        if len(rest) < (2 if split else 1):
            reasons[name] = "no_class_folder"
            continue
        uri = storage.join(folder, name)
        contents.files.append(
            LabelledFile(uri=uri, path=path, label=canonical_label(label), split=split, patient_id=None)
        )
    if not contents.files:
        raise UserError(
            f"{shown} holds {len(images)} images, such as {images[0]}, but no class folders; give one a class"
        )
    contents.left_out += [LeftOut(name=name, reason=reason) for name, reason in reasons.items()]
    contents.left_out += [LeftOut(name=name, reason="hidden") for name in _hidden(folder, names)]
    return contents


def _hidden(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Files that listings leave out, in the folders where others are listed."""
    folders = {""} | {str(parent) for name in names for parent in PurePosixPath(name).parents if str(parent) != "."}
    for below in sorted(folders):
        where = storage.join(folder, below) if below else folder
        # missing: a local name that is not UTF-8, which was listed with escapes
        for entry in storage.list_names(where, missing_ok=True):
            if entry.startswith((".", "_")):
                for info in storage.list_files(storage.join(where, entry)):
                    yield info.uri[len(folder) + 1 :]


def class_root(names: Iterable[str], shown: str) -> str:
    """The folder, relative and without slashes around it, whose children are the classes or the splits.

    It is the topmost one with a child that is named like a split or a known class; where there is none, single
    folders are taken for wrappers down to the first that has files or several children.

    Raises `UserError` where several unrelated folders look like a class tree.
    """
    children: dict[str, set[str]] = {}
    with_files: set[str] = set()
    for name in names:
        *folders, _ = name.split("/")
        with_files.add("/".join(folders))
        for depth, child in enumerate(folders):
            children.setdefault("/".join(folders[:depth]), set()).add(child)
    known = sorted(folder for folder, below in children.items() if any(_is_known(child) for child in below))
    tops = [folder for folder in known if not any(folder != top and _is_below(folder, top) for top in known)]
    if len(tops) > 1:
        several = ", ".join(repr(top) for top in tops[:3])
        raise UserError(
            f"{shown} holds {len(tops)} class trees ({several}, ...); unpack it and give each as a --source"
        )
    if tops:
        return tops[0]
    root = ""
    while root not in with_files and len(children.get(root, ())) == 1:
        child = f"{root}/{next(iter(children[root]))}".strip("/")
        if child in with_files:
            break
        root = child
    return root


def _is_known(folder: str) -> bool:
    return folder.casefold() in SPLITS or canonical_label(folder) in CANONICAL


def _is_below(folder: str, top: str) -> bool:
    return not top or folder.startswith(f"{top}/")


def _manifest(uri: str) -> Contents:
    """The files that a manifest names, wherever they lie, put into folders by split and label; one class is enough."""
    contents = Contents()
    taken: set[str] = set()
    for row in read_labelled(uri, least_classes=1).to_pylist():
        folders = [_folder_name(part) for part in (row["split"], row["label"]) if part]
        path = _free_path("/".join([*folders, storage.name(row["uri"])]), taken)
        contents.files.append(
            LabelledFile(
                uri=row["uri"], path=path, label=row["label"], split=row["split"], patient_id=row["patient_id"]
            )
        )
    return contents


def _folder_name(label: str) -> str:
    return re.sub(r"[/\\\0]", "-", label).lstrip("._") or "class"


def _free_path(path: str, taken: set[str]) -> str:
    pure, candidate, number = PurePosixPath(path), path, 1
    while candidate.casefold() in taken:
        number += 1
        candidate = str(pure.with_name(f"{pure.stem}-{number}{pure.suffix}"))
    taken.add(candidate.casefold())
    return candidate
