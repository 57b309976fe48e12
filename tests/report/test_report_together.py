"""The page of a run by several workers says what each of them did, whatever is missing of it."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import SPARSE, epochs, law
from test_report_html import ABOUT, ANYTHING, Page, mostly, undrawn, written

from noctule.report import RunFolder, compare_table, write_report
from noctule.report.charts import BarChart
from noctule.report.html import page
from noctule.report.together import everyone, how, together

ASKED = {"workers": 3, "codec": "natural"}


def worked(worker, number=10, *, series="sparse", sent=39_100, workers=3, **facts):
    """The records of one of several workers."""
    said = {
        "worker": worker,
        "workers": workers,
        "sent_bytes": sent,
        "exchange_share": 0.25,
        "groups": 1,
        "link": "4.25e+03 Mbit/s, 1.2 ms",
    }
    return [record | {"together": said | facts} for record in epochs(series, number)]


def pushed(worker, number=10, *, each=4, late=1):
    """The records of a worker of a parameter server, of whose pushes in an epoch one is stale."""
    said = {"worker": worker, "workers": 2, "sent_bytes": 391_000, "exchange_share": 0.5}
    return [
        record | {"together": said | {"staleness": {"0": (each - 1) * epoch, str(late): epoch}}}
        for epoch, record in enumerate(epochs("sparse", number), 1)
    ]


@pytest.fixture
def make_team(make_run):
    """Writes a run by several workers into the folders that they use."""

    def make(workers, *, asked=ASKED, series=None, name="run"):
        run = make_run(
            name, records=workers[0], series={"sparse": SPARSE} if series is None else series, together=asked, threads=1
        )
        for worker, records in workers.items():
            if worker:
                with RunFolder.of_worker(run, worker) as own:
                    for record in records:
                        own.log(record)
        return run

    return make


def rows(text):
    """The cells of all rows of all tables."""
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL)]
    return [[cell.replace("\u00a0", " ") for cell in row] for row in found]


def test_each_worker_has_a_row_and_all_of_them_a_sum(make_team):
    run = make_team({0: worked(0), 1: worked(1), 2: worked(2, sent=78_200)})
    text = write_report(run).read_text("utf-8")
    assert rows(text)[:5] == [
        [
            "Worker",
            "Samples per second",
            "Sent per step",
            "Sent in all",
            "Time in exchanges",
            "In a group of",
            "Groups",
        ],
        ["0", "40,000", "100 B", "391 kB", "25.0 %", "3", "1"],
        ["1", "40,000", "100 B", "391 kB", "25.0 %", "3", "1"],
        ["2", "40,000", "200 B", "782 kB", "25.0 %", "3", "1"],
        ["all", "120,000", "400 B", "1.56 MB", "", "", ""],
    ]
    found = Page(text)
    for words in (
        "3 workers, sync, natural",
        "1 thread each",
        "The link between the workers, as measured when a group was formed: 4,250 Mbit/s, 1.2 ms.",
        "Memory is that of one of the 3 workers",
        "waiting for others included",
        "Samples per second by epoch",
        "Sent in an epoch (kB) by epoch",
        "Validation accuracy (%) by training time",
        "Workers 3 workers, sync, natural",
    ):
        assert words in found.text


def test_a_run_of_one_process_is_as_it_was(make_run):
    text = written(make_run()).text
    for word in ("Workers", "What each worker did", "worker 0", "thread each"):
        assert word not in text


def test_a_worker_that_was_away_leaves_a_gap_and_the_others_were_fewer(make_team):
    whole = worked(0)[:3] + worked(0, workers=2, groups=2, sent=20_000)[3:7] + worked(0, groups=3)[7:]
    away = worked(1)[:1] + worked(1, link="5 Mbit/s, 2 ms")[9:]
    run = make_team({0: whole, 1: away, 2: whole})
    text = write_report(run).read_text("utf-8")
    assert [row[-2:] for row in rows(text)[1:4]] == [["2 to 3", "3"], ["3", "1"], ["2 to 3", "3"]]
    assert rows(text)[2][2] == "100 B"  # not those of one epoch over the steps of nine
    assert "4,250\u00a0Mbit/s, 1.2\u00a0ms; 5\u00a0Mbit/s, 2\u00a0ms" in text
    pace = together({0: whole, 1: away}).charts[0]
    assert [y is None for _, y in pace.lines[1].points] == [False, True, False]


@pytest.mark.parametrize("lost", ["folder", "records", "damaged", "foreign"])
def test_a_worker_whose_records_are_lost_does_not_cost_the_page(make_team, lost):
    run = make_team({0: worked(0), 1: worked(1), 2: worked(2)})
    own = run.path / "workers" / "2"
    if lost == "folder":
        own.rename(run.path / "elsewhere")
    elif lost == "records":
        (own / "metrics.jsonl").unlink()
    elif lost == "damaged":
        (own / "metrics.jsonl").write_text("{}\nno\n{}\n")
    else:
        own.rename(run.path / "workers" / "copy of 2")
    found = rows(write_report(run).read_text("utf-8"))
    assert [row[0] for row in found[:4]] == ["Worker", "0", "1", "2"]
    assert found[3] == ["2", "no records"]
    assert "all" not in [row[0] for row in found]


def test_what_one_worker_does_not_say_is_in_no_sum(make_team):
    silent = [record | {"samples_per_second": None} for record in worked(2)]
    found = rows(write_report(make_team({0: worked(0), 1: worked(1), 2: silent})).read_text("utf-8"))
    assert found[3][:3] == ["2", "not available", "100 B"]
    assert found[4][:3] == ["all", "not available", "300 B"]


def test_a_last_line_that_is_torn_is_left_out(make_team):
    run = make_team({0: worked(0), 1: worked(1), 2: worked(2)})
    with open(run.path / "workers" / "1" / "metrics.jsonl", "a") as file:
        file.write('{"series": "sparse", "epo')
    assert rows(write_report(run).read_text("utf-8"))[2][:2] == ["1", "40,000"]


def test_before_the_first_epoch_ends_and_before_all_have_one(make_team):
    nobody = written(make_team({0: [], 1: [], 2: []}, series={}))
    assert "What each worker did" not in nobody.text
    assert "3 workers, sync, natural" in nobody.text
    early = written(make_team({0: worked(0, 1), 1: [], 2: worked(2, 1)}, series={}, name="early"))
    assert "Not finished." in early.text
    assert "1 no records 2 40,000" in early.text
    assert "Samples per second by epoch" not in early.text


def test_each_series_has_a_table(make_team):
    records = {worker: worked(worker, series="dense") + worked(worker) for worker in range(3)}
    text = written(make_team(records)).text
    assert text.index("What each worker did (sparse)") < text.index("What each worker did (dense)")
    assert "Samples per second (dense) by epoch" in text
    assert "Sent in an epoch" not in text  # as much in all of them


def test_how_stale_pushes_were(make_team):
    run = make_team({0: pushed(0), 1: pushed(1, late=12)}, asked={"workers": 2, "strategy": "ssp", "bound": 5})
    text = write_report(run).read_text("utf-8")
    assert rows(text)[:4] == [
        ["Worker", "Samples per second", "Sent per step", "Sent in all", "Time in exchanges", "Mean staleness"],
        ["0", "40,000", "1.00 kB", "3.91 MB", "50.0 %", "0.25"],
        ["1", "40,000", "1.00 kB", "3.91 MB", "50.0 %", "3.0"],
        ["all", "80,000", "2.00 kB", "7.82 MB", "", ""],
    ]
    found = Page(text)
    assert "2 workers, ssp, bound 5" in found.text
    assert "Staleness of pushes" in found.text
    assert "0 behind 75.0 % · 60 pushes" in found.text
    assert "1 behind 12.5 % · 10 pushes" in found.text
    assert "10 or more behind 12.5 % · 10 pushes" in found.text


def staleness(found):
    return [(bar.name, bar.note) for chart in found.charts if isinstance(chart, BarChart) for bar in chart.bars]


def test_pushes_count_once_where_workers_go_on_without_the_server():
    quiet = [
        later | {"together": pushed(0, 4)[-1]["together"] | {"sent_bytes": 0}} for later in epochs("sparse", 6)[4:]
    ]
    found = together({0: pushed(0, 4) + quiet})
    assert staleness(found)[0] == ("0 behind", "75.0\u00a0% · 12 pushes")
    assert "Sent in an epoch (kB) by epoch" in [chart.title for chart in found.charts]


def test_pushes_of_a_worker_that_was_started_again_count_once():
    first, again = pushed(0, 4), pushed(0, 10)[:6]
    resumed = first + [later | {"epoch": epoch} for epoch, later in enumerate(again, 5)]
    assert staleness(together({0: resumed}))[0] == ("0 behind", "75.0\u00a0% · 30 pushes")


def test_the_page_of_one_worker_is_its_own(make_team):
    run = make_team({0: worked(0), 1: worked(1), 2: worked(0)})  # in a smaller group it was number 0 for a while
    text = write_report(RunFolder(run.path / "workers" / "2")).read_text("utf-8")
    assert [row[0] for row in rows(text)] == ["Worker", "2"]
    assert "worker 2 of 3 workers, sync, natural" in text
    assert "What worker 2 saw" in text


def test_under_torchrun_the_records_say_how_many_there_were(make_team):
    run = make_team({0: worked(0, workers=2), 1: worked(1, workers=2)}, asked=None)
    text = written(run).text
    assert "2 workers, sync" in text
    assert "To repeat it, by torchrun with 2 workers:" in text
    assert list(everyone({}, worked(1, workers=2), {})) == [1]


def test_the_command_to_repeat_it_has_the_workers(make_team):
    assert (
        "noctule run sparse_mlp --epochs 10 --hidden 300,100 --rewire --seed 1 --workers 3 --codec natural"
        in re.sub(r"\s+", " ", written(make_team({0: worked(0), 1: worked(1), 2: worked(2)})).text)
    )


def test_many_workers_have_rows_and_the_first_have_lines():
    found = together({worker: worked(worker, workers=40) for worker in range(40)})
    assert len(found.tables[0].rows) == 41
    assert "the first 12 of 40 workers" in found.charts[0].title
    assert len(found.charts[0].lines) == 12


def test_compared_runs_say_how_many_workers_they_had(make_team, make_run):
    table = compare_table([make_team({0: worked(0), 1: worked(1)}), make_run("alone")])
    assert "run, 3 workers, sync, natural" in table
    assert "\nalone  " in table


def test_how_it_is_said():
    assert how({"together": {"workers": 1}}, []) == ["1 worker", "sync"]
    assert how({"together": {"workers": 2, "strategy": "bsp", "server_rate": 0.05}}, []) == [
        "2 workers",
        "bsp",
        "server rate 0.05",
    ]
    assert how({"together": None}, epochs("sparse")) == []


SAID = mostly(worked(1)[0]["together"] | pushed(1)[0]["together"])
RECORDS = st.lists(
    st.builds(lambda record, said: record | {"together": said}, mostly(epochs("sparse", 3)[1]), SAID | ANYTHING),
    max_size=4,
)


@settings(law, max_examples=150)
@given(ABOUT, mostly(ASKED) | ANYTHING, RECORDS, st.dictionaries(st.integers(0, 3), RECORDS, max_size=3))
def test_no_record_of_a_worker_is_too_odd_for_a_page(about, asked, records, others):
    with undrawn():
        Page(page(about | {"together": asked}, records, {}, others=others))


def scale(signal, noise, measured=60, batch=128.0):
    return {"noise_scale": {"signal": signal, "noise": noise, "measured": measured, "batch": batch}}


@pytest.mark.parametrize(
    ("measured", "hint"),
    [
        ([scale(1.0, 300.0), scale(3.0, 988.0)], "up to about 320 samples in a step; this run had 128."),
        ([scale(1.0, 300.0), {}], "up to about 300 samples"),
        ([scale(2.0, 0.5), scale(2.0, 0.5)], "up to about 1.0 samples"),
        ([scale(-1.0, 300.0), scale(0.5, 300.0)], "gradients were almost all noise"),
        ([scale(1e-9, 300.0), scale(1e-9, 300.0)], "gradients were almost all noise"),
        ([scale(1.0, 300.0, measured=20), scale(1.0, 300.0, measured=20)], None),
        ([scale(1.0, -3.0), scale(1.0, 2.0)], None),
        ([{"noise_scale": "none"}, {"noise_scale": {"signal": None}}], None),
    ],
)
def test_the_noise_of_all_workers_together_says_which_batch_is_useful(measured, hint):
    workers = {worker: worked(worker, workers=2, **facts) for worker, facts in enumerate(measured)}
    found = " ".join(together(workers).hints)
    assert hint in found if hint else found == ""
