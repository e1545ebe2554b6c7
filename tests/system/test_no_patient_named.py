"""No job on labelled data or an archive writes what DICOM says of the patient: not into results, nor into logs.

Classification, training and `btray predict` have tests of their own beside them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from btray import phantoms
from btray.acquire.config import AcquireConfig
from btray.acquire.job import acquire
from btray.audit.config import AuditConfig
from btray.audit.job import audit
from btray.bulk.config import PackConfig
from btray.bulk.pack import pack
from btray.data.scans import decode
from btray.evaluation.config import EvaluateConfig
from btray.evaluation.job import evaluate
from tests.helpers.dicom_files import IDENTIFIERS, SERIES, STUDY, slice_file
from tests.helpers.privacy import found_in, ray_logs, written
from tests.helpers.tiny_bundle import saved_bundle

pytestmark = pytest.mark.cluster


def test_what_jobs_write_of_dicom_names_no_patient(
    ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="btray")
    scans, model = tmp_path / "scans", str(tmp_path / "model")
    saved_bundle(model)
    for number in range(16):
        label = ("glioma", "no_tumor")[number % 2]
        pixels = decode(phantoms.encoded_phantom(label, number // 2 % 7)).frames[0].astype(np.uint16) * 9
        data = slice_file(pixels, PatientID=f"PLANTEDID{number}", SOPInstanceUID=f"1.2.3.{number}")
        path = scans / ("Testing" if number > 11 else "Training") / label / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[:-999] if number in (2, 3) else data)
    acquire(AcquireConfig(source=(str(scans),), out=str(tmp_path / "acquired")))
    audit(AuditConfig(data=str(tmp_path / "acquired"), out=str(tmp_path / "audit")))
    evaluate(EvaluateConfig(model=model, data=str(scans), out=str(tmp_path / "report"), max_rejected=1.0))
    pack(PackConfig(input=str(scans), output=str(tmp_path / "packed"), actors=1))

    copies = [name for name, _ in written(tmp_path / "packed") if name.endswith(".parquet")]
    texts = [
        *((name, text) for name, text in written(tmp_path / "acquired") if "/images/" not in name),
        *written(tmp_path / "audit", tmp_path / "report"),
        *((name, text) for name, text in written(tmp_path / "packed") if name not in copies),
    ]
    assert len(texts) > 15
    assert copies
    said = [("output", "".join(capfd.readouterr())), ("log", caplog.text)]
    assert found_in([*texts, *said, *ray_logs()], (*IDENTIFIERS, STUDY, SERIES)) == set()
