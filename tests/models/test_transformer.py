import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noctule.core.convert import convert_
from noctule.data import Batches, Windows, read_text
from noctule.models import Transformer
from noctule.models.transformer import rotated
from noctule.sparse.layers import FuseEpilogue, SparseLinear, ToDense, ToSparse
from noctule.train.fit import evaluate

CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def small(**options) -> Transformer:
    return Transformer(11, **{"width": 16, "depth": 2, "heads": 2, **options})


def test_a_guess_depends_on_what_came_before_and_on_nothing_after():
    model, numbers = small(), torch.randint(0, 11, (3, 9))
    before = model(numbers)
    assert before.shape == (3, 11, 9)
    for at in range(9):
        changed = numbers.clone()
        changed[:, at] = (changed[:, at] + 1) % 11
        after = model(changed)
        torch.testing.assert_close(after[:, :, :at], before[:, :, :at], **CLOSE)
        for later in range(at, 9):
            assert not torch.allclose(after[:, :, later], before[:, :, later], **CLOSE)


def test_positions_show_as_distances_alone():
    query, key = torch.randn(2, 8)
    turned = rotated(torch.stack([query, key])[:, None].expand(2, 12, 8))
    scores = turned[0] @ turned[1].t()
    for distance in range(-11, 12):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), **CLOSE)
    assert scores[0].std() > 0.01
    torch.testing.assert_close(turned.norm(dim=-1), torch.stack([query, key]).norm(dim=-1)[:, None].expand(2, 12))
    assert rotated(torch.randn(3, 8, dtype=torch.float64)).dtype == torch.float64


def test_order_matters():
    model = small(depth=1)
    assert not torch.allclose(model(torch.tensor([[1, 2, 3]]))[..., -1], model(torch.tensor([[2, 1, 3]]))[..., -1])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_with_all_weights_stored_it_is_its_dense_twin(dropout):
    dense = small(dropout=dropout)
    sparse = copy.deepcopy(dense)
    done = convert_(sparse, ToSparse(density=1.0, fresh=False))
    assert len(done.changed) == 2 * 4 + 1
    assert list(done.left) == ["characters"]  # a lookup
    assert len(convert_(sparse, FuseEpilogue()).changed) == 2
    numbers, targets = torch.randint(0, 11, (2, 3, 9))
    found = []
    for model in (sparse, dense):
        torch.manual_seed(5)  # attention drops the same, the residual streams too
        loss = F.cross_entropy(model(numbers), targets)
        gradients = torch.autograd.grad(loss, [model.characters.weight, model.norm.weight, model.head.bias])
        found.append([loss, *gradients])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    dense.eval(), sparse.eval()
    convert_(sparse, ToDense())
    torch.testing.assert_close(sparse(numbers), dense(numbers), **CLOSE)


def test_evaluate_counts_characters():
    characters = torch.randint(0, 11, (391,))
    windows = Windows(characters[:-1].view(-1, 13), characters[1:].view(-1, 13), name="noise", classes=11)
    model = small(dropout=0.2)
    with torch.no_grad():
        logits = model.eval()(windows.inputs).transpose(1, 2).reshape(-1, 11)
    targets = windows.targets.flatten()
    right = float(F.cross_entropy(logits, targets)), float((logits.argmax(1) == targets).float().mean())
    model.train()
    for batch_size in (1, 50, 1000):
        assert evaluate(model, windows, batch_size=batch_size) == pytest.approx(right, rel=1e-5)
    assert model.training


def test_a_sparse_one_learns_a_text_that_repeats(tmp_path):
    (tmp_path / "song.txt").write_text("the bat sings at night. " * 60)
    text = read_text(tmp_path / "song.txt", context=24)
    model = Transformer(len(text.vocabulary), width=32, depth=1, heads=2)
    convert_(convert_(model, ToSparse(density=0.3)).model, FuseEpilogue())
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = Batches(text.train, 8, seed=0)
    for epoch in range(15):
        for inputs, targets in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    loss, accuracy = evaluate(model, text.test)
    assert loss < 0.3
    assert accuracy > 0.9


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 15}, "even share"),
        ({"heads": 16}, "even share"),
        ({"depth": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        small(**options)


def test_the_modules_are_plain():
    kinds = {type(m) for m in small().modules() if not list(m.children())}
    assert kinds == {nn.Embedding, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Dropout}
