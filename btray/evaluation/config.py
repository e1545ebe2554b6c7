"""The settings of the evaluate job. No heavy import: `--help` must be quick."""

from __future__ import annotations

from pydantic import Field

from btray.core.config import JobConfig, Positive, Probability
from btray.core.uris import Uri
from btray.data.labels import Label
from btray.model.config import require_bundle


class EvaluateConfig(JobConfig):
    """Measure a bundle on labelled data: metrics.json, plots and report.html."""

    model: Uri
    """Model bundle."""
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

        require_bundle(self.model)
        storage.require_input(self.data, "--data")
        if not self.overwrite:
            settings = self.model_dump(mode="json", exclude={"max_rejected", "batch_size", "use_gpu"})
            storage.require_own(self.out, settings, result="metrics.json")
        storage.require_writable(self.out, "--out")
