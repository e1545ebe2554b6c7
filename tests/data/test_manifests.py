"""Lists and manifests as people and programs write them name the same objects; what is odd in a name may be meant."""

from __future__ import annotations

import codecs
import gzip
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from btray import storage
from btray.acquire.config import AcquireConfig
from btray.bulk.listing.archive import list_archive
from btray.bulk.listing.selection import Selection
from btray.core.errors import UserError
from btray.data.labelled import read_labelled
from tests.helpers.flat_store import flat_store

NAMES = ["images/glioma/0 a.jpg", "images/glioma/1,ü.jpg", "images/no_tumor/2.jpg"]
CASES = Path(__file__).resolve().parents[3] / "shared" / "cases" / "lists"


@pytest.fixture(autouse=True)
def images(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())


def listed(path: str | Path) -> list[str]:
    return [info.uri for info in list_archive(str(path), Selection())]


def labelled(path: str | Path) -> list[str]:
    return [str(uri) for uri in read_labelled(str(path))["uri"].to_pylist()]


def expected(folder: Path) -> list[str]:
    return [str(folder / name) for name in NAMES]


def csv_text(separator: str = ",", end: str = "\n") -> str:
    lines = [separator.join((f'"{name}"', name.split("/")[1])) for name in NAMES]
    return end.join([f"uri{separator}label", *lines, ""])


ENCODED = {
    "plain": lambda text: text.encode(),
    "utf-8 mark": lambda text: text.encode("utf-8-sig"),
    "utf-16 le": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 be": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-16 le, no mark": lambda text: text.encode("utf-16-le"),
    "utf-16 be, no mark": lambda text: text.encode("utf-16-be"),
    "two marks": lambda text: codecs.BOM_UTF8 + text.encode("utf-8-sig"),
    "gzip, utf-16": lambda text: gzip.compress(text.encode("utf-16")),
    "gzip": lambda text: gzip.compress(text.encode("utf-8-sig")),
}


@pytest.mark.parametrize("encoded", ENCODED.values(), ids=ENCODED)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\r"])
def test_text_is_read_as_systems_old_and_new_write_it(tmp_path: Path, encoded, end: str) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "list.TXT").write_bytes(
        encoded(end.join(["# of today", *NAMES, f'"{NAMES[0]}"', "  # the end", "\x1a"]))
    )
    assert listed(tmp_path / "list.TXT") == [*expected(tmp_path), expected(tmp_path)[0]]
    for separator in (",", ";", "\t"):
        (tmp_path / "m.CSV").write_bytes(encoded(csv_text(separator, end)))
        assert listed(tmp_path / "m.CSV") == labelled(tmp_path / "m.CSV") == expected(tmp_path)


@pytest.mark.parametrize(("name", "text"), [("m.csv.gz", csv_text()), ("m.tsv", csv_text("\t"))])
def test_other_names_of_tables_are_known(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert listed(tmp_path / name) == labelled(tmp_path / name) == expected(tmp_path)


def test_the_mark_of_excel_for_its_separator_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("sep=;\r\n" + csv_text(";", "\r\n"))
    assert listed(tmp_path / "m.csv") == labelled(tmp_path / "m.csv") == expected(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: name.replace("/", "\\"),
        lambda name: f"  {name}\t",
        lambda name: f"\ufeff{name}\u00a0",
        lambda name: " ./" + name.replace("/", "\\"),
        lambda name: f" '{name}' ",
        lambda name: f"\u201c{name}\u201d",
        lambda name: f"\u202a{name}\u202c\u200b",
        lambda name: unicodedata.normalize("NFD", name),
        lambda name: f" {{folder}}/{name}",
        lambda name: "{folder}\\" + name.replace("/", "\\"),
    ],
)
def test_a_name_that_is_not_there_is_looked_for_without_what_was_added(tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    names = [change(name).replace("{folder}", str(tmp_path)) for name in NAMES]
    (tmp_path / "list.txt").write_text("\n".join(names))
    pq.write_table(pa.table({" URI ": names, "Label": [" glioma ", "glioma", "no_tumor"]}), tmp_path / "m.parquet")
    assert listed(tmp_path / "list.txt") == listed(tmp_path / "m.parquet") == expected(tmp_path)
    assert labelled(tmp_path / "m.parquet") == expected(tmp_path)


def test_what_is_not_there_in_any_spelling_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("gone\\1.jpg\n" + NAMES[2])
    assert listed(tmp_path / "list.txt") == [str(tmp_path / "gone\\1.jpg"), str(tmp_path / NAMES[2])]


def test_a_name_that_begins_with_a_tilde_lies_beside_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "~a.png").write_bytes(b"a")
    (tmp_path / "m.csv").write_text("uri,label\n~a.png,glioma\nb.png,no_tumor\n")
    assert labelled(tmp_path / "m.csv") == [str(tmp_path / "~a.png"), str(tmp_path / "b.png")]


