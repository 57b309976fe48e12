"""Teachers: beside the student, several, or stored; always in evaluation, without gradients, and left as they were."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noctule.compress.distill import Ensemble, Stored, attention_transfer, distilling, hinton, outputs_of, taps
from noctule.data import Batches, Dataset, load
from noctule.models import cnn, mlp
from noctule.train.fit import evaluate, fit


def loss(own, taught, targets):
    return 0.1 * F.cross_entropy(own, targets) + hinton(own, taught)


def networks():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    teacher[3].eval()
    return nn.Linear(6, 3), teacher


def test_the_teacher_is_in_evaluation_gets_no_gradient_and_is_left_as_it_was():
    student, teacher = networks()
    before = copy.deepcopy(teacher.state_dict())
    x, targets = torch.randn(7, 6), torch.randint(0, 3, (7,))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with distilling(student, teacher, loss) as loss_fn:
        assert not any(m.training for m in teacher.modules())
        value = loss_fn(student(x), targets)
        expected = loss(student(x), teacher(x), targets)
        torch.testing.assert_close(value, expected)
        value.backward()
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert [m.training for m in teacher] == [True, True, True, False, True]
    assert not student._forward_pre_hooks


def test_in_evaluation_the_loss_is_that_of_the_targets_and_the_teacher_rests():
    student, _ = networks()
    calls = []
    with distilling(student, lambda x: calls.append(x), loss) as loss_fn:
        x, targets = torch.randn(7, 6), torch.randint(0, 3, (7,))
        student.eval()
        assert loss_fn(student(x), targets) == F.cross_entropy(student(x), targets)
        assert not calls
        student.train()
        with pytest.raises(RuntimeError, match="not been called"):
            loss_fn(torch.zeros(7, 3), targets)


def test_a_teacher_within_the_student_is_refused():
    student, _ = networks()
    with pytest.raises(ValueError, match="share parameters"), distilling(student, student, loss):
        pass
    assert not student._forward_pre_hooks


def test_an_ensemble_is_the_mean_of_softened_outputs():
    teachers = [nn.Linear(6, 3) for _ in range(3)]
    x = torch.randn(5, 6)
    mean = torch.stack([(t(x) / 4).softmax(1) for t in teachers]).mean(0)
    torch.testing.assert_close((Ensemble(*teachers, temperature=4.0)(x) / 4).softmax(1), mean)
    one = Ensemble(teachers[0], temperature=4.0)
    torch.testing.assert_close(hinton(teachers[1](x), one(x)), hinton(teachers[1](x), teachers[0](x)))
    with pytest.raises(ValueError, match="needs teachers"):
        Ensemble(temperature=1.0)


def toy(n=23):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(n, 6, generator=generator)
    return Dataset(inputs, torch.arange(n) % 3, name="toy", classes=3)


def test_stored_outputs_are_those_of_the_samples_of_each_batch():
    _, teacher = networks()
    data = toy()
    outputs = outputs_of(teacher, data.inputs, batch_size=5)
    assert teacher.training
    stored = Stored(Batches(data, 4, seed=3), outputs)
    teacher.eval()
    for epoch, start in ((0, 0), (1, 2)):
        for inputs, _ in stored.epoch(epoch, start):
            torch.testing.assert_close(stored(inputs), teacher(inputs))


def test_a_stored_teacher_trains_like_the_one_beside_the_student():
    states = []
    data = toy()
    for offline in (False, True):
        student, teacher = networks()
        batches = Batches(data, 4, seed=0)
        source = Stored(batches, outputs_of(teacher, data.inputs)) if offline else batches
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        with distilling(student, source if offline else teacher, loss) as loss_fn:
            fit(student, optimizer, source, validation=data, epochs=2, loss_fn=loss_fn)
        states.append(student.state_dict())
    torch.testing.assert_close(states[0], states[1])


def test_stored_outputs_that_do_not_fit_are_refused():
    data = toy()
    with pytest.raises(ValueError, match="5 stored outputs for 23"):
        Stored(Batches(data, 4, seed=0), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="augmentation"):
        Stored(Batches(data, 4, seed=0, augment=lambda x, g: x), torch.zeros(23, 3))
    stored = Stored(Batches(data, 4, seed=0), torch.zeros(23, 3))
    with pytest.raises(RuntimeError, match="loop over"):
        stored(data.inputs)


def test_taps_of_both_feed_the_loss_within_fit():
    splits = load("digits", seed=0)
    torch.manual_seed(0)
    teacher, student = (cnn((1, 8, 8), 10, channels=(c, c), convolutions=1) for c in (16, 4))
    batches = Batches(splits.train, 64, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    seen = []
    with taps(student, ["5"]) as own, taps(teacher, ["5"]) as taught:

        def both(y, t, targets):
            seen.append(attention_transfer(own["5"], taught["5"]).item())
            return F.cross_entropy(y, targets) + 100.0 * attention_transfer(own["5"], taught["5"])

        with distilling(student, teacher, both) as loss_fn:
            fit(student, optimizer, batches, validation=splits.validation, epochs=4, loss_fn=loss_fn)
    assert sum(seen[-10:]) < 0.7 * sum(seen[:10])


@pytest.mark.slow
def test_a_student_with_few_labels_gains_by_a_good_teacher():
    splits = load("digits", seed=0)
    torch.manual_seed(0)
    teacher = mlp(64, 128, 128, 10)
    fit(
        teacher,
        torch.optim.AdamW(teacher.parameters(), lr=0.003),
        Batches(splits.train, 32, seed=0),
        validation=None,
        epochs=15,
    )
    few = splits.train.take(range(60))
    accuracy = {}
    for taught in (False, True):
        torch.manual_seed(1)
        student = mlp(64, 16, 10)
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
        with distilling(
            student, teacher, (lambda o, t, y: hinton(o, t)) if taught else (lambda o, t, y: F.cross_entropy(o, y))
        ) as loss_fn:
            fit(student, optimizer, Batches(few, 20, seed=0), validation=None, epochs=100, loss_fn=loss_fn)
        accuracy[taught] = evaluate(student, splits.test)[1]
    assert accuracy[True] > accuracy[False]
