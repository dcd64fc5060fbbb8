"""A page in headless Chromium: what its scripts see, what it logs and asks for, and a picture of it.

The browser is driven through its DevTools protocol over a pipe: JSON messages that end in a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time


def find_chromium():
    """Path of a Chromium or Chrome, or None."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for path in map(shutil.which, names) if path), None)


class Chromium:
    """Opens pages, one after the other; a context manager. `timeout` in seconds is for each answer."""

    def __init__(self, profile, timeout=60):
        self.timeout = timeout
        self.logged, self.requested = [], []  # of the page that is open: errors and warnings; addresses
        self._count, self._text, self._loaded = 0, b"", False
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
        command = [find_chromium(), *flags, f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
        # The browser reads at descriptor 3 and writes at 4.
        command = ["bash", "-c", f'exec 3<&{to_browser} 4>&{from_browser}; exec "$0" "$@"', *command]
        self._process = subprocess.Popen(
            command, pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_browser), os.close(from_browser)

    def __enter__(self):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable", page=True)
        return self

    def __exit__(self, *exc_info):
        os.close(self._out)  # the browser ends with the pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def open(self, path, width=1280, dark=False):
        """Load a file and wait until it is complete, pictures included."""
        self.logged.clear(), self.requested.clear()
        self._loaded = False
        self.call("Emulation.setDeviceMetricsOverride", page=True, width=width, height=900, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", page=True, features=[scheme])
        self.call("Page.navigate", page=True, url=path.as_uri())
        while not self._loaded:
            self._receive()
        decoded = "Promise.all([...document.images].map(image => image.decode().catch(() => 0))).then(() => 0)"
        self.evaluate(decoded)

    def evaluate(self, script):
        """The value of a JavaScript expression, or of what it promises."""
        answer = self.call("Runtime.evaluate", page=True, expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path):
        """The whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", page=True, captureBeyondViewport=True, format="png")
        path.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method, page=False, **parameters):
        self._count += 1
        number = self._count
        message = {"id": number, "method": method, "params": parameters}
        if page:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _receive(self):
        deadline = time.monotonic() + self.timeout
        while b"\0" not in self._text:
            ready, _, _ = select.select([self._in], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"Chromium did not answer within {self.timeout} s."
            part = os.read(self._in, 1 << 20)
            assert part, "Chromium ended."
            self._text += part
        line, _, self._text = self._text.partition(b"\0")
        message = json.loads(line)
        parameters = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self._loaded = True
            case "Log.entryAdded":
                self.logged.append(parameters["entry"]["text"])
            case "Runtime.exceptionThrown" | "Runtime.consoleAPICalled":
                self.logged.append(json.dumps(parameters))
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"][:60])
        return message
