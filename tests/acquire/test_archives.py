"""Attack the unpacking: nothing leaves the folder, nothing fills the disk or memory, nothing vanishes in silence."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from btray.acquire.config import AcquireConfig
from btray.acquire.unpack import LeftOut, UnpackLimits, unpack
from btray.core.errors import UserError
from btray.data.trees import reason_to_leave_out

LIMITS = UnpackLimits(max_bytes=1 << 30, max_files=100, max_ratio=200)


def run(
    archive: Path,
    limits: UnpackLimits = LIMITS,
    leave_out: Callable[[str], str | None] = lambda _: None,
    encoding: str = "utf-8",
) -> list[LeftOut]:
    folder = archive.parent / "unpacked"
    folder.mkdir(exist_ok=True)
    return unpack(archive, folder, limits=limits, shown="it", leave_out=leave_out, encoding=encoding)


def unpacked(archive: Path) -> dict[str, bytes]:
    folder = archive.parent / "unpacked"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_zip(path: Path, members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def make_tar(path: Path, members: list[tuple[tarfile.TarInfo | str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for member, data in members:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if info.isreg():
                info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_every_format_is_told_by_content_and_unpacks_whole(tmp_path: Path, mode: str) -> None:
    noise = random.Random(0).randbytes(3 << 20)
    members = [("a/1.png", b"one"), ("a/ü b%20#.png", noise), ("leer.png", b"")]
    path = tmp_path / "misnamed.bin"
    _ = make_zip(path, members) if mode == "zip" else make_tar(path, list(members), mode)
    assert run(path) == []
    assert unpacked(path) == dict(members)


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/evil.png", "C:\\evil.png", "..\\evil.png", "//h/x"]
)
@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, make: Callable[..., Path], name: str) -> None:
    archive = make(tmp_path / "evil", [("good.png", b"1"), (name, b"evil")])
    with pytest.raises(UserError, match="is unsafe"):
        run(archive)
    assert not (tmp_path / "evil.png").exists()
    assert set(unpacked(archive)) <= {"good.png"}


@pytest.mark.parametrize(
    "member",
    [
        special("link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("link.png", tarfile.SYMTYPE, "good.png"),
        special("link.png", tarfile.LNKTYPE, "good.png"),
        special("link.png", tarfile.LNKTYPE, "../../secret"),
        special("pipe", tarfile.FIFOTYPE),
        special("device", tarfile.CHRTYPE),
        special("block", tarfile.BLKTYPE),
    ],
    ids=lambda member: f"{member.name}-{member.linkname}",
)
def test_no_link_and_no_device_leaves_a_tar(tmp_path: Path, member: tarfile.TarInfo) -> None:
    archive = make_tar(tmp_path / "evil.tar", [("good.png", b"1"), (member, b"")])
    with pytest.raises(UserError, match="is unsafe"):
        run(archive)
    assert list(unpacked(archive)) == ["good.png"]


def test_no_link_leaves_a_zip(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link.png")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="is unsafe"):
        run(tmp_path / "evil.zip")
    assert unpacked(tmp_path / "evil.zip") == {}


@pytest.mark.parametrize("mode", ["zip", "w:gz", "w:xz"])
def test_a_bomb_is_refused_by_its_ratio_before_it_has_unpacked(tmp_path: Path, mode: str) -> None:
    zeros = bytes(20 << 20)
    path = tmp_path / "bomb"
    _ = make_zip(path, [("a.png", zeros)]) if mode == "zip" else make_tar(path, [("a.png", zeros)], mode)
    with pytest.raises(UserError, match="times its own size"):
        run(path, UnpackLimits(max_bytes=1 << 40, max_files=10, max_ratio=50, free_bytes=1 << 20))
    assert sum(map(len, unpacked(path).values())) < 5 << 20


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_size_is_limited_over_all_members_together(tmp_path: Path, make: Callable[..., Path]) -> None:
    archive = make(tmp_path / "big", [(f"{i}.png", random.Random(i).randbytes(100_000)) for i in range(20)])
    with pytest.raises(UserError, match="max-unpacked-gb"):
        run(archive, UnpackLimits(max_bytes=1_000_000, max_files=100, max_ratio=200))
    assert sum(map(len, unpacked(archive).values())) <= 1_000_000


def test_what_is_left_out_of_a_compressed_tar_counts_too(tmp_path: Path) -> None:
    archive = make_tar(tmp_path / "bomb", [("notes.txt", bytes(20 << 20))], "w:gz")
    with pytest.raises(UserError, match="times its own size"):
        run(
            archive,
            UnpackLimits(max_bytes=1 << 40, max_files=10, max_ratio=50, free_bytes=1 << 20),
            lambda name: "no_image",
        )


@pytest.mark.parametrize("make", [make_zip, make_tar])
def test_too_many_files_are_refused(tmp_path: Path, make: Callable[..., Path]) -> None:
    archive = make(tmp_path / "many", [(f"{i}.png", b"") for i in range(101)])
    with pytest.raises(UserError, match="more than 100 files"):
        run(archive)


def test_a_zip_that_declares_a_small_size_gives_no_more_and_is_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "liar.zip", [("a.png", bytes(10 << 20))])
    data = path.read_bytes().replace(struct.pack("<L", 10 << 20), struct.pack("<L", 10))
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        run(path)
    assert sum(map(len, unpacked(path).values())) <= 10


def test_a_tar_header_that_claims_gigabytes_does_not_fill_the_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 8 << 30
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(8):
            file.write(bytes(1 << 20))
    with pytest.raises(UserError, match="header of more than"):
        run(tmp_path / "bomb.tar.gz")


def test_the_same_name_twice_and_names_that_collide_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive = make_zip(
            tmp_path / "twice.zip",
            [
                ("a/1.png", b"first"),
                ("a/1.png", b"second"),
                ("A/1.PNG", b"case"),
                ("a/1.png/x", b"below"),
                ("a", b"above"),
            ],
        )
    assert {(item.name, item.reason) for item in run(archive)} == {
        ("a/1.png", "duplicate_name"),
        ("A/1.PNG", "colliding_name"),
        ("a/1.png/x", "colliding_name"),
        ("a", "colliding_name"),
    }
    assert unpacked(archive) == {"a/1.png": b"first"}


def test_names_that_cannot_be_stored_are_named(tmp_path: Path) -> None:
    long = "x" * 300 + ".png"
    archive = make_tar(tmp_path / "names.tar", [(long, b"1"), (os.fsdecode(b"\xff.png"), b"2"), ("ok.png", b"3")])
    left_out = run(archive)
    assert [item.reason for item in left_out] == ["unusable_name", "unknown_encoding"]
    assert "".join(item.name for item in left_out).encode()
    assert unpacked(archive) == {"ok.png": b"3"}


def test_backslashes_of_windows_separate_folders(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "w.zip", [("T\\g\\1.png", b"1"), ("T\\", b"")])
    run(archive)
    assert unpacked(archive) == {"T/g/1.png": b"1"}


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_that_was_cut_off_anywhere_is_refused(tmp_path: Path, mode: str) -> None:
    members = [(f"{i}.png", random.Random(i).randbytes(700)) for i in range(3)]
    path = tmp_path / "cut"
    _ = make_zip(path, members) if mode == "zip" else make_tar(path, list(members), mode)
    whole = path.read_bytes()
    end = len(whole) if mode != "w" else 3 * 1536  # behind that a plain tar holds nothing but zeros
    for length in range(0, end, 97):
        path.write_bytes(whole[:length])
        for left in (path.parent / "unpacked").glob("*"):
            left.unlink()
        with pytest.raises(UserError, match="it is damaged"):
            run(path)


@pytest.mark.parametrize("mode", ["zip", "w", "w:gz"])
def test_random_damage_is_refused_or_harmless_and_never_a_crash(tmp_path: Path, mode: str) -> None:
    members = [(f"{i}.png", random.Random(i).randbytes(50)) for i in range(3)]
    path = tmp_path / "damaged"
    _ = make_zip(path, members) if mode == "zip" else make_tar(path, list(members), mode)
    whole, chance = path.read_bytes(), random.Random(1)
    refused = []
    for _ in range(300):
        data = bytearray(whole)
        data[chance.randrange(min(len(data), 3000))] = chance.randrange(256)
        path.write_bytes(data)
        for left in sorted((path.parent / "unpacked").rglob("*"), reverse=True):
            (os.rmdir if left.is_dir() else os.unlink)(left)
        try:
            run(path)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 30
    assert not any("\n" in message for message in refused)


def test_a_corrupt_header_in_the_middle_is_not_the_end(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "mid.tar", [("1.png", b"1"), ("2.png", b"2"), ("3.png", b"3")])
    data = bytearray(path.read_bytes())
    data[1024:1030] = b"\xff" * 6
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        run(path)


def test_a_second_tar_behind_the_first_is_not_lost(tmp_path: Path) -> None:
    one = make_tar(tmp_path / "1.tar", [("1.png", b"1")])
    two = make_tar(tmp_path / "2.tar", [("2.png", b"2")])
    one.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(UserError, match="more after its end"):
        run(one)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<!DOCTYPE html><html>log in</html>", "web page"),
        (b"Rar!\x1a\x07\x00", "RAR"),
        (b"7z\xbc\xaf\x27\x1c\x00\x04", "7-Zip"),
        (b"PK\x07\x08PK\x03\x04", "split zip"),
        (b"plain text, and quite a lot of it " * 40, "no zip or tar"),
        (gzip.compress(b"no tar in here", mtime=0), "no zip or tar"),
        (b"", "no zip or tar"),
    ],
)
def test_what_is_no_archive_is_refused_with_a_reason(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(UserError, match=match):
        run(tmp_path / "x.zip")


def test_an_encrypted_zip_is_refused_by_name(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "secret.zip", [("a.png", b"1" * 50)], zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.png.*encrypted"):
        run(path)


def patched_method(path: Path, method: int) -> Path:
    """Write a zip whose member says that it was compressed by `method`."""
    make_zip(path, [("a.png", b"1" * 50)])
    data = bytearray(path.read_bytes())
    for offset in (8, data.index(b"PK\x01\x02") + 10):
        data[offset : offset + 2] = struct.pack("<H", method)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("method", "name"), [(9, "Deflate64"), (93, "Zstandard"), (95, "xz"), (98, "PPMd"), (77, "")])
def test_a_compression_that_is_not_read_is_not_called_damage(tmp_path: Path, method: int, name: str) -> None:
    with pytest.raises(UserError, match=rf"a compression that is not read \({name}.*a\.png.*repack it") as caught:
        run(patched_method(tmp_path / "z.zip", method))
    assert "damaged" not in str(caught.value)
    assert len(run(tmp_path / "z.zip", leave_out=lambda _: "no_image")) == 1  # what is not wanted need not be read


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_the_other_compressions_are_read(tmp_path: Path, compression: int) -> None:
    archive = make_zip(tmp_path / "z.zip", [("a.png", b"1" * 50)], compression)
    assert run(archive) == []
    assert unpacked(archive) == {"a.png": b"1" * 50}


def test_a_zip_that_unpacks_itself_is_read(tmp_path: Path) -> None:
    zipped = make_zip(tmp_path / "z.zip", [("a.png", b"1" * 50)]).read_bytes()
    (tmp_path / "z.exe").write_bytes(b"MZ" + bytes(500) + zipped)
    assert run(tmp_path / "z.exe") == []
    assert unpacked(tmp_path / "z.exe") == {"a.png": b"1" * 50}


def test_an_archive_of_archives_alone_says_so(tmp_path: Path) -> None:
    archive = make_zip(tmp_path / "z.zip", [("part 1.zip", b"PK"), ("README", b"")])
    with pytest.raises(UserError, match=r"archives alone, such as part 1\.zip; unpack it"):
        run(archive, leave_out=reason_to_leave_out)


@pytest.mark.parametrize("encoding", ["hex", "rot13", "idna", "undefined", "utf-16", "mbcs", "klingon"])
def test_what_is_no_encoding_of_names_is_refused_and_no_archive_called_damaged(encoding: str) -> None:
    with pytest.raises(ValidationError, match="no encoding that names in archives have"):
        AcquireConfig(source=("z.zip",), out="o", archive_encoding=encoding)


def legacy_zip(path: Path, name: bytes, extra: bytes = b"") -> Path:
    """Write a zip with one member, whose name is not marked as UTF-8."""
    info = zipfile.ZipInfo("x" * len(name))
    info.extra = extra
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, b"0")
    path.write_bytes(path.read_bytes().replace(b"x" * len(name), name))
    return path


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "cp437", "cp1252"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_in_a_legacy_encoding_are_decoded_right_or_left_out(tmp_path: Path, encoding: str, kind: str) -> None:
    name = {"gbk": "胶质瘤/表\u7ca7.png", "shift_jis": "腫瘍/表.png"}.get(encoding, "Müll/ö.png")
    raw = name.encode(encoding)
    if kind == "zip":
        archive = legacy_zip(tmp_path / "a", raw)
    else:
        with tarfile.open(tmp_path / "a", "w", encoding=encoding, format=tarfile.GNU_FORMAT) as file:
            info = tarfile.TarInfo(name)
            info.size = 1
            file.addfile(info, io.BytesIO(b"0"))
        archive = tmp_path / "a"
    with pytest.raises(UserError, match=r"1 names are not in utf-8.*--archive-encoding"):
        run(archive)
    assert unpacked(archive) == {}
    assert run(archive, encoding=encoding) == []
    assert unpacked(archive) == {name: b"0"}


def test_what_is_left_out_for_its_encoding_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    archive = make_tar(tmp_path / "a", [(os.fsdecode("胶质瘤".encode("gbk")) + "/1.png", b"1"), ("b/2.png", b"2")])
    assert [item.reason for item in run(archive)] == ["unknown_encoding"]
    assert unpacked(archive) == {"b/2.png": b"2"}
    assert "1 names are not in utf-8" in caplog.text


def test_utf8_that_is_not_marked_and_the_extra_field_of_info_zip_are_read(tmp_path: Path) -> None:
    archive = legacy_zip(tmp_path / "a", "Gehirn/ü日.png".encode())
    assert run(archive) == []
    assert unpacked(archive) == {"Gehirn/ü日.png": b"0"}
    raw, right = b"??????/1.png", "胶质瘤/1.png".encode()
    body = struct.pack("<BL", 1, zlib.crc32(raw)) + right
    archive = legacy_zip(tmp_path / "b", raw, extra=struct.pack("<HH", 0x7075, len(body)) + body)
    assert run(archive) == []
    assert unpacked(archive)["胶质瘤/1.png"] == b"0"


@pytest.mark.parametrize("options", [["--format=gnu"], ["--format=pax"], ["--format=posix", "--sparse-version=1.0"]])
def test_sparse_members_of_a_tar_are_whole(tmp_path: Path, options: list[str]) -> None:
    content = b"head" + bytes(300_000) + b"tail"
    with (tmp_path / "a.png").open("wb") as file:
        file.write(content[:4])
        file.seek(len(content) - 4)
        file.write(content[-4:])
    (tmp_path / "b.png").write_bytes(b"after")
    subprocess.run(["tar", "-cS", *options, "-f", "it.tar", "a.png", "b.png"], cwd=tmp_path, check=True)
    archive = tmp_path / "it.tar"
    assert archive.stat().st_size < len(content)
    assert run(archive) == []
    assert unpacked(archive) == {"a.png": content, "b.png": b"after"}
    (tmp_path / "unpacked/b.png").unlink()
    assert len(run(archive, leave_out=lambda name: "no_image" if name == "a.png" else None)) == 1
    assert unpacked(archive)["b.png"] == b"after"
