"""The tune job: Ray Tune over the network family and the optimiser, each trial a run of Ray Train as training does it.

The images are decoded once and shared by all trials. The training job then resumes the trial with the best validation
score: it gives it the epochs it has not had, the refit, and the one look at the test split.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, SearchAlgorithm, Searcher

from btray import storage
from btray.core import logs
from btray.core.cluster import connected, cpus, gpus, started_ray_here
from btray.core.config import set_environment
from btray.core.console import ProgressLine, show_progress
from btray.core.errors import Failed, UserError
from btray.model.config import NetworkConfig
from btray.model.network import build_network, count_flops, count_parameters
from btray.storage import StorageError
from btray.training.config import (
    BOUNDED,
    LOGARITHMIC,
    RANDOM,
    OptimiserConfig,
    SpaceConfig,
    TrainConfig,
    TuneConfig,
)
from btray.training.history import best_record, read_history
from btray.training.job import train
from btray.training.plan import run_folder
from btray.training.preemption import STOP
from btray.training.prepare import TrainingData, prepare, read_source, worker_range
from btray.training.run import claim_run, fit, is_finished, record_finished
from btray.training.tuning_report import TrialRecord, accuracy_against_cost, by_score, short, table_csv, table_text

_log = logging.getLogger(__name__)

Settings = dict[str, Any]
"""A point of the space: a value for each of its settings."""

# The driver of a trial only waits for its workers. Together with them it must fit into the CPUs that there are.
_DRIVER_CPUS = 0.01
# Least CPUs of a worker: as many workers fit as there are CPUs, with the drivers beside them.
_WORKER_CPUS = 0.9
_TRIALS = "trials"
_OWN_ERROR = f"{UserError.__module__}.{UserError.__qualname__}: "


def tune(config: TuneConfig) -> str:
    """Search by `config` and return the URI of the best trial's bundle.

    A search of the same name in the same storage is resumed where it was interrupted.

    Raises:
        UserError: the input is unusable.
        ThresholdExceeded: more than `max_rejected` of the images cannot be read.
    """
    config.check()
    source = read_source(config)
    if is_finished(source):
        print(f"search {config.name!r} is finished, and its images are the same", flush=True)
        return config.out
    record = config.to_yaml().encode()
    chosen = config.search or ("optuna" if importlib.util.find_spec("optuna") else "random")
    _log.info("search: %s", "Optuna's tree-structured Parzen estimator" if chosen == "optuna" else "random")
    config = config.model_copy(update={"search": chosen})
    source = replace(source, config=config)
    with connected(dashboard=True):
        data = prepare(source)
        claim_run(data)
        folder = data.plan.run_uri
        trials = _search(config, data)
        files = {"trials.csv": table_csv(trials)}
        table, plot = (storage.join(folder, name) for name in ("trials.csv", "trials.png"))
        storage.write_bytes(table, files["trials.csv"])
        best = by_score(trials)[0]
        if best.best is None:
            raise Failed(
                f"not one of {config.trials} trials completed an epoch, for the reasons above; the same command tries "
                f"them again, see {table} and {storage.join(folder, 'search')}"
            )
        files["trials.png"] = accuracy_against_cost(trials, best, images=len(data.plan.validation))
        storage.write_bytes(plot, files["trials.png"])
        files[config.record] = record
        print(table_text(trials, varied_settings(config.space)), flush=True)
        print(f"trial {best.trial} is the best; trials: {table}", flush=True)
        out = train(trial_config(config, best.settings, best.trial), files=files)
    record_finished(source)
    return out


# ---- the space


def varied_settings(space: SpaceConfig) -> list[str]:
    """Return the names of the settings that differ between trials."""
    return [name for name, values in space if len(set(values)) > 1]


def domains(space: SpaceConfig) -> Settings:
    """Return the space in Ray Tune's terms: a value or a distribution for each setting."""
    domains: Settings = {}
    for name, values in space:
        if len(set(values)) == 1:
            domains[name] = values[0]
        elif name in BOUNDED:
            domains[name] = (ray.tune.loguniform if name in LOGARITHMIC else ray.tune.uniform)(*values)
        else:
            domains[name] = ray.tune.choice(list(values))
    return domains


def default_point(config: TuneConfig) -> Settings | None:
    """Return the config as it is given, as a point of the space; None if it lies outside."""
    given = dict(config.network) | dict(config.optimiser) | {"width": 1.0, "depth": 0}
    for name, values in config.space:
        if not (values[0] <= given[name] <= values[1] if name in BOUNDED else given[name] in values):
            return None
    return {name: given[name] for name in SpaceConfig.model_fields}


