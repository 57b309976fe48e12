"""Any model: what is tied goes together, and without what is gone the model computes what it did."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from noctule import ToSparse, convert_, load_model, save_model
from noctule.compress.shrink import ImportancePruning, incoming, magnitude, rebuild, resize_to, shrink, taylor
from noctule.compress.shrink.following import Following, _silence
from noctule.core.method import attach
from noctule.core.optim import param_groups
from noctule.models import ResNet, Transformer, ViT, mlp, mobilenet


class Concatenated(nn.Module):
    """Two branches side by side, one of them read twice, through 1x1 convolutions and a shared linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.norm, self.c = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.shared, self.out = nn.Linear(20, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).sigmoid()
        y = self.c(self.norm(torch.cat([a, self.b(a).tanh()], 1))).flatten(1)
        return self.out(self.shared(self.shared(y).relu()))


class Grouped(nn.Module):
    """A convolution of two groups between a group norm and a bare scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(1, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 12, 1, groups=2)
        self.scale, self.out = nn.Parameter(torch.rand(12, 1, 1)), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.norm(self.a(x))) * self.scale).mean((2, 3))


def sparse(model: nn.Module) -> nn.Module:
    return convert_(model, ToSparse(density=0.6)).model


IMAGES = (2, 6, 4)
MODELS = {
    "mlp": (lambda: mlp(5, 9, 8, 3), lambda: torch.rand(4, 5)),
    "residual": (lambda: ResNet(IMAGES, 3, blocks=(1, 1), width=4), lambda: torch.rand(3, 48)),
    "sparse residual": (lambda: sparse(ResNet(IMAGES, 3, blocks=(1, 1), width=4)), lambda: torch.rand(3, 48)),
    "depthwise": (lambda: mobilenet(IMAGES, 3, stages=((1, 4, 1, 1), (2, 6, 2, 1)), stem=4, last=8), lambda: torch.rand(3, 48)),
    "concatenated": (Concatenated, lambda: torch.rand(3, 2, 2, 2)),
    "grouped": (Grouped, lambda: torch.rand(3, 1, 3, 3)),
    "vit": (lambda: ViT(IMAGES, 3, patch=2, width=8, depth=2, heads=4, hidden=12), lambda: torch.rand(3, 48)),
    "sparse vit": (lambda: sparse(ViT(IMAGES, 3, patch=2, width=8, depth=1, heads=4)), lambda: torch.rand(3, 48)),
    "decoder": (lambda: Transformer(7, width=8, depth=1, heads=2), lambda: torch.randint(0, 7, (2, 5))),
}  # fmt: skip
EXACT = [name for name in MODELS if name != "grouped"]


def made(name: str, *, constants: bool = True) -> tuple[nn.Module, Tensor]:
    """A model in float64 with statistics of its own; without constants a channel that nothing leads into gives zero."""
    torch.manual_seed(3)
    make, example = MODELS[name]
    model = make()
    for module in model.modules():
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.is_floating_point() and tensor.dim() == 1 and own != "values":
                tensor.data.uniform_(0.5, 1.5)
                if not constants and own in ("bias", "running_mean"):
                    tensor.data.zero_()
    x = example()
    return model.double().eval(), x.double() if x.is_floating_point() else x


def groups_and_masks(model: nn.Module, x: Tensor):
    """Half of the units of each group, drawn."""
    following = Following(model, x)
    torch.manual_seed(1)
    gone = {n: torch.randperm(g.units) < g.units // 2 for n, g in enumerate(following.groups) if g.units > 1}
    return following, gone


def silent(model: nn.Module, following: Following, gone) -> nn.Module:
    """A copy in which no weight leads into the units that go."""
    twin = copy.deepcopy(model)
    for number, mask in gone.items():
        group = following.groups[number]
        for tensor, dimension in group.producers:
            lines = torch.zeros(following.trace.size_of(tensor, dimension), dtype=torch.bool)
            lines[group.members[tensor, dimension][mask].flatten()] = True
            _silence(twin, tensor, dimension, lines)
    return twin


@pytest.mark.parametrize("name", EXACT)
def test_without_what_nothing_leads_into_the_function_stays(name):
    """Each group that is exact alone; constants where no border of zeros is read."""
    constants = name in ("mlp", "concatenated", "vit", "sparse vit", "decoder")
    model, x = made(name, constants=constants)
    following, gone = groups_and_masks(model, x)
    tried = 0
    for number, mask in gone.items():
        if following.groups[number].inexact:
            continue
        twin = silent(model, following, {number: mask})
        expected = twin(x)
        removal = following.removal({number: mask}, {})
        smaller = Following(twin, x)
        smaller.make_(removal, ())
        if name == "concatenated" and "shared" in removal.inexact:
            continue  # a constant for each of its two uses
        assert not removal.inexact
        torch.testing.assert_close(twin(x), expected, atol=1e-9, rtol=1e-9)
        tried += 1
    assert tried


@pytest.mark.parametrize("name", MODELS)
def test_half_goes_a_record_rebuilds_it_and_a_whole_share_changes_nothing(name, tmp_path):
    model, x = made(name)
    before, weights = model(x), sum(p.numel() for p in model.parameters())
    assert not shrink(model, 1.0, example=x).record
    assert torch.equal(model(x), before)
    result = shrink(model, 0.5, example=x)
    assert result
    assert sum(p.numel() for p in model.parameters()) < 0.65 * weights
    assert model(x).shape == before.shape
    model(x).sum().backward()

    save_model(tmp_path / "small", model.state_dict(), {"shrunk": result.record})
    state, structure = load_model(tmp_path / "small")
    again = MODELS[name][0]().double().eval()
    rebuild(again, structure["shrunk"])
    again.load_state_dict(state)
    assert torch.equal(again(x), model(x))
    assert str(again) == str(model)


@pytest.mark.parametrize("name", ["sparse residual", pytest.param("vit", marks=pytest.mark.slow)])
def test_the_order_of_groups_does_not_matter(name):
    model, x = made(name)
    following, gone = groups_and_masks(model, x)
    several = [following.removal({number: mask}, {}).step for number, mask in gone.items()]
    together = copy.deepcopy(model)
    Following(together, x).make_(following.removal(gone, {}), ())
    for order in (several, several[::-1]):
        twin = copy.deepcopy(model)
        for step in order:
            rebuild(twin, [step])
        for (key, a), (_, b) in zip(twin.named_parameters(), together.named_parameters(), strict=True):
            if a.dim() > 1 or "values" in key:  # biases and norms take constants, which depend on what is there
                torch.testing.assert_close(a, b)


def test_what_an_optimizer_keeps_is_cut_with_the_weights():
    model, x = made("residual")
    model.train()
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
    with attach(model, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        kept = {name: {**optimizer.state[p]} for name, p in model.named_parameters()}
        result = shrink(model, 0.5, example=x)
        (step,) = result.record
        for name, parameter in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq"):
                expected = kept[name][key]
                for dimension, entry in step["cut"].get(name, {}).items():
                    expected = expected.index_select(int(dimension), torch.tensor(entry["kept"]))
                assert torch.equal(optimizer.state[parameter][key], expected), name
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {*map(id, model.parameters())}
        model(x).square().sum().backward()
        optimizer.step()


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix = nn.Embedding(9, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, numbers: Tensor) -> Tensor:
            return self.head(self.words(numbers) + self.mix(self.words(numbers)).relu())

    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    numbers = torch.randint(0, 9, (2, 4))
    model(numbers).sum().backward()
    optimizer.step()
    assert shrink(model, 0.5, example=numbers, optimizers=[optimizer]) == {"words": 3, "mix": 3}
    assert model.head.weight is model.words.weight
    assert model.words.embedding_dim == model.head.in_features == 3
    assert len(optimizer.param_groups[0]["params"]) == 3
    model(numbers).sum().backward()
    optimizer.step()


def test_layers_are_named_as_in_a_sequence():
    model, x = made("mlp")
    twin = copy.deepcopy(model)
    keep = {"0": torch.tensor([0, 3, 8]), "2": torch.tensor([True] * 5 + [False] * 3)}
    assert shrink(model, keep) == shrink(twin, keep, example=x) == {"0": 6, "2": 3}
    torch.testing.assert_close(model(x), twin(x))
    assert str(model) == str(twin)
    again, _ = made("mlp")
    rebuild(again, json.loads(json.dumps(shrink(made("mlp")[0], keep).record)))
    assert str(again) == str(model)


@pytest.mark.parametrize("score", [magnitude, incoming, taylor])
def test_those_with_the_least_score_go(score):
    model, x = made("residual")
    model(x).square().sum().backward()
    group = next(g for g in Following(model, x).groups if g.name == "stage1_0.conv1")
    scores = score(model, group)
    assert scores.shape == (4,)
    order = scores.argsort()
    weights = model.get_submodule("stage1_0.conv1").weight.clone()
    shrink(model, 0.5, example=x, score=score)
    stay = order[2:].sort().values
    left = model.get_submodule("stage1_0.conv1").weight
    assert left.shape[0] == 2
    assert any(torch.equal(left, weights[stay][:, pair]) for pair in torch.combinations(torch.arange(4)))


def test_rounding_is_to_multiples_and_what_stays_whole_is_said():
    model, x = made("residual")
    result = shrink(model, 0.3, example=x, round_to=4)
    assert "round_to=4 leaves none" in result.whole["stage1_0.conv1"]
    assert all(m.out_channels % 4 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))
    assert "output of the model" in result.left["head"]


def test_heads_go_as_a_whole_and_the_residual_stream_is_said_to_be_inexact():
    model, x = made("vit")
    mask = torch.ones(8, dtype=torch.bool)
    mask[2:4] = False
    result = shrink(model, {"blocks.0.value": mask}, example=x)
    assert result == {f"blocks.0.{part}": 2 for part in ("query", "key", "value")}
    assert not result.inexact
    assert "norm1" in shrink(model, {"patches": torch.arange(6)}, example=x).inexact["patches"]


class Own(nn.Module):
    def __init__(self, then) -> None:
        super().__init__()
        self.a, self.b, self.then = nn.Linear(4, 6), nn.Linear(6, 2), then

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.then(self.a(x)))


@pytest.mark.parametrize(
    ("make", "keep", "text"),
    [
        (lambda: made("vit"), {"blocks.0.key": torch.tensor([0, 1, 2])}, "go together or not at all"),
        (lambda: made("residual"), {"stage1_0.conv2": torch.tensor([0]), "stem.0": torch.tensor([1])}, "lose their features"),
        (lambda: made("residual"), {"head": torch.tensor([0])}, "output of the model"),
        (lambda: made("residual"), {"stem.0": torch.tensor([9])}, "numbers from 0 to 3"),
        (lambda: made("residual"), {"nowhere": torch.tensor([0])}, "no layers that make features"),
        (lambda: made("residual"), 0.0, "in \\(0, 1\\]"),
        (lambda: (Own(lambda y: y.sort(-1).values), torch.rand(3, 4)), {"a": torch.tensor([0])}, "sort"),
        (lambda: (Own(lambda y: y.cummax(-1).values), torch.rand(3, 4)), {"a": torch.tensor([0])}, "cummax.* not known"),
        (lambda: (Own(lambda y: y * torch.ones(6)), torch.rand(3, 4)), {"a": torch.tensor([0])}, "widths of its own"),
        (lambda: (Own(lambda y: y if y.sum() > 0 else -y), torch.rand(3, 4)), 0.5, "paths="),
        (lambda: (Own(lambda y: y), torch.rand(3, 5)), 0.5, "torch.export cannot follow"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_changes(make, keep, text):
    model, x = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        shrink(model, keep, example=x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ("no", "list of steps"),
        ([{"cut": {"nowhere.weight": {"0": {"of": 3, "kept": [0]}}}, "numbers": {}}], "no nowhere.weight"),
        ([{"cut": {"0.weight": {"0": {"of": 3, "kept": [0]}}}, "numbers": {}}], "has 9 lines"),
        ([{"cut": {"0.weight": {"0": {"of": 9, "kept": [9]}}}, "numbers": {}}], "cannot be"),
        ([{"cut": {"0.weight": {"0": {"of": 9, "kept": []}}}, "numbers": {}}], "cannot be"),
        ([{"cut": {}}], "no step of a record"),
        ([{"cut": {}, "numbers": {"0.training": 3, "0.weight": 2}}], "no number"),
    ],
)
def test_a_record_of_another_model_is_refused(record, text):
    model, _ = made("mlp")
    before = str(model)
    with pytest.raises(ValueError, match=text):
        rebuild(model, record)
    assert str(model) == before


def test_a_share_needs_an_example_and_paths_exclude_it():
    with pytest.raises(ValueError, match="give example="):
        shrink(mlp(3, 4, 2), 0.5)
    with pytest.raises(ValueError, match="not both"):
        shrink(mlp(3, 4, 2), 0.5, example=torch.rand(2, 3), paths={})


@pytest.mark.parametrize(
    "name", ["depthwise", "vit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("residual", "decoder"))]
)
def test_a_method_removes_on_schedule_and_resumes_as_if_never_stopped(name):
    def train(model: nn.Module, x: Tensor, steps: int, state=None) -> tuple[nn.Module, dict]:
        model.train()
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
        method = ImportancePruning(every=2, percentile=30, start=2, until=5, least=2, example=x)
        if state is not None:
            resize_to(model, state["model"], optimizers=[optimizer])
        with attach(model, optimizer, method) as session:
            if state is not None:
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
                session.load_state_dict(state["session"])
            for _ in range(steps):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
            kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
            return model, copy.deepcopy(kept) | {"removed": dict(method.removed)}

    model, x = made(name)
    whole, after = train(copy.deepcopy(model), x, 5)
    assert sum(after["removed"].values()) > 0
    _, half = train(copy.deepcopy(model), x, 3)
    resumed, again = train(copy.deepcopy(model), x, 2, half)
    assert again["removed"] == after["removed"]
    assert str(resumed) == str(whole)
    for (key, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
