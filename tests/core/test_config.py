"""A config is filled in the order it says, refuses what it does not know by name, and a wrong use costs one line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest
from pydantic import BaseModel, Field, TypeAdapter
from pydantic_settings import CliPositionalArg

from btray import launch, phantoms, storage
from btray.acquire.config import AcquireConfig
from btray.audit.config import AuditConfig
from btray.bulk.config import ClassifyConfig
from btray.core import config as config_layer
from btray.core.config import ComponentConfig, JobConfig
from btray.core.errors import Failed, ThresholdExceeded, UserError
from btray.evaluation.config import EvaluateConfig
from btray.launch import run_job
from btray.model.config import PredictConfig
from btray.registry.config import ModelsConfig
from btray.storage import StorageError
from btray.training.config import TrainConfig, TuneConfig
from tests.helpers.forked_jobs import ROOT, Ended, run_all
from tests.helpers.tiny_bundle import saved_bundle
from tools.s3_server import S3Server

NEEDED = ["--data", "d", "--out", "o"]


@pytest.fixture(autouse=True)
def no_settings_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BTRAY_")]:
        monkeypatch.delenv(name)


def refusal(arguments: list[str], cls: type[JobConfig] = TrainConfig) -> str:
    with pytest.raises(UserError) as caught:
        launch.read_config(cls, arguments, "job")
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, text: str) -> str:
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(
        tmp_path,
        "data: file\nout: file\nepochs: 1\nseed: 1\nbatch_size: 1\n"
        "preprocess: {size: 64, margin: 0.1}\noptimiser: {learning_rate: 0.5, ema: 0.5}\n",
    )
    monkeypatch.setenv("BTRAY_EPOCHS", "2")
    monkeypatch.setenv("BTRAY_SEED", "2")
    monkeypatch.setenv("BTRAY_OPTIMISER__EMA", "0.25")
    config = TrainConfig.from_command_line(["--config", file, "--epochs", "3", "--preprocess.size=96"])
    assert (config.data, config.out, config.batch_size) == (os.path.abspath("file"), os.path.abspath("file"), 1)
    assert (config.seed, config.epochs) == (2, 3)
    assert (config.preprocess.size, config.preprocess.margin, config.preprocess.crop) == (96, 0.1, True)
    assert (config.optimiser.learning_rate, config.optimiser.ema, config.optimiser.warmup) == (0.5, 0.25, 0.1)
    assert config.patience == TrainConfig.model_fields["patience"].default


@pytest.mark.parametrize("value", ["leak, conflict", '["leak", "conflict"]'])
def test_several_values_stand_in_a_variable_as_in_a_flag(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("BTRAY_FAIL_ON", value)
    config = AuditConfig.from_command_line(["--data", "d", "--out", "o"])
    assert config == AuditConfig.from_command_line(["--data", "d", "--out", "o", "--fail-on", "leak, conflict"])
    assert config.fail_on == ("leak", "conflict")


@pytest.mark.parametrize("by", ["flag", "variable"])
@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("[0-9]*.jpg", ("[0-9]*.jpg",)),
        ("*.jpg, [a-c]*", ("*.jpg", "[a-c]*")),
        ("[x]", ("[x]",)),
        ("{a}", ("{a}",)),
        ("true,null,none,1,1.0,nan", ("true", "null", "none", "1", "1.0", "nan")),
        ('"a,b",c', ("a,b", "c")),
        ('say "x"', ('say "x"',)),
        (" x ", (" x ",)),
        ('["a,b", "c"]', ("a,b", "c")),
    ],
)
def test_a_value_of_several_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch, given: str, values: tuple[str, ...], by: str
) -> None:
    if by == "variable":
        monkeypatch.setenv("BTRAY_INCLUDE", given)
    flags = [] if by == "variable" else ["--include", given]
    config = ClassifyConfig.from_command_line(["--model", "m", "--input", "i", "--output", "o", *flags])
    assert config.include == values


def test_a_config_made_in_python_does_not_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRAY_EPOCHS", "2")
    monkeypatch.setenv("EPOCHS", "2")
    assert TrainConfig(data="d", out="o").epochs == TrainConfig.model_fields["epochs"].default
    assert TrainConfig.from_command_line(NEEDED).epochs == 2


def test_the_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = TrainConfig.from_command_line(
        [*NEEDED, "--network.widths", "8,16", "--network.depths", "1,1", "--no-augment.enabled", "--num-workers", "1:4",
         "--optimiser.learning-rate", "1e-05", "--batch-size", "none"]
    )  # fmt: skip
    assert (config.network.widths, config.augment.enabled, config.worker_range) == ((8, 16), False, (1, 4))
    assert config.batch_size is None
    assert TrainConfig.from_command_line(["--config", written(tmp_path, config.to_yaml())]) == config


def test_none_is_a_name_like_any_wherever_a_user_could_mean_it() -> None:
    arguments = ["--data", "none", "--out", "none", "--network.norm", "none", "--optimiser.class-balance", "none"]
    config = TrainConfig.from_command_line(
        [*arguments, "--storage", "none", "--init-from", "none", "--mlflow", "none", "--classes", "none,yes"]
    )
    here = os.path.abspath("none")
    assert config.data == config.out == config.storage == config.init_from == config.mlflow == here
    assert (config.network.norm, config.optimiser.class_balance, config.classes) == ("none", "none", ("none", "yes"))
    assert TrainConfig.from_command_line([*NEEDED, "--outliers", "none"]).outliers == "no_tumor"
    assert "--num-workers: 'none' is refused" in refusal([*NEEDED, "--num-workers", "none"])
    assert PredictConfig.from_command_line(["--model", "none", "x.jpg"]).model == here


@pytest.mark.parametrize("config", launch.COMMANDS.values(), ids=launch.COMMANDS)
def test_none_unsets_numbers_and_choices_alone(config: tuple[type[JobConfig], str]) -> None:
    cls = config[0]
    words = {"action": "list", "files": "x.png"}  # positional ones
    needed = [name for name, field in cls.model_fields.items() if field.is_required()]
    flags = [name for name in needed if name not in words]
    given = [word for name in flags for word in (f"--{name}", "dicomweb://host/root" if name == "to" else "x")]
    given += [words[name] for name in needed if name in words]
    given += ["--uris", "x"] * ("uris" in cls.model_fields)
    for name, field in cls.model_fields.items():
        kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in get_args(field.annotation)]
        if type(None) not in kinds or name == "uris":
            continue
        given += ["--pending", "x"] * (name == "report_to")
        try:
            value = getattr(cls.from_command_line([*given, f"--{name.replace('_', '-')}", "none"], "job"), name)
        except UserError as error:
            assert re.search(f"none|give one of|--{name.replace('_', '-')}", str(error)), f"{name}: {error}"  # noqa: PT017
        else:
            assert (value is None) == (str not in kinds), name


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*NEEDED, "--epoch-count", "3"], "--epoch-count"),
        ([*NEEDED, "--preprocess.sise", "64"], "--preprocess.sise"),
        ([*NEEDED, "stray"], "stray"),
        ([*NEEDED, "--epochs"], "--epochs"),
        ([*NEEDED, "--epochs", "0"], "--epochs"),
        ([*NEEDED, "--epochs", "many"], "--epochs"),
        ([*NEEDED, "--preprocess.size", "31"], "--preprocess.size"),
        ([*NEEDED, "--network.depths", "1,1"], "network.depths"),
        ([*NEEDED, "--network.norm", "layer"], "--network.norm"),
        ([*NEEDED, "--num-workers", "4:1"], "--num-workers"),
        ([*NEEDED, "--num-workers", "two"], "--num-workers"),
        ([*NEEDED, "--name", "../up"], "--name"),
        ([*NEEDED, "--validation", "0.9"], "--validation"),
        ([*NEEDED, "--optimiser.learning-rate", "nan"], "--optimiser.learning-rate"),
        (["--out", "o"], "--data"),
        (["--data", "d"], "--out"),
        ([*NEEDED, "--config"], "--config"),
        ([*NEEDED, "--config", "/nowhere/x.yaml"], "/nowhere/x.yaml"),
    ],
)
def test_a_wrong_flag_is_named_in_one_line(arguments: list[str], named: str) -> None:
    assert named in refusal(arguments)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch: 3", "epoch"),
        ("preprocess: {sise: 3}", "preprocess.sise"),
        ("epochs: 0", "epochs"),
        ("preprocess: 7", "preprocess"),
        ("optimiser: {ema: 1}", "optimiser.ema"),
        ("- epochs", "list"),
        ("epochs: [", "YAML"),
        ("!!python/object/apply:os.mkdir [trace]", "YAML"),
        ("\x00", "YAML"),
        ("no: 3", "False"),
        ("classes: [yes, no]", "between quotes"),
        ("outliers: no", "between quotes"),
        ("1: 3", "1"),
        ("network: {on: 3}", "True"),
        ("network: {1: 3}", "config.yaml: the key 1 is not the name"),
    ],
)
def test_a_wrong_key_in_the_file_is_named_in_one_line(tmp_path: Path, text: str, named: str) -> None:
    assert named in refusal([*NEEDED, "--config", written(tmp_path, text)])
    assert not Path("trace").exists()


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x80")
    assert "x.yaml" in refusal([*NEEDED, "--config", str(tmp_path / "x.yaml")])
    assert str(tmp_path) in refusal([*NEEDED, f"--config={tmp_path}"])


@pytest.mark.parametrize(
    ("name", "value", "named"),
    [
        ("BTRAY_EPOCH", "3", "BTRAY_EPOCH"),
        ("BTRAY_EPOCHS", "0", "epochs"),
        ("BTRAY_PREPROCESS__SISE", "64", "preprocess.sise"),
        ("BTRAY_PREPROCESS__SIZE", "huge", "preprocess.size"),
        ("BTRAY_PREPROCESS", "not json", "preprocess"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, named: str
) -> None:
    monkeypatch.setenv(name, value)
    assert named in refusal(NEEDED)


def test_a_variable_of_another_job_is_none_of_this_ones_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BTRAY_EPOCHS", "3")
    monkeypatch.setenv("BTRAY_NETWORK__DROPOUT", "0.1")
    monkeypatch.setenv("BTRAY_MAX_REJECTED", "0.5")
    assert launch.read_config(EvaluateConfig, ["--model", "m", "--data", "d", "--out", "o"]).max_rejected == 0.5
    assert launch.read_config(TrainConfig, NEEDED).epochs == 3
    monkeypatch.setenv("BTRAY_EPOCH", "3")
    assert "BTRAY_EPOCH " in refusal(["--model", "m", "--data", "d", "--out", "o"], EvaluateConfig)


class Part(ComponentConfig):
    """A part."""

    size: int = Field(3, ge=1)
    """Size."""


class Files(JobConfig):
    """Takes files."""

    files: CliPositionalArg[tuple[str, ...]]
    """Files."""
    part: Part = Part()
    """A part."""


@pytest.mark.parametrize(
    "name",
    ["a,b.png", "[1].png", '"quoted"', "none", "1.50", " spaced ", "{x}", "back\\slash\\", "true", "ü\udcff", "a=b"],
)
def test_file_names_are_taken_as_they_are(name: str) -> None:
    assert Files.from_command_line([name, "--part.size", "4", "other"]).files == (name, "other")


def test_files_that_look_like_flags_stand_behind_two_dashes() -> None:
    config = Files.from_command_line(["--part.size", "4", "--", "-x.png", "--part.size"])
    assert (config.files, config.part.size) == (("-x.png", "--part.size"), 4)
    assert "FILES" in refusal(["--part.size", "4"], Files)


def test_predict_takes_json_as_a_flag() -> None:
    config = PredictConfig.from_command_line(["--model", "m", "a", "--json", "b", "--model-id", "x"])
    assert (config.files, config.json_lines, config.model_id) == (("a", "b"), True, "x")


def test_configs_do_not_change() -> None:
    config = TrainConfig(data="d", out="o")
    with pytest.raises(ValueError, match="frozen"):
        config.epochs = 3


def test_the_password_of_mlflow_is_used_and_never_written_down() -> None:
    config = TrainConfig(data="d", out="o", mlflow="https://me:p%40ss@w@host:5000/x@y")
    assert config.mlflow == "https://me:p%40ss@w@host:5000/x@y"
    assert config.model_copy(update={"epochs": 2}).mlflow == config.mlflow
    for written_down in (config.to_yaml(), str(config.model_dump(mode="json")), TuneConfig(**dict(config)).to_yaml()):
        assert "https://host:5000/x@y" in written_down
        assert "p%40ss" not in written_down
    assert "file:/runs/a@b" in TrainConfig(data="d", out="o", mlflow="file:/runs/a@b").to_yaml()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Failed("a line"), 1),
        (UserError("a line"), 2),
        (ThresholdExceeded("a line"), 3),
        (None, 0),
        (RuntimeError("bug"), 1),
    ],
)
def test_each_ending_has_its_exit_code(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception | None,
    code: int,
) -> None:
    def job(config: TrainConfig) -> str:
        if error:
            raise error
        return f"made of {config.data}"

    monkeypatch.setattr(sys, "argv", ["job", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    if error is None:
        run_job(TrainConfig, job)
        assert capsys.readouterr().out == f"made of {tmp_path}\n"
    elif isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError):
            run_job(TrainConfig, job)
    else:
        with pytest.raises(SystemExit) as caught:
            run_job(TrainConfig, job)
        assert caught.value.code == code
        assert capsys.readouterr() == ("", "error: a line\n")


@pytest.mark.parametrize(("code", "exit_code"), [("forbidden", 2), ("not_found", 2), ("unavailable", 1)])
def test_a_storage_error_that_no_one_caught_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str, exit_code: int
) -> None:
    def job(config: TrainConfig) -> str:
        raise StorageError(code, "s3://bucket/x")

    monkeypatch.setattr(sys, "argv", ["job", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as caught:
        run_job(TrainConfig, job)
    assert caught.value.code == exit_code
    said = capsys.readouterr().err
    assert said.startswith("error: s3://bucket/x: ")
    assert said.count("\n") == 1


def test_only_the_config_layer_reads_arguments_and_environment() -> None:
    # a program of its own, which HAProxy's binary becomes
    allowed = {*(Path(module.__file__ or "") for module in (config_layer, launch)), ROOT / "btray/serving/haproxy.py"}
    for path in (ROOT / "btray").rglob("*.py"):
        found = re.findall(r"sys\.argv|os\.environ|os\.getenv", path.read_text())
        assert not found or path in allowed, f"{path}: {found}"


@pytest.mark.parametrize("script", ["train", "evaluate", "acquire"])
def test_help_and_typos_cost_no_heavy_import(script: str) -> None:
    code = (
        "import runpy, sys\n"
        "def end(arguments):\n"
        f"    sys.argv = ['{script}.py', *arguments]\n"
        "    try:\n"
        f"        runpy.run_path('jobs/{script}.py', run_name='__main__')\n"
        "    except SystemExit as ended:\n"
        "        return ended.code\n"
        "codes = [end(['--help']), end(['--ot', 'x'])]\n"
        "print(codes, sorted({'torch', 'ray', 'numpy', 'matplotlib', 'sklearn', 'pyarrow', 's3fs'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 2] []"
    assert f"usage: {script}.py" in done.stdout
    assert done.stderr.startswith("error: ")
    assert "--ot" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def assert_one_line(ended: Ended, *named: str) -> None:
    assert ended.code == 2, ended
    assert ended.stdout == "", ended
    assert len(ended.stderr.splitlines()) == 1, ended
    assert ended.stderr.startswith("error: "), ended
    for text in named:
        assert text in ended.stderr, ended


def test_unusable_input_of_a_job_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    phantoms.write_data_set(data, per_class={"Training": 1}, seed=0)
    (tmp_path / "empty").mkdir()
    single = tmp_path / "single" / "glioma"
    storage.write_bytes(str(single / "scan.jpg"), phantoms.encoded_phantom("glioma", 0))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.doc").write_text("mine")
    saved_bundle(tmp_path / "model", classes=("glioma", "no_tumor"))
    saved_bundle(tmp_path / "five")
    out = str(tmp_path / "out")
    cases = {
        "absent data": ("train", ["--data", str(tmp_path / "absent"), "--out", out], ["absent"]),
        "empty folder": ("train", ["--data", str(tmp_path / "empty"), "--out", out], ["empty"]),
        "one class": ("train", ["--data", str(tmp_path / "single"), "--out", out], ["glioma", "two classes"]),
        "one class folder": ("train", ["--data", str(single), "--out", out], ["glioma"]),
        "foreign out": ("train", ["--data", data, "--out", str(foreign)], ["--out", "thesis.doc"]),
        "out is a file": ("train", ["--data", data, "--out", str(foreign / "thesis.doc")], ["--out", "thesis.doc"]),
        "out below a file": (
            "evaluate",
            ["--model", str(tmp_path / "five"), "--data", data, "--out", str(foreign / "thesis.doc" / "x")],
            ["--out", "thesis.doc is not a folder"],
        ),
        "audit below a file": (
            "audit",
            ["--data", data, "--out", str(foreign / "thesis.doc" / "x")],
            ["--out", "thesis.doc is not a folder"],
        ),
        "storage is a file": (
            "train",
            ["--data", data, "--out", out, "--storage", str(foreign / "thesis.doc")],
            ["--storage", "thesis.doc is not a folder"],
        ),
        "other scheme": ("train", ["--data", "gs://bucket/x", "--out", out], ["gs://"]),
        "no bundle": ("evaluate", ["--model", str(tmp_path / "absent"), "--data", data, "--out", out], ["bundle.json"]),
        "wrong pin": (
            "evaluate",
            ["--model", str(tmp_path / "model"), "--model-id", "0" * 32, "--data", data, "--out", out],
            ["--model-id"],
        ),
        "unknown label": (
            "evaluate",
            ["--model", str(tmp_path / "model"), "--data", data, "--out", out],
            ["meningioma", "glioma, no_tumor"],
        ),
        "init-from": ("train", ["--data", data, "--out", out, "--init-from", str(foreign / "thesis.doc")], ["thesis"]),
    }
    endings = run_all([(f"jobs/{script}.py", arguments) for script, arguments, _ in cases.values()])
    for name, ended in zip(cases, endings, strict=True):
        assert_one_line(ended, *cases[name][2])
    assert [path.name for path in foreign.iterdir()] == ["thesis.doc"]
    assert not Path(out).exists()


@pytest.mark.s3
def test_a_store_that_refuses_is_one_line_and_exit_code_2(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    absent, wrong = "s3://no-such-bucket-of-btray", {"AWS_SECRET_ACCESS_KEY": "wrong"}
    phantoms.write_data_set(f"{bucket}/data", per_class={"Training": 1}, seed=0)
    out = str(tmp_path / "out")
    cases = [
        ("jobs/train.py", ["--data", f"{absent}/data", "--out", out]),
        ("jobs/train.py", ["--data", f"{bucket}/nothing", "--out", out]),
        ("jobs/train.py", ["--data", f"{bucket}/data", "--out", out]),
        ("jobs/train.py", ["--data", f"{bucket}/data", "--out", f"{absent}/out"]),
        ("jobs/evaluate.py", ["--model", f"{bucket}/model", "--data", f"{bucket}/data", "--out", out]),
        ("jobs/train.py", ["--data", f"{bucket}/data", "--out", out, "--storage", f"{absent}/runs"]),
    ]
    endings = run_all(cases, case2=wrong, case4=wrong)
    assert_one_line(endings[0], "no-such-bucket-of-btray")
    assert_one_line(endings[1], f"{bucket}/nothing")
    assert_one_line(endings[2], bucket, "AWS_")
    assert_one_line(endings[3], "no-such-bucket-of-btray")
    assert_one_line(endings[4], bucket, "AWS_")
    assert_one_line(endings[5], "--storage", "no-such-bucket-of-btray")


def test_every_setting_says_what_it_is() -> None:
    for cls in (TrainConfig, EvaluateConfig, PredictConfig):
        for name, field in cls.model_fields.items():
            assert field.description, f"{cls.__name__}.{name}"


ALL_CONFIGS = [config for config, _ in launch.COMMANDS.values()]


def uri_fields(config: type[BaseModel]) -> Iterator[tuple[type[BaseModel], str]]:
    """The settings whose help says that they are a place, local or in object storage; those of components too."""
    for name, field in config.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from uri_fields(part)
        text = field.description or ""
        if re.search(r"s3://|[Mm]odel bundle|OUT/_run|Local folder|[Tt]racking URI|\.prom|weights file", text):
            yield config, name


@pytest.mark.parametrize("given", ["x", "./x", "../x", "~/x", "a b/ü%20#?", "s3://bucket/x/", "s3://bucket"])
def test_every_uri_of_every_config_is_resolved_when_it_is_read(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = {(config, name) for job in ALL_CONFIGS for config, name in uri_fields(job)}
    assert len(found) >= 20
    # Scans that predict prints a line about are named as they are given, and it starts no other process.
    for config, name in found - {(PredictConfig, "files")}:
        if name in ("cache", "mlflow") and given.startswith("s3://"):
            continue
        field = config.model_fields[name]
        validate = TypeAdapter(Annotated[field.annotation, "", *field.metadata]).validate_python
        many = get_origin(field.annotation) is tuple
        value = validate([given])[0] if many else validate(given)
        assert value == storage.resolve(given), f"{config.__name__}.{name}"
        assert (validate([value])[0] if many else validate(value)) == value, "resolving again changes nothing"


def test_what_is_no_path_is_left_alone_where_it_may_be_given_and_refused_elsewhere() -> None:
    sources = ("kaggle:owner/name", "HTTPS://host/a.zip", "http://host/a.zip")
    assert AcquireConfig(source=sources, out="o").source == sources
    assert ClassifyConfig(model="m", input="i", output="o", metrics_to="http://host:9091").metrics_to[:4] == "http"
    for uri in ("http://host:5000", "databricks", "databricks://profile", "postgresql://host/db"):
        assert TrainConfig(data="d", out="o", mlflow=uri).mlflow == uri
    database = TrainConfig(data="d", out="o", mlflow="sqlite:///runs.db").mlflow
    assert database == f"sqlite:///{os.path.abspath('runs.db')}"
    for uri in ("", "gs://bucket/x", "file:///tmp/x", "s3://"):
        assert "--data: " in refusal(["--data", uri, "--out", "o"])
    assert "--cache: " in refusal(["--source", "x", "--out", "o", "--cache", "s3://bucket/x"], AcquireConfig)


@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_a_flag_is_never_taken_for_a_longer_one(config: type[JobConfig]) -> None:
    short = [f"--{name.replace('_', '-')}"[:-1] for name in config.model_fields]
    files = {PredictConfig: ["x"], ModelsConfig: ["list"]}.get(config, [])
    said = refusal([*files, *(argument for flag in short for argument in (f"{flag}=1", flag))], config)
    assert said.startswith("unrecognized arguments: ")
    assert all(f"{flag}=1 {flag}" in said for flag in short), said


def test_a_flag_that_is_unknown_names_the_one_it_may_have_been() -> None:
    assert "--epoch 3; did you mean --epochs?" in refusal([*NEEDED, "--epoch", "3"])
    assert "did you mean --batch-size?" in refusal([*NEEDED, "--batch_size=4"])
    assert "did you mean --network.dropout?" in refusal([*NEEDED, "--network.droput", "0.1"])
    assert "did you mean" not in refusal([*NEEDED, "--zzzzzz"])


@pytest.mark.parametrize("config", ALL_CONFIGS)
def test_help_says_nothing_in_terms_of_the_library(config: type[JobConfig], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launch.read_config(config, ["--help"], "job")
    said = " ".join(capsys.readouterr().out.split())
    for term in ("undefined", "ifdef", "factory", "Pydantic", "(default: none)"):
        assert term not in said
