"""The sources of a data set: a Kaggle data set, an archive, a folder or a manifest becomes a list of labelled files."""

from __future__ import annotations

import itertools
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal
from urllib.parse import unquote, urlsplit

from btray import storage
from btray.acquire.config import AcquireConfig
from btray.acquire.download import digest, download, without_secrets
from btray.acquire.unpack import SUFFIXES, LeftOut, UnpackLimits, unpack
from btray.core.errors import UserError
from btray.data.labelled import MANIFESTS, list_labelled
from btray.data.manifests import ENDINGS, kind_of
from btray.data.trees import read_tree, reason_to_leave_out
from btray.storage.errors import storage_errors_for

Kind = Literal["kaggle", "http", "archive", "folder", "manifest"]

_COPIED_AT_A_TIME = 1 << 20  # bytes
_SUFFIX = re.compile(r"(\.nii)?\.[^./]*\Z", re.IGNORECASE)


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


@dataclass(frozen=True)
class LabelledFile:
    """One image that a source brings."""

    uri: str
    path: str
    """Where it goes, below the source's folder."""
    label: str
    split: str | None
    patient_id: str | None = None
    source: str | None = None
    """What a manifest calls its source; if nothing, it is the --source itself."""


@dataclass(frozen=True)
class Contents:
    """What a source holds; its files can be read for as long as the source is open."""

    files: list[LabelledFile]
    left_out: list[LeftOut] = field(default_factory=list)
    warnings: Sequence[str] = ()
    """Each names folders or labels that are probably not meant so."""
    sha256: str | None = None
    """Of an archive."""


def parse_sources(config: AcquireConfig, out: str) -> list[Source]:
    """Return the sources of `config`, of which those without a name get one.

    Raises:
        UserError: a source is not there, overlaps `out`, or has a SHA-256 but is not an archive.
    """
    sources: list[Source] = []
    taken: dict[str, int] = {}
    licenses = config.license * len(config.source) if len(config.license) == 1 else config.license
    for given, digest_, license_, name in itertools.zip_longest(config.source, config.sha256, licenses, config.name):
        uri, kind = _kind_of(str(given))
        sha256 = None if digest_ == "-" else digest_
        if sha256 and kind not in {"http", "archive"}:
            raise UserError(
                f"--sha256 {sha256}: {given} is not an archive, so there is nothing to compare; give - for it"
            )
        # a second run would take its own output for input
        overlap = f"{uri}/".startswith(f"{out}/") or f"{out}/".startswith(f"{uri}/")
        if overlap and kind in {"folder", "manifest"}:
            raise UserError(f"--source {given} and --out {out} overlap; write the data set elsewhere")
        unused = _unused(name or _default_name(uri), "", taken)
        sources.append(Source(uri=uri, kind=kind, name=unused, sha256=sha256, license=license_))
    return sources


def _kind_of(given: str) -> tuple[str, Kind]:
    if given.startswith("kaggle:"):
        if not re.fullmatch(r"kaggle:\w[\w.-]*/\w[\w.-]*(/versions/\d+)?", given):
            raise UserError(f"--source {given}: write kaggle:OWNER/NAME, as in the address of the data set")
        return given, "kaggle"
    if given.lower().startswith(("http://", "https://")):
        with suppress(ValueError):
            if urlsplit(given).hostname:
                return given, "http"
        raise UserError(f"--source {given} names no server; write http(s)://SERVER/PATH")
    if not storage.exists(given):
        raise UserError(f"--source {given}: nothing is there; check the spelling (a comma separates sources)")
    if kind_of(given) == "manifest":
        return given, "manifest"
    return given, "folder" if storage.is_folder(given) else "archive"


def _default_name(uri: str) -> str:
    if uri.startswith("kaggle:"):
        last = uri.split("/")[1]
    else:
        last = storage.name(unquote(urlsplit(uri).path) if uri.lower().startswith(("http://", "https://")) else uri)
    suffix = next((end for end in (*SUFFIXES, *ENDINGS) if last.lower().endswith(end)), "")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last[: len(last) - len(suffix)]).strip("._-")[:80] or "source"


def _unused(stem: str, suffix: str, taken: dict[str, int]) -> str:
    """Return the name, with a number if one file system or another would take it for one of `taken`; add it to them.

    Their values are the last numbers that they were given.
    """
    given = _folded(stem + suffix)
    unused, number = stem + suffix, taken.get(given, 1)
    while _folded(unused) in taken:
        number += 1
        unused = f"{stem}-{number}{suffix}"
    taken[_folded(unused)] = 1
    taken[given] = number
    return unused


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@contextmanager
def opened(
    source: Source, *, cache: Path, limits: UnpackLimits, encoding: str, classes: Sequence[str]
) -> Iterator[Contents]:
    """Fetch and unpack `source` below the local folder `cache` and give its images to the block.

    If `classes` are named, images of others are left out.

    Raises:
        UserError: the source cannot be fetched, is unsafe or holds no labelled images.
    """
    if source.kind == "kaggle":
        yield _read_tree(_from_kaggle(source.uri), source.shown, classes)
    elif source.kind == "folder":
        yield _read_folder(source.uri, source.shown, classes)
    elif source.kind == "manifest":
        yield _read_manifest(source.uri, classes)
    else:
        with storage_errors_for(str(cache)):
            cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="unpack-") as folder:
            archive = _local_archive(source, cache, Path(folder))
            sha256 = digest(archive)
            if source.sha256 not in {None, sha256}:
                raise UserError(f"{source.shown} has the SHA-256 {sha256}, expected {source.sha256}")
            below = Path(folder) / "content"  # apart from the archive itself, which a listing would find
            below.mkdir()
            left_out = unpack(
                archive, below, limits=limits, shown=source.shown, leave_out=reason_to_leave_out, encoding=encoding
            )
            contents = _read_tree(str(below), source.shown, classes)
            yield replace(contents, left_out=contents.left_out + left_out, sha256=sha256)


