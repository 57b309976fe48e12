"""Train a network with as many neurons as the brain of a bat, end to end, on one machine without a GPU.

Curci, Mocanu, Pechenizkiy 2021, "Truly Sparse Neural Networks at Scale", arXiv 2102.01732, set the record of 50 million. Differs
from the paper: the data are synthetic, and the activation is LeakyReLU, since All-ReLU, ten layers deep, leaves the magnitude of
a signal and little of its sign.
"""

from typing import Any, Literal

from noctule.checkpoint import save_model
from noctule.core.errors import UsageError
from noctule.data.prototypes import Prototypes
from noctule.measure import footprint, measure
from noctule.measure.allocator import keep_memory
from noctule.recipes.bat_brain_network import Brain, connected, momentum_sgd
from noctule.recipes.bat_brain_training import Training
from noctule.report import Journal, RunFolder, write_report
from noctule.report.units import count, duration, percent, size
from noctule.sparse.rewire import Rewire, anywhere, guided
from noctule.team import team

GROWERS = {"set": anywhere, "gse": guided}


def bat_brain(
    run: RunFolder,
    *,
    neurons: int = 50_000_000,
    layers: int = 10,
    epsilon: float = 1.0,
    features: int = 65_536,
    classes: int = 10,
    noise: float = 2.0,
    batch: int = 8,
    steps: int = 60,
    every: int = 20,
    rewire: Literal["set", "gse", "none"] = "set",
    fraction: float = 0.3,
    learning_rate: float = 0.2,
    slope: float = 0.5,
    samples: int = 200,
    seed: int = 0,
    checkpoint_seconds: float = 600.0,
) -> dict[str, Any]:
    """Fifty million neurons and a hundred million weights, trained, rewired, saved and tested without any dense matrix.

    Args:
        neurons: of all hidden layers together.
        layers: hidden layers, all of the same width.
        epsilon: each layer has epsilon (inputs + outputs) weights: about two for each neuron at 1.
        features: numbers in a sample.
        classes: of the synthetic task, noisy copies of one prototype each.
        noise: standard deviation of the noise on the features, which are -1 and 1 in the prototypes.
        batch: samples in a step.
        steps: of training.
        every: steps between two moves of connections, with a validation after each: an epoch of the report.
        rewire: how connections move: random (set), guided by the gradient (gse), or not at all.
        fraction: of the connections that move each time.
        learning_rate: of a layer with one weight for each output; each layer's is over its fan-in.
        slope: of the activation for negative inputs.
        samples: in the validation data, and in the test data.
        seed: of data, places and weights.
        checkpoint_seconds: between two checkpoints; the last is written after the last step.
    """
    if min(batch, every, samples) < 1 or steps < 0:
        raise ValueError(
            f"batch, every and samples must be at least 1 and steps 0, got {batch}, {every}, {samples} and {steps}"
        )
    if not team().alone:
        raise UsageError("bat_brain trains one network in one process: leave --workers out and give it --threads")
    if finished := run.summary():
        return finished
    brain = Brain(neurons=neurons, layers=layers, epsilon=epsilon, features=features, classes=classes, slope=slope)
    data = Prototypes(features=features, classes=classes, noise=noise, seed=seed)
    rewiring = None
    if rewire != "none":  # not after the last step: new connections would not be trained
        rewiring = Rewire(grow=GROWERS[rewire], fraction=fraction, every=every, until=max(steps, 1), seed=seed)
    with keep_memory(), measure() as cost:
        model = brain.model(seed=seed)
        optimizer = momentum_sgd(model, learning_rate)
        facts = {"neurons": neurons, "connected_neurons": connected(model), "weights": brain.weights}
        print(_table(facts), flush=True)
        training = Training(model, optimizer, data, rewiring, batch=batch, every=every, samples=samples)
        training.run(steps, Journal(run, "sparse"), checkpoint_seconds)
        loss, accuracy = training.evaluate("test")
    held = footprint(model, optimizer, all_gradients=True)
    outcome = {
        "test_accuracy": accuracy,
        "test_loss": loss,
        "epochs": -(-steps // every),
        **facts,
        "connected_neurons": connected(model),
        **held.as_dict(),
        **training.facts(),
        "peak_memory_bytes": cost.peak_memory_bytes,
        "joules": cost.joules,
    }
    save_model(run.path, model.state_dict(), {"kind": "bat_brain", "widths": list(brain.widths), "slope": slope})
    about = {"name": "prototypes", "features": features, "classes": classes}
    sizes = {"train": steps * batch, "validation": samples, "test": samples}
    summary = {"data": {**about, **sizes}, "series": {"sparse": outcome}}
    run.write_summary(summary)
    write_report(run)
    print(_table(outcome))
    return summary


def _table(facts: dict[str, Any]) -> str:
    """The known figures, one a line."""
    lines = (
        ("neurons", "neurons", count),
        ("  with a way in and out", "connected_neurons", count),
        ("weights", "weights", count),
        ("values and biases", "weights_bytes", size),
        ("indices", "index_bytes", size),
        ("gradients", "gradient_bytes", size),
        ("optimizer state", "optimizer_bytes", size),
        ("activations", "activation_bytes", size),
        ("peak resident memory", "peak_memory_bytes", size),
        ("a step", "seconds_per_step", duration),
        ("  that moves connections", "seconds_per_moving_step", duration),
        ("a checkpoint", "checkpoint_bytes", size),
        ("  takes", "checkpoint_seconds", duration),
        ("test loss", "test_loss", "{:.3f}".format),
        ("test accuracy", "test_accuracy", percent),
    )
    return "\n".join(f"{label:<26}{shown(facts[name])}" for label, name, shown in lines if name in facts)
