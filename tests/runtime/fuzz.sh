#!/usr/bin/env bash
# Read and run mutated files with the compiled code under AddressSanitizer and UndefinedBehaviorSanitizer.
# usage: tests/runtime/fuzz.sh PYTHON [FILES]
set -euo pipefail
cd "$(dirname "$0")/../.."
python="$(realpath -s "${1:-.venv/bin/python}")"
count="${2:-100000}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

tools="$(dirname "$python")"
export PATH="$tools:$PATH"
cmake -S . -B "$folder/build" -G Ninja -DPython_EXECUTABLE="$python" -DNOCTULE_RUNTIME_ONLY=ON -DCMAKE_BUILD_TYPE=None -DNOCTULE_OPTIMIZE=-O1 \
    -DCMAKE_CXX_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g" > "$folder/log"
ninja -C "$folder/build" runtime > "$folder/log" || { tail -20 "$folder/log"; exit 1; }
mkdir -p "$folder/noctule"
cp -r src/noctule/runtime "$folder/noctule/"
rm -f "$folder"/noctule/runtime/_native*.so
cp "$folder"/build/runtime/_native*.so "$folder/noctule/runtime/"
cat > "$folder/run.py" <<'PYTHON'
import random
import sys
import time

import test_runtime_file

sound, started, count = 0, time.monotonic(), int(sys.argv[1])
for number in range(count):
    sound += test_runtime_file.survives(random.Random(number))
    if number % 1000 == 999:
        print(f"{number + 1:,} files, {sound:,} of them sound and run, {time.monotonic() - started:.0f} s", flush=True)
PYTHON
cd "$folder"
site="$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
    PYTHONPATH="$folder:$OLDPWD/tests/runtime:$site" "$python" -S run.py "$count"
