"""The page does its work in a real browser: by mouse and keyboard, for a screen reader, on a phone, from here alone."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from btray.model.manifest import Thresholds
from btray.model.ood import Distribution
from btray.serving.access import make_key, revoke_key
from tests.helpers.browser import Browser, classified
from tests.helpers.serving_helpers import Running, bundle_at, running, scan
from tools.processes import until

FEATURES = 32
"""Channels that `tiny_bundle.NETWORK` sums up: what its out-of-distribution score is made of."""


@pytest.fixture(scope="module")
def service(model: str) -> Iterator[Running]:
    with running(model=model) as served:
        yield served


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    good, bad, pages = tmp_path / "<b>good & bad.jpg", tmp_path / "notes.jpg", tmp_path / "pages.tif"
    good.write_bytes(scan())
    bad.write_text("not an image")
    stack = [Image.fromarray(np.full((64, 64), 90 * page, np.uint8)) for page in (1, 2)]
    file = io.BytesIO()
    stack[0].save(file, "TIFF", save_all=True, append_images=stack[1:])
    pages.write_bytes(file.getvalue())
    return [good, bad, pages]


def cards(browser: Browser) -> list[str]:
    return browser.run("[...document.querySelectorAll('#results article')].map(card => card.innerText)")


def wait_for_model(browser: Browser) -> None:
    until(lambda: browser.run("document.querySelectorAll('.figure').length >= 2"))


def test_scans_become_labels_bars_and_heat_maps(service: Running, browser: Browser, files: list[Path]) -> None:
    browser.open(service.url)
    wait_for_model(browser)
    browser.give_files("#files", files)
    assert classified(browser) == "2 of 3 scans classified."
    good, bad, first_page, second_page = cards(browser)
    (answer,) = service.post("/v1/classify", scan(), "image/jpeg").json()["results"]
    assert "<b>good & bad.jpg" in good, "a file's name is read as HTML"
    assert f"{answer['label']} {100 * answer['confidence']:.1f} %" in good
    for label in answer["probabilities"]:
        assert label in good
    assert "Not classified" in bad
    assert "not_an_image" in bad
    assert "page 1" in first_page
    assert "page 2" in second_page
    widths = browser.run(
        "[...document.querySelector('.bars').querySelectorAll('.track i')].map(bar => bar.style.width)"
    )
    assert widths == [f"{100 * share:.1f}%" for share in answer["probabilities"].values()]
    shown = browser.run("[...document.querySelectorAll('.stack img')].map(image => image.naturalWidth)")
    assert shown == [48] * 6
    own = [text for text in browser.complaints() if "400" not in text]  # the bad file's answer
    assert own == []
    assert all(url.startswith((service.url, "data:", "about:")) for url in browser.requested()), browser.requested()


def test_the_slider_fades_the_heat_map(service: Running, browser: Browser, files: list[Path]) -> None:
    browser.open(service.url)
    browser.give_files("#files", files[:1])
    classified(browser)
    opacity = "document.querySelector('.heat').style.opacity"
    assert browser.run(opacity) == "0.6"
    browser.run("document.querySelector('.slider input').focus()")
    browser.press("ArrowRight", 3)
    assert browser.run(opacity) == "0.63"
    browser.press("Home")
    assert (browser.run(opacity), browser.run("document.querySelector('output').textContent")) == ("0", "0 %")


def test_keyboard_and_screen_reader_find_everything(service: Running, browser: Browser, files: list[Path]) -> None:
    browser.open(service.url)
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "files"
    browser.give_files("#files", files[:2])
    classified(browser)
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "folder"
    browser.press("Tab")
    assert browser.run("document.activeElement.type") == "range"
    told = browser.accessible()
    assert ("status", "") in told
    assert ("slider", "Heat map over " + files[0].name) in told
    assert ("article", "notes.jpg") in told
    assert ("list", "Calibrated probabilities of " + files[0].name) in told
    assert any(role == "image" and name.startswith("Heat map for") for role, name in told)
    assert any(role == "image" and name.startswith("Slice of") for role, name in told)
    headings = [name for role, name in told if role == "heading"]
    assert headings[0].startswith("btray")
    assert {"The model", "notes.jpg"} <= set(headings)
    assert any("not a diagnosis" in name for _, name in told)
    assert browser.run("document.documentElement.lang") == "en"


def test_it_fits_a_phone(service: Running, browser: Browser, files: list[Path]) -> None:
    browser.resize(375, 800)
    browser.open(service.url)
    wait_for_model(browser)
    browser.give_files("#files", files)
    classified(browser)
    assert browser.run("document.documentElement.scrollWidth") <= 375
    assert browser.run("document.querySelector('.stack').getBoundingClientRect().width") > 250


def test_dropped_files_are_classified(service: Running, browser: Browser) -> None:
    browser.open(service.url)
    data = list(scan())
    browser.run(
        "(() => { const moved = new DataTransfer();"
        f"moved.items.add(new File([new Uint8Array({data})], 'dropped.jpg', {{type: 'image/jpeg'}}));"
        "document.getElementById('drop').dispatchEvent(new DragEvent('drop', {dataTransfer: moved, bubbles: true,"
        "cancelable: true})); })()"
    )
    assert classified(browser) == "1 of 1 scan classified."
    assert "dropped.jpg" in cards(browser)[0]


def test_doubts_and_honest_figures_are_shown(browser: Browser, files: list[Path], tmp_path: Path) -> None:
    nothing_is_like_it = Distribution(
        np.full(FEATURES, 1e3, np.float32), np.ones(FEATURES, np.float32),
        np.eye(FEATURES, 1, dtype=np.float32), np.ones(2, np.float32),
    )  # fmt: skip
    unlike = bundle_at(tmp_path, "unlike", ood=nothing_is_like_it, thresholds=Thresholds(ood_score=3.0))
    unsure = bundle_at(tmp_path, "unsure", temperature=100.0)
    with running(model=unsure, abstain_below=0.99) as service:
        browser.open(service.url)
        wait_for_model(browser)
        shown = browser.run("document.getElementById('model').innerText")
        assert "50.0 %" in shown
        assert "as published" in shown
        assert "not measured" in shown
        assert "abstains below 99.0 %" in shown
        browser.give_files("#files", files[:1])
        classified(browser)
        assert "The model abstains" in cards(browser)[0]
        assert "Perhaps" in cards(browser)[0]
        service.configure(model=unlike, abstain_below=1.0)
        assert service.switched()["state"] == "done", service.switched()
        browser.give_files("#files", files[:1])
        until(lambda: "Unlike the training images" in cards(browser)[0])
        assert "The model abstains" in cards(browser)[0], "one doubt hides the other"


def test_a_file_of_more_pages_than_one_request_explains_is_explained_in_parts(
    browser: Browser, files: list[Path], tmp_path: Path
) -> None:
    with running(model=bundle_at(tmp_path, "model"), limits={"max_images": 1}) as service:
        browser.open(service.url)
        wait_for_model(browser)
        browser.give_files("#files", [files[0], files[2]])  # together they are refused
        assert classified(browser) == "2 of 2 scans classified."
        titles = [files[0].name, "pages.tif, page 1", "pages.tif, page 2"]
        assert [card.splitlines()[0] for card in cards(browser)] == titles
        assert browser.run("[...document.querySelectorAll('.stack img')].map(image => image.naturalWidth)") == [48] * 6
        # another model takes over between two requests: all is classified anew, by one model
        browser.open(service.url)
        wait_for_model(browser)
        browser.run(
            "(() => { const real = fetch; let asked = 0; window.fetch = (path, options) =>"
            "real(++asked === 2 ? path.replace(/model_id=\\w+/, 'model_id=gone') : path, options); })()"
        )
        browser.give_files("#files", files[2:])
        assert classified(browser) == "1 of 1 scan classified."
        assert [card.splitlines()[0] for card in cards(browser)] == titles[1:]
        assert len([url for url in browser.requested() if "model_id=gone" in url]) == 1


def test_a_service_with_keys_asks_for_one(browser: Browser, files: list[Path], tmp_path: Path) -> None:
    key = make_key(str(tmp_path / "keys.txt"), "reader")
    with running(model=bundle_at(tmp_path, "model"), keys=str(tmp_path / "keys.txt")) as service:
        browser.open(service.url)
        until(lambda: browser.run("!document.getElementById('key-form').hidden"))
        status = "document.getElementById('status').textContent"
        assert browser.run("document.activeElement.id") == "key"
        assert browser.run(status) == "This service asks for an API key."
        for given, said in (("wrong", "The service does not know this key."), (key, "The key is accepted.")):
            browser.run("document.getElementById('key').value = ''")
            browser.send("Input.insertText", text=given)
            browser.send(
                "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )
            until(lambda said=said: browser.run(status) == said)
            assert browser.run("document.getElementById('key').ariaInvalid") == ("true" if given == "wrong" else None)
        wait_for_model(browser)
        browser.give_files("#files", files[:1])
        assert classified(browser) == "1 of 1 scan classified."
        revoke_key(str(tmp_path / "keys.txt"), "reader")
        until(lambda: service.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 401)
        browser.give_files("#files", files[:1])
        until(lambda: browser.run(status) == "0 of 1 scan classified. The service needs another key.")
        assert browser.run("document.activeElement.id") == "key"


def test_the_ood_bundle_of_these_tests_fits_its_network(tmp_path: Path) -> None:
    from btray.model.classifier import Classifier

    model = Classifier.load(bundle_at(tmp_path, "model"))
    frames = torch.zeros(1, 48, 48, dtype=torch.uint8).numpy()
    assert model.answer(frames).features.shape == (1, FEATURES)
