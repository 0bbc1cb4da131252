"""Opens a page in headless Chromium, in a frame of a given width, and says what a reader would see of it."""

import contextlib
import functools
import html
import http.server
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without the background flags Chromium looks up its maker's hosts at every start.
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --log-level=0"
).split()
# The frame has the width of a phone, which Chromium's own window cannot have; both are of one origin, so that the
# outer page may look into the inner one, whose own policy lets no script run.
HARNESS = """<!doctype html><body style="margin:0">
<iframe id="page" src="PAGE" width="WIDTH" height="HEIGHT" style="border:0"></iframe><script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => setTimeout(() => {
  const inner = frame.contentWindow, root = frame.contentDocument.documentElement;
  const out = (e) => e.getBoundingClientRect().right > WIDTH + 1 && !e.closest(".scroll");
  const found = {
    overflow: root.scrollWidth - WIDTH,
    widest: [...root.querySelectorAll("body *")].filter(out).slice(0, 5).map((e) => e.outerHTML.slice(0, 80)),
    images: root.querySelectorAll("img").length,
    broken: [...root.querySelectorAll("img")].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.alt),
    scripts: root.querySelectorAll("script").length,
    planted: typeof inner.planted,
    fetched: inner.performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
    text: root.innerText,
  };
  const shown = document.createElement("pre");
  shown.id = "found"; shown.hidden = true; shown.textContent = JSON.stringify(found);
  document.body.append(shown);
}, 500));
</script>"""


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server of this folder on the loopback interface."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def chromium(*arguments: str) -> tuple[str, list[str]]:
    """Its output and the lines that pages wrote to the console."""
    with tempfile.TemporaryDirectory() as profile:
        done = subprocess.run(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


def look(page: Path, width: int, height: int = 900, screenshot: Path | None = None, dark: bool = False) -> dict:
    """What is found on the page at this width (keys as in HARNESS), and its `console` lines; a PNG where asked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(page, folder / "page.html")
        harness = HARNESS.replace("PAGE", "page.html").replace("WIDTH", str(width)).replace("HEIGHT", str(height))
        (folder / "index.html").write_text(harness, encoding="utf-8")
        with served(folder) as address:
            common = ["--virtual-time-budget=8000", f"--window-size={max(width, 500)},{height}"]
            if dark:
                common.append("--blink-settings=preferredColorScheme=0")
            output, console = chromium(*common, "--dump-dom", f"{address}/index.html")
            if screenshot:
                chromium(*common, f"--screenshot={screenshot}", f"{address}/index.html")
    found = re.search(r'<pre id="found"[^>]*>(.*?)</pre>', output, re.S)
    assert found, f"the harness reported nothing:\n{output[-2000:]}"
    return {**json.loads(html.unescape(found[1])), "console": console}
