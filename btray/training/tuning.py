"""The tune job: Ray Tune over the network family and the optimiser, each trial a run of Ray Train as training does it.

The images are decoded once and shared by all trials. The trial with the best validation score is then taken up by the
training job itself, which gives it the epochs it has not had, the refit, and the one look at the test split.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from dataclasses import replace
from typing import Any

import ray.train
import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from btray import storage
from btray.core.cluster import connected, cpus, gpus, started_ray_here
from btray.core.errors import UserError
from btray.data.labelled import read_labelled
from btray.model.config import NetworkConfig
from btray.model.network import build_network, count_flops, count_parameters
from btray.storage import StorageError
from btray.training.config import SpaceConfig, TrainConfig, TuneConfig
from btray.training.job import RUN_MAY_CHANGE, claim_run, fit, require_destinations, train
from btray.training.preemption import STOP
from btray.training.prepare import TrainingData, prepare, training_classes, worker_range
from btray.training.pretrained import read_initial_weights
from btray.training.tracking import HISTORY, require_mlflow
from btray.training.tuning_report import Row, accuracy_against_cost, by_score, table_csv, table_text

_log = logging.getLogger(__name__)

Point = dict[str, Any]
"""A value for each setting of the space."""

# The driver of a trial only waits for its workers. Together with them it must fit into the CPUs that there are.
_DRIVER_CPUS = 0.01
# Least of a worker: with it as many fit on a CPU as one, and drivers beside them.
_WORKER_CPUS = 0.9
_TRIALS = "trials"
_CHOICES = ("architecture", "width", "depth", "kernel", "squeeze_excite", "pooling", "mixup")
_LOGARITHMIC = ("learning_rate", "weight_decay")
_SEARCH_MAY_CHANGE = RUN_MAY_CHANGE - {"epochs", "num_workers", "patience"} | {"concurrent"}


def tune(config: TuneConfig) -> str:
    """Search by `config` and return the URI of the best trial's bundle.

    A search of the same name in the same storage is taken up where it was cut off. Raises UserError for unusable input
    and ThresholdExceeded where more than `max_rejected` of the images cannot be read.
    """
    folder = storage.join(storage.resolve(config.storage_uri), config.name)
    config = config.model_copy(update={"search": _search_kind(config)})
    require_destinations(config)
    if config.mlflow:
        require_mlflow()
    table = read_labelled(config.data)
    classes = training_classes(table, config.data)
    initial = read_initial_weights(config.init_from, config.network, len(classes)) if config.init_from else None
    with connected():
        data = prepare(config, table, classes, folder, initial)
        claim_run(folder, data, config, _SEARCH_MAY_CHANGE)
        rows = _search(config, data, folder)
        best = by_score(rows)[0]
        if best["score"] is None:
            raise RuntimeError(f"not one of {len(rows)} trials ended an epoch; see {storage.join(folder, 'search')}")
        files = {
            "trials.csv": table_csv(rows),
            "trials.png": accuracy_against_cost(rows, best, images=len(data.plan.validation)),
        }
        for name, body in files.items():
            storage.write_bytes(storage.join(folder, name), body)
        print(table_text(rows, varied_settings(config.space)), flush=True)
        print(f"trial {best['trial']} is the best; trials: {storage.join(folder, 'trials.csv')}", flush=True)
        chosen = trial_config(config, {name: best[name] for name in SpaceConfig.model_fields}, best["trial"])
        return train(chosen, files=files)


def _search_kind(config: TuneConfig) -> str:
    installed = importlib.util.find_spec("optuna") is not None
    if config.search == "optuna" and not installed:
        raise UserError("--search optuna needs the extra: pip install 'btray[tune]'; or give --search random")
    kind = config.search or ("optuna" if installed else "random")
    _log.info("search: %s", "Optuna's tree-structured Parzen estimator" if kind == "optuna" else "random")
    return kind


# ---- the space


def varied_settings(space: SpaceConfig) -> list[str]:
    """Names of the settings that differ between trials."""
    return [name for name in SpaceConfig.model_fields if len(set(getattr(space, name))) > 1]


def domains(space: SpaceConfig) -> dict[str, Any]:
    """The space as Ray Tune takes it."""
    found: dict[str, Any] = {}
    for name in SpaceConfig.model_fields:
        values = getattr(space, name)
        if len(set(values)) == 1:
            found[name] = values[0]
        elif name in _CHOICES:
            found[name] = ray.tune.choice(list(values))
        else:
            found[name] = (ray.tune.loguniform if name in _LOGARITHMIC else ray.tune.uniform)(*values)
    return found


def given_point(config: TuneConfig) -> Point | None:
    """The config as it is given, as a point of the space; None where it lies outside."""
    network, optimiser = config.network, config.optimiser
    point: Point = {"width": 1.0, "depth": 0}
    for name in SpaceConfig.model_fields.keys() - point.keys():
        point[name] = getattr(network if hasattr(network, name) else optimiser, name)
    for name, value in point.items():
        values = getattr(config.space, name)
        inside = value in values if name in _CHOICES else values[0] <= value <= values[1]
        if not inside:
            return None
    return point


def trial_config(config: TuneConfig, point: Point, trial: str) -> TrainConfig:
    """The training that a trial is."""
    base = {name: getattr(config, name) for name in TrainConfig.model_fields}
    optimiser = {name: point[name] for name in ("learning_rate", "weight_decay", "label_smoothing", "mixup")}
    return TrainConfig(
        **base
        | {
            "name": trial,
            "storage": storage.join(storage.resolve(config.storage_uri), config.name, _TRIALS),
            "network": _network(config.network, point),
            "optimiser": config.optimiser.model_copy(update=optimiser),
        }
    )


def _network(base: NetworkConfig, point: Point) -> NetworkConfig:
    kept = {name: point[name] for name in ("architecture", "kernel", "squeeze_excite", "pooling", "dropout")}
    scaled = {
        "stem_width": _eights(base.stem_width, point["width"]),
        "widths": tuple(_eights(width, point["width"]) for width in base.widths),
        "depths": tuple(depth + point["depth"] for depth in base.depths),
    }
    return base.model_copy(update=kept | scaled)


def _eights(width: int, factor: float) -> int:
    """Group norm and vector units want whole eights; a width that is not changed stays as it is."""
    return width if factor == 1.0 else max(8, round(width * factor / 8) * 8)


# ---- the search


def _search(config: TuneConfig, data: TrainingData, folder: str) -> list[Row]:
    """Run the trials that are left and return what is known of all."""
    at_a_time = concurrency(config)
    within = cpus_of_a_trial(config, at_a_time) - _DRIVER_CPUS
    trial = ray.tune.with_parameters(_trial, config=config, data=data, within=within)
    trainable = ray.tune.with_resources(trial, {"CPU": _DRIVER_CPUS})
    filesystem, path = storage.arrow_filesystem(folder)
    searched = f"{path}/search"
    if ray.tune.Tuner.can_restore(searched, storage_filesystem=filesystem):
        _log.info("taking up the search %s", config.name)
        tuner = ray.tune.Tuner.restore(
            searched, trainable, resume_errored=True, param_space=domains(config.space), storage_filesystem=filesystem
        )
    else:
        tuner = ray.tune.Tuner(
            trainable,
            param_space=domains(config.space),
            tune_config=ray.tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=config.trials,
                max_concurrent_trials=at_a_time,
                search_alg=_algorithm(config),
                trial_dirname_creator=_name_of,
                # One epoch more than there are: a trial that has all of them ends by itself, its checkpoint written.
                scheduler=EarlyStopping(
                    storage.join(folder, _TRIALS),
                    time_attr="epoch",
                    max_t=config.epochs + 1,
                    grace_period=min(config.grace, config.epochs),
                    reduction_factor=config.reduction,
                ),
            ),
            run_config=ray.tune.RunConfig(
                name="search", storage_path=path, storage_filesystem=filesystem, verbose=0, callbacks=[_Announce()]
            ),
        )
    results = tuner.fit()
    return [_row(config, results[number], len(data.plan.classes)) for number in range(len(results))]


def concurrency(config: TuneConfig) -> int:
    """Trials at a time: as many as there is room for, where each of their workers has a CPU, or a GPU, of its own.

    A cluster that this job joined may grow to hold as many as are asked for (--concurrent).
    """
    room = max(1, int((gpus() if config.use_gpu else cpus()) // worker_range(config)[1]))
    most = room if started_ray_here() else max(room, config.concurrent or 0)
    return min(config.concurrent or room, most, config.trials)


def cpus_of_a_trial(config: TuneConfig, at_a_time: int) -> float:
    """Its share of the CPUs; no less than its workers need of a cluster that is yet to grow."""
    share = cpus() / at_a_time
    return share if started_ray_here() else max(share, _WORKER_CPUS * worker_range(config)[1])


class EarlyStopping(ASHAScheduler):
    """ASHA (arXiv:1810.05934) that asks a trial in `trials_uri` to end, where Ray's would have it killed.

    A Ray Train run whose driver is killed keeps its CPUs until an actor of Ray's finds its controller dead. That one
    looks in vain where two Rays run on a machine, or one has no dashboard, and all that comes after waits for ever.
    """

    def __init__(self, trials_uri: str, **options: Any) -> None:
        super().__init__(**options)
        self._trials_uri = trials_uri
        self._asked: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Tune's question what is to become of a trial: it always goes on, until it has ended by itself."""
        if trial.trial_id not in self._asked:
            action: str = super().on_trial_result(tune_controller, trial, result)
            if action != TrialScheduler.STOP:
                return action
        self._asked.add(trial.trial_id)
        try:  # with every result anew: a search that is taken up begins without the mark
            storage.write_text(storage.join(self._trials_uri, trial.trial_id, STOP), "")
        except StorageError as error:
            _log.warning("trial %s cannot be asked to end: %s", trial.trial_id, error)
        return TrialScheduler.CONTINUE