def trial_config(config: TuneConfig, point: Settings, trial: str) -> TrainConfig:
    """Return the config of the training that a trial is."""
    base = config.network
    network = {name: value for name, value in point.items() if name in NetworkConfig.model_fields} | {
        "stem_width": _eights(base.stem_width, point["width"]),
        "widths": tuple(_eights(width, point["width"]) for width in base.widths),
        "depths": tuple(depth + point["depth"] for depth in base.depths),
    }
    optimiser = {name: value for name, value in point.items() if name in OptimiserConfig.model_fields}
    return TrainConfig(
        **{name: getattr(config, name) for name in TrainConfig.model_fields}
        | {
            "name": trial,
            "init_from": config.start or RANDOM,
            "overwrite": True,  # --out is free, or holds the model of an earlier trial of this search
            "storage": storage.join(run_folder(config), _TRIALS),
            "network": base.model_copy(update=network),
            "optimiser": config.optimiser.model_copy(update=optimiser),
        }
    )


def _eights(width: int, factor: float) -> int:
    """Scale a width; group norm and vector units need multiples of eight, but an unchanged width stays as it is."""
    return width if factor == 1.0 else max(8, round(width * factor / 8) * 8)


# ---- the search


def _search(config: TuneConfig, data: TrainingData) -> list[TrialRecord]:
    """Run the remaining trials and return the records of all."""
    concurrent = concurrency(config)
    within = cpus_of_a_trial(config, concurrent) - _DRIVER_CPUS
    trial = ray.tune.with_parameters(_run_trial, config=config, data=data, within=within)
    trainable = ray.tune.with_resources(trial, {"CPU": _DRIVER_CPUS})
    filesystem, path = storage.arrow_filesystem(data.plan.run_uri)
    search: dict[str, Any] = {"trainable": trainable, "param_space": domains(config.space)}
    folder = f"{path}/search"
    if ray.tune.Tuner.can_restore(folder, storage_filesystem=filesystem):
        _log.info("resuming the search %s", config.name)
        tuner = ray.tune.Tuner.restore(folder, resume_errored=True, storage_filesystem=filesystem, **search)
    else:
        tuner = ray.tune.Tuner(
            **search,
            tune_config=ray.tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=config.trials,
                max_concurrent_trials=concurrent,
                search_alg=_algorithm(config),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
                # One epoch more than there are: a trial that has all of them ends by itself, its checkpoint written.
                scheduler=EarlyStopping(
                    storage.join(data.plan.run_uri, _TRIALS),
                    time_attr="epoch",
                    max_t=config.epochs + 1,
                    grace_period=min(config.grace, config.epochs),
                    reduction_factor=config.reduction,
                ),
            ),
            run_config=ray.tune.RunConfig(
                name="search",
                storage_path=path,
                storage_filesystem=filesystem,
                verbose=0,
                callbacks=[Announcer(config, folder)],
            ),
        )
    # The new output prints a table of settings also with verbose=0. Of a trial that fails `Announcer` says why.
    set_environment({"RAY_AIR_NEW_OUTPUT": "0", "TUNE_PRINT_ALL_TRIAL_ERRORS": "0"})
    for name in ("ray.tune.tune", "ray.tune.analysis.experiment_analysis"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with ProgressLine("starting the trials", keep=False, of_workers=False):
        results = tuner.fit()
    # The results have no settings of a trial that failed before its first epoch.
    settings = ray.tune.ExperimentAnalysis(folder, storage_filesystem=filesystem).get_all_configs()
    return [
        _record(config, result, settings[storage.name(result.path)], len(data.plan.classes))
        for result in map(results.__getitem__, range(len(results)))
    ]


def concurrency(config: TuneConfig) -> int:
    """Return how many trials run at a time, so that each of their workers has a CPU, or a GPU, of its own.

    A cluster that this job joined may grow to hold as many as are requested (--concurrent).
    """
    room = max(1, int((gpus() if config.use_gpu else cpus()) // worker_range(config)[1]))
    most = room if started_ray_here() else max(room, config.concurrent or 0)
    return min(config.concurrent or room, most, config.trials)


def cpus_of_a_trial(config: TuneConfig, concurrent: int) -> float:
    """Return a trial's share of the CPUs; no less than its workers need of a cluster that is yet to grow."""
    share = cpus() / concurrent
    return share if started_ray_here() else max(share, _WORKER_CPUS * worker_range(config)[1])


class EarlyStopping(ASHAScheduler):
    """ASHA (Li et al. 2020, arXiv:1810.05934) that stops a trial in `trials_uri` with a checkpoint; Ray's kills it.

    A Ray Train run whose driver is killed keeps its CPUs until an actor of Ray's finds its controller dead. That one
    looks in vain if two Rays run on a machine, or one has no dashboard, and all later trials wait for ever.
    """

    def __init__(self, trials_uri: str, **options: Any) -> None:
        super().__init__(**options)
        self._trials_uri = trials_uri
        self._stopping: set[str] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return CONTINUE to Tune for every trial until it ends by itself, and mark those that ASHA stops."""
        if trial.trial_id not in self._stopping:
            action: str = super().on_trial_result(tune_controller, trial, result)
            if action != TrialScheduler.STOP:
                return action
        self._stopping.add(trial.trial_id)
        try:  # with every result again: a resumed trial deletes the mark
            storage.write_text(storage.join(self._trials_uri, trial.trial_id, STOP), "")
        except StorageError as error:
            _log.warning("trial %s cannot be stopped: %s", trial.trial_id, error)
        return TrialScheduler.CONTINUE


class _Report(TuneReportCallback):
    """Reports whole epochs to Tune. The record of an interrupted one has no score to compare."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        if "step" not in metrics[0]:
            super().after_report(run_context, metrics, checkpoint)


def _algorithm(config: TuneConfig) -> Searcher | SearchAlgorithm:
    point = default_point(config)
    if config.search == "random":
        return BasicVariantGenerator(points_to_evaluate=[point] if point else None, random_state=config.seed)
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna's space has no fixed settings.
    first = [{name: point[name] for name in varied_settings(config.space)}] if point else None
    return OptunaSearch(points_to_evaluate=first, seed=config.seed)


def _run_trial(point: Settings, *, config: TuneConfig, data: TrainingData, within: float) -> None:
    """Run Ray Train, whose epochs Tune hears of; resumed after a failure, it continues from its last checkpoint."""
    trained = trial_config(config, point, ray.tune.get_context().get_trial_id())
    plan = replace(data.plan, config=trained, run_uri=run_folder(trained))
    fit(replace(data, plan=plan), within=within, callbacks=[_Report()])


class Announcer(ray.tune.Callback):
    """Prints a line for each trial that ends or fails, and rewrites the live line with each epoch of any."""

    def __init__(self, config: TuneConfig, folder: str) -> None:
        self._trials, self._epochs, self._folder = config.trials, config.epochs, folder
        self._varied = varied_settings(config.space)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Rewrite the live line."""
        if logs.is_json():
            return
        latest = [result, *(other.last_result or {} for other in trials)]
        best = max(last.get("val_macro_f1", 0.0) for last in latest)
        show_progress(
            f"trial {trial.trial_id}  epoch {result.get('epoch', 0)}/{self._epochs}  "
            f"val macro-F1 {result.get('val_macro_f1', float('nan')):.3f}  "
            f"{sum(other.is_finished() for other in trials)} of {self._trials} trials ended, best now {best:.3f}"
        )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print how the trial ended."""
        last = trial.last_result or {}
        ended = 1 + sum(other.is_finished() for other in trials if other is not trial)
        print(
            f"trial {trial.trial_id} ended after {last.get('epoch', 0)} epochs, "
            f"val macro-F1 {last.get('val_macro_f1', float('nan')):.3f} ({ended} of {len(trials)} started have ended)",
            flush=True,
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Log why the trial failed."""
        cause = _cause(Path(trial.error_file).read_text(encoding="utf-8"))
        settings = ", ".join(f"{name} {short(trial.config[name])}" for name in self._varied)
        _log.error(
            "trial %s (%s) failed after %d epochs: %s; the search goes on without it, see %s/%s/%s",
            *(trial.trial_id, settings, (trial.last_result or {}).get("epoch", 0), cause),
            *(self._folder, trial.trial_id, Path(trial.error_file).name),
        )


def _cause(error: object) -> str:
    """Return the last line of a traceback; processes and threads between the trial and here add theirs above it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].removeprefix(_OWN_ERROR)


def _record(config: TuneConfig, result: Any, point: Settings, classes: int) -> TrialRecord:
    """Return the record of a trial, from the history that its run keeps; a failed one may have none."""
    settings = {name: point[name] for name in SpaceConfig.model_fields}
    trained = trial_config(config, settings, storage.name(result.path))
    history = read_history(run_folder(trained))
    network = build_network(trained.network, classes)
    return TrialRecord(
        trial=trained.name,
        state="failed" if result.error else "finished" if len(history) >= config.epochs else "stopped",
        epochs=len(history),
        best=best_record(history) if history else None,
        gflop=count_flops(network, config.preprocess.size) / 1e9,
        parameters=count_parameters(network),
        seconds=sum(record.seconds for record in history),
        error=_cause(result.error) if result.error else None,
        settings=settings,
    )
