"""The report of one study: a Comprehensive 3D SR by template TID 1500 (PS3.16), the study first, then its series.

It says the same whenever it is made: UIDs follow from model and source, and all dates from the time at which the study
was classified.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from datetime import UTC
from typing import Any, Final

from highdicom.sr import (
    AlgorithmIdentification,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    FindingSite,
    ImageContentItem,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    RelationshipTypeValues,
    SourceImageForMeasurementGroup,
    TextContentItem,
    TrackingIdentifier,
)
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.valuerep import DA, DT, TM

from btray.core.notice import NOTICE
from btray.model.manifest import Manifest
from btray.pacs.own import MANUFACTURER, SERIES_DESCRIPTION
from btray.pacs.report.answers import Answer, StudyAnswer
from btray.pacs.report.codes import (
    ABSENT,
    BRAIN,
    NO_TUMOR,
    PRESENCE,
    PROBABILITY,
    finding,
    own_code,
    procedure,
)
from btray.pacs.report.identity import derived_uid, report_uid, series_uid
from btray.pacs.report.sources import Sources, reference

_SERIES_NUMBER: Final = 9901  # beyond those of scanners


def make_report(
    answer: StudyAnswer, manifest: Manifest, sources: Sources, heat_maps: Sequence[Dataset] = ()
) -> Comprehensive3DSR:
    """Return the report of what the model of `manifest` says of a study, with references to some heat maps."""
    uid = report_uid(answer)
    content = _Content(answer, manifest, sources).tree(uid, heat_maps)
    report = Comprehensive3DSR(
        evidence=[*sources.references, *map(reference, heat_maps)],
        content=content,
        sop_instance_uid=uid,
        series_instance_uid=series_uid("report", uid),
        series_number=_SERIES_NUMBER,
        instance_number=1,
        is_complete=True,  # unverified and preliminary, as it is by default
        **origin(answer, SERIES_DESCRIPTION),
    )
    finish(report, answer, sources.patient)
    return report


def origin(answer: StudyAnswer, series_description: str) -> dict[str, Any]:
    """Return what highdicom is told of all that is made of an answer: who made it, and when."""
    date, time = dates(answer)
    return {
        "manufacturer": MANUFACTURER,
        "manufacturer_model_name": MANUFACTURER,
        "device_serial_number": answer.model_id,
        "software_versions": importlib.metadata.version("btray"),
        "series_description": series_description,
        "content_date": date,
        "content_time": time,
        "series_date": date,
        "series_time": time,
    }


def finish(made: Any, answer: StudyAnswer, patient: Dataset) -> None:
    """Add the data of the patient and the study to an object, and date it."""
    made.copy_patient_and_study_information(patient)
    made.SpecificCharacterSet = "ISO_IR 192"  # as DICOM's JSON, of which they are
    made.InstanceCreationDate, made.InstanceCreationTime = dates(answer)
    for equipment in made.get("ContributingEquipmentSequence", ()):
        if "ContributionDateTime" in equipment:  # highdicom's own
            equipment.ContributionDateTime = DT(answer.classified_at.astimezone(UTC).replace(tzinfo=None))


def dates(answer: StudyAnswer) -> tuple[DA, TM]:
    """Return date and time of all that is made of an answer, in UTC."""
    at = answer.classified_at.astimezone(UTC)
    return DA(at.date()), TM(at.time())


def parameters(answer: StudyAnswer) -> list[str]:
    """Return the parameters of the algorithm."""
    return [f"model_id={answer.model_id}", f"rule={answer.rule}"]


class _Content:
    """The content tree."""

    def __init__(self, answer: StudyAnswer, manifest: Manifest, sources: Sources) -> None:
        self._answer, self._manifest, self._sources = answer, manifest, sources

    def tree(self, uid: str, heat_maps: Sequence[Dataset]) -> MeasurementReport:
        device = DeviceObserverIdentifyingAttributes(
            uid=derived_uid("device", self._answer.model_id),
            name=MANUFACTURER,
            manufacturer_name=MANUFACTURER,
            model_name=MANUFACTURER,
            serial_number=self._answer.model_id,
        )
        observer = ObserverContext(codes.DCM.Device, device)
        groups = [group for part in self._answer.parts for group in self._groups(uid, part)]
        pictures = [
            ImageContentItem(
                name=codes.DCM.BestIllustrationOfFinding,
                referenced_sop_class_uid=picture.SOPClassUID,
                referenced_sop_instance_uid=picture.SOPInstanceUID,
                relationship_type=RelationshipTypeValues.CONTAINS,
            )
            for picture in heat_maps
        ]
        groups[0][0].ContentSequence.extend(pictures)
        return MeasurementReport(
            observation_context=ObservationContext(observer_device_context=observer),
            procedure_reported=procedure(self._sources.patient.get("Modality")),
            imaging_measurements=groups,
            referenced_images=self._sources.library,
        )

    def _groups(self, uid: str, part: Answer) -> Iterator[MeasurementsAndQualitativeEvaluations]:
        """Yield the answer for a study or series, and then what there is for each class."""
        for name, label, probability in part.statements:
            group = self._group(uid, part, name, label, probability, is_answer=name == part.name)
            if name == part.name:
                group[0].ContentSequence.append(_comment(part))
            yield group

    def _group(
        self, uid: str, part: Answer, name: str, label: str, probability: float, *, is_answer: bool
    ) -> MeasurementsAndQualitativeEvaluations:
        kind = own_code("answer", "Answer of the model") if is_answer else own_code("class", "Class of the model")
        evaluations = [QualitativeEvaluation(PRESENCE, ABSENT)] if label == NO_TUMOR else []
        if is_answer and part.abstained:
            abstained = own_code("abstained", "Below the threshold: the model does not stand by it")
            evaluations.append(QualitativeEvaluation(own_code("reliability", "Reliability"), abstained))
        return MeasurementsAndQualitativeEvaluations(
            tracking_identifier=TrackingIdentifier(derived_uid("group", uid, name), name),
            finding_category=kind,
            finding_type=finding(label),
            finding_sites=[FindingSite(BRAIN)],
            algorithm_id=AlgorithmIdentification(
                name=MANUFACTURER,
                version=self._manifest.versions.get("btray", "unknown"),
                parameters=parameters(self._answer),
            ),
            measurements=[Measurement(PROBABILITY, probability, codes.UCUM.NoUnits)],
            qualitative_evaluations=evaluations,
            source_images=[
                SourceImageForMeasurementGroup(
                    referenced_sop_class_uid=self._sources.headers[frame.instance_uid].SOPClassUID,
                    referenced_sop_instance_uid=frame.instance_uid,
                    referenced_frame_numbers=self._sources.frame_number(frame),
                )
                for frame in part.sources
            ],
        )


def _comment(part: Answer) -> TextContentItem:
    frames = f"{part.frames} frames" + (f", {part.rejected} rejected" if part.rejected else "")
    abstained = "the model abstains; " if part.abstained else ""
    return TextContentItem(
        name=codes.DCM.Comment,
        value=f"{part.label} {part.confidence:.3f} ({frames}); {abstained}{NOTICE}",
        relationship_type=RelationshipTypeValues.CONTAINS,
    )
