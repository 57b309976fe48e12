"""A ticket's file: what was saved is loaded, and what is no ticket is refused, without a secret in the error."""

import dataclasses
import json
import traceback

import pytest

from noctule.parallel import Ticket

TICKET = Ticket(3, ("tcp://127.0.0.1:5999", "tcp://127.0.0.1:6000"), "server's", "public one", "hidden one")


def test_what_was_saved_is_loaded_whatever_else_the_file_says(tmp_path):
    TICKET.save(tmp_path / "ticket")
    assert Ticket.load(tmp_path / "ticket") == TICKET
    found = json.loads((tmp_path / "ticket").read_text())
    (tmp_path / "more").write_text(json.dumps({**found, "strategy": {"strategy": "bsp"}}))
    assert Ticket.load(tmp_path / "more") == TICKET


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("server_key", 5),
        ("public_key", None),
        ("secret_key", ["hidden one"]),
        ("addresses", [5]),
        ("addresses", []),
        ("addresses", "tcp://127.0.0.1:5999"),
        ("addresses", {"tcp://127.0.0.1:5999": "hidden one"}),
        ("worker", "x"),
        ("worker", -1),
        ("worker", True),
        ("worker", 1.5),
    ],
)
def test_a_damaged_ticket_is_refused(tmp_path, name, value):
    path = tmp_path / "ticket"
    path.write_text(json.dumps({**dataclasses.asdict(TICKET), name: value}))
    with pytest.raises(ValueError, match=r"ticket holds no ticket: write one with server\.ticket") as caught:
        Ticket.load(path)
    text = "".join(traceback.format_exception(caught.value))
    assert f"its {name} cannot be one" in text
    assert "hidden" not in text


@pytest.mark.parametrize("text", ["", "[]", "5", "null", '"ticket"', "{", "{}", '{"worker": 3}', "\0"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "ticket").write_text(text)
    with pytest.raises(ValueError, match="holds no ticket"):
        Ticket.load(tmp_path / "ticket")
