"""A CUDA device without Triton: blocks run in plain torch, and a warning says so once."""

import sys
import warnings

import torch
from torch._subclasses import FakeTensorMode

from noctule import kernels
from noctule.kernels import reference


def test_it_falls_back_and_says_so_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "noctule.kernels.triton", raising=False)
    kernels._triton.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught, FakeTensorMode():
            warnings.simplefilter("always")
            small = torch.empty(3, 8, 8, device="cuda")
            assert kernels._code_for(small, block=(8, 8)) is reference
            assert not caught
            values = torch.empty(3, 32, 32, device="cuda")
            assert [kernels._code_for(values, block=(32, 32)) for _ in range(3)] == [reference] * 3
        assert [str(w.message)[:25] for w in caught] == ["Triton cannot be imported"]
    finally:
        kernels._triton.cache_clear()
