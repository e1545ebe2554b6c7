"""The settings of the evaluate and publish jobs. No heavy import: `--help` must be quick."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from btray.core.config import JobConfig, Positive, Probability
from btray.core.errors import UserError
from btray.core.uris import Uri
from btray.data.labels import Label
from btray.model.config import MANIFEST, require_bundle
from btray.model.shipped import SHIPPED, Model


class EvaluateConfig(JobConfig):
    """Measure a bundle on labelled data: metrics.json, plots and report.html."""

    model: Model = SHIPPED
    """Model bundle: a folder, local or s3://, or the name of the shipped one."""
    data: Uri
    """Labelled data, as for training; its test split if it has one, else all of it. One class is enough."""
    classes: tuple[str, ...] = ()
    """Class folders, or labels of a manifest, that are meant; all others are left out. Default: all."""
    outliers: Label | None = None
    """Label of images that show none of the classes: they are in no figure but the share that is rejected."""
    out: Uri
    """Folder for the report; local or s3://."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace the report at --out if it was made with other settings."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    abstain_below: Probability | None = None
    """Confidence below which the model abstains; default: the bundle's own."""
    max_rejected: Probability = 0.05
    """Share of unreadable images above which the job ends with exit code 3."""
    batch_size: Positive | None = None
    """Images per forward pass; default: 16 on a CPU, 64 on a GPU."""
    use_gpu: bool = False
    """Run one actor per GPU."""

    def check(self) -> None:
        """Refuse a bundle or data that are not there, and an --out that is taken or cannot be written to."""
        from btray import storage
        from btray.model.promotion import pinned

        require_bundle(self.model)
        storage.require_input(self.data, "--data")
        if not self.overwrite:
            settings = pinned(self, log=False).model_dump(
                mode="json", exclude={"max_rejected", "batch_size", "use_gpu"}
            )
            storage.require_own(self.out, settings, result="metrics.json")
        storage.require_writable(self.out, "--out")


class PublishConfig(JobConfig):
    """Make of a trained bundle one to pass on: half precision, no picture of a scan, its terms; another model_id."""

    model: Uri
    """Model bundle, as a training wrote it."""
    out: Uri
    """Folder for the published bundle; local or s3://."""
    license: Uri
    """Text of the terms of the model and its data: it becomes LICENSE, and stands on the model card."""
    data: Uri | None = None
    """Labelled images over which the answers in half precision are compared too; default: noise alone."""
    max_mb: Annotated[float, Field(gt=0)] = 6.0
    """Largest size of all files together, in MB (10^6 bytes)."""
    model_id: str | None = None
    """Refuse the bundle unless this is its model_id."""
    overwrite: bool = Field(default=False, exclude=True)
    """Replace the bundle at --out."""

    def check(self) -> None:
        """Refuse what is not there, and an --out that is taken, is the trained bundle or cannot be written to."""
        from btray import storage

        require_bundle(self.model)
        storage.require_input(self.license, "--license")
        if self.data is not None:
            storage.require_input(self.data, "--data")
        if self.out == self.model:
            raise UserError(f"--out {self.out} is the trained bundle, whose report would be lost; name another folder")
        if not self.overwrite and storage.exists(storage.join(self.out, MANIFEST)):
            raise UserError(f"--out {self.out} holds a bundle; give another --out, or --overwrite to replace it")
        storage.require_writable(self.out, "--out")
