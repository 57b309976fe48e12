"""The page is whole, well-formed, needs nothing else, and copes with whatever a run left behind."""

import base64
import hashlib
import html
import json
import re
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import DENSE, SPARSE, epochs, law
from markupsafe import Markup
from matplotlib.figure import Figure

from noctule.report import RunFolder, charts, write_report
from noctule.report.html import page, templates

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Reads a page, insists that every tag is closed in its turn, and keeps what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.references, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for key, value in attributes if key in ("src", "href", "xlink:href", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words)).strip().replace("\u00d7", "x")


def written(run: RunFolder) -> Page:
    path = write_report(run)
    assert path == run.path / "report.html"
    return Page(path.read_text("utf-8"))


def test_a_finished_run_tells_everything(make_run):
    run = make_run(
        threads=2, instruction_set="avx512", command=["noctule", "run", "sparse_mlp", "--data-dir", "my data"]
    )
    found = written(run)
    assert "Sparse: 90.1 % on the test set against 90.5 % of its dense twin" in found.text
    for title in (
        "Validation accuracy (%) by epoch",
        "Validation accuracy (%) by training time",
        "Loss by epoch",
        "Loss by training time",
        "Layer densities: weights of possible places",
        "Connections moved by epoch",
    ):
        # in the caption, and as the drawing's own title; bars are text and need none
        assert found.text.count(title) == (1 if "densities" in title else 2)
    for row in (
        "Test accuracy 90.12 % 90.45 % \u22120.33 \u00b1 0.82 points",
        "Parameters 100,000 2,500,000 25x",
        "Stored from step to step, total 1.40 MB 30.0 MB 21x",
        "indices 200 kB 0 B",
        "Peak of the whole process 612 MB 612 MB",
        "Multiply-adds per sample 300,000 7,500,000 25x",
        "Time per epoch, median 1.25 s 8.50 s 6.8x",
        "Time for the whole training 12.6 s 85.2 s 6.8x",
        "Energy not available not available",
    ):
        assert row in found.text
    for fact in ("avx512", "noctule run sparse_mlp --data-dir 'my data'", "hidden = 300,100", "50,000 train samples"):
        assert fact in found.text
    assert run.about()["machine"]["cpu"] in found.text
    assert run.about()["versions"]["torch"] in found.text


def test_the_page_asks_for_nothing(make_run):
    run = make_run()
    text = write_report(run).read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert Page(text).references == ["data:,"]
    assert not re.search(r"url\((?!#)|href=\"(?!#|data:,)|@import|https?:", text)
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
        in html.unescape(text)
    )


@pytest.mark.parametrize("layers", [True, False])
def test_one_series_and_one_epoch(make_run, layers):
    found = written(make_run(records=epochs("sparse", 1, layers=layers), series={"sparse": SPARSE}))
    assert found.text.startswith("sparse_mlp on fashion-mnist")
    assert "dense" not in found.text
    assert ("Connections moved" in found.text) == layers


def test_no_epoch_at_all(make_run):
    found = written(make_run(records=[], series={}))
    assert "No epoch finished yet." in found.text
    assert "svg" not in found.tags


def test_killed_before_the_summary(make_run):
    found = written(make_run(series={}))
    assert "Not finished. Sparse after epoch 10" in found.text
    assert "when the run has finished" in found.text


def test_losses_that_are_not_finite_are_counted_and_leave_gaps(make_run):
    records = [record | {"train_loss": float("nan") if record["epoch"] > 4 else 0.5} for record in epochs("sparse")]
    assert "6 recorded losses were not finite" in written(make_run(records=records)).text
    lost = [record | {"train_loss": None, "validation_loss": None} for record in epochs("sparse")]
    assert "No finite value recorded." in written(make_run("lost", records=lost)).text


def test_many_series_each_have_a_column_and_a_ratio(make_run):
    names = ["static", "rigl", "set"]
    records = [record for name in ["dense", *names] for record in epochs(name, layers=name != "dense")]
    found = written(make_run(records=records, series={"dense": DENSE} | dict.fromkeys(names, SPARSE)))
    assert "Measure static rigl set dense dense / static dense / rigl dense / set" in found.text
    assert "Connections moved (rigl) by epoch" in found.text


