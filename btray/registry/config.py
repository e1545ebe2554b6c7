"""The settings of `btray models`. No heavy import: `--help` must be quick."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from btray.core.config import JobConfig
from btray.core.errors import UserError
from btray.core.uris import TrackingUri, Uri

Action = Literal["list", "show", "compare", "promote", "roll-back"]


class ModelsConfig(JobConfig):
    """List the models of a registry, compare and promote them; NAME@production then means the promoted one.

    Exit code 3 if --require says that the model is worse than the promoted one; nothing is promoted then.
    """

    action: CliPositionalArg[Action]
    """list; show one; compare one with the promoted one; promote one; roll-back to the one promoted before."""
    registry: Uri
    """Folder of the models of one name, such as s3://bucket/models/brain-mri; `promote` makes it."""
    model: str | None = None
    """The model: its model_id or the beginning of it, or a bundle (folder, or brain-mri), which `promote` adds."""
    against: str | None = None
    """What it is compared with: another model of the registry; default: the promoted one."""
    stage: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")] = "production"
    """Stage that is meant: NAME@STAGE names its model."""
    why: str | None = None
    """Why it is promoted or rolled back; the history keeps it."""
    by: str | None = None
    """Who promotes it; default: this user and machine."""
    require: Uri | None = None
    """Labelled data on which the model must not be worse than the promoted one; their test split if they have one."""
    at_least: Annotated[float, Field(ge=-1, le=1)] = -0.01
    """Least difference of the accuracies on --require: the model's less the promoted one's."""
    force: bool = False
    """Promote it although --require says that it is worse; --why must say why."""
    mlflow: TrackingUri | None = None
    """Tracking URI of an MLflow server whose registry gets a copy of the entry (extra mlflow)."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.action in ("show", "compare", "promote") and self.model is None:
            raise ValueError(f"{self.action} needs --model MODEL_ID; btray models list shows them")
        if self.action in ("promote", "roll-back") and not (self.why and self.why.strip()):
            raise ValueError(f"{self.action} needs --why TEXT: the history keeps it")
        if re.search(r"[\r\n]", self.why or ""):
            raise ValueError("--why takes one line")
        return self

    def check(self) -> None:
        """Refuse data that are not there, and a name for a registry that means something else."""
        from btray import storage
        from btray.model.promotion import split

        if split(self.registry):
            raise UserError(f"--registry {self.registry}: name the folder, without @STAGE; --stage takes the stage")
        if self.require is not None:
            storage.require_input(self.require, "--require")
