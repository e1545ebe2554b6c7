"""`btray predict` says for every scan what the model says or why it says nothing, on any laptop, with no Ray."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import os
import platform
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from btray import cli, storage
from btray.core.config import SUBMITTED_VARIABLE
from btray.launch import COMMANDS
from btray.model.classifier import Classifier
from btray.phantoms import encoded_phantom
from btray.serving.job import free_port
from tests.helpers import scan_corpus
from tests.helpers.dicom_files import IDENTIFIERS, STUDY, slice_file
from tests.helpers.forger import rewrite
from tests.helpers.forked_jobs import ROOT
from tests.helpers.tiny_bundle import random_bundle, saved_bundle

KEYS = [
    "uri",
    "frame",
    "status",
    "error_code",
    "error",
    "retryable",
    "label",
    "confidence",
    "probabilities",
    "abstained",
    "label_set",
    "out_of_distribution",
    "ood_score",
    "study_uid",
    "series_uid",
    "instance_uid",
    "modality",
    "plane",
    "position_mm",
    "spacing_mm",
    "image_kind",
    "sequence",
    "contrast",
    "burned_in",
    "engine",
    "model_id",
]


class Ended(NamedTuple):
    """How the command ended."""

    code: int
    out: list[str]
    err: str


@pytest.fixture(autouse=True)
def no_settings_of_mine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BTRAY_")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bundle") / "model"
    saved_bundle(folder)
    return str(folder)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.jpg"
    path.write_bytes(encoded_phantom("glioma", 1))
    return path


@pytest.fixture
def btray(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["btray", *map(str, arguments)])
        code: Any = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return Ended(code, captured.out.splitlines(), captured.err)

    return run


def records(ended: Ended) -> list[dict[str, Any]]:
    def strict(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=strict) for line in ended.out]


def test_the_table_has_a_row_a_scan_with_all_probabilities(btray: Callable[..., Ended], model: str, scan: Path) -> None:
    ended = btray("predict", "--model", model, scan)
    (expected,) = Classifier.load(model).predict([scan])
    assert ended.code == 0
    header, row = ended.out
    assert header.split() == ["file", "label", "confidence", *expected.probabilities]
    values = [f"{value:.3f}" for value in expected.probabilities.values()]
    assert row.split() == [str(scan), expected.label, f"{expected.confidence:.3f}", *values]
    assert len(header) == len(row), "columns do not stand below their titles"
    assert "not a diagnosis" in ended.err


def test_json_is_strict_and_says_what_the_classifier_says(btray: Callable[..., Ended], model: str, scan: Path) -> None:
    ended = btray("predict", "--json", "--model", model, scan, scan)
    (expected,) = Classifier.load(model).predict([scan])
    assert ended.code == 0
    assert "not a diagnosis" in ended.err
    first, second = records(ended)
    assert first == second
    assert list(first) == KEYS
    assert first["uri"] == str(scan)
    assert first["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    assert (first["label"], first["status"], first["model_id"]) == (
        expected.label,
        "ok",
        random_bundle().manifest.model_id,
    )


def test_rejected_scans_are_rows_with_their_code_between_the_others(
    btray: Callable[..., Ended], model: str, scan: Path, tmp_path: Path
) -> None:
    bad = {name: tmp_path / name for name in ("png_flipped_bit", "html_error_page", "no_bytes", "one_pixel_png")}
    for name, path in bad.items():
        path.write_bytes(scan_corpus.bad_scans()[name][0])
    files = [tmp_path / "absent.png", scan, *bad.values(), scan]
    found = records(btray("predict", "--model", model, "--json", *files))
    assert [record["uri"] for record in found] == list(map(str, files))
    codes = [scan_corpus.bad_scans()[name][1] for name in bad]
    assert [record["error_code"] for record in found] == ["not_found", None, *codes, None]
    ended = btray("predict", "--model", model, *files)
    assert ended.code == 0
    assert len(ended.out) == 1 + len(files)
    for line, code in zip(ended.out[3:-1], codes, strict=True):
        assert f" rejected {code}: " in " ".join(line.split())


def test_columns_stay_where_they_are_and_a_rejection_has_its_code_and_name_once(
    btray: Callable[..., Ended], model: str, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_AT_A_TIME", 1)
    folder = tmp_path / "scans"
    for name, data in (("a.jpg", scan.read_bytes()), ("b.jpg", b"hi"), ("c with a longer name.jpg", scan.read_bytes())):
        storage.write_bytes(str(folder / name), data)
    storage.write_bytes(str(folder / "pages.tiff"), scan_corpus.good_scans()["tiff_pages"])
    lines = btray("predict", "--model", model, folder, tmp_path / "absent.jpg").out
    place = lines[0].index("label")
    assert all(line[place - 2 : place] == "  " and line[place] != " " for line in lines)
    whole = [line for line in lines if " rejected " not in line]
    assert len({len(line) for line in whole}) == 1, "columns stand below their titles"
    rejected = [line for line in lines if " rejected " in line]
    assert [line[len(lines[0]) :].split(":")[0].strip() for line in rejected] == ["not_an_image", "not_found"]
    for line, name in zip(rejected, (folder / "b.jpg", tmp_path / "absent.jpg"), strict=True):
        assert line.count(str(name)) == line.count("not_an_image") + line.count("not_found") == 1


def test_where_nothing_could_be_classified_the_exit_code_is_2(
    btray: Callable[..., Ended], model: str, tmp_path: Path
) -> None:
    ended = btray("predict", "--model", model, "--json", tmp_path / "absent.png")
    assert ended.code == 2
    assert [record["error_code"] for record in records(ended)] == ["not_found"]
    assert "not one of 1 scans" in ended.err
    (tmp_path / "empty").mkdir()
    ended = btray("predict", "--model", model, tmp_path / "empty")
    assert (ended.code, ended.out) == (2, [])
    assert f"{tmp_path / 'empty'} holds no file" in ended.err


def test_folders_give_every_file_below_them_in_order(
    btray: Callable[..., Ended], model: str, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_AT_A_TIME", 3)
    names = ["a/1.jpg", "a/b/2.jpg", "a/no ending", "c/3.jpg", "c/4.jpg"]
    for name in names:
        storage.write_bytes(str(tmp_path / "in" / name), scan.read_bytes())
    (tmp_path / "in" / ".hidden").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    ended = btray(
        "predict", "--model", model, "--json", tmp_path / "in", tmp_path / "empty", scan, tmp_path / "in" / "c"
    )
    below = [str(tmp_path / "in" / name) for name in names]
    assert [record["uri"] for record in records(ended)] == [*below, str(scan), *below[3:]]
    assert ended.code == 0
    assert len(btray("predict", "--model", model, tmp_path / "in").out) == 1 + len(names), "one header"


def test_a_folder_of_a_study_ends_with_a_line_for_each_series_and_for_the_study(
    btray: Callable[..., Ended], model: str, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_AT_A_TIME", 2)
    folder = tmp_path / "study"
    generator = np.random.default_rng(7)
    for series, number in itertools.product((1, 2), range(3)):
        pixels = generator.integers(0, 900, (64, 64)).astype(np.uint16)
        data = slice_file(pixels, SeriesInstanceUID=f"{STUDY}.{series}", SOPInstanceUID=f"{STUDY}.{series}.{number}")
        storage.write_bytes(str(folder / f"{number}-{series}.dcm"), data if number or series == 2 else data[:-99])
    ended = btray("predict", "--model", model, "--json", folder, scan)
    lines = records(ended)
    frames = [record for record in lines if "level" not in record]
    assert len(frames) == 7
    decided = {(record["level"], record["series_uid"]): record for record in lines[7:]}
    assert list(decided) == [("series", f"{STUDY}.1"), ("series", f"{STUDY}.2"), ("study", None)]
    assert [(r["frames"], r["rejected"], r["study_uid"]) for r in decided.values()] == [
        (2, 1, STUDY), (3, 0, STUDY), (5, 1, STUDY),
    ]  # fmt: skip
    study = decided["study", None]
    for label, share in study["probabilities"].items():
        of_series = [decided["series", f"{STUDY}.{n}"]["probabilities"][label] for n in (1, 2)]
        assert share == pytest.approx(sum(of_series) / 2, abs=1e-6)
    assert study["rule"] == "mean of the top 3 (default: the bundle has no rule)"
    key_frames = [(key["uri"], key["frame"]) for key in study["key_frames"]]
    tumor = {
        (r["uri"], r["frame"]): 1 - r["probabilities"]["no_tumor"] for r in frames if r["series_uid"] and r["label"]
    }
    assert key_frames == sorted(tumor, key=lambda key: -tumor[key])
    last = btray("predict", "--model", model, folder).out[-3:]
    assert [line.partition(":")[0] for line in last] == [f"series {STUDY}.1", f"series {STUDY}.2", f"study {STUDY}"]
    assert "5 frames, 1 rejected" in last[2]
    assert not [name for name in IDENTIFIERS if name in ended.err + "".join(ended.out)]


def test_every_frame_of_a_scan_is_a_row(btray: Callable[..., Ended], model: str, tmp_path: Path) -> None:
    path = tmp_path / "pages.tiff"
    path.write_bytes(scan_corpus.good_scans()["tiff_pages"])
    found = records(btray("predict", "--model", model, "--json", path))
    assert [record["frame"] for record in found] == [0, 1, 2]
    assert [line.split()[:3] for line in btray("predict", "--model", model, path).out[2:]] == [
        [str(path), "frame", "1"],
        [str(path), "frame", "2"],
    ]


@pytest.mark.parametrize(
    "name", ["a,b.jpg", "[1].jpg", "none", "with space.jpg", "ü%20#?.jpg", "line\nbreak.jpg", "-x.jpg"]
)
def test_odd_file_names_are_taken_literally(
    btray: Callable[..., Ended], model: str, scan: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan.rename(scan.with_name(name))
    monkeypatch.chdir(scan.parent)
    (found,) = records(btray("predict", "--model", model, "--json", "--", name))
    assert (found["uri"], found["status"]) == (name, "ok")
    assert len(btray("predict", "--model", model, "--", name).out) == 2


def test_a_name_that_is_no_utf8_is_classified_and_printed_with_escapes(model: str, scan: Path) -> None:
    odd = os.path.join(os.fsencode(scan.parent), b"\xff\xfe.jpg")
    os.rename(scan, odd)
    command = [sys.executable, "-c", "from btray.cli import main; main()", "predict", "--model", model]
    done = subprocess.run([*command, odd], capture_output=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert b"\\udcff\\udcfe.jpg" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "command"),
        (["foretell"], "foretell"),
        (["--modle", "x"], "command"),
        (["predict"], "FILES"),
        (["predict", "--model"], "--model"),
        (["predict", "--model", "m"], "FILES"),
        (["predict", "--model", "/nowhere/at/all", "x.png"], "bundle.json"),
        (["predict", "--modle", "m", "x.png"], "--modle"),
        (["predict", "--model", "gs://bucket/model", "x.png"], "gs://"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(btray: Callable[..., Ended], arguments: list[str], said: str) -> None:
    ended = btray(*arguments)
    assert (ended.code, ended.out) == (2, [])
    assert len(ended.err.splitlines()) == 1, ended.err
    assert ended.err.startswith("error: ")
    assert said in ended.err


def test_the_pin_and_schemes_are_checked(btray: Callable[..., Ended], model: str, scan: Path) -> None:
    right = random_bundle().manifest.model_id
    assert btray("predict", "--model", model, "--model-id", right, scan).code == 0
    wrong = btray("predict", "--model", model, "--model-id", "0" * 32, scan)
    assert (wrong.code, wrong.out) == (2, [])
    assert "--model-id" in wrong.err
    assert btray("predict", "--model", model, "http://example.org/scan.png").code == 2


def test_settings_come_from_the_environment_too(
    btray: Callable[..., Ended], model: str, scan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BTRAY_MODEL", model)
    assert btray("predict", scan).code == 0
    monkeypatch.setenv("BTRAY_MODDEL", model)
    assert "BTRAY_MODDEL" in btray("predict", scan).err


def test_help_and_version(btray: Callable[..., Ended]) -> None:
    ended = btray("--help")
    assert ended.code == 0
    for name, (config, _) in COMMANDS.items():
        (line,) = [line for line in ended.out if line.split()[:1] == [name]]
        assert (config.__doc__ or "").startswith(line.split(maxsplit=1)[1])
    ended = btray("predict", "--help")
    assert ended.code == 0
    for flag in ("usage: btray predict", "--model", "--model-id", "--json", "FILES", "Exit code"):
        assert flag in "\n".join(ended.out)
    installed = [f"{name} {importlib.metadata.version(name)}" for name in ("btray", "ray", "torch")]
    assert btray("--version") == Ended(0, [*installed, f"python {platform.python_version()}"], "")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("predict", "key", "models")])
def test_every_job_is_a_command_with_the_same_flags_and_the_same_code(name: str) -> None:
    script = runpy.run_path(str(ROOT / "jobs" / f"{name}.py"))
    config, command = COMMANDS[name]
    assert config in script.values()
    source = (ROOT / "jobs" / f"{name}.py").read_text()
    (function,) = re.findall(r"    return (\w+)\(config", source)
    (module,) = re.findall(rf"    from (btray\S+) import {function}\b", source)
    if name == "serve":
        assert (module, function, command) == ("btray.serving.job", "run_service", "btray.cli:serve")
    else:
        assert command == f"{module}:{function}"


# Every setting of a command that it writes to.
OUTPUTS = {
    "acquire": ("out", "cache"), "audit": ("out",), "train": ("out", "storage", "mlflow"),
    "tune": ("out", "storage", "mlflow"), "evaluate": ("out",), "publish": ("out",), "export": ("out",), "predict": (),
    "classify": ("output", "metrics-to"), "pack": ("output", "metrics-to"), "erase": ("output",),
    "report": (),
    "serve": (), "key": ("file",), "models": ("mlflow",),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_submitted_job_writes_nowhere_where_nobody_looks_and_says_why_data_are_missing(
    name: str, btray: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = COMMANDS[name]
    required = [
        field for field, of in config.model_fields.items() if of.is_required() or (field == "model" and of.default)
    ]
    given = {field.replace("_", "-"): "x" if field == "name" else str(tmp_path / "x") for field in required}
    given.pop("files", None)
    words = []
    if name == "models":
        words = ["list"]
        del given["action"]
    given |= {"where": "true"} if name == "erase" else {"to": "dicomweb://x/y"} if name == "report" else {}
    for flag in OUTPUTS[name]:
        flags = [f"--{key}={value}" for key, value in {**given, flag: "runs/x"}.items()]
        monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
        ended = btray(name, *words, *flags)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert f"--{flag}: 'runs/x' is refused: a submitted job runs in a folder of Ray's" in ended.err
        monkeypatch.delenv(SUBMITTED_VARIABLE)
        config.from_command_line([*words, *flags])
    monkeypatch.setenv(SUBMITTED_VARIABLE, "{}")
    for flag in {"data", "input", "model", "source"} & given.keys():
        flags = [f"--{key}={value}" for key, value in {**given, flag: "scans"}.items()]
        assert ".rayignore" in btray(name, *flags, *["x.png"] * (name == "predict")).err


def test_a_job_that_is_run_as_a_command_ends_and_prints_as_its_script_does(
    btray: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("btray.evaluation.job.evaluate", lambda config: f"report of {config.model}")
    saved_bundle(tmp_path / "m")
    needed = ["--model", tmp_path / "m", "--data", tmp_path, "--out", tmp_path / "o"]
    assert btray("evaluate", *needed) == Ended(0, [f"report of {tmp_path / 'm'}"], "")
    (tmp_path / "x.yaml").write_text("batch_size: 0")
    for wrong in (["--modle", "x"], ["--config", tmp_path / "x.yaml"]):
        ended = btray("evaluate", *needed, *wrong)
        assert (ended.code, ended.out, ended.err.count("\n")) == (2, [], 1)
    assert "usage: btray evaluate " in "\n".join(btray("evaluate", "--help").out)


def test_serve_reads_its_own_command_line_again_on_a_reload(
    btray: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.yaml"
    monkeypatch.chdir(tmp_path)
    saved_bundle(tmp_path / "first")
    file.write_text("model: first")

    def run_service(config: Any, reload: Callable[[], Any]) -> str:
        file.write_text("model: second")
        names = [Path(config.model).name, Path(reload().model).name]
        return f"{names} {config.port == reload().port}"

    monkeypatch.setattr("btray.serving.job.run_service", run_service)
    assert btray("serve", "--config", file, "--port", free_port()).out == ["['first', 'second'] True"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["serve", "--help"]])
def test_help_and_version_cost_no_heavy_import(arguments: list[str]) -> None:
    code = (
        "import sys, btray.cli\n"
        f"sys.argv = ['btray', *{arguments!r}]\n"
        "try:\n"
        "    btray.cli.main()\n"
        "except SystemExit as ended:\n"
        "    heavy = {'torch', 'ray', 'numpy', 'matplotlib', 'sklearn', 'pyarrow', 's3fs', 'rich'} & set(sys.modules)\n"
        "    print(ended.code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_what_cannot_be_is_refused_before_torch_and_ray_are_imported(tmp_path: Path) -> None:
    saved_bundle(tmp_path / "model")
    for path in ("data/glioma/x.png", "foreign/notes.txt", "file"):
        storage.write_bytes(str(tmp_path / path), b"x")
    data, out, model = ["--data", "data"], ["--out", "out"], ["--model", "model"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = [
            (["train", "--data", "absent", *out], f"--data {tmp_path}/absent: nothing is there"),
            (["train", *data, *out, "--init-from", "absent"], f"--init-from {tmp_path}/absent: nothing is there"),
            (["train", *data, "--out", "file"], "--out"),
            (["train", *data, "--out", "file/below"], "--out"),
            (["train", *data, "--out", "foreign"], "notes.txt"),
            (["train", *data, "--out", "model"], "--overwrite"),
            (["train", *data, *out, "--storage", "file"], "--storage"),
            (["tune", "--data", "absent", *out], "absent: nothing is there"),
            (["tune", *data, "--out", "model"], "--overwrite"),
            (["evaluate", "--model", "absent", *data, *out], "absent is not a model bundle"),
            (["evaluate", "--model", "data", *data, *out], "data is not a model bundle"),
            (["evaluate", *model, "--data", "absent", *out], "--data"),
            (["evaluate", *model, *data, "--out", "file"], "--out"),
            (["audit", "--data", "absent", *out], "--data"),
            (["audit", *data, "--out", "file"], "--out"),
            (["acquire", "--source", "data,absent", *out], f"--source {tmp_path}/absent: nothing is there"),
            (["acquire", "--source", "data", "--out", "file"], "--out"),
            (["classify", "--model", "absent", "--input", "data", "--output", "out"], "not a model bundle"),
            (["classify", *model, "--input", "absent", "--output", "out"], "--input"),
            (["classify", *model, "--input", "data", "--output", "file"], "--output"),
            (["pack", "--input", "absent", "--output", "out"], "--input"),
            (["pack", "--input", "data", "--output", "file"], "--output"),
            (["erase", "--output", "absent", "--where", "true"], "--output"),
            (["erase", "--output", "data", "--uris", "absent"], "--uris"),
            (["report", *model, "--studies", "absent", "--to", "dicomweb://x/y"], "--studies"),
            (["report", "--model", "absent", "--studies", "data", "--to", "dicomweb://x/y"], "not a model bundle"),
            (["report", *model, "--studies", "data", "--to", "https://x/y"], "dicomweb://HOST"),
            (["serve", "--model", "absent"], "not a model bundle"),
            (["serve", *model, "--canary.model", "absent"], "absent is not a model bundle"),
            (["serve", *model, "--keys", "absent"], "--keys"),
            (["serve", *model, "--port", port], f"127.0.0.1:{port}"),
            (["predict", "--model", "absent", "data/glioma/x.png"], "not a model bundle"),
            (["publish", "--model", "absent", *out, "--license", "file"], "not a model bundle"),
            (["publish", *model, *out, "--license", "absent"], "--license"),
            (["publish", *model, "--out", "model", "--license", "file"], "is the trained bundle"),
            (["export", "--model", "absent", *out], "not a model bundle"),
            (["export", *model, "--out", "file"], "--out"),
        ]
        code = (
            "import sys, btray.cli\n"
            f"for arguments in {[arguments for arguments, _ in cases]!r}:\n"
            "    sys.argv = ['btray', *arguments]\n"
            "    try:\n"
            "        btray.cli.main()\n"
            "    except SystemExit as ended:\n"
            "        heavy = {'torch', 'ray', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
            "        print(ended.code, sorted(heavy), flush=True)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    assert done.stdout.splitlines() == ["2 []"] * len(cases)
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases), "one line each"
    for (arguments, said), line in zip(cases, lines, strict=True):
        assert line.startswith("error: "), line
        assert said in line, arguments


def test_a_bundle_of_another_format_is_refused_alike_wherever_a_model_is_given(tmp_path: Path) -> None:
    saved_bundle(tmp_path / "old")
    rewrite(tmp_path / "old", lambda content: content.update(format_version=1))
    for path in ("data/glioma/x.png", "data/no_tumor/x.png"):
        storage.write_bytes(str(tmp_path / path), b"x")
    data, out, model = ["--data", "data"], ["--out", "out"], ["--model", "old"]
    cases = [
        ["predict", *model, "data/glioma/x.png"],
        ["classify", *model, "--input", "data", "--output", "out"],
        ["evaluate", *model, *data, *out],
        ["serve", *model],
        ["train", *data, *out, "--init-from", "old"],
        ["train", *data, "--out", "old", "--overwrite"],
    ]
    code = (
        "import sys, btray.cli\n"
        f"for arguments in {cases!r}:\n"
        "    sys.argv = ['btray', *arguments]\n"
        "    try:\n"
        "        btray.cli.main()\n"
        "    except SystemExit as ended:\n"
        "        print(ended.code, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    line = (
        f"error: {tmp_path}/old has format_version 1; this btray makes other frames and reads 2: train the model "
        "again, into another folder"
    )
    assert done.stdout.splitlines() == ["2"] * len(cases)
    assert done.stderr.splitlines() == [line] * len(cases)


def test_a_bundle_that_was_tampered_with_is_refused(btray: Callable[..., Ended], scan: Path, tmp_path: Path) -> None:
    saved_bundle(tmp_path / "bad")
    (tmp_path / "bad" / "metrics.json").write_bytes(b"{}")
    ended = btray("predict", "--model", tmp_path / "bad", scan)
    assert (ended.code, ended.out) == (2, [])
    assert "metrics.json" in ended.err


@pytest.mark.s3
def test_model_scans_and_folders_may_lie_in_object_storage(
    btray: Callable[..., Ended], bucket: str, scan: Path
) -> None:
    saved_bundle(f"{bucket}/model")
    for name in ("1.jpg", "deep/2.jpg"):
        storage.write_bytes(f"{bucket}/in/{name}", scan.read_bytes())
    uris = [f"{bucket}/in/1.jpg", f"{bucket}/in", f"{bucket}/absent.jpg", "s3://no-such-bucket-of-btray/x.jpg", scan]
    ended = btray("predict", "--model", f"{bucket}/model", "--json", *uris)
    assert ended.code == 0, ended.err
    found = records(ended)
    assert [(Path(record["uri"]).name, record["error_code"]) for record in found] == [
        ("1.jpg", None), ("1.jpg", None), ("2.jpg", None), ("absent.jpg", "not_found"), ("x.jpg", "not_found"),
        ("scan.jpg", None),
    ]  # fmt: skip
    assert len({record["confidence"] for record in found if record["status"] == "ok"}) == 1


def test_ray_is_neither_imported_nor_started_and_a_closed_pipe_is_no_traceback(model: str, scan: Path) -> None:
    code = (
        "import sys, btray.cli\n"
        f"sys.argv = ['btray', 'predict', '--model', {model!r}, {str(scan)!r}]\n"
        "btray.cli.main()\n"
        "print(sorted({'ray', 'matplotlib', 'sklearn', 'pandas', 'jinja2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    read, write = os.pipe()
    os.close(read)
    script = [str(Path(sys.executable).parent / "btray"), "predict", "--model", model, "--json", str(scan)]
    done = subprocess.run(script, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_model_that_diverged_never_prints_nan(btray: Callable[..., Ended], tmp_path: Path) -> None:
    """Weights that are finite but logits that are not."""
    saved_bundle(tmp_path / "model", temperature=1e-44)
    path = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)).save(path)
    ended = btray("predict", "--model", tmp_path / "model", "--json", path)
    assert "NaN" not in "".join(ended.out)
    assert len(ended.err.splitlines()) <= 2
    assert ended.code == 2
    assert "diverged" in ended.err
