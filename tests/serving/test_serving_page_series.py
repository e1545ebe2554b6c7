"""The page shows the slices of a series as one: in the order of their place, with key frames, without identifiers."""

from __future__ import annotations

import base64
import gzip
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from btray.explain import slice_png
from btray.model.classifier import Classifier
from btray.model.studies import FrameAnswers, Reader, judge_series, judge_study
from btray.phantoms import phantom
from tests.helpers.browser import Browser, classified
from tests.helpers.dicom_files import IDENTIFIERS, SERIES, STUDY, slice_file
from tests.helpers.nifti_files import write_nifti
from tests.helpers.serving_helpers import Running, running
from tools.processes import until

LABELS = ("glioma", "no_tumor", "meningioma", "pituitary")
BURNED_IN = 5
"""Number, from the foot, of the slice with text in it."""
SLICES = 12
SHOWN = "[...document.querySelectorAll('.study .card')][{}]"


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model) as served:
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a study of two series, a volume and what lies beside them; names and numbers of files say nothing."""
    order = np.random.default_rng(3).permutation(SLICES)
    for number in range(SLICES):
        write(tmp_path / "scan" / "A" / f"IM{order[number]:03}", axial(number))
    for number in range(3):
        sagittal = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "ImagePositionPatient": [5.0 * number, 0, 0]}
        series = {"SeriesInstanceUID": f"{SERIES}.2", "SOPInstanceUID": f"{SERIES}.2.{number}", **sagittal}
        write(tmp_path / "scan" / "B" / f"IM{number:03}", slice_file(phantom("glioma", number, size=64), **series))
    write(tmp_path / "scan" / "B" / "IM900", axial(20)[:-1500])
    write(tmp_path / "scan" / "notes.txt", b"no scan")
    volume = np.stack([phantom(LABELS[n % 4], 50 + n, size=64).T for n in range(5)], axis=-1)
    write(tmp_path / "scan" / "volume.nii.gz", gzip.compress(write_nifti(volume)))
    return tmp_path / "scan"


def write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def axial(number: int) -> bytes:
    return slice_file(
        phantom(LABELS[number % 4], number, size=64), ImagePositionPatient=[0, 0, 4.0 * number - 20],
        SOPInstanceUID=f"{SERIES}.1.{number}", InstanceNumber=SLICES - number,
        BurnedInAnnotation="YES" if number == BURNED_IN else "NO",
    )  # fmt: skip


def seen(browser: Browser, viewer: int) -> list[dict[str, Any]]:
    """Return what a viewer shows of each slice, from one end of its slider to the other."""
    return browser.run(
        "(() => { const card = " + SHOWN.format(viewer) + "; const slider = card.querySelector('.slices');"
        "return Array.from({length: Number(slider.max) + 1}, (_, at) => { slider.value = at;"
        "slider.dispatchEvent(new Event('input')); return {place: card.querySelector('.place').textContent,"
        "text: card.querySelector('.answer').innerText,"
        "pictures: [...card.querySelectorAll('.stack img')].filter(image => !image.hidden).map(image => image.src),"
        "unseen: card.querySelector('.unseen').innerText}; }); })()"
    )


def middle(browser: Browser, selector: str) -> list[float]:
    """Return where the middle of an element is, once it is in view."""
    return browser.run(
        f"(() => {{ const one = document.querySelector('{selector}'); one.scrollIntoView({{block: 'center'}});"
        "const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
    )


def test_a_folder_is_shown_by_series_in_order_of_place_with_its_key_frames_and_no_identifier(
    service: Running, browser: Browser, classifier: Classifier, folder: Path, *,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        browser.open(service.url)
        browser.give_files("#folder", [folder])
        assert classified(browser) == "16 of 18 scans classified."
    reader = Reader.of(classifier.manifest)
    slices = classifier.predict([axial(number) for number in range(SLICES)])
    first = seen(browser, 0)
    assert [float(each["place"].split(" mm")[0]) for each in first] == [4.0 * number - 20 for number in range(SLICES)]
    for each, prediction in zip(first, slices, strict=True):
        assert f"{prediction.label} {100 * prediction.confidence:.1f} %" in each["text"]
    # the key frames are those of the one rule, and the study's answer is
    answers = [FrameAnswers.of(slices, classifier.classes)]
    key_frames = judge_series(answers[0], reader).key_frames
    ranks = {int(each["place"].rpartition(" ")[2]): at for at, each in enumerate(first) if "key frame" in each["place"]}
    assert tuple(ranks[rank] for rank in sorted(ranks)) == key_frames
    assert browser.run(SHOWN.format(0) + ".querySelectorAll('.ticks i').length") == len(key_frames)
    others = [file.read_bytes() for file in sorted((folder / "B").glob("IM00?"))]
    answers.append(FrameAnswers.of(classifier.predict(others), classifier.classes))
    verdict = judge_study(answers, reader)
    shown = browser.run("document.querySelector('.study .verdict').innerText")
    assert f"{verdict.label} {100 * verdict.confidence:.1f} %" in shown
    assert f"{100 * verdict.agreement:.1f} % of the slices" in shown
    assert str(reader) in shown
    assert "15 in 2 series" in shown
    # pictures: each slice's own, with heat, and none of text that is burned in
    for number, each in enumerate(first):
        if number == BURNED_IN:
            assert each["pictures"] == []
            assert "text is burned into" in each["unseen"]
        else:
            (frames,) = classifier.frames([axial(number)])
            plain, heat = each["pictures"]
            assert plain == "data:image/png;base64," + base64.b64encode(slice_png(frames[0])).decode()
            assert heat not in (plain, "")
    # a volume scrolls, and what is bad is named with its code
    assert [each["place"].split(" mm")[0] for each in seen(browser, 2)] == [f"{n:.1f}" for n in range(5)]
    assert all(len(each["pictures"]) == 2 for each in seen(browser, 2))
    text = browser.run("document.getElementById('results').innerText")
    assert "2 files not classified" in text
    assert "scan/notes.txt: not_an_image" in text
    assert "scan/B/IM900: truncated" in text
    assert "1 file" in shown, "a rejected slice is missing in its study"
    # nothing that names the patient
    page = browser.run("document.documentElement.outerHTML")
    network = "".join(browser.answers())
    logs = caplog.text + "".join(capfd.readouterr())
    for identifier in IDENTIFIERS:
        assert identifier not in page + network + logs
    assert STUDY not in page + logs
    assert browser.complaints() == []
    assert all(url.startswith((service.url, "data:", "about:")) for url in browser.requested())


def test_slices_are_scrolled_by_keys_wheel_and_finger(service: Running, browser: Browser, folder: Path) -> None:
    browser.open(service.url)
    x, y = middle(browser, "#drop")
    dragged = {"items": [], "files": [str(folder / "A")], "dragOperationsMask": 1}
    for moment in ("dragEnter", "dragOver", "drop"):
        browser.send("Input.dispatchDragEvent", type=moment, x=x, y=y, data=dragged)
    assert classified(browser) == "12 of 12 scans classified."
    at = SHOWN.format(0) + ".querySelector('.slices').value"
    browser.run("document.getElementById('folder').focus()")
    browser.press("Tab")
    assert browser.run("document.activeElement.className") == "slices", "the first thing behind the fields"
    for key, expected in (("Home", "0"), ("ArrowRight", "1"), ("End", "11"), ("ArrowLeft", "10")):
        browser.press(key)
        assert browser.run(at) == expected
    told = browser.run("document.activeElement.getAttribute('aria-valuetext')")
    assert told.startswith("Slice 11 of 12, 20.0 mm, ")
    x, y = middle(browser, ".stack")
    scrolled = browser.run("scrollY")
    browser.send("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-100)
    until(lambda: browser.run(at) == "9")
    assert browser.run("scrollY") == scrolled, "the page scrolls too"
    browser.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    for moved in (30, 60, 90):
        browser.send("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": x - moved, "y": y}])
    browser.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    until(lambda: int(browser.run(at)) < 9)
    told_all = browser.accessible()
    assert ("group", "Key frames of Series 1: MR axial T1 post contrast") in told_all
    browser.run("document.querySelector('.keys button').click()")
    assert "key frame 1" in browser.run("document.querySelector('.place').textContent")
    browser.run("document.querySelector('.toggle').click()")
    assert browser.run("getComputedStyle(document.querySelector('.heat')).visibility") == "hidden"
    assert ("button", "Heat map") in told_all
    browser.resize(375, 800)
    assert browser.run("document.documentElement.scrollWidth") <= 375
