from pathlib import Path
from typing import Literal

import pytest

from noctule.cli.signature import Parser, add_options, from_json
from noctule.core.errors import UsageError
from noctule.core.place import nearest


def recipe(
    run,
    *,
    epochs: int = 3,
    rate: float = 0.5,
    name: str = "a",
    where: Path | None = None,
    fast: bool = False,
    how: Literal["x", "y"] = "x",
    widths: tuple[int, ...] = (1, 2),
):
    """Do it.

    Args:
        epochs: how often,
            in whole numbers.
        how: the way.
    """


def parse(*words: str):
    parser = Parser(prog="test", allow_abbrev=False)
    add_options(parser, recipe)
    return vars(parser.parse_args(list(words)))


def test_types_come_from_the_signature():
    given = parse("--epochs", "5", "--rate", "1e-3", "--where", "/x", "--fast", "--how", "y", "--widths", "3", "4", "5")
    assert given == {"epochs": 5, "rate": 1e-3, "where": Path("/x"), "fast": True, "how": "y", "widths": (3, 4, 5)}
    assert parse() == {}
    assert parse("--no-fast") == {"fast": False}
    assert parse("--widths") == {"widths": ()}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--epoch", "3"], "did you mean --epochs"),
        (["--epochs", "three"], "invalid int value"),
        (["--how", "z"], "invalid choice"),
        (["stray"], "no argument stray"),
        (["--epochs"], "expected one argument"),
    ],
)
def test_wrong_words_are_usage_errors(words, text):
    with pytest.raises(UsageError, match=text):
        parse(*words)


def test_help_has_the_docstring_and_the_defaults():
    parser = Parser(prog="test")
    add_options(parser, recipe)
    text = " ".join(parser.format_help().split())
    assert "how often, in whole numbers. (default: 3)" in text
    assert "(default: 1 2)" in text


def test_json_round_trip_restores_types():
    stored = {"epochs": 4, "where": "/x", "widths": [3], "fast": True, "how": "y", "rate": 1}
    assert from_json(recipe, stored) == {
        "epochs": 4,
        "where": Path("/x"),
        "widths": (3,),
        "fast": True,
        "how": "y",
        "rate": 1.0,
    }
    assert from_json(recipe, {"where": None}) == {"where": None}
    with pytest.raises(UsageError, match="did you mean epochs"):
        from_json(recipe, {"epoch": 1})


def test_recipes_without_defaults_or_with_odd_types_are_refused():
    def bare(run, *, x): ...

    def odd(run, *, x: dict = {}): ...  # noqa: B006

    for bad in (bare, odd):
        with pytest.raises(UsageError, match="option x of"):
            add_options(Parser(), bad)


def test_nearest_says_nothing_when_nothing_is_near():
    assert nearest("zzz", ["epochs"]) == ""
