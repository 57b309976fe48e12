"""What sparsity costs in accuracy: paired trainings of the recipe, the test set read once by each."""

import tempfile
from pathlib import Path
from typing import Any

import torch

from noctule.measure.paired import interval
from noctule.recipes import sparse_mlp
from noctule.report import RunFolder
from noctule_bench import program

PARTS = ("dense", "static", "original")
WITHIN_DENSE_POINTS = 0.5
ORIGINAL_LEAST = 0.855


def accuracy(
    *,
    data: str = "fashion-mnist",
    data_dir: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    epochs: int = 20,
    original_epochs: int = 10,
    hidden: tuple[int, ...] = (1000, 1000, 1000),
    density: float = 0.045,
    low_density: float = 0.01,
    parts: tuple[str, ...] = (),
    threads: int = 1,
    runs: Path | None = None,
    out: Path | None = None,
) -> None:
    """Compare the sparse recipe with its dense twin, rewired with static networks, and train the original recipe.

    Args:
        data: a data set.
        data_dir: where data sets are looked for first.
        seeds: one pair of trainings for each.
        epochs: of the default recipe.
        original_epochs: of the original recipe, whose last epoch counts.
        hidden: widths of the hidden layers.
        density: of the sparse network beside its dense twin.
        low_density: of the rewired network beside the static one.
        parts: dense, static, original (default: all).
        threads: of every training.
        runs: a folder where the runs are kept; finished ones found there are not trained again.
        out: a file that the lines are appended to.
    """
    program.at_least_one(epochs=epochs, original_epochs=original_epochs, threads=threads, seeds=len(seeds))
    chosen = program.chosen(parts, list(PARTS))
    lines = program.Lines(out)
    torch.set_num_threads(threads)
    common: dict[str, Any] = {"data": data, "data_dir": data_dir, "hidden": hidden}
    with tempfile.TemporaryDirectory() as temporary:
        folder = runs or Path(temporary)

        def train(name: str, seed: int, **options: Any) -> dict[str, Any]:
            return _train(folder / f"{name}-{seed}", {**common, **options, "seed": seed})

        written = []
        if "dense" in chosen:
            pairs = []
            for seed in seeds:
                series = train("dense", seed, density=density, epochs=epochs, compare="dense")
                pairs.append((series["sparse"]["test_accuracy"], series["dense"]["test_accuracy"]))
                lines.write(
                    "accuracy",
                    part="dense",
                    seed=seed,
                    density=density,
                    epochs=epochs,
                    **_pair(pairs[-1], "sparse", "dense"),
                )
            found = interval(pairs)
            holds = found["difference_points"] >= -WITHIN_DENSE_POINTS
            written.append(
                lines.write("accuracy.target", row="sparse - dense", target=-WITHIN_DENSE_POINTS, holds=holds, **found)
            )
        if "static" in chosen:
            pairs = []
            for seed in seeds:
                options: dict[str, Any] = {"density": low_density, "epochs": epochs, "compare": "none"}
                rewired = train("rewired", seed, **options)["sparse"]["test_accuracy"]
                static = train("static", seed, rewire="none", **options)["sparse"]["test_accuracy"]
                pairs.append((rewired, static))
                lines.write(
                    "accuracy",
                    part="static",
                    seed=seed,
                    density=low_density,
                    epochs=epochs,
                    **_pair(pairs[-1], "rewired", "static"),
                )
            found = interval(pairs)
            holds = all(rewired > static for rewired, static in pairs)
            written.append(
                lines.write("accuracy.target", row="rewired - static, each pair", target=0.0, holds=holds, **found)
            )
        if "original" in chosen:
            for seed in seeds:
                result = train("original", seed, original=True, epochs=original_epochs, compare="none")["sparse"]
                lines.write(
                    "accuracy", part="original", seed=seed, epochs=original_epochs, accuracy=result["test_accuracy"]
                )
                written.append(
                    lines.write(
                        "accuracy.target",
                        row=f"original, seed {seed}",
                        target=ORIGINAL_LEAST,
                        holds=result["test_accuracy"] >= ORIGINAL_LEAST,
                        accuracy=result["test_accuracy"],
                    )
                )
    program.show(
        "accuracy on the test set",
        ("what", "found", "target", "holds"),
        [(line["row"], _found(line), f"{line['target']:g}", "yes" if line["holds"] else "no") for line in written],
    )


def _train(path: Path, options: dict[str, Any]) -> dict[str, Any]:
    run = RunFolder(path) if (path / "run.json").exists() else None
    if run is None:
        run = RunFolder.create(
            path, recipe="sparse_mlp", options=options, seed=options["seed"], threads=torch.get_num_threads()
        )
    elif run.about()["options"] != _plain(options):
        raise ValueError(f"{path} is a run with other options: choose another --runs folder")
    with run:
        return sparse_mlp(run, **options)["series"]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options in the form in which a run folder keeps them: tuples as lists, paths as text."""
    return {
        name: list(v) if isinstance(v, tuple) else str(v) if isinstance(v, Path) else v for name, v in options.items()
    }


def _pair(pair: tuple[float, float], first: str, second: str) -> dict[str, float]:
    return {first: pair[0], second: pair[1], "difference_points": 100 * (pair[0] - pair[1])}


def _found(line: dict[str, Any]) -> str:
    if "accuracy" in line:
        return f"{line['accuracy']:.4f}"
    text = f"{line['difference_points']:+.2f} points"
    return text + (" [{:+.2f}, {:+.2f}]".format(*line["interval_points"]) if line["interval_points"] else "")
