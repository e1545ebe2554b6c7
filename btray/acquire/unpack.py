"""Unpack a downloaded zip or tar archive into an empty folder, trusting nothing that the archive says of itself."""

from __future__ import annotations

import bz2
import gzip
import logging
import lzma
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO, Any, Final, Self, TypeVar, cast

from btray.acquire.paths import StorablePaths
from btray.core.errors import UserError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz")
"""What archives are usually called; what one is, its content tells."""

T = TypeVar("T")

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_HEADER_BYTES = 4 << 20  # a tar header with its long-name extensions is a few kB; a hostile one claims gigabytes
# What zipfile, tarfile and the decompressors raise on broken or hostile input; some of it is not documented.
_DAMAGE = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError,
    RuntimeError, ValueError, LookupError, ArithmeticError,
)  # fmt: skip
_DECOMPRESSORS: Final[dict[bytes, Callable[[IO[bytes]], Any]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_OTHER_FORMATS = {
    b"Rar!": "RAR", b"7z\xbc\xaf": "7-Zip", b"\x28\xb5\x2f\xfd": "Zstandard", b"\x04\x22\x4d\x18": "LZ4",
    b"LZIP": "lzip", b"\x1f\x9d": "compress (.Z)", b"MSCF": "cabinet", b"PK\x07\x08": "split zip",
}  # fmt: skip
_METHODS = {1: "shrink", 6: "implode", 9: "Deflate64", 93: "Zstandard", 95: "xz", 97: "WavPack", 98: "PPMd"}
_UTF8_NAME, _PATCHED = 0x800, 0x20  # flags of a zip's member
_UNICODE_PATH = 0x7075  # extra field of Info-ZIP: version, CRC of the other name, name in UTF-8


@dataclass(frozen=True, kw_only=True)
class UnpackLimits:
    """What an archive may unpack to before it is refused as a bomb."""

    max_bytes: int
    """All members together, counted while unpacking."""
    max_files: int
    """Members, folders among them."""
    max_ratio: float
    """Bytes unpacked for each byte of the archive; the most that deflate can do is 1032."""
    free_bytes: int = 64 << 20
    """Up to this many bytes `max_ratio` is not applied: small archives of blank images compress very well."""


@dataclass(frozen=True)
class LeftOut:
    """A file that was not taken."""

    name: str
    reason: str


@dataclass
class _Unpacking:
    """The state of one archive's unpacking: what was spent, and every name that was taken."""

    archive_bytes: int
    shown: str
    folder: Path
    limits: UnpackLimits
    paths: StorablePaths
    encoding: str
    left_out: list[LeftOut] = field(default_factory=list)
    members: int = 0
    spent: int = 0

    def take(self, member: _Member) -> None:
        """Unpack one member, unless it is left out. Raises UserError."""
        self.members += 1
        if self.members > self.limits.max_files:
            raise UserError(
                f"{self.shown} holds more than {self.limits.max_files} files; if you trust it, raise --max-files"
            )
        if member.is_folder:
            return
        if member.content is None:
            raise self.unsafe(member.name, "is a link, a device or another special file")
        if member.encrypted:
            raise UserError(f"{self.shown}: member {member.name!r} is encrypted; unpack it and give the folder")
        if not (target := self.target(member.name)):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        content = self.undamaged(member.content)
        with target.open("xb") as out:
            # in chunks, counted as they come: the size that an archive declares may be a lie
            while chunk := self.undamaged(lambda: content.read(_CHUNK)):
                self.spend(len(chunk))
                out.write(chunk)

    def undamaged(self, read: Callable[[], T]) -> T:
        """Return what `read` gives; what it raises means damage. It writes nothing: a full disk is not damage."""
        try:
            return read()
        except NotImplementedError as error:  # of zipfile
            raise UserError(f"{self.shown} uses {error}; repack it") from error
        except _DAMAGE as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.shown} is damaged or no zip or tar archive ({why}); get it again") from error

    def spend(self, size: int) -> None:
        self.spent += size
        limits = self.limits
        if self.spent > limits.max_bytes:
            limit = f"{limits.max_bytes / 1e9:g} GB; if you trust it, raise --max-unpacked-gb"
        elif self.spent > max(limits.free_bytes, int(limits.max_ratio * self.archive_bytes)):
            limit = f"{limits.max_ratio:g} times its own size; if you trust it, raise --max-ratio"
        else:
            return
        raise UserError(f"{self.shown} unpacks to more than {limit}")

    def unsafe(self, name: str, why: str) -> UserError:
        return UserError(f"{self.shown} is unsafe and was not used: its member {name!r} {why}")

    def target(self, name: str) -> Path | None:
        """Return where the file `name` goes; None if it is left out, which is noted."""
        unix = name.replace("\\", "/")  # archives made on Windows may separate so
        if unix.startswith("/") or PureWindowsPath(name).drive:
            raise self.unsafe(name, "has an absolute path")
        if ".." in unix.split("/"):
            raise self.unsafe(name, "lies outside the archive ('..')")
        if not unix.strip("./") or "\0" in name:
            raise self.unsafe(name, "has no usable name")
        path, reason = self.paths.take(unix)
        if reason is None:
            return self.folder / path
        self.left_out.append(LeftOut(name=name.encode("utf-8", "backslashreplace").decode(), reason=reason))
        return None


def unpack(
    archive: Path,
    folder: Path,
    *,
    limits: UnpackLimits,
    shown: str,
    leave_out: Callable[[str], str | None],
    encoding: str = "utf-8",
) -> list[LeftOut]:
    """Unpack `archive` (zip, tar, tar.gz, tar.bz2, tar.xz; told by its content) into the empty `folder`.

    Besides the files that `leave_out` names, those are left out, and returned, whose name is in the archive already
    (`duplicate_name`; the first one is kept), differs from another only in case or Unicode form or is also a folder
    (`colliding_name`), cannot be stored (`unusable_name`) or is not in `encoding` (`unknown_encoding`: decoded by
    guess, it would become another class). Archives inside the archive stay packed.

    Args:
        archive: The file.
        folder: An empty folder.
        limits: What the archive may unpack to.
        shown: What errors call the archive.
        leave_out: Gives, for a path in the archive, the reason why it is not wanted, or None.
        encoding: Of names that are not marked as UTF-8.

    Raises:
        UserError: an absolute path, a `..`, a link, a device, an encrypted member, a compression that is not read, more
            files or bytes than `limits` allows, and damage of any kind.
    """
    state = _Unpacking(archive.stat().st_size, shown, folder, limits, StorablePaths(leave_out), encoding)
    with archive.open("rb") as file:
        start = file.read(8)
        file.seek(0)
        if start.lstrip().startswith(b"<"):
            raise UserError(f"{shown} is a web page, not an archive; give the address of the file itself")
        if other := next((name for magic, name in _OTHER_FORMATS.items() if start.startswith(magic)), None):
            raise UserError(f"{shown} is a {other} archive, which is not read; repack it as zip or tar")
        # by content: servers and people misname archives
        opener = next((opener for magic, opener in _DECOMPRESSORS.items() if start.startswith(magic)), nullcontext)
        with opener(file) as stream:
            is_zip = start.startswith(b"PK") or (start.startswith(b"MZ") and zipfile.is_zipfile(file))  # unpacks itself
            members = _zip_members(file, state) if is_zip else _tar_members(stream, state)
            while member := state.undamaged(lambda: next(members, None)):
                state.take(member)
    inside = [item.name for item in state.left_out if item.reason == "archive_inside"]
    if inside and not state.paths.files:
        raise UserError(f"{shown} holds archives alone, such as {inside[0]}; unpack it and give these, or their folder")
    unknown = [item.name for item in state.left_out if item.reason == "unknown_encoding"]
    if unknown:
        message = (
            f"{shown}: {len(unknown)} names are not in {encoding}, such as {unknown[0]}; name theirs with "
            "--archive-encoding, such as gbk, shift_jis or cp437"
        )
        if not state.paths.files:
            raise UserError(message)
        _log.warning("%s.", message)
    return state.left_out


@dataclass(frozen=True)
class _Member:
    name: str
    is_folder: bool
    content: Callable[[], Any] | None
    """Opens it; None for a link, a device or another special file."""
    encrypted: bool = False


def _zip_members(file: IO[bytes], state: _Unpacking) -> Iterator[_Member]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            mode = stat.S_IFMT(info.external_attr >> 16)  # that of Unix; 0 if the archive was made elsewhere
            name = _zip_name(info, state.encoding)
            content = partial(_open_in_zip, archive, info) if mode in {0, stat.S_IFREG, stat.S_IFDIR} else None
            yield _Member(name, name.endswith(("/", "\\")), content, encrypted=bool(info.flag_bits & 1))


def _open_in_zip(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    try:
        return archive.open(info)
    except NotImplementedError as error:
        named = error if info.flag_bits & _PATCHED else f"method {info.compress_type}"
        method = _METHODS.get(info.compress_type, named)
        raise NotImplementedError(f"a compression that is not read ({method}, member {info.filename!r})") from error


def _zip_name(info: zipfile.ZipInfo, encoding: str) -> str:
    """Return a member's name; zipfile takes what is not marked as UTF-8 for CP 437, which it seldom is."""
    if info.flag_bits & _UTF8_NAME:
        return info.filename
    raw = info.orig_filename.encode("cp437")
    extra = info.extra
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == _UNICODE_PATH and extra[5:9] == struct.pack("<L", zlib.crc32(raw)):
            return extra[9 : 4 + size].decode()
        extra = extra[4 + size :]
    return raw.partition(b"\0")[0].decode(encoding, "surrogateescape")


def _tar_members(stream: IO[bytes], state: _Unpacking) -> Iterator[_Member]:
    # As a stream ("r|"): a tar has no index, and seeking in a compressed one would decompress it again and again.
    meter = _Meter(stream)
    meter.limit = _HEADER_BYTES
    with tarfile.TarFile.open(
        fileobj=cast("IO[bytes]", meter), mode="r|", bufsize=_CHUNK, tarinfo=_StrictTarInfo, encoding=state.encoding
    ) as archive:
        reader = cast("IO[bytes]", archive.fileobj)
        while info := archive.next():
            meter.limit = None
            yield _Member(info.name, info.isdir(), partial(archive.extractfile, info) if info.isreg() else None)
            # What is left out is read as well: it lies before the next member in the stream, and counts.
            while chunk := reader.read(min(_CHUNK, archive.offset - reader.tell())):
                state.spend(len(chunk))
            vars(archive)["members"].clear()  # tarfile would remember every header
            meter.limit = meter.position + _HEADER_BYTES
        meter.limit = None
        # what follows the end mark is read too: a truncated or concatenated archive must not pass for the whole one
        while rest := reader.read(_CHUNK):
            state.spend(len(rest))
            if rest.strip(b"\0"):
                raise tarfile.ReadError("there is more after its end")


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is an error if it is broken or truncated; tarfile takes it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        if len(buf) == tarfile.BLOCKSIZE and not any(buf):
            return super().frombuf(buf, encoding, errors)
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error}; it was truncated or altered") from error


class _Meter:
    """A stream that refuses to give more than `limit` bytes in all: a header's length must not fill the memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.position = 0
        self.limit: int | None = None

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self.position += len(data)
        if self.limit is not None and self.position > self.limit:
            raise tarfile.ReadError(f"a header of more than {_HEADER_BYTES} bytes")
        return data
