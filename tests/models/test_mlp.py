import pytest
import torch
from torch import nn

from noctule.models import mlp
from noctule.sparse.layers import AllReLU, SparseLinear


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.children()]


def test_layers_activations_and_dropout_alternate():
    assert kinds(mlp(8, 4)) == ["Linear"]
    assert kinds(mlp(8, 6, 4)) == ["Linear", "ReLU", "Linear"]
    assert kinds(mlp(8, 6, 5, 4, dropout=0.3)) == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert mlp(8, 6, 5, 4)(torch.zeros(3, 8)).shape == (3, 4)


def test_activations_know_their_number_and_layers_are_made_as_asked():
    model = mlp(
        8, 6, 5, 4,
        activation=lambda number: AllReLU(0.6, layer=number),
        linear=lambda i, o: SparseLinear(i, o, density=0.5),
    )  # fmt: skip
    assert [m.negative_slope for m in model if isinstance(m, AllReLU)] == [-0.6, 0.6]
    assert [(m.in_features, m.out_features) for m in model if isinstance(m, SparseLinear)] == [(8, 6), (6, 5), (5, 4)]


@pytest.mark.parametrize(("widths", "dropout"), [((), 0.0), ((8,), 0.0), ((8, 0), 0.0), ((8, 4), 1.0), ((8, 4), -0.1)])
def test_what_makes_no_sense_is_refused(widths, dropout):
    with pytest.raises(ValueError, match=r"at least an input|dropout"):
        mlp(*widths, dropout=dropout)
