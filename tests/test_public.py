"""The public surface is written down here: a change of it is a decision, not an accident."""

import subprocess
import sys

import noctule

PUBLIC = """
AllReLU Batches Checkpoints Conversion Dataset Decay ExponentialAverage Factor FuseEpilogue ImportancePruning
KeepLayout Method Prune Remap Rewire RunFolder Session SparseConv2d SparseLinear SparseMLPClassifier
SparseMLPRegressor StaticInt8 ToDense ToSparse Topology WeightOnly attach card_of compress_saved convert_ ctre erdos_renyi
evaluate export fit follow footprint gradual_magnitude gse keep_freed_memory load_model merge mlp param_groups rebuild resize
rigl save_model set_ shrink taps uniform write_report
""".split()


def test_public_names():
    assert noctule.__all__ == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(noctule, name).__doc__, f"{name} has no docstring"


def test_importing_does_nothing():
    code = (
        "import sys, noctule; loaded = {m.split('.')[0] for m in sys.modules};"
        "assert not loaded & {'torch', 'numpy', 'sklearn', 'tensorboard', 'safetensors'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_star_import_and_dir_agree():
    namespace: dict[str, object] = {}
    exec("from noctule import *", namespace)
    assert set(PUBLIC) <= set(namespace)
    assert set(PUBLIC) <= set(dir(noctule))
