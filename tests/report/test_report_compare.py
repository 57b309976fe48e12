"""Runs side by side in a terminal."""

from made_up import SPARSE, epochs

from noctule.report import RunFolder, compare_table


def test_one_line_a_run_and_series(make_run):
    runs = [make_run("one"), make_run("two", series={}), make_run("three", records=[], series={})]
    assert compare_table(runs).splitlines() == [
        "run    series             accuracy  parameters   stored  time per epoch",
        "-----  ------  -------------------  ----------  -------  --------------",
        "one    sparse               90.1 %     100,000  1.40 MB          1.25 s",
        "one    dense                90.5 %   2,500,000  30.0 MB          8.50 s",
        "two    sparse  89.6 % (validation)           -        -               -",
        "two    dense   89.6 % (validation)           -        -               -",
        "three  -              no epoch yet           -        -               -",
    ]


def test_runs_of_one_name_are_told_apart_by_their_paths(make_run):
    runs = [make_run("a/run"), make_run("b/run"), make_run("c")]
    lines = compare_table(runs).splitlines()
    assert {line.split()[0] for line in lines[2:]} == {str(runs[0].path), str(runs[1].path), "c"}


def test_missing_fields_and_hostile_names_stay_in_their_columns(make_run):
    name = "a\x1b[31m\nb\tc"
    run = make_run(records=epochs(name, 1), series={name: {"test_accuracy": None, "parameters": "many"}})
    lines = compare_table([run]).splitlines()
    assert len(lines) == 3
    assert lines[2].split() == ["run", "a?[31m?b?c", "-", "-", "-", "-"]


def test_a_finished_series_without_metrics_is_there_too(make_run):
    table = compare_table([make_run(records=[], series={"sparse": SPARSE})])
    assert table.splitlines()[2].split()[:3] == ["run", "sparse", "90.1"]


def test_no_runs_make_an_empty_table():
    assert len(compare_table([]).splitlines()) == 2


def test_the_folder_named_by_a_dot_has_a_name(make_run, monkeypatch):
    monkeypatch.chdir(make_run("here").path)
    assert compare_table([RunFolder(".")]).splitlines()[2].startswith("here ")
