"""The int8 code of AVX-512 VNNI gives the same numbers, on machines without it too: its intrinsics are emulated by SIMDe."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "cpp" / "runtime"


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/usr/include/simde").is_dir() or shutil.which("g++") is None, reason="needs g++ and SIMDe (libsimde-dev)"
)
def test_emulated_vnni_passes_the_tests_of_integers(tmp_path: Path) -> None:
    nanobind = pytest.importorskip("nanobind")
    module = tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    parts = ["integers", "integer_pack", "integer_portable", "integer_avx2", "integer_vnni"]
    package = Path(nanobind.include_dir()).parent
    sources = [HERE / "emulated.cpp", package / "src" / "nb_combined.cpp", *(SOURCES / f"{part}.cpp" for part in parts)]
    flags = [
        "-std=c++17",
        "-O1",
        "-mavx2",
        "-mfma",
        "-ffp-contract=off",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-fno-strict-aliasing",
    ]
    includes = [
        HERE,
        SOURCES,
        nanobind.include_dir(),
        package / "ext" / "robin_map" / "include",
        sysconfig.get_path("include"),
    ]
    defines = ["-DNOCTULE_SIMDE", "-DNOCTULE_X86", "-DNDEBUG"]
    command = ["g++", *flags, *defines, *(f"-I{path}" for path in includes), *map(str, sources), "-o", str(module)]
    subprocess.run(command, check=True)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_integers.py")]
    subprocess.run(tests, check=True, env={**os.environ, "NOCTULE_EMULATED": str(module)})
