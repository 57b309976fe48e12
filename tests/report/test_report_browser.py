"""The page in a real browser: it shows what it should, asks for nothing, complains of nothing and fits its window."""

import html
import json
import re

import pytest
from browser import CHROMIUM, screenshot, visit
from made_up import DENSE, SPARSE, epochs

from noctule.report import RunFolder, write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (on Debian: apt-get install chromium)")

SITE = "http://report.example/"


def text_of(run: RunFolder) -> str:
    return write_report(run).read_text("utf-8")


def test_the_page_shows_its_content_and_asks_for_nothing_else(make_run):
    seen = visit(SITE, {SITE: text_of(make_run())})
    assert seen.requests == []
    assert seen.console == []
    words = html.unescape(re.sub(r"<(style|script)>.*?</\1>|<[^>]*>", " ", seen.dom, flags=re.DOTALL))
    words = re.sub(r"\s+", " ", words)
    assert "Sparse: 90.1 % on the test set against 90.5 % of its dense twin" in words
    assert "Validation accuracy (%) by training time" in words
    assert "How this was measured" in words
    assert seen.dom.count('<svg viewBox="0 0 400 240') == 5


def test_what_the_test_before_looks_for_would_be_seen():
    style = '<link rel="stylesheet" href="http://elsewhere.example/x.css">'
    page = '<body><img src="http://elsewhere.example/x.png"><script>console.error("oh"); nothing.here()</script>'
    seen = visit(SITE, {SITE: style + page})
    asked = {"http://elsewhere.example/x.css", "http://elsewhere.example/x.png"}
    # the icon is the browser's own wish, which on a busy machine comes after the visit
    assert set(seen.requests) in (asked, asked | {SITE + "favicon.ico"})
    assert sum("oh" in line or "nothing" in line for line in seen.console) == 2


def team(make_run) -> RunFolder:
    """A run by eight workers on a parameter server, of whose pushes many are very late."""
    said = {"workers": 8, "exchange_share": 1 / 3, "link": "1.23e+05 Mbit/s, 0.00123 ms"}
    found = []
    for worker in range(8):
        late = {str(by): 10**6 for by in range(30)}
        more = {"worker": worker, "sent_bytes": 10**9 * (worker + 1), "staleness": late}
        found.append([record | {"together": said | more} for record in epochs("sparse", 20)])
    run = make_run("team", records=found[0], together={"workers": 8, "strategy": "ssp", "server_rate": 0.0123})
    for worker in range(1, 8):
        with RunFolder.of_worker(run, worker) as own:
            for record in found[worker]:
                own.log(record)
    return run


# Opens each report at each width in a frame, and tells of each: whether it scrolls sideways, which labels of its charts
# lie on one another or outside of the window, and what the read-outs say when the pointer is at 30 % of each chart.
INSPECT = """
<body><script>
const found = [], reports = REPORTS, widths = [320, 768, 1280];
const overlap = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
onload = () => {
  for (const frame of document.querySelectorAll("iframe")) {
    const view = frame.contentWindow, page = frame.contentDocument, width = view.innerWidth, problems = [], says = [];
    if (page.documentElement.scrollWidth > width) problems.push("scrolls sideways");
    for (const drawing of page.querySelectorAll("svg[role]")) {
      const labels = [...drawing.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
      labels.forEach(([a, boxA], at) => {
        if (boxA.left < 0 || boxA.right > width) problems.push("outside: " + a);
        for (const [b, boxB] of labels.slice(at + 1)) if (overlap(boxA, boxB)) problems.push(a + " lies on " + b);
      });
    }
    for (const chart of page.querySelectorAll("svg[data-frame]")) {
      const box = chart.getBoundingClientRect(), out = chart.parentNode.querySelector(".readout");
      for (const part of [0.98, 0.02, 0.3]) {
        const at = {clientX: box.left + part * box.width, clientY: box.top + 20};
        chart.dispatchEvent(new view.PointerEvent("pointermove", at));
        const shown = out.getBoundingClientRect();
        if (out.hidden || shown.left < 0 || shown.right > width) problems.push("read-out: " + out.textContent);
      }
      says.push([...out.children].map(row => row.textContent).join("; "));
      chart.dispatchEvent(new view.PointerEvent("pointerleave"));
      if (!out.hidden) problems.push("the read-out stays");
    }
    found.push({name: frame.name, width, problems, says});
  }
  document.body.textContent = "";
  document.body.appendChild(document.createElement("pre")).textContent = JSON.stringify(found);
};
for (const report of reports) for (const width of widths) {
  const frame = document.createElement("iframe");
  Object.assign(frame, {name: report, src: "/" + report, width, height: 900});
  frame.style.border = 0;
  document.body.appendChild(frame);
}
</script>
"""


def test_nothing_overlaps_or_sticks_out_on_phones_and_desktops(make_run):
    layer = {"weights": 12_345_678, "places": 10**9, "moved": 5}
    names = {f"blocks.{number}.attention.output.dense": layer for number in range(9)}
    many = [record for name in ("sparse", "static", "rigl", "dense") for record in epochs(name, 150, layers=True)]
    exploded = [record | {"train_loss": 10.0 ** (3 * record["epoch"])} for record in epochs("sparse", 12, pace=1e-4)]
    flat = [record | {"validation_loss": 1234567.25, "train_loss": 1234567.5} for record in epochs("sparse", 3)]
    deep = [record | {"layers": names} for record in epochs("sparse", 5, pace=1234)]
    series = {"sparse": SPARSE, "a-rather-long-name-of-a-series": SPARSE, "dense": DENSE}
    runs = {
        "plain": make_run("plain", threads=2, instruction_set="avx512"),
        "many": make_run("many", records=many, series=series, options={"data_dir": "/" + "long" * 40}),
        "exploded": make_run("exploded", records=exploded, series={}),
        "flat": make_run("flat", records=flat),
        "deep": make_run("deep", records=deep),
        "one": make_run("one", records=epochs("sparse", 1, layers=True), series={"sparse": SPARSE}),
        "none": make_run("none", records=[], series={}),
        "team": team(make_run),
    }
    pages = {SITE + name: text_of(run) for name, run in runs.items()}
    pages[SITE] = INSPECT.replace("REPORTS", json.dumps(list(runs)))
    seen = visit(SITE, pages)
    assert seen.console == []
    found = json.loads(html.unescape(re.search(r"<pre>(.*)</pre>", seen.dom, re.DOTALL).group(1)))
    assert len(found) == 3 * len(runs)
    assert [(f["name"], f["width"], problem) for f in found for problem in f["problems"]] == []
    plain = next(f["says"] for f in found if f["name"] == "plain")
    assert plain[0] == "epoch: 3; sparse: 83.98 %; dense: 83.98 %"
    assert plain[1].startswith("training time (s): ")
    assert plain[2].startswith("epoch: 3; sparse, validation: 0.42")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_is_drawn_in_the_readers_colours(make_run, tmp_path, dark):
    image = pytest.importorskip("PIL.Image")
    write_report(run := make_run())
    screenshot(run.path / "report.html", tmp_path / "page.png", width=1280, height=1000, dark=dark)
    with image.open(tmp_path / "page.png") as picture:
        drawn = picture.convert("RGB")
    assert drawn.size == (1280, 1000)
    shares = {color: count / (1280 * 1000) for count, color in drawn.getcolors(1 << 24)}
    page, line = ((18, 22, 28), (92, 174, 245)) if dark else ((255, 255, 255), (0, 114, 211))
    assert 0.8 < shares[page] < 0.99
    assert shares[line] > 2e-4
