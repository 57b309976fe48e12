"""Train a truly sparse transformer on the characters of a text, beside its dense twin."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from noctule.checkpoint import save_model
from noctule.core.convert import convert_
from noctule.core.method import Method
from noctule.core.optim import param_groups
from noctule.core.schedule import cosine
from noctule.data import Batches, read_text
from noctule.data.names import InputFile
from noctule.models import Transformer
from noctule.recipes.own_data import describe
from noctule.recipes.training import Compare, Moving, falling_rewire, linear_layers, train_classifier, train_series
from noctule.report import Journal, RunFolder
from noctule.sparse.layers import FuseEpilogue, SparseLinear, ToSparse

FEW_INPUTS = 40
"""Most inputs of a linear layer that learns at the full rate."""


def sparse_transformer(
    run: RunFolder,
    *,
    text: InputFile | None = None,
    width: int = 256,
    depth: int = 4,
    heads: int = 4,
    context: int = 128,
    epochs: int = 3,
    batch: int = 8,
    density: float = 0.1,
    rewire: Moving = "gse",
    fraction: float = 0.3,
    every: int = 100,
    learning_rate: float = 0.01,
    weight_decay: float = 0.01,
    dropout: float = 0.0,
    compare: Compare = "auto",
    seed: int = 0,
    checkpoint_seconds: float = 30.0,
) -> dict[str, Any]:
    """A transformer over characters that stores, computes and learns its non-zeros only.

    Losses are in nats per character, accuracies the share of characters that were guessed right.

    Args:
        text: a file in UTF-8, whose last tenth is the test part and the tenth before the validation part (default:
            Python's own help on the language).
        width: of the residual stream.
        depth: blocks.
        heads: of each attention.
        context: characters before a prediction that the network reads.
        epochs: passes over the training part.
        batch: windows of the text in a step.
        density: share of the linear layers' weights that is kept, shared out by Erdos-Renyi.
        rewire: how connections move: guided (gse), steepest gradient (rigl), random (set), or not at all.
        fraction: of the connections that move each time, falling along a cosine to zero at three quarters of the training.
        every: steps from one move to the next.
        learning_rate: at the start; it falls along a cosine to a hundredth. A linear layer with more than 40 inputs to an output,
            stored ones, learns the more slowly the more it has.
        weight_decay: decoupled from the gradient, times the learning rate.
        dropout: of attention weights and of what each part of a block adds.
        compare: train the dense twin too: yes, no, or where it is small (auto).
        seed: of data order, places, weights and dropout.
        checkpoint_seconds: training time between two checkpoints within an epoch.
    """
    if batch < 1 or epochs < 0:
        raise ValueError(f"batch must be at least 1 and epochs at least 0, got {batch} and {epochs}")
    parts = read_text(text, context=context)
    sizes = {"width": width, "depth": depth, "heads": heads}
    to_sparse = ToSparse(density=density)
    batches = Batches(parts.train, batch, seed=seed)
    steps = epochs * len(batches)

    def methods() -> list[Method]:
        if rewire == "none":
            return []
        return [*falling_rewire(rewire, fraction=fraction, every=every, steps=steps, seed=seed)]

    def network() -> nn.Module:
        torch.manual_seed(seed)
        return Transformer(len(parts.vocabulary), **sizes, dropout=dropout)

    def train(journal: Journal) -> dict[str, Any]:
        sparse = journal.series == "sparse"
        model = network()
        if sparse:
            model = convert_(convert_(model, to_sparse).model, FuseEpilogue()).model
        optimizer = torch.optim.AdamW(
            by_inputs(model, learning_rate=learning_rate, weight_decay=weight_decay), fused=True
        )
        outcome = train_classifier(
            model,
            optimizer,
            batches,
            parts,
            epochs=epochs,
            methods=methods() if sparse else [],
            scheduler=LambdaLR(optimizer, cosine(1.0, end=0.01, steps=steps)) if steps else None,
            journal=journal,
            checkpoint_seconds=checkpoint_seconds,
        )
        if sparse:
            structure = {"kind": "transformer", "vocabulary": parts.vocabulary, **sizes, "layers": linear_layers(model)}
            save_model(run.path, model.state_dict(), structure)
        return outcome

    methods()  # errors come before anything is trained or written
    summary = train_series(
        run,
        train,
        about={"data": describe(parts)},
        compare=compare,
        dense_weights=sum(m.weight.numel() for m in network().modules() if isinstance(m, nn.Linear)),
    )
    for name, outcome in summary["series"].items():
        print(f"{name}: {outcome['test_loss']:.4f} nats per character on the test part")
    return summary


def by_inputs(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups in which the learning rate of a linear layer falls with the inputs of its outputs.

    Yang, Hu, Babuschkin, Sidor, Liu, Farhi, Ryder, Pachocki, Chen, Gao 2022, arXiv 2203.03466: one rate then does for all widths.
    Differs from the paper: inputs are those that are stored, so that it does for all densities too, the dense twin's included.
    """
    inputs: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, SparseLinear):
            inputs[module.values] = module.weights / module.out_features
        elif isinstance(module, nn.Linear):
            inputs[module.weight] = module.in_features
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for group in param_groups(model, weight_decay=weight_decay):
        for parameter in group["params"]:
            rate = learning_rate * FEW_INPUTS / max(inputs.get(parameter, 0.0), FEW_INPUTS)
            own = groups.setdefault((rate, group["weight_decay"]), {**group, "params": [], "lr": rate})
            own["params"].append(parameter)
    return list(groups.values())
