"""The settings of the evaluate job. No heavy import: `--help` must be quick."""

from __future__ import annotations

from btray.core.config import JobConfig, Positive, Probability


class EvaluateConfig(JobConfig):
    """Measure a bundle on labelled data: metrics.json, plots and report.html."""

    model: str
    """Model bundle."""
    data: str
    """Labelled data, as for training; its test split if it has one, else all of it. One class is enough."""
    classes: tuple[str, ...] = ()
    """Class folders, or labels of a manifest, that are meant; all others are left out. Default: all."""
    out: str
    """Folder for the report; local or s3://."""
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
