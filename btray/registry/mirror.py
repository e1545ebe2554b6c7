"""A copy of a promotion in MLflow's registry, for those who look there; btray itself never reads it."""

from __future__ import annotations

import logging

from btray.core.errors import UserError
from btray.model.promotion import Promotion

_log = logging.getLogger(__name__)


def mirror(tracking_uri: str, name: str, stage: str, uri: str, entry: Promotion) -> None:
    """Give the version of `name` that stands for the bundle `uri` the alias `stage`; make it if there is none.

    The promotion stands already: a server that fails is a warning. Raises UserError if MLflow is not installed.
    """
    try:
        import mlflow
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise UserError("--mlflow needs the extra: pip install 'btray[mlflow]'") from error
    try:
        mlflow.set_tracking_uri(tracking_uri)  # not of the client alone: it would make a mlflow.db in this folder
        client = mlflow.MlflowClient()
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        versions = [one for one in client.search_model_versions(f"name = '{name}'") if one.source == uri]
        tags = {"model_id": entry.model_id, "by": entry.by, "why": entry.why, "at": entry.at}
        version = versions[0] if versions else client.create_model_version(name, uri, tags=tags)
        client.set_registered_model_alias(name, stage, version.version)
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        _log.warning("--mlflow %s has no copy of this promotion, which stands all the same: %s", tracking_uri, reason)
