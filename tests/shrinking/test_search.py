"""A search resumes without training anything again, rebuilds a candidate to the byte, and refuses what does not fit."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from noctule.core.errors import NoctuleError, UsageError
from noctule.data import load, standardize
from noctule.models import mlp
from noctule.recipes.sparse_mlp import network
from noctule.shrinking import Asked, Change, Source, changes_for, search

CHANGES = [Change(name="source"), Change(name="half", width=0.5), Change(name="gone", left=0.2)]
ASKED = Asked(model="tiny", data="digits", target=("bytes=2x",), epochs=1, teacher_epochs=3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def source() -> Source:
    torch.manual_seed(0)
    return Source(mlp(64, 24, 10), standardize(load("digits")), trained=False)


def run(out: Path, asked: Asked = ASKED, **how):
    lines: list[str] = []
    chosen = search(asked, source, out, changes=CHANGES, seconds=0.02, say=lines.append, **how)
    return chosen, lines


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "tiny"
    return out, *run(out)


def test_the_folder_holds_files_cards_the_record_and_a_page_that_marks_the_choice(found):
    out, chosen, lines = found
    assert chosen.bytes * 2 <= (out / "source-float32.noctule").stat().st_size
    assert chosen.bytes == (out / chosen.file).stat().st_size
    assert len((out / "candidates.jsonl").read_text().splitlines()) == 6
    assert (out / f"{chosen.file}.card.json").exists()
    page = (out / "shrink.html").read_text()
    assert page.count("<svg") == 3
    assert "--only " + chosen.name in page
    assert any(line.startswith("test part, read once") for line in lines)


def test_a_second_call_trains_and_measures_nothing_and_has_the_same_table(found, monkeypatch):
    out, chosen, _ = found
    table, page = (out / "candidates.jsonl").read_bytes(), (out / "shrink.html").read_bytes()
    for name in ("train", "card_of", "export"):
        monkeypatch.setattr(f"noctule.shrinking.searching.{name}", None)
    monkeypatch.setattr("noctule.shrinking.source.train", None)
    again, _ = run(out)
    assert again == chosen
    assert (out / "candidates.jsonl").read_bytes() == table
    assert (out / "shrink.html").read_bytes() == page


@pytest.mark.parametrize("name", ["half-int8", "gone-int8"])
def test_one_candidate_is_rebuilt_to_the_byte_in_a_new_folder(found, tmp_path, name):
    out, _, _ = found
    built, _ = run(tmp_path / "again", only=name)
    assert built.name == name
    assert (tmp_path / "again" / built.file).read_bytes() == (out / built.file).read_bytes()


def test_another_command_in_the_folder_is_refused_with_the_first_difference(found):
    before = (found[0] / "candidates.jsonl").read_bytes()
    with pytest.raises(UsageError, match="epochs was 1 there and is 2 now"):
        run(found[0], replace(ASKED, epochs=2, seed=3))
    assert (found[0] / "candidates.jsonl").read_bytes() == before


def test_a_target_that_nothing_meets_names_the_nearest_three_and_keeps_the_folder(found, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for file in found[0].iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    asked = replace(ASKED, target=("bytes=1000x",))
    (out / "shrink.json").write_text((out / "shrink.json").read_text().replace("bytes=2x", "bytes=1000x"))
    with pytest.raises(NoctuleError, match=r"no candidate has bytes at most .*The nearest:") as caught:
        run(out, asked)
    assert str(caught.value).count(" ms, accuracy ") == 3
    assert "No candidate meets" in (out / "shrink.html").read_text()
    assert (out / "gone-int8.noctule").exists()


def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path):
    for asked, only, text in (
        (replace(ASKED, target=()), None, "at least one --target"),
        (replace(ASKED, epochs=0), None, "at least 1"),
        (replace(ASKED, to="abacus"), None, "no target"),
        (ASKED, "halve-int8", "did you mean half-int8"),
    ):
        with pytest.raises(UsageError, match=text):
            run(tmp_path / "out", asked, only=only)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        run(tmp_path / "full")


def test_a_candidate_that_cannot_be_had_says_why_and_the_others_go_on(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x):
            return self.layer(x.sort(1).values)

    with pytest.raises(NoctuleError, match=r"source cannot be written for noctule: .*sort"):
        search(
            ASKED,
            lambda: replace(source(), model=Odd(), trained=True),
            tmp_path / "out",
            changes=CHANGES[:1],
            seconds=0.02,
        )


def test_a_candidate_without_hope_ends_after_an_epoch_and_says_why(tmp_path, monkeypatch):
    seen: list[list[tuple[str, int]]] = []

    def always(sketches, finished, *, margin):
        seen.append([(each.name, each.bytes) for each in sketches])
        return lambda accuracy: [f"no hope for {each.name} at {accuracy:.2f}" for each in sketches]

    monkeypatch.setattr("noctule.shrinking.searching.hopeless", always)
    asked, lines = replace(ASKED, epochs=3, target=("bytes=1x",), within=100.0), []
    chosen = search(asked, source, tmp_path / "out", changes=CHANGES[:2], seconds=0.02, say=lines.append)
    assert chosen.name == "source-int8"
    record = [json.loads(line) for line in (tmp_path / "out" / "candidates.jsonl").read_text().splitlines()]
    assert [each["epochs"] for each in record] == [0, 0, 1, 1]
    for each in record[2:]:
        assert each["stopped"].startswith(f"no hope for {each['name']} at {each['accuracy']:.2f}")
        assert each["file"] is None
    assert seen == [[(each["name"], each["bytes"]) for each in record[2:]]]
    assert not (tmp_path / "out" / "half-int8.noctule").exists()
    assert "no hope for half-int8" in (tmp_path / "out" / "shrink.html").read_text()


@pytest.mark.parametrize("sparse", [False, True])
def test_a_sketch_has_the_connections_that_training_ends_with(sparse):
    kind = {"original": False, "density": 0.2, "epsilon": None, "dropout": 0.0, "widths": [64, 40, 40, 10]}
    model, example = network(kind, sparse=sparse), torch.rand(8, 64)
    for change in changes_for(sparse=sparse, to="noctule"):
        cut = change.cut(model, example)
        stored = sum(p.numel() for p in cut.parameters() if p.dim() > 1 or sparse)
        left = change.sketch(cut)
        values = sum(int(p.count_nonzero()) for name, p in left.named_parameters() if "bias" not in name)
        biases = sum(p.numel() for name, p in cut.named_parameters() if "bias" in name)
        whole = stored - (biases if sparse else 0)
        assert abs(values - change.left * whole) <= 0.03 * whole
    assert len(changes_for(sparse=sparse, to="noctule")) >= 8