def test_thousands_of_epochs_make_a_small_page(make_run):
    run = make_run(records=[])
    lines = [json.dumps(record) + "\n" for name in ("sparse", "dense") for record in epochs(name, 5000, layers=True)]
    (run.path / "metrics.jsonl").write_text("".join(lines))
    written(run)
    assert (run.path / "report.html").stat().st_size < 200_000


def test_many_layers_are_cut_and_it_says_so(make_run):
    layers = {f"blocks.{n}.attention.projection": {"weights": 10 + n, "places": 100, "moved": n} for n in range(40)}
    records = [record | {"layers": layers} for record in epochs("sparse", 3)]
    text = written(make_run(records=records)).text
    assert "the first 12 of 40 layers" in text
    assert "the 12 busiest of 40 layers" in text
    assert "blocks.39.attention.projection" in text


def test_a_slower_run_is_marked(make_run):
    run = make_run(series={"sparse": SPARSE | {"seconds_per_epoch": 17.0}, "dense": DENSE})
    text = write_report(run).read_text("utf-8")
    assert "but it takes 2.0\u00d7 the time per epoch" in text
    assert '<td class="worse">0.50\u00d7</td>' in text


def test_the_report_is_replaced_whole(make_run):
    run = make_run(records=[], series={})
    first = write_report(run).read_text("utf-8")
    run.log(epochs("sparse", 1)[0])
    second = write_report(run).read_text("utf-8")
    run.close()
    assert "No epoch finished yet" in first
    assert "No epoch finished yet" not in second
    assert not list(run.path.glob(".*"))


@law
@given(st.text())
def test_whatever_the_templates_show_reads_as_itself_and_never_as_markup(value):
    safe = templates().from_string("{{ value }}").render(value=value)
    assert not set(safe) & set("<>\"'")
    readable = html.unescape(safe)
    assert len(readable) == len(value)
    assert all(a == b or b == "\ufffd" for a, b in zip(value, readable, strict=True))
    safe.encode("utf-8")


HOSTILE = "<script>alert('x')</script>\"&amp;\x00\ud800</style>"


def test_hostile_text_stays_text():
    layers = {HOSTILE: {"weights": 1, "places": 2, "moved": 1}}
    records = [record | {"layers": layers} for record in epochs(HOSTILE, 2)]
    words = ("recipe", "seed", "started", "threads", "instruction_set")
    about = dict.fromkeys(words, HOSTILE) | {"command": [HOSTILE], "machine": {"cpu": HOSTILE}}
    about |= {"options": {HOSTILE: HOSTILE}, "versions": {HOSTILE: HOSTILE}}
    found = Page(page(about, records, {"data": {"name": HOSTILE}, "series": {HOSTILE: SPARSE, "dense": DENSE}}))
    assert found.tags.count("script") == 1
    assert "<script>alert('x')</script>" in found.text


@contextmanager
def undrawn():
    """Pages without the drawings of their charts, which take a tenth of a second each."""
    figure = Figure()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "drawing", lambda plot: (Markup(""), figure.add_subplot()))
        yield


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def mostly(good: dict) -> st.SearchStrategy:
    """Mappings with some keys of `good`, their values right, missing or anything at all."""
    return st.fixed_dictionaries({}, optional={key: st.just(value) | ANYTHING for key, value in good.items()})


RECORDS = st.lists(mostly(epochs("sparse", 3, layers=True)[1]), max_size=4)
SUMMARIES = mostly({"data": {"name": "x", "test": 5}}) | st.fixed_dictionaries(
    {"data": mostly({"name": "x", "test": 5}), "series": mostly({"sparse": {}, "dense": DENSE})}
)
TWINS = st.fixed_dictionaries({"series": st.fixed_dictionaries({"sparse": mostly(SPARSE), "dense": mostly(DENSE)})})
ABOUT = mostly({"recipe": "r", "options": {"a": 1}, "seed": 1, "machine": {}, "versions": {}, "command": ["a"]})


@settings(law, max_examples=10)
@given(RECORDS, SUMMARIES)
def test_no_record_is_too_odd_for_a_chart(records, summary):
    Page(page({}, records, summary))


@settings(law, max_examples=150)
@given(ABOUT, RECORDS, SUMMARIES | TWINS)
def test_no_record_is_too_odd_for_a_page(about, records, summary):
    with undrawn():
        Page(page(about, records, summary))
