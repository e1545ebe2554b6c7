"""What `btray models` does: it lists, shows, compares, promotes and rolls back."""

from __future__ import annotations

import getpass
import logging
import socket
from datetime import UTC, datetime

from btray import storage
from btray.core.errors import ThresholdExceeded, UserError
from btray.model import promotion
from btray.model.bundle_files import own_names, read_files
from btray.model.config import MANIFEST
from btray.model.promotion import Promotion
from btray.model.shipped import SHIPPED, locate
from btray.registry.config import ModelsConfig

_log = logging.getLogger(__name__)


def manage(config: ModelsConfig) -> str | None:
    """Do what the command says; return the URI of the promoted bundle if it changed.

    Raises UserError for a model that is not there, and if another promotion came first; ThresholdExceeded if the model
    is worse than the promoted one on `require`.
    """
    config.check()
    actions = {"list": _list, "show": _show, "compare": _compare, "promote": _promote, "roll-back": _roll_back}
    return actions[config.action](config)


def _list(config: ModelsConfig) -> None:
    from btray.registry.description import line_of  # takes seconds to import, which a promotion does without

    promoted = {stage: promotion.current(config.registry, stage) for stage in promotion.stages(config.registry)}
    model_ids = _model_ids(config.registry)
    if not model_ids:
        raise UserError(f"--registry {config.registry}: no model is there; btray models promote makes a registry")
    for model_id in model_ids:
        marks = [stage for stage, entry in promoted.items() if entry and entry.model_id == model_id]
        print(line_of(promotion.bundle_uri(config.registry, model_id), marks))
    for stage in promoted:
        print(f"\nhistory of {stage}:")
        for entry in promotion.history(config.registry, stage):
            print(f"{entry.number:>4}  {entry}{' (forced)' if entry.forced else ''}")
    if not promoted:
        print(f"nothing is promoted in {config.registry}")


def _show(config: ModelsConfig) -> None:
    from btray.registry.description import describe

    print("\n".join(describe(_find(config, str(config.model)))))


def _compare(config: ModelsConfig) -> None:
    from btray.registry.description import describe

    uri, other = _find(config, str(config.model)), _against(config)
    for name, one in (("the model", uri), ("what it is compared with", other)):
        print("\n".join([f"{name}:", *describe(one)]), end="\n\n")
    if config.require is not None:
        from btray.registry.requirement import measure

        print(measure(config.require, uri, other))


def _promote(config: ModelsConfig) -> str:
    """Add the bundle if it is not in the registry, ask the data set, and make the next entry of the history."""
    before = promotion.current(config.registry, config.stage)
    uri = _added(config)
    evidence, forced = {}, False
    if config.require is not None and before is not None:
        from btray.registry.requirement import measure

        comparison = measure(config.require, uri, promotion.bundle_uri(config.registry, before.model_id))
        print(comparison, flush=True)
        evidence = comparison.record() | {"at_least": config.at_least}
        forced = comparison.difference < config.at_least
        if forced and not config.force:
            raise ThresholdExceeded(
                f"not promoted: {comparison}, and --at-least is {config.at_least}; --force --why TEXT promotes it all "
                "the same"
            )
    previous = before.model_id if before else None
    return _record(config, storage.name(uri), before, previous=previous, evidence=evidence, forced=forced)


def _roll_back(config: ModelsConfig) -> str:
    """Promote again the model that was promoted before the one that is now."""
    before = promotion.current(config.registry, config.stage)
    if before is None or before.previous is None:
        raise UserError(f"{config.registry}@{config.stage}: there is no earlier promotion to roll back to")
    # What was rolled back from is no aim of a second roll-back: follow the entry that first promoted that model.
    return _record(config, before.previous, before, previous=_before(config, before.previous))


def _before(config: ModelsConfig, model_id: str) -> str | None:
    """Return what was promoted when `model_id` was promoted for the first time."""
    entries = promotion.history(config.registry, config.stage)
    return next((entry.previous for entry in entries if entry.model_id == model_id), None)


def _record(
    config: ModelsConfig,
    model_id: str,
    before: Promotion | None,
    *,
    previous: str | None,
    evidence: dict[str, object] | None = None,
    forced: bool = False,
) -> str:
    """Verify the bundle, make it the promoted one and return its URI."""
    uri = promotion.bundle_uri(config.registry, model_id)
    read_files(uri, model_id=model_id)
    if before is not None and before.model_id == model_id:
        raise UserError(f"{config.registry}@{config.stage} is already model {before}; nothing is changed")
    entry = Promotion(
        number=before.number + 1 if before else 1,
        model_id=model_id,
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        by=config.by or f"{getpass.getuser()}@{socket.gethostname()}",
        why=str(config.why),
        previous=previous,
        evidence=evidence or {},
        forced=forced,
    )
    promotion.record(config.registry, config.stage, entry)
    print(f"{config.registry}@{config.stage} is now model {entry}", flush=True)
    if config.mlflow is not None:
        from btray.registry.mirror import mirror

        mirror(config.mlflow, storage.name(config.registry), config.stage, uri, entry)
    return uri


def _added(config: ModelsConfig) -> str:
    """Return the bundle `config.model` of the registry; copy it there, whole and verified, if it lies elsewhere."""
    given = str(config.model)
    if not _is_place(given):
        return _find(config, given)
    source = locate(given)
    manifest, _ = read_files(source)
    uri = promotion.bundle_uri(config.registry, manifest.model_id)
    if source != uri:
        # The manifest is last: until it is there, this is no bundle, and the same command completes it.
        for name in sorted(own_names(source), key=lambda name: name == MANIFEST):
            storage.write_new(storage.join(uri, name), storage.read_bytes(storage.join(source, name)))
        read_files(uri, model_id=manifest.model_id)
        _log.info("%s is in the registry as %s", source, uri)
    return uri


def _find(config: ModelsConfig, model: str, setting: str = "--model") -> str:
    """Return the one bundle of the registry whose model_id begins with `model`, or the bundle that lies there."""
    if _is_place(model):
        return locate(model)
    found = [model_id for model_id in _model_ids(config.registry) if model_id.startswith(model)]
    if len(found) != 1:
        known = ", ".join(_model_ids(config.registry)) or "none"
        raise UserError(
            f"{setting} {model}: the model_id of {len(found)} models of {config.registry} begins so; it has {known} "
            f"(a folder beside you: ./{model})"
        )
    return promotion.bundle_uri(config.registry, found[0])


def _against(config: ModelsConfig) -> str:
    if config.against is not None:
        return _find(config, config.against, "--against")
    return promotion.resolve(f"{config.registry}@{config.stage}", log=False)[0]


def _is_place(model: str) -> bool:
    return "/" in model or storage.is_remote(model) or model == SHIPPED


def _model_ids(registry: str) -> list[str]:
    """Return the models of the registry; a folder without a manifest, of a promoter that was killed, is none."""
    names = [name for name in storage.list_names(registry, missing_ok=True) if not name.startswith(("_", "."))]
    return [name for name in names if storage.exists(storage.join(registry, name, MANIFEST))]
