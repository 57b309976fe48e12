"""The sentence on top says what came out, good and bad alike."""

import pytest

from noctule.report.headline import headline

SPARSE = {
    "test_accuracy": 0.912,
    "parameters": 45,
    "seconds_per_epoch": 1.0,
    "weights_bytes": 10,
    "index_bytes": 5,
    "gradient_bytes": 10,
    "optimizer_bytes": 10,
}
DENSE = {
    "test_accuracy": 0.915,
    "parameters": 1000,
    "seconds_per_epoch": 6.8,
    "weights_bytes": 135,
    "index_bytes": 0,
    "gradient_bytes": 125,
    "optimizer_bytes": 125,
}


def said(sparse=None, dense=None, records=(), **series):
    named = {"sparse": sparse, "dense": dense} | series
    sentence = headline({"series": {name: own for name, own in named.items() if own is not None}}, records)
    return sentence.replace("\u00a0", " ").replace("\u00d7", "x")


def test_a_good_run():
    assert said(SPARSE, DENSE) == (
        "Sparse: 91.2 % on the test set against 91.5 % of its dense twin (\u22120.3 points), with 4.5 % of its parameters, "
        "6.8x less time per epoch and 11x less memory for weights, gradients and optimizer state."
    )


def test_a_slower_and_larger_run_says_so():
    slow = SPARSE | {"seconds_per_epoch": 17.0, "index_bytes": 1000}
    assert said(slow, DENSE).endswith(
        "with 4.5 % of its parameters, but it takes 2.5x the time per epoch and 2.7x the "
        "memory for weights, gradients and optimizer state."
    )
    big = slow | {"parameters": 2000}
    assert said(big, DENSE).endswith(
        "points), and it takes 2.0x its parameters, 2.5x the time per epoch and 2.7x the memory for weights, gradients and "
        "optimizer state."
    )


@pytest.mark.parametrize(
    ("accuracy", "words"),
    [
        (0.915, "against 91.5 % of its dense twin (0.0 points)"),
        (0.9153, "against 91.5 % of its dense twin (0.0 points)"),
        (0.925, "against 91.5 % of its dense twin (+1.0 points)"),
        (0.5, "against 91.5 % of its dense twin (\u221241.5 points)"),
    ],
)
def test_the_difference_of_accuracy(accuracy, words):
    assert words in said(SPARSE | {"test_accuracy": accuracy}, DENSE)


def uncertain(summary):
    return headline({"series": {"sparse": SPARSE, "dense": DENSE | {"way": "bf16 autocast"}}} | summary, ())


def test_a_difference_within_its_uncertainty_is_called_none_and_the_twin_is_named():
    few = uncertain({"data": {"test": 100}}).replace("\u00a0", " ")
    assert "against 91.5 % of its dense twin in bf16 autocast (no difference: \u22120.3 \u00b1 7.9 points)" in few
    many = uncertain({"data": {"test": 1_000_000}}).replace("\u00a0", " ")
    assert "(\u22120.3 \u00b1 0.1 points)" in many
    paired = {"difference": {"points": -0.3, "margin_points": 0.2}}
    assert "(\u22120.3 \u00b1 0.2 points)" in uncertain({"data": {"test": 100}} | paired).replace("\u00a0", " ")


def test_equal_costs_are_not_gains():
    sentence = said(DENSE, DENSE)
    assert (
        "as many parameters, about the same time per epoch and about the same memory for weights, gradients and optimizer state"
        in sentence
    )
    assert "less" not in sentence


def test_a_run_without_a_twin_boasts_of_nothing():
    costs = "45 parameters, 1.00 s per epoch and 35 B of memory for weights, gradients and optimizer state"
    assert said(SPARSE) == f"Sparse: 91.2 % on the test set, with {costs}."
    assert said(None, DENSE).startswith("Dense: 91.5 % on the test set, with 1,000 parameters")
    assert said(rigl=SPARSE, static=DENSE).startswith("Rigl: 91.2 %")


@pytest.mark.parametrize("lost", [{}, {"test_accuracy": None}, {"test_accuracy": "?", "parameters": 0}])
def test_missing_fields_are_left_out(lost):
    tail = ", with 0 parameters." if "parameters" in lost else "."
    assert said(lost) == f"Sparse: test accuracy not available{tail}"
    assert said(lost, DENSE).startswith("Sparse: test accuracy not available")
    assert "no test accuracy of the dense twin" in said(SPARSE, lost)


def test_an_unfinished_run_says_how_far_it_got():
    assert said() == "No epoch finished yet."
    records = [
        {"series": "dense", "epoch": 1, "validation_accuracy": None},
        {"series": "sparse", "epoch": 1, "validation_accuracy": 0.88},
        {"series": "sparse", "epoch": 2, "validation_accuracy": 0.87},
    ]
    assert said(records=records) == (
        "Not finished. Sparse after epoch 2: 88.0 % on the validation set at best; "
        "dense after epoch 1: no validation accuracy yet."
    )
