"""The page in a browser: nothing is loaded from elsewhere, and the slices can be leafed through."""

import html
import json
import re
import shutil
import subprocess

import pytest

from invented_runs import LABELS, write_plan
from kdnet.data.description import load_description
from kdnet.results.page import write_report

ROWS = ("baseline", "kdnet", "teacher")
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

# Runs beside the page's own script, once its pictures are decoded, and writes what it saw.
PROBE = """
(async () => {
  const get = (name) => document.getElementById(name);
  const drawn = () => [...document.querySelectorAll("canvas")].map((c) => c.toDataURL());
  const until = async (ready) => {
    // The browser's virtual clock runs ahead of the threads that decode pictures: turn by turn,
    // real time has to pass as well.
    for (let turn = 0; turn < 1000 && !ready(); turn += 1) {
      for (let count = 0; count < 1e7; count += 1);
      await new Promise((done) => setTimeout(done, 10));
    }
  };
  await until(() => get("viewer-number").textContent);
  const seen = { titles: [...document.querySelectorAll("#viewer-panels figcaption")]
    .map((c) => c.textContent) };
  seen.number = get("viewer-number").textContent;
  seen.first = drawn();
  get("viewer-slice").value = 0;
  get("viewer-slice").dispatchEvent(new Event("input"));
  seen.moved = drawn();
  get("viewer-slice").dispatchEvent(new KeyboardEvent("keydown",
    { key: "ArrowRight", bubbles: true }));
  seen.stepped = get("viewer-number").textContent;
  get("viewer-slice").value = 3;
  get("viewer-slice").dispatchEvent(new Event("input"));
  seen.labelled = drawn();
  get("viewer-labels").click();
  seen.bare = drawn();
  get("viewer-case").value = 1;
  get("viewer-case").dispatchEvent(new Event("change"));
  await until(() => !get("viewer-status").textContent.startsWith("lowest"));
  seen.status = get("viewer-status").textContent;
  seen.loaded = performance.getEntriesByType("resource").map((e) => e.name)
    .filter((name) => !name.startsWith("data:"));
  const result = document.createElement("pre");
  result.id = "seen";
  result.textContent = JSON.stringify(seen);
  document.body.append(result);
})();
"""


# Holds a page in a window as wide as a phone's: the browser's own windows cannot be so narrow.
PHONE = """<!doctype html>
<iframe style="width: 390px; height: 800px" srcdoc="{page}"></iframe>
<pre id="seen"></pre>
<script>
addEventListener("load", () => {{
  const inner = document.querySelector("iframe").contentDocument.documentElement;
  const widths = [inner.scrollWidth, inner.clientWidth];
  document.getElementById("seen").textContent = JSON.stringify(widths);
}});
</script>"""


def browse(page, folder):
    """What a script in a page wrote about it, and what the browser complained about."""
    path = folder / "browsed.html"
    path.write_text(page, encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=1280,900",
        "--virtual-time-budget=30000",
        "--dump-dom",
        path.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    seen = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert seen, complaints or done.stderr[-2000:]
    return json.loads(html.unescape(seen.group(1))), complaints


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    root = tmp_path_factory.mktemp("viewer") / "crossval"
    write_plan(root, load_description("phantom"), ROWS, kind="crossval")
    return write_report(root).read_text(encoding="utf-8")


needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="neither chromium nor google-chrome is installed"
)


@pytest.mark.slow
@needs_browser
def test_slices_can_be_leafed_through(page, tmp_path):
    # The page's own policy would forbid the probe, as it forbids any script but one.
    page = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", page)
    seen, complaints = browse(page.replace("</body>", f"<script>{PROBE}</script></body>"), tmp_path)
    assert complaints == []
    assert seen["loaded"] == []
    assert seen["titles"] == ["t1ce", "reference", *(LABELS.get(row, row) for row in ROWS)]
    assert seen["number"] == "slice 4 of 10"
    assert all(map(str.__ne__, seen["first"], seen["moved"]))
    assert seen["stepped"] == "slice 3 of 10"
    assert seen["labelled"][0] == seen["bare"][0]
    assert all(map(str.__ne__, seen["labelled"][1:], seen["bare"][1:]))
    assert len(set(seen["bare"])) == 1
    assert "median difference" in seen["status"]


@pytest.mark.slow
@needs_browser
def test_page_as_it_is_complains_of_nothing_and_fits_a_phone(page, tmp_path):
    (there, room), complaints = browse(PHONE.format(page=html.escape(page)), tmp_path)
    assert complaints == []
    assert there == room
    assert room <= 390
