"""The settings of the jobs on whole archives. No heavy import: `--help` must be quick."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from btray.bulk.clinical.series import SeriesFilter
from btray.core.config import JobConfig, Positive, Probability
from btray.core.errors import UserError
from btray.core.uris import Uri, resolved
from btray.data.config import PreprocessConfig
from btray.model.config import EngineName, Precision, require_bundle
from btray.model.shipped import SHIPPED, Model
from btray.pacs.address import SCHEME, Address, is_dicomweb
from btray.pacs.config import PacsConfig

if TYPE_CHECKING:
    from btray.pacs.source import PacsSource

SHOWN = 24
"""Number of the least certain frames that summary.html shows."""


class ArchiveConfig(JobConfig):
    """Settings that the jobs on archives share."""

    input: Uri
    """Folder or prefix, manifest (.parquet or .csv with the column uri), S3 Inventory (manifest.json), file list \
    (.txt) or packed archive (the folder that jobs/pack.py wrote); local or s3://."""
    output: Uri
    """Where the result is written; local or s3://."""
    include: tuple[str, ...] = ()
    """Only paths below the input (keys of an inventory) that match one of these globs; `*` matches `/` too."""
    exclude: tuple[str, ...] = ()
    """No paths below the input that match one of these globs."""
    since: datetime | None = None
    """Only objects modified at this time or later, ISO 8601, UTC if no zone is given."""
    limit: Positive | None = None
    """Read at most this many objects."""
    dry_run: bool = False
    """Print how many objects would be read, their size and how long that takes; write nothing."""
    max_rejected: Probability | None = None
    """Share of rejected objects above which the job, having written everything, ends with exit code 3; default: any."""
    metrics_to: Annotated[str, resolved(unless="https?://")] | None = None
    """Where the run's last numbers are written for Prometheus: a file (.prom) that node-exporter's textfile collector \
    reads, or the http:// URL of a Pushgateway."""
    actors: Positive | None = None
    """Most actors that work at a time; default: one a CPU, or as many as the GPUs hold with --use-gpu. On a cluster \
    that grows, give as many as it may grow to hold. In a pipeline of two stages: most that classify."""
    threads: Positive = 16
    """Objects that an actor reads at a time."""
    patience: Annotated[float, Field(ge=0)] = 300.0
    """Seconds to wait for a store that does not answer, before its objects are rejected or the job fails."""

    def check(self) -> None:
        """Refuse an input that is not there, and an output that cannot be written to."""
        from btray import storage

        super().check()
        if not is_dicomweb(self.input):
            storage.require_input(self.input, "--input")
        if not storage.is_remote(self.output) and not self.dry_run:  # the lease tells whether a store takes objects
            storage.require_writable(self.output, "--output")

    @field_validator("since")
    @classmethod
    def _utc(cls, value: datetime | None) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class ClassifyConfig(ArchiveConfig, PacsConfig):
    """Classify every scan of an archive into a Parquet table; what is in it already is not read again."""

    input: Annotated[str, resolved(unless=SCHEME.pattern)]
    """Folder or prefix, manifest (.parquet or .csv with the column uri), S3 Inventory (manifest.json), file list \
    (.txt) or packed archive (the folder that jobs/pack.py wrote), local or s3://. Or a PACS: \
    dicomweb://HOST/ROOT?KEY=VALUE&..., with keys such as StudyDate=20261101- and ModalitiesInStudy=MR."""
    model: Model = SHIPPED
    """Model bundle: a folder, local or s3://, or the name of the shipped one."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    reclassify: bool = False
    """Read all objects again; their new rows supersede the old ones."""
    retry_rejected: bool = False
    """Read again what was rejected for good; what failed because of the store is read again anyway."""
    use_gpu: bool = False
    """Classify on GPUs."""
    gpu_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """GPU of each actor with --use-gpu; below 1 several share one; default: an actor for each 8 CPUs of a GPU, at \
most 4."""
    pipeline: Literal["auto", "one", "two"] = "auto"
    """Whether each actor reads, decodes and classifies (one), or actors on CPUs read and decode for those that \
