import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.core.errors import DataError, UsageError
from noctule.data import Batches, Windows, read_text


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes, name: str = "tale.txt"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@settings(deadline=None, max_examples=50)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=60, max_size=400),
    context=st.integers(1, 5),
)
def test_the_windows_are_the_text_in_order_and_every_guess_is_the_next_character(text, context, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text(text, encoding="utf-8", newline="")
    found = read_text(path, context=context, validation=0.2, test=0.3)
    assert found.vocabulary == "".join(sorted(set(text)))
    starts = [0, round(len(text) * (1.0 - 0.3 - 0.2)), round(len(text) * (1.0 - 0.3)), len(text)]
    for part, start, stop in zip((found.train, found.validation, found.test), starts, starts[1:]):
        assert part.inputs.shape == part.targets.shape == (len(part), context)
        assert found.decode(part.inputs) == text[start : start + len(part) * context]
        assert found.decode(part.targets) == text[start + 1 : start + 1 + len(part) * context]
        assert stop - start - 1 - len(part) * context in range(context)  # nothing beyond the part, little left over
        assert (part.classes, part.features) == (len(set(text)), context)


def test_characters_outside_the_common_plane_count_as_one(write):
    text = read_text(write("🦇é" * 60), context=4)
    assert text.vocabulary == "é🦇"
    assert text.train.classes == 2


def test_batches_take_windows(write):
    train = read_text(write("abcdefgh" * 40), context=8).train
    batches = Batches(train, 7, seed=3)
    seen = [(inputs, targets) for inputs, targets in batches.epoch(0)]
    assert sum(len(inputs) for inputs, _ in seen) == len(train)
    assert {t.dtype for pair in seen for t in pair} == {torch.int64}
    order = batches.order(0)
    assert torch.equal(torch.cat([inputs for inputs, _ in seen]), train.inputs[order])
    assert torch.equal(torch.cat([targets for _, targets in seen]), train.targets[order])


def test_the_text_that_comes_with_python():
    text = read_text()
    assert text.train.name == "python-help"
    assert text.train.features == 128
    assert 300_000 < text.train.inputs.numel() < 1_000_000
    assert "statement" in text.decode(text.train.inputs[:20])
    assert repr(text.test).startswith("Windows('python-help', samples=")


@pytest.mark.parametrize(
    ("content", "options", "text"),
    [
        (b"abc\xff" * 100, {}, "byte 3 is wrong"),
        (b"", {}, "has 0 characters"),
        (b"a" * 1000, {"context": 100}, "100 of them for validation: too few for one window of 100"),
    ],
)
def test_a_text_that_does_not_do_is_refused(write, content, options, text):
    with pytest.raises(DataError, match=text):
        read_text(write(content), **options)


@pytest.mark.parametrize("options", [{"context": 0}, {"validation": 0.0}, {"test": 0.9}, {"test": -0.1}])
def test_numbers_that_make_no_sense_are_refused(options):
    with pytest.raises(UsageError, match="context must be at least 1"):
        read_text(**options)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read_text(tmp_path / "nowhere.txt")
    with pytest.raises(UsageError, match="Is a directory"):
        read_text(tmp_path)


def test_windows_hold_no_copies_of_the_text():
    train = read_text().train
    assert isinstance(train, Windows)
    assert train.inputs.untyped_storage().data_ptr() == train.targets.untyped_storage().data_ptr()
