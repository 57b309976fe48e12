"""Which smaller model meets what is asked? Candidates are trained, written and measured, and one is chosen."""

from noctule.shrinking.candidates import Candidate, Change, changes_for
from noctule.shrinking.folder import Asked
from noctule.shrinking.front import Bound, choose, front
from noctule.shrinking.searching import search
from noctule.shrinking.source import SHIPPED, Source, of_function, of_name, of_run

__all__ = [
    "SHIPPED",
    "Asked",
    "Bound",
    "Candidate",
    "Change",
    "Source",
    "changes_for",
    "choose",
    "front",
    "of_function",
    "of_name",
    "of_run",
    "search",
]