classify and write (two); auto: two with --use-gpu, so that no GPU waits."""
    engine: EngineName = "auto"
    """How the network is run: as it is, as a frozen graph, or by ONNX Runtime (extra onnx); auto: frozen on a CPU, \
    eager on a GPU."""
    precision: Precision = "float32"
    """In what the network computes; bf16, bfloat16, takes less time on CPUs with AVX512_BF16 or AMX and on GPUs."""
    batch_size: Positive | None = None
    """Images per forward pass; default: 16 on a CPU, 64 on a GPU, halved automatically if its memory is full."""
    explain: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Write pictures of what spoke for the label (Grad-CAM) of this many of the least certain scans."""
    explain_labels: tuple[str, ...] = ()
    """Write such pictures of every scan that gets one of these labels."""
    studies: Uri | None = None
    """Where the table of series and studies is written, if the archive has any (DICOM); default: OUTPUT-studies."""
    series: tuple[str, ...] = ()
    """KEY=VALUE[|VALUE], repeatable: only series of which all of these hold. Keys are modality, plane, image_kind, \
    sequence, contrast, ..., body_part, description and protocol; values are globs, `unknown` if the header has none."""
    series_preset: Literal["t1-post-axial"] | None = None
    """A choice of series by its name: MR, axial, T1, after contrast agent or unknown, no localizer or the like."""
    pseudonymize: Uri | None = None
    """File with a key of at least 32 bytes, mode 600: UIDs and names of objects are written as HMACs with it."""

    def check(self) -> None:
        """As for all archives; and refuse a bundle that is not there, or a key that cannot be used."""
        from btray import storage

        require_bundle(self.model)
        if self.pseudonymize is not None and not is_dicomweb(self.input) and not storage.may_exist(self.input):
            raise UserError("--input: nothing is there; check the spelling")  # its name may be that of a patient
        super().check()
        if self.studies is not None and not self.dry_run and not storage.is_remote(self.studies):
            storage.require_writable(self.studies, "--studies")
        if self.pseudonymize is not None:
            from btray.bulk.clinical.pseudonyms import Pseudonyms

            Pseudonyms.from_file(self.pseudonymize)

    def pacs_source(self) -> PacsSource | None:
        """Return what lists and reads the archive if it is that of a PACS."""
        if not is_dicomweb(self.input):
            return None
        from btray.pacs.source import PacsSource

        return PacsSource(Address.parse(self.input, insecure=self.insecure), self, patience=self.patience)

    @property
    def studies_uri(self) -> str:
        """Root of the table of series and studies."""
        return self.studies or f"{self.output}-studies"

    @property
    def series_filter(self) -> SeriesFilter | None:
        """The choice of series; None: all."""
        return SeriesFilter.parse(self.series, self.series_preset)

    @property
    def stages(self) -> int:
        """Number of the stages of the pipeline."""
        return 2 if self.pipeline == "two" or (self.pipeline == "auto" and self.use_gpu) else 1

    @property
    def least_certain(self) -> int:
        """Number of the least certain frames that run.json names."""
        return max(SHOWN, self.explain)

    @field_validator("series")
    @classmethod
    def _terms(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        SeriesFilter.parse(value)
        return value

    @model_validator(mode="after")
    def _pacs(self) -> Self:
        if is_dicomweb(self.input):
            try:
                Address.parse(self.input, insecure=self.insecure)
            except UserError as error:
                raise ValueError(f"--input {error}") from error
            if self.since:
                raise ValueError("--since is for files: choose studies of a PACS by StudyDate=YYYYMMDD- in --input")
        return self

    @model_validator(mode="after")
    def _studies_beside_the_output(self) -> Self:
        if self.studies is None and re.fullmatch("s3://[^/]+", self.output):
            raise ValueError(f"{self.output} is a whole bucket, beside which no studies can be written; give --studies")
        if f"{self.studies_uri}/".startswith(f"{self.output}/"):
            raise ValueError(f"{self.studies} lies in the results table; give --studies another folder")
        return self

    @model_validator(mode="after")
    def _onnx_on_a_cpu(self) -> Self:
        if self.use_gpu and self.engine == "onnx":
            raise ValueError("engine onnx runs on a CPU: leave out --use-gpu, or choose --engine eager or frozen")
        if self.precision == "bf16" and self.engine == "onnx":
            raise ValueError("engine onnx has no bf16: leave out --precision, or choose --engine eager or frozen")
        return self


class PackConfig(ArchiveConfig):
    """Pack many small objects into few Parquet shards, which classify, train and audit read several times faster.

    Run again it packs what is new or changed. Exit code 0 if every object was read, whatever it holds.
    """

    frames: bool = False
    """Pack the frames that the network sees instead of the files: train, evaluate and classify with the same \
    preprocessing need not decode anything then."""
    model: Model | None = None
    """With --frames: model bundle whose preprocessing makes them."""
    preprocess: PreprocessConfig = PreprocessConfig()
    """With --frames: preprocessing, if no --model is given."""

    def check(self) -> None:
        """As for all archives; and refuse a bundle that is not there."""
        super().check()
        if self.model is not None:
            require_bundle(self.model)

    @model_validator(mode="after")
    def _one_preprocessing(self) -> Self:
        given = self.preprocess != PreprocessConfig()
        if (given or self.model) and not self.frames:
            raise ValueError("--model and --preprocess say how frames are made: add --frames, or leave them out")
        if given and self.model:
            raise ValueError("give --model or --preprocess, not both")
        return self


class EraseConfig(JobConfig):
    """Erase objects from a results table or a packed archive: every row and picture, and no later run takes them.

    Give one of --uris, --study and --where. All frames, versions and models of an object are erased.
    """

    output: Uri
    """Results table (--output of classify) or packed archive."""
    uris: Uri | None = None
    """List (.txt) or manifest (.parquet, .csv) of the objects, by the URIs that the output has."""
    study: str | None = None
    """StudyInstanceUID: all objects of the study."""
    where: str | None = None
    """Condition in DuckDB's SQL on the columns of the table: all objects of which a row fulfils it."""
    studies: Uri | None = None
    """Table of series and studies; default: those that the runs on the output have written."""
    pseudonymize: Uri | None = None
    """File with the key that the output was written with, if it was."""
    dry_run: bool = False
    """Print what would be erased; write nothing."""
    patience: Annotated[float, Field(ge=0)] = 300.0
    """Seconds to wait for a store that does not answer."""

    def check(self) -> None:
        """Refuse an output or a list that is not there, or a key that cannot be used."""
        from btray import storage

        storage.require_input(self.output, "--output")
        if self.uris is not None:
            storage.require_input(self.uris, "--uris")
        if self.pseudonymize is not None:
            from btray.bulk.clinical.pseudonyms import Pseudonyms

            Pseudonyms.from_file(self.pseudonymize)

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if sum(choice is not None for choice in (self.uris, self.study, self.where)) != 1:
            raise ValueError("give one of --uris, --study and --where")
        return self
