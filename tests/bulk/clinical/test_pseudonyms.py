"""`--pseudonymize`: equal names get equal pseudonyms, only the key tells whose, and one table has one key."""

from __future__ import annotations

import hmac
import os
import pickle
from pathlib import Path

import pytest

from btray import storage
from btray.bulk.clinical.pseudonyms import CHECK, Pseudonyms, check_table, claim_table
from btray.bulk.config import ClassifyConfig
from btray.core.errors import UserError
from btray.storage import FileInfo, StorageError

KEY = bytes(range(32))
NAMES = Pseudonyms(KEY)
DOE = FileInfo("s3://archive/DOE^JANE/1.dcm", 77, '"abc-1"', 5.0)


def key_file(folder: Path, key: bytes = KEY, mode: int = 0o600) -> str:
    path = folder / "key"
    path.write_bytes(key)
    path.chmod(mode)
    return str(path)


def test_pseudonyms_are_hmacs_that_the_owner_of_the_key_can_make_again() -> None:
    digest = hmac.digest(KEY, b"1.2.840.1", "sha256")
    assert NAMES.uid("1.2.840.1") == f"2.25.{int.from_bytes(digest[:16], 'big')}"
    assert len(NAMES.uid("1.2.840.1")) <= 64
    assert NAMES.name(DOE.uri) == f"hmac:{hmac.digest(KEY, DOE.uri.encode(), 'sha256').hex()}"
    assert Pseudonyms(KEY[::-1]).uid("1.2.840.1") != NAMES.uid("1.2.840.1")


def test_an_object_is_found_again_by_its_pseudonym_and_nothing_else_tells_where_it_is() -> None:
    hidden = NAMES.conceal(DOE)
    assert (hidden.size, hidden.etag) == (77, DOE.etag)
    assert "DOE" not in repr(hidden) + repr(NAMES) + repr(
        NAMES.conceal_error(StorageError("forbidden", DOE.uri, DOE.uri), hidden)
    )
    assert KEY not in repr(NAMES).encode()
    assert NAMES.conceal(DOE) == hidden
    other = pickle.loads(pickle.dumps(NAMES))
    found = other.reveal(hidden)
    assert (found.uri, found.etag, found.place) == (DOE.uri, DOE.etag, "")
    assert NAMES.place(hidden.place) == DOE.uri
    assert NAMES.place(NAMES.conceal(FileInfo("a", 1, "e", 0.0, "pack.parquet#3/a")).place) == "pack.parquet#3/a"
    with pytest.raises(UserError, match="another key"):
        Pseudonyms(KEY[::-1]).reveal(hidden)


@pytest.mark.parametrize("uid", ["1.2.840.10008.1", "2.25.329800735698586629295641978511506172918"])
def test_an_etag_that_is_a_uid_is_hidden_and_still_used_to_read(uid: str) -> None:
    info = FileInfo("dicomweb/1", 0, uid, 0.0)
    hidden = NAMES.conceal(info)
    assert hidden.etag == NAMES.name(uid)
    assert NAMES.reveal(hidden).etag == uid
    assert NAMES.conceal(FileInfo("a", 0, "1.2.x", 0.0)).etag == "1.2.x"


def test_rows_have_pseudonyms_for_their_uids_and_nulls_stay() -> None:
    row = NAMES.conceal_row({"study_uid": "1.2", "series_uid": None, "instance_uid": "1.2.3", "label": "glioma"})
    assert row == {
        "study_uid": NAMES.uid("1.2"),
        "series_uid": None,
        "instance_uid": NAMES.uid("1.2.3"),
        "label": "glioma",
    }


@pytest.mark.parametrize(
    ("key", "mode", "said"), [(KEY, 0o640, "chmod 600"), (KEY, 0o604, "chmod 600"), (KEY[1:], 0o600, "31 bytes")]
)
def test_a_key_that_others_can_read_or_guess_is_refused(tmp_path: Path, key: bytes, mode: int, said: str) -> None:
    path = key_file(tmp_path, key, mode)
    for refused in (path, str(tmp_path / "missing")):
        with pytest.raises(UserError) as caught:
            Pseudonyms.from_file(refused)
        assert refused in str(caught.value)
        assert "\n" not in str(caught.value)
        assert said in str(caught.value) or "No such file" in str(caught.value)


def test_a_bad_key_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    for name in ("bundle.json", "scan.png"):
        (tmp_path / name).write_bytes(b"{}")
    config = ClassifyConfig(
        model=str(tmp_path),
        input=str(tmp_path),
        output=str(tmp_path / "out"),
        pseudonymize=key_file(tmp_path, b"short"),
    )
    with pytest.raises(UserError, match="a key needs 32"):
        config.check()


def test_a_table_has_one_key_from_its_first_run_on(tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    check_table(output, NAMES)
    claim_table(output, NAMES)
    storage.write_json(storage.join(output, "_runs", "model", "run", "run.json"), {})
    claim_table(output, NAMES)
    check_table(output, NAMES)
    assert KEY.hex() not in Path(output, CHECK).read_text()
    for other, said in ((Pseudonyms(os.urandom(32)), "another key"), (None, "give the same key")):
        with pytest.raises(UserError, match=said):
            check_table(output, other)
    plain = str(tmp_path / "plain")
    claim_table(plain, None)
    storage.write_json(storage.join(plain, "_runs", "model", "run", "run.json"), {})
    check_table(plain, None)
    with pytest.raises(UserError, match="without --pseudonymize"):
        claim_table(plain, NAMES)
