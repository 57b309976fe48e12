"""The code of AVX-512 gives the products too, on machines without it: its intrinsics are emulated by SIMDe."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "cpp"
SETS = ("portable", "avx2", "avx512")


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/usr/include/simde").is_dir() or shutil.which("g++") is None, reason="needs g++ and SIMDe (libsimde-dev)"
)
def test_emulated_avx512_passes_the_tests_of_the_kernels(tmp_path: Path) -> None:
    nanobind = pytest.importorskip("nanobind")
    package = Path(nanobind.include_dir()).parent
    parts = ["module", *(f"{kind}_{name}" for kind in ("kernels", "codecs") for name in SETS)]
    sources = [package / "src" / "nb_combined.cpp", *(SOURCES / f"{part}.cpp" for part in parts)]
    flags = "-std=gnu++17 -O1 -mavx2 -mfma -mbmi2 -fopenmp -fPIC -fvisibility=hidden -fno-strict-aliasing -w".split()
    defines = ["-DNOCTULE_X86", "-DNDEBUG", "-include", str(HERE / "emulated_avx512.h")]
    includes = [
        SOURCES,
        nanobind.include_dir(),
        package / "ext" / "robin_map" / "include",
        sysconfig.get_path("include"),
    ]
    module = tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = ["g++", *flags, *defines, *(f"-I{path}" for path in includes), *map(str, sources), "-shared"]
    subprocess.run([*command, "-o", str(module)], check=True)
    names = ("products", "epilogue", "steps")
    tests = [str(HERE / f"test_kernels_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "avx512", *tests]
    subprocess.run(command, check=True, env={**os.environ, "NOCTULE_EMULATED": str(module)})