def test_a_name_as_it_is_given_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["a\\b.jpg", "a/b.jpg", " c.jpg", "c.jpg", '"d.jpg"', "d.jpg", "#e.jpg"]
    with flat_store(monkeypatch, {f"in/{key}": b"x" for key in keys}) as bucket:
        (tmp_path / "list.txt").write_text("\n".join(f"{bucket}/in/{key}" for key in keys))
        assert listed(tmp_path / "list.txt") == [f"{bucket}/in/{key}" for key in keys]
    for key in keys:
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / key).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("\n".join(keys))
    assert listed(tmp_path / "list.txt") == [str(tmp_path / key) for key in keys]


@pytest.mark.parametrize("name", ["spark", "spark.csv", "spark.parquet", "spark.txt"])
def test_the_folder_that_spark_makes_of_a_table_is_one(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for number, some in enumerate((NAMES[:1], NAMES[1:], [])):
        table = pa.table({"uri": pa.array(some, pa.string()), "label": [part.split("/")[1] for part in some]})
        if name == "spark.parquet":
            pq.write_table(table, folder / f"part-{number:05d}-8a.c000.snappy.parquet")
        elif name == "spark.txt":
            (folder / f"part-{number:05d}").write_text("".join(f"{line}\n" for line in some))
        else:
            rows = "".join(f'"{row["uri"]}",{row["label"]}\n' for row in table.to_pylist())
            (folder / f"part-{number:05d}-8a.csv.gz").write_bytes(gzip.compress(f"uri,label\n{rows}".encode()))
        (folder / f".part-{number:05d}.crc").write_bytes(b"crc")
    (folder / "_SUCCESS").touch()
    if "parquet" not in name:
        for number in (".", "9"):  # before and after the others
            (folder / f"part-{number}.{'txt' if 'txt' in name else 'csv'}").touch()
    assert listed(folder) == expected(tmp_path)
    if name != "spark.txt":
        assert labelled(folder) == expected(tmp_path)


@pytest.mark.parametrize(
    ("name", "body", "match"),
    [
        ("m.csv", csv_text().encode("cp1252"), "UTF-8"),
        ("m.csv", csv_text().encode("utf-32"), "NUL"),
        ("m.csv", csv_text().encode("utf-32-be"), "NUL"),
        ("l.txt", "\n".join(NAMES).encode("utf-32-le"), "NUL"),
        ("l.txt", "\0".join(NAMES).encode(), "NUL"),
        ("m.csv.gz", gzip.compress(csv_text().encode() * 99, mtime=0)[:-40], "cannot be read"),
        ("m.csv", b"", "no column uri"),
        ("l.txt", "\n".join(NAMES).encode("cp1252"), "UTF-8"),
        ("l.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:20], "cannot be read"),
        ("m.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, name: str, body: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(UserError, match=match) as caught:
        listed(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["l.jsonl", "l.XLSX", "l.csv.bz2", "l.lst", "l.pq", "all.zip", "all.tar.gz"])
def test_a_list_or_archive_of_another_kind_is_refused_and_not_taken_for_a_scan(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("\n".join(NAMES))
    with pytest.raises(UserError, match=f"{name} is of a kind that names no objects here; give a folder"):
        listed(tmp_path / name)


@pytest.mark.skipif(not CASES.is_dir(), reason=f"CASES ABSENT: {CASES} does not exist, so they are NOT shown here")
@pytest.mark.parametrize("name", ["list_bom.txt", "backslash.csv", "spaces.csv"])
def test_the_cases_that_people_sent_name_what_is_there(name: str) -> None:
    uris = listed(CASES / name)
    assert len(uris) == 8
    assert all(Path(uri).is_file() for uri in uris)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_other_text_may_have_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "keys.txt").write_text("radiology " + "0" * 64 + "\r\n", encoding=encoding)
    assert storage.read_text(str(tmp_path / "keys.txt")).split()[0] == "radiology"
    (tmp_path / "run.yaml").write_text("source: [a]\r\nout: /b\r\n", encoding=encoding)
    assert AcquireConfig.from_command_line(["--config", str(tmp_path / "run.yaml")]).out == "/b"
