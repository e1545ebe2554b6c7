"""The report job: every study of a table that the PACS holds gets its report there, once, whatever is killed.

Nothing is kept here of what was sent: the UIDs follow from the table, and the PACS says which it has.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any, Final

import pyarrow as pa

from btray import results, storage
from btray.core.errors import Failed, UserError
from btray.model.bundle_files import read_files
from btray.model.manifest import Manifest
from btray.model.promotion import pinned
from btray.model.shipped import announce, locate
from btray.model.studies import Reader
from btray.pacs.address import Address
from btray.pacs.client import DicomWeb
from btray.pacs.report.answers import StudyAnswer
from btray.pacs.report.config import ReportConfig
from btray.pacs.report.reporter import OtherContent, Refused, Reporter
from btray.storage import StorageError
from btray.storage.read_many import in_threads

_log = logging.getLogger(__name__)

_ROWS: Final = 512  # as Python objects at a time, which take much more than as Arrow's
_PSEUDONYM: Final = "hmac:"
"""What the URI of an object begins with if classify wrote pseudonyms."""


def report(config: ReportConfig) -> str:
    """Send the reports that the PACS lacks, and return its address.

    Raises:
        UserError: the table has no answer of the model, or pseudonyms; the PACS has none of its studies, or holds
            other content under the UID of a report, once all others were sent.
        Failed: the PACS refused a report, once all others were sent.
        StorageError: the PACS or the store does not answer.
    """
    config.check()
    with storage.retry_timeout(config.patience):
        config = pinned(config)
        model = locate(config.model)
        manifest, _ = read_files(model, model_id=config.model_id)
        announce(config.model, manifest.model_id)
        job = _Job(_reporter(config, model, manifest))
        job.run(_answers(config.studies, manifest))
    return config.to


def _reporter(config: ReportConfig, model: str, manifest: Manifest) -> Reporter:
    classifier = None
    if config.heat_maps:
        from btray.model.classifier import Classifier  # torch, which a report alone does without

        classifier = Classifier.load(model, model_id=manifest.model_id, device="cpu", engine="eager")
    archive = DicomWeb(Address.parse(config.to, insecure=config.insecure).root, config, patience=config.patience)
    return Reporter(archive, manifest, classifier, heat_maps=config.heat_maps)


def _answers(studies: str, manifest: Manifest) -> Iterator[tuple[str, StudyAnswer | None]]:
    """Yield the UID of each study of a table and what the model says of it, None if nothing."""
    reader = Reader.of(manifest)
    found = False
    for table in results.studies(studies, manifest.model_id):
        for uid, rows in _by_study(table):
            found = True
            _require_names(rows, studies)
            if rows[0]["rule"] != str(reader):
                raise UserError(
                    f"--studies {studies} was decided by the {rows[0]['rule']}, and --model says {reader}; run "
                    "classify again, which makes the table anew"
                )
            yield uid, StudyAnswer.of_rows(rows, model_id=manifest.model_id, top=reader.rule.top)
    if not found:
        raise UserError(f"--studies {studies} has no study of model {manifest.model_id}; name its model with --model")


def _by_study(table: pa.Table) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the rows of each study, which stand next to each other; a series that names none cannot be reported."""
    rows = (row for batch in table.to_batches(max_chunksize=_ROWS) for row in batch.to_pylist())
    yield from ((uid, list(some)) for uid, some in groupby(rows, key=itemgetter("study_uid")) if uid is not None)


def _require_names(rows: list[dict[str, Any]], studies: str) -> None:
    if any(frame["uri"].startswith(_PSEUDONYM) for row in rows for frame in row["key_frames"]):
        raise UserError(
            f"--studies {studies} has pseudonyms, by which no archive knows a study; run classify without "
            "--pseudonymize, into another --output"
        )


class _Job:
    """Counts what became of the studies."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._counts: Counter[str] = Counter()
        self._problems: list[UserError | Failed] = []
        self._away: StorageError | None = None

    def run(self, answers: Iterator[tuple[str, StudyAnswer | None]]) -> None:
        for (uid, _), outcome in in_threads(self._report, answers):
            if isinstance(outcome, StorageError) and outcome.code != "not_found":
                raise outcome
            if isinstance(outcome, StorageError):
                _log.warning("study %s is not reported: %s", uid, outcome)
                self._counts["not in the archive"] += 1
            elif isinstance(outcome, UserError | Failed):
                _log.error("%s", outcome)
                self._problems.append(outcome)
            else:
                self._counts[outcome] += 1
        self._conclude()

    def _report(self, given: tuple[str, StudyAnswer | None]) -> str | UserError | Failed:
        """Report one study; once the PACS has not answered, no further one."""
        _, answer = given
        if answer is None:
            return "without an answer"
        if self._away is not None:
            return self._away
        try:
            return self._reporter.report(answer)
        except StorageError as error:
            if error.code != "not_found":
                self._away = error
            return error
        except (OtherContent, Refused) as error:
            return error

    def _conclude(self) -> None:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self._counts.items()))
        print(
            f"reports: {counts or 'none'}" + (f", {len(self._problems)} not taken" * bool(self._problems)), flush=True
        )
        if self._problems:
            raise self._problems[0]
        if self._counts["not in the archive"] and not self._counts.keys() & {"sent", "there"}:
            raise UserError("--to holds the images of none of these studies; name the archive that holds them")
