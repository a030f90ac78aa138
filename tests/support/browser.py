"""Open a page in headless Chromium, drive it with a script, and hear everything that went wrong.

No driver package: the script is appended to a copy of the page, and its answer is read from the
document that Chromium prints.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,900",
    "--enable-logging=stderr",
    # Whatever a page might ask for would go to a port that nobody listens on.
    "--proxy-server=127.0.0.1:9",
    "--virtual-time-budget=20000",
)
SECONDS = 120  # for a machine that is busy with other tests

# Goes before the page's own scripts.
_EARS = """
window.problems = [];
const problem = (kind, what) => window.problems.push(kind + ": " + what);
addEventListener("error", (event) => problem("error", event.message), true);
addEventListener("unhandledrejection", (event) => problem("rejection", event.reason));
addEventListener("securitypolicyviolation", (event) => problem("policy", event.blockedURI));
for (const name of ["error", "warn"]) console[name] = (...args) => problem(name, args.join(" "));
for (const name of ["alert", "confirm", "prompt"]) window[name] = (text) => problem(name, text);
"""

# Goes after them; the page's scripts have run by then.
_DRIVER = """
(async () => {
  const $ = (selector) => document.querySelector(selector);
  const $$ = (selector) => [...document.querySelectorAll(selector)];
  const click = (element) => element.dispatchEvent(new MouseEvent("click", { bubbles: true }));
  const type = (selector, text) => {
    $(selector).value = text;
    $(selector).dispatchEvent(new Event("input", { bubbles: true }));
  };
  const key = (element, name, more = {}) => element.dispatchEvent(
    new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true, ...more }));
  const settled = () => new Promise((resolve) => setTimeout(resolve, 100));
  const answer = {};
  try {
    %s
  } catch (error) {
    problem("script", error.stack);
  }
  await settled();
  answer.problems = window.problems;
  answer.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  answer.ready_ms = Number(document.documentElement.dataset.readyMs);
  const pre = document.createElement("pre");
  pre.id = "answer-of-the-test";
  pre.textContent = JSON.stringify(answer);
  document.body.append(pre);
})();
"""


class _Answer(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.inside = False
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = ("id", "answer-of-the-test") in attrs

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.text += data


def chromium() -> str:
    """Where Chromium is; the test is skipped where it is missing, except under CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        reason = "chromium is not installed; on Debian: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def drive(html: str, script: str, folder: Path) -> dict[str, Any]:
    """Open a page and run a script in it.

    Args:
        html: the page.
        script: the body of an async function, with ``$`` and ``$$`` (select), ``click``, ``type``,
            ``key`` and ``settled``; it writes what it saw into ``answer``.
        folder: an empty one.

    Returns:
        ``answer``, with ``problems`` (errors, console output, dialogs and violations of the
        page's policy), ``loaded`` (addresses) and ``ready_ms`` besides.
    """
    browser = chromium()
    assert html.count("<style>") == 1
    assert html.count("</body>\n</html>") == 1
    page = html.replace("<style>", f"<script>{_EARS}</script><style>")
    driver = _DRIVER % script.replace("</", "<\\/")
    page = page.replace("</body>\n</html>", f"<script>{driver}</script></body></html>")
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=SECONDS,
    )
    parser = _Answer()
    parser.feed(done.stdout)
    assert parser.text, f"the page gave no answer: {done.stderr[-2000:]}"
    answer: dict[str, Any] = json.loads(parser.text)
    said = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    answer["problems"] = [*answer["problems"], *said]
    return answer
