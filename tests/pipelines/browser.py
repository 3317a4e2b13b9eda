"""A headless Chromium that tests ask about a page: what is drawn where, in which colours, and what the console said.

It is spoken to over a pipe (DevTools protocol, one JSON document a message, a zero byte between them), so it needs no driver and no port.
"""

import base64
import contextlib
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
WIRE = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"


def program() -> str | None:
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page at a time. `said`: what the console, the content policy and the page's errors told since it was opened."""

    def __init__(self, read: int, write: int):
        self.read, self.write, self.count, self.rest, self.session = read, write, 0, b"", ""
        self.said: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of one command; events on the way are kept if they complain."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(answer["params"]))
            if answer.get("id") == self.count:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            part = os.read(self.read, 1 << 20)
            assert part, "the browser is gone"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path, dark: bool = False, width: int = 1100, height: int = 900, media: str = "screen") -> None:
        self.said.clear()
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.ask("Page.navigate", url=path.resolve().as_uri())
        while self.run("document.readyState + location.href") != "complete" + path.resolve().as_uri():
            pass

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression on the page."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> Any:
        """The whole page as it is painted: uint8 [height, width, 3]."""
        from PIL import Image

        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True, format="png")["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(found))).convert("RGB"))

    def pdf(self) -> bytes:
        return base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True)["data"])


@contextlib.contextmanager
def browsing(path: str) -> Iterator[Browser]:
    """A browser that ends with the block."""
    to_read, from_write = os.pipe()  # of the browser's commands
    from_read, to_write = os.pipe()  # of its answers
    ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_read, to_write)]  # 3 and 4 stay free for the wiring
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-c", WIRE, *map(str, ends), path, *FLAGS, f"--user-data-dir={home}"]
        process = subprocess.Popen(command, pass_fds=ends, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | {"HOME": home})
        for fd in (*ends, to_read, to_write):
            os.close(fd)
        try:
            browser = Browser(from_read, from_write)
            yield browser
            browser.session = ""
            browser.ask("Browser.close")
            process.wait(20)
        finally:
            process.kill()
            process.wait()
            os.close(from_read)
            os.close(from_write)
