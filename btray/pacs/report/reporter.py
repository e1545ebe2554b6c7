"""Makes the report of a study and sends it, once: a PACS that has it already is left as it is."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Literal

from pydicom import dcmread
from pydicom.dataset import Dataset

from btray.core.errors import Failed, UserError
from btray.model.manifest import Manifest
from btray.pacs.client import DicomWeb
from btray.pacs.report.answers import StudyAnswer
from btray.pacs.report.document import make_report
from btray.pacs.report.held import says, shows_the_same
from btray.pacs.report.identity import report_uid, series_uid
from btray.pacs.report.sources import Sources
from btray.storage import StorageError

if TYPE_CHECKING:
    from btray.model.classifier import Classifier

Outcome = Literal["sent", "there"]
"""Whether the report was sent, or the PACS had it already."""


class OtherContent(UserError):
    """The PACS holds a UID of this report with other content. Most would answer success to a repeat, and keep it."""


class Refused(Failed):
    """The PACS did not take an object."""


class Reporter:
    """Reports what one model says of studies to one PACS. Safe in threads."""

    def __init__(
        self, archive: DicomWeb, manifest: Manifest, classifier: Classifier | None = None, *, heat_maps: int = 0
    ) -> None:
        """Send to `archive`; with `heat_maps`, of that many slices of a study, which needs the `classifier`."""
        self._archive, self._manifest, self._classifier, self._heat_maps = archive, manifest, classifier, heat_maps

    def report(self, answer: StudyAnswer) -> Outcome:
        """Send the report of a study, whose images the PACS must have, after its heat maps.

        Raises:
            StorageError: the PACS does not answer, or lacks images that the answer is made of (not_found).
            OtherContent: it holds something else under the UID of the report or of a heat map.
            Refused: it does not take one of them.
        """
        uid = report_uid(answer)
        held = self._held(answer, series_uid("report", uid), uid)
        if held is not None:
            _require(says(held, answer), answer, uid)
            return "there"
        sources = Sources.read(self._archive, answer)
        pictures = self._send_heat_maps(answer, sources)
        report = make_report(answer, self._manifest, sources, pictures)
        self._send(report)
        _require(says(self._taken(answer, report), answer), answer, uid)
        return "sent"

    def _send_heat_maps(self, answer: StudyAnswer, sources: Sources) -> list[Dataset]:
        if not (self._heat_maps and self._classifier):
            return []
        from btray.pacs.report.heat_maps import make_heat_maps  # torch, which a report alone does without

        pictures: list[Dataset] = []
        pictures += make_heat_maps(self._archive, answer, sources.patient, self._classifier, self._heat_maps)
        for picture in pictures:
            if self._held(answer, picture.SeriesInstanceUID, picture.SOPInstanceUID) is None:
                self._send(picture)
            made = dcmread(BytesIO(as_file(picture)))
            _require(shows_the_same(self._taken(answer, picture), made), answer, picture.SOPInstanceUID)
        return pictures

    def _held(self, answer: StudyAnswer, series: str, uid: str) -> Dataset | None:
        try:
            return dcmread(BytesIO(self._archive.retrieve_instance(answer.study_uid, series, uid)))
        except StorageError as error:
            if error.code == "not_found":
                return None
            raise

    def _taken(self, answer: StudyAnswer, made: Dataset) -> Dataset:
        """Return what the PACS holds of an object that it was sent: some answer success, and throw it away."""
        held = self._held(answer, made.SeriesInstanceUID, made.SOPInstanceUID)
        if held is None:
            raise Refused(f"{made.SOPInstanceUID}: the archive does not have what it was sent; see its log")
        return held

    def _send(self, made: Dataset) -> None:
        uid = made.SOPInstanceUID
        answer = self._archive.store([as_file(made)], made.StudyInstanceUID)
        if uid not in answer.stored:
            raise Refused(f"{uid}: the archive did not take it (reason 0x{answer.failed.get(uid, 0):04X}); see its log")


def _require(same: bool, answer: StudyAnswer, uid: str) -> None:
    if not same:
        raise OtherContent(
            f"{uid} (study {answer.study_uid}): the archive holds this UID with other content, of another run or rule "
            "perhaps; remove it there to have it sent"
        )


def as_file(made: Dataset) -> bytes:
    """Return the file of an object."""
    body = BytesIO()
    made.save_as(body, enforce_file_format=True)
    return body.getvalue()
