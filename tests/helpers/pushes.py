"""What an archive pushes by STOW-RS, and the reports that it gets for it."""

from __future__ import annotations

import io
from collections.abc import Sequence

from pydicom import Dataset, dcmread

from tests.helpers.orthanc import Orthanc

STOW = "/dicomweb/studies"
RELATED = 'multipart/related; type="application/dicom"; boundary=b'


def related(objects: Sequence[bytes]) -> bytes:
    """Return the body of a push, of the content type RELATED."""
    head = b"\r\n--b\r\nContent-Type: application/dicom\r\n\r\n"
    return b"".join(head + data for data in objects) + b"\r\n--b--\r\n"


def reports(pacs: Orthanc, study_uid: str) -> list[Dataset]:
    """Return the structured reports that a PACS has of a study."""
    query = {"Level": "Instance", "Query": {"StudyInstanceUID": study_uid, "Modality": "SR"}}
    names = pacs.session.post(f"{pacs.url}/tools/find", json=query, timeout=30).json()
    files = (pacs.session.get(f"{pacs.url}/instances/{name}/file", timeout=30).content for name in names)
    return [dcmread(io.BytesIO(file)) for file in files]
