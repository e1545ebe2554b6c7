"""A headless Chromium, driven over the DevTools protocol: open pages, choose files, press keys, read the page."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

from tools.processes import until


def find_chromium() -> str | None:
    """Return the path of Chromium, by the names that Debian and others use; None if it is not installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One browser tab, as a context manager."""

    def __init__(self, binary: str, folder: Path, *, width: int = 1100, height: int = 900) -> None:
        self.log = (folder / "chromium.log").open("wb")
        # --no-sandbox: Chromium's own sandbox does not run as root, and the page is ours.
        self.process = subprocess.Popen(
            [
                binary, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                "--disable-background-networking", "--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}",
                "--force-color-profile=srgb", "--hide-scrollbars", "about:blank",
            ],
            stdout=self.log, stderr=self.log, env=os.environ | {"HOME": str(folder)},
        )  # fmt: skip
        port_file = folder / "profile" / "DevToolsActivePort"
        until(lambda: port_file.is_file() and len(port_file.read_text().splitlines()) > 1)
        port = port_file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            target = next(entry for entry in json.load(answer) if entry["type"] == "page")
        self.opened = ExitStack()
        self.socket = self.opened.enter_context(connect(target["webSocketDebuggerUrl"], max_size=None))
        self.number = 0
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()
        self.process.terminate()
        self.process.wait(20)
        self.log.close()

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return the answer; events that arrive in between are kept."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(30))
            if message.get("id") == self.number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
            self.events.append(message)

    def resize(self, width: int, height: int) -> None:
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )

    def open(self, url: str) -> None:
        self.send("Page.navigate", url=url)
        until(lambda: self.run("document.readyState") == "complete")

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def give_files(self, selector: str, files: list[Path]) -> None:
        """Choose files, or a folder if it takes one, in a file input, as its dialog would."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def press(self, key: str, times: int = 1) -> None:
        code = {"Tab": 9, "Enter": 13, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}[key]
        for _ in range(times):
            for kind in ("keyDown", "keyUp"):
                text = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
                self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def accessible(self) -> list[tuple[str, str]]:
        """Return the (role, name) pairs that a screen reader sees."""
        nodes = self.send("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
        ]

    def screenshot(self, path: Path) -> None:
        size = self.send("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def answers(self) -> list[str]:
        """Return the bodies of all answers that the network gave."""
        self.run("0")
        ended = [
            event["params"]["requestId"] for event in self.events if event.get("method") == "Network.loadingFinished"
        ]
        return [self.send("Network.getResponseBody", requestId=request)["body"] for request in ended]

    def requested(self) -> set[str]:
        """Return every requested URL."""
        self.run("0")
        return {
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        }

    def complaints(self) -> list[str]:
        """Return the page's errors: exceptions, failed loads, violations of the content security policy."""
        self.run("0")
        found = [event for event in self.events if event.get("method") == "Runtime.exceptionThrown"]
        logged = [event["params"]["entry"] for event in self.events if event.get("method") == "Log.entryAdded"]
        return [str(event) for event in found] + [entry["text"] for entry in logged if entry["level"] == "error"]


def classified(browser: Browser) -> str:
    """Return what btray's page says of the chosen scans, once it is done with them."""
    return until(
        lambda: (said := browser.run("document.getElementById('status').textContent")).endswith("ed.") and said
    )