class _Report(TuneReportCallback):
    """What Tune hears of: whole epochs. The record of one that was broken off is no score."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if "step" not in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


def _algorithm(config: TuneConfig) -> Searcher | SearchAlgorithm:
    given = given_point(config)
    if config.search == "random":
        first = [given] if given else None
        return BasicVariantGenerator(points_to_evaluate=first, random_state=config.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    varied = varied_settings(config.space)
    first = [{name: given[name] for name in varied}] if given else None
    return OptunaSearch(points_to_evaluate=first, seed=config.seed)


def _name_of(trial: Any) -> str:
    return str(trial.trial_id)


def _trial(point: Point, *, config: TuneConfig, data: TrainingData, within: float) -> None:
    """One run of Ray Train, whose epochs Tune hears of. Taken up after a failure, it goes on at its last checkpoint."""
    trained = trial_config(config, point, ray.tune.get_context().get_trial_id())
    run_uri = storage.join(storage.resolve(trained.storage_uri), trained.name)
    mine = replace(data, plan=replace(data.plan, config=trained, run_uri=run_uri))
    fit(mine, within=within, callbacks=[_Report()])


class _Announce(ray.tune.Callback):
    """A line for each trial that ends."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        ended = sum(other.is_finished() for other in trials)
        print(
            f"trial {trial.trial_id} ended after {last.get('epoch', 0)} epochs, "
            f"val macro-F1 {last.get('val_macro_f1', float('nan')):.3f} ({ended} of {len(trials)} begun have ended)",
            flush=True,
        )


def _row(config: TuneConfig, result: Any, classes: int) -> Row:
    """What is known of a trial, from the history that its run keeps."""
    trial = storage.name(result.path)
    point = {name: result.config[name] for name in SpaceConfig.model_fields}
    trained = trial_config(config, point, trial)
    history_uri = storage.join(storage.resolve(trained.storage_uri), trial, HISTORY)
    history = (
        [json.loads(line) for line in storage.read_text(history_uri).splitlines()]
        if storage.exists(history_uri)
        else []
    )
    best: Row = max(history, key=lambda record: record["score"], default={})
    network = build_network(trained.network, classes)
    state = "failed" if result.error else "finished" if len(history) >= config.epochs else "stopped"
    return {
        "trial": trial,
        "state": state,
        "epochs": len(history),
        "score": best.get("score"),
        "val_macro_f1": best.get("val_macro_f1"),
        "val_accuracy": best.get("val_accuracy"),
        "val_loss": best.get("val_loss"),
        "gflop": count_flops(network, config.preprocess.size) / 1e9,
        "parameters": count_parameters(network),
        "images_per_second": best.get("images_per_second"),
        "seconds": sum(record["seconds"] for record in history),
        **point,
    }
