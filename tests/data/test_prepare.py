"""What is learnt from the training rows is all that there is; a table is the same from a file and from memory."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from noctule.core.errors import DataError, UsageError
from noctule.data import Dataset, Splits, load, standardize
from noctule.data.objects import frame_of
from noctule.data.preparation import Preparation

pandas = pytest.importorskip("pandas")
law = settings(deadline=None, derandomize=True, max_examples=12)


def people(rows: int = 60, seed: int = 0):
    """A table as people have them: numbers with gaps, text, flags, dates, a key."""
    random = np.random.default_rng(seed)
    age = random.integers(1, 90, rows).astype(float)
    age[random.random(rows) < 0.2] = np.nan
    return pandas.DataFrame(
        {
            "id": np.arange(rows),
            "name": [f"person {at}" for at in range(rows)],
            "age": age,
            "port": random.choice(["S", "C", "Q", None], rows),  # type: ignore[list-item]
            "member": random.random(rows) < 0.5,
            "joined": pandas.Timestamp("2020-01-01") + pandas.to_timedelta(random.integers(0, 900, rows), unit="D"),
            "fee": random.normal(30, 9, rows),
            "kind": random.choice(["ant", "bee", "cow"], rows),
        }
    )


def tensors(splits: Splits) -> list[torch.Tensor]:
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    return [tensor for part in parts for tensor in (part.inputs, part.targets)]


def same(one: Splits, other: Splits) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@law
@given(rows=st.integers(20, 80), seed=st.integers(0, 99), separator=st.sampled_from(",;\t|"))
def test_a_frame_and_its_csv_are_the_same(
    rows: int, seed: int, separator: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, frame = tmp_path_factory.getbasetemp() / "people.csv", people(rows, seed)
    frame.to_csv(path, index=False, sep=separator)
    one, other = load(frame), load(path)
    assert same(one, other)
    assert one.preparation is not None
    assert other.preparation is not None
    assert one.preparation.columns == other.preparation.columns
    assert one.preparation.target.labels == other.preparation.target.labels == ("ant", "bee", "cow")
    assert set(one.preparation.left_out) == {"id", "name"}


def test_parquet_is_the_same_too(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    people().to_parquet(tmp_path / "people.parquet")
    assert same(load(people()), load(tmp_path / "people.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pandas", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "own.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install 'noctule\[tables\]'"):
        load(tmp_path / "own.parquet")


@law
@given(
    row=st.integers(0, 19), column=st.sampled_from(["age", "port", "member", "joined", "fee"]), seed=st.integers(0, 9)
)
def test_a_change_of_test_rows_changes_no_training_tensor(row: int, column: str, seed: int) -> None:
    train, test = people(40, seed), people(20, seed + 1)
    changed = test.copy()
    changed.loc[row, column] = {
        "age": 1e6, "port": "never seen", "member": True, "joined": pandas.Timestamp("1900-01-01"), "fee": -1e6
    }[column]  # fmt: skip
    with_warnings = pytest.warns(UserWarning, match="never seen") if column == "port" else None
    one = standardize(load({"train": train, "test": test}))
    if with_warnings is None:
        other = standardize(load({"train": train, "test": changed}))
    else:
        with with_warnings:
            other = standardize(load({"train": train, "test": changed}))
    assert torch.equal(one.train.inputs, other.train.inputs)
    assert one.preparation is not None
    assert other.preparation is not None
    kept = [{**p.to_json(), "fingerprint": ""} for p in (one.preparation, other.preparation)]
    assert kept[0] == kept[1]


def test_encoding_from_json_is_what_training_saw() -> None:
    frame = people()
    splits = standardize(load({"train": frame, "test": frame}, validation_fraction=0))
    assert splits.preparation is not None
    kept = Preparation.from_json(json.loads(json.dumps(splits.preparation.to_json())))
    assert kept == splits.preparation
    table = load({"train": frame, "test": frame}).preparation
    assert table is not None
    for columns in (list(frame.columns), list(frame.columns)[::-1]):  # matched by name
        assert torch.equal(kept.encode(frame_of(frame[columns])), splits.train.inputs)


def test_numbers_to_predict() -> None:
    frame = people().drop(columns="kind")
    splits = load(frame)
    assert splits.train.classes == 0
    assert splits.train.outputs == 1
    fees = torch.cat([part.targets for part in (splits.train, splits.validation, splits.test) if part is not None])
    assert sorted(fees.tolist()) == sorted(frame["fee"].astype(np.float32).tolist())
    scaled = standardize(splits)
    assert scaled.preparation is not None
    assert abs(float(scaled.train.targets.mean())) < 1e-5
    back = scaled.test.targets.double() * scaled.preparation.target_deviation + scaled.preparation.target_mean
    torch.testing.assert_close(back.float(), splits.test.targets)
    assert load(frame, task="classification", target="member").train.classes == 2


def test_the_target_is_named_or_found() -> None:
    frame = people()
    assert load(frame, target="member").preparation.target.name == "member"  # type: ignore[union-attr]
    assert load(frame, target="KIND").preparation.target.name == "kind"  # type: ignore[union-attr]
    assert load(frame.rename(columns={"member": "Label"})).preparation.target.name == "Label"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"no column 'kinds' \(did you mean kind\?\)"):
        load(frame, target="kinds")
    with pytest.raises(DataError, match="the columns 'y', 'target' could each be the label"):
        load(frame.rename(columns={"member": "y", "fee": "target"}))
    with pytest.raises(DataError, match="no label; give one"):
        load(frame, target="port")


def test_a_separator_at_the_end_of_each_line_makes_no_target(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("".join(f"{at},{at % 7},{'ab'[at % 2]},\n" for at in range(20)))
    splits = load(tmp_path / "own.csv")
    assert splits.preparation is not None
    assert splits.preparation.target.labels == ("a", "b")
    assert splits.preparation.left_out == {"column 4": "empty"}
    with pytest.raises(UsageError, match="no table, so there are no columns"):
        load((X, Y), target="y")


def test_a_class_with_few_samples_stays_in_the_training_part() -> None:
    frame = people(50)
    frame.loc[7, "kind"] = "yak"
    with pytest.warns(UserWarning, match="no sample of yak is in the test part"):
        splits = load(frame)
    assert splits.preparation is not None
    yak = splits.preparation.target.labels.index("yak")
    assert int((splits.train.targets == yak).sum()) == 1


def test_nothing_to_learn_from() -> None:
    with pytest.raises(DataError, match="has no column to learn from: 'a' is the same in every training row"):
        load(pandas.DataFrame({"a": [1] * 20, "y": [0, 1] * 10}))
    with pytest.raises(DataError, match="needs at least one feature and the label"):
        load(pandas.DataFrame({"y": [0, 1] * 10}))


X = np.arange(120.0).reshape(40, 3)
Y = np.arange(40) % 2


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        (X.tolist(), Y.tolist()),
        (torch.from_numpy(X), torch.from_numpy(Y)),
        torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
        {"x": X, "y": Y},
        {"train": (X, Y), "test": (X, Y)},
        {"a": X[:, 0], "b": X[:, 1], "c": X[:, 2], "y": Y},
        pandas.DataFrame(X, columns=list("abc")).assign(label=Y),
        (pandas.DataFrame(X, columns=list("abc")), pandas.Series(Y, name="y")),
        Dataset(torch.from_numpy(X), torch.from_numpy(Y), name="toy", classes=2),
    ],
    ids=lambda data: type(data).__name__,
)
def test_data_in_memory(data: object) -> None:
    splits = load(data)
    assert (splits.train.features, splits.train.classes) == (3, 2)
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    assert sum(map(len, parts)) in (40, 80)
    for part in parts:
        assert torch.equal(part.targets, (part.inputs[:, 0] / 3 % 2).long())


@pytest.mark.parametrize("data", [3, X, None, "", object(), [1, 2, 3]], ids=lambda data: type(data).__name__)
def test_what_is_no_data(data: object) -> None:
    with pytest.raises((UsageError, DataError), match=r"give|no data set"):
        load(data)


class HuggingFaceLike:
    """What a Dataset of Hugging Face has, over a DataFrame."""

    class ClassLabel:
        names = ("no", "yes")

    def __init__(self, frame) -> None:
        self.frame = frame
        self.column_names = list(frame.columns)
        self.features = dict.fromkeys(self.column_names) | {"label": self.ClassLabel()}

    def __len__(self) -> int:
        return len(self.frame)

    def with_format(self, kind: str | None) -> "HuggingFaceLike":
        return self

    def to_pandas(self):
        return self.frame


def test_a_data_set_of_hugging_face_keeps_the_names_of_its_classes() -> None:
    frame = pandas.DataFrame({"label": Y, "v": X.tolist()})
    splits = load({"train": HuggingFaceLike(frame), "test": HuggingFaceLike(frame)})
    assert splits.preparation is not None
    assert splits.preparation.target.labels == ("no", "yes")
    assert splits.train.features == 3