def _local_archive(source: Source, cache: Path, folder: Path) -> Path:
    if source.kind == "http":
        return download(source.uri, cache / "downloads", sha256=source.sha256)
    if not storage.is_remote(source.uri):
        return Path(source.uri)
    filesystem, path = storage.arrow_filesystem(source.uri)
    target = folder / "archive"
    with storage_errors_for(source.uri), filesystem.open_input_stream(path) as stream, target.open("wb") as file:
        shutil.copyfileobj(stream, file, _COPIED_AT_A_TIME)
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


def _read_folder(uri: str, shown: str, classes: Sequence[str]) -> Contents:
    """Return what the manifest of a user's folder names, if it has one at its top, or else its class tree."""
    manifest = next((name for name in MANIFESTS if storage.exists(storage.join(uri, name))), None)
    if manifest is None:
        return _read_tree(uri, shown, classes)
    contents = _read_manifest(storage.join(uri, manifest), classes)
    known = {file.uri for file in contents.files} | {item.name for item in contents.left_out}
    known.add(storage.join(uri, manifest))
    others = [info.uri[len(uri) + 1 :] for info in storage.list_files(uri) if info.uri not in known]
    rest = [LeftOut(name, reason_to_leave_out(name) or "not_in_manifest") for name in others]
    return replace(contents, left_out=contents.left_out + rest)


def _read_tree(folder: str, shown: str, classes: Sequence[str]) -> Contents:
    """Return the images of the class tree at `folder` or somewhere below it.

    Unlike `read_labelled` this takes one class too, for other sources may bring the others, and no manifest: one inside
    a downloaded archive could name any file of this machine.
    """
    # a key in S3 may begin or end with a slash, which joining would take away
    uris = {info.uri[len(folder) + 1 :]: info.uri for info in storage.list_files(folder)}
    tree = read_tree(uris, shown, classes)
    files = []
    folders: dict[str, str] = {}  # glioma/ beside Glioma/: one class, but on some file systems one folder as well
    taken: dict[str, int] = {}
    for name, (split, label) in tree.images.items():
        above, _, last = name.removeprefix(f"{tree.root}/").rpartition("/")
        if above not in folders:
            folders[above] = _unused(above, "", taken)
        files.append(LabelledFile(uris[name], f"{folders[above]}/{last}", label=label, split=split))
    left_out = [*tree.left_out.items(), *((name, "hidden") for name in _hidden(folder, uris))]
    return Contents(files, [LeftOut(name, reason) for name, reason in left_out], warnings=tree.warnings)


def _hidden(folder: str, names: Iterable[str]) -> Iterator[str]:
    """Yield the files that listings leave out, in the folders of those that they give."""
    folders = {""} | {str(parent) for name in names for parent in PurePosixPath(name).parents if str(parent) != "."}
    for below in sorted(folders):
        location = storage.join(folder, below) if below else folder
        # missing: a local name that is not UTF-8, which was listed with escapes
        for name in storage.list_names(location, missing_ok=True):
            if storage.is_hidden(name):
                yield from (info.uri[len(folder) + 1 :] for info in storage.list_files(storage.join(location, name)))


def _read_manifest(uri: str, classes: Sequence[str]) -> Contents:
    """Return the files that a manifest names, put into folders by split and label; one class is enough.

    They keep the folders below the one that all have in common: each may hold the slices of one patient.
    """
    files = []
    taken: dict[str, int] = {}
    data = list_labelled(uri, classes)
    rows = data.table.select(["uri", "label", "split", "patient_id", "source"]).to_pylist()
    above = zip(*(row["uri"].split("/")[:-1] for row in rows), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, above))
    for row in rows:
        names = [row["split"], row["label"], *row["uri"].split("/")[common:]]
        path = "/".join(re.sub(r"[/\\\0]", "-", name).lstrip(".") or "_" for name in names if name)
        suffix = ending[0] if (ending := _SUFFIX.search(path)) else ""
        files.append(LabelledFile(path=_unused(path.removesuffix(suffix), suffix, taken), **row))
    return Contents(files, [LeftOut(*item) for item in data.left_out.items()], warnings=data.warnings)
