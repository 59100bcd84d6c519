#!/bin/sh
# Fuzz the decoder of the core:   run.sh [SECONDS]
# With clang and its libFuzzer where they are (Debian: apt-get install clang), else with any compiler
# and the driver beside this, which also writes the inputs that libFuzzer begins with.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
native=$here/../../nexus_ext/native
seconds=${1:-60}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
flags="-std=c11 -Wall -Wextra -Werror -O1 -g -D_GNU_SOURCE -I$native/include -I$native"
sources="$here/fuzz_ans.c"
for file in decode encode simd neon; do sources="$sources $native/codec_ans_$file.c"; done
checks="address,undefined -fno-sanitize-recover=all"

echo 'int LLVMFuzzerTestOneInput(const unsigned char *, unsigned long);
int LLVMFuzzerTestOneInput(const unsigned char *p, unsigned long n) { return p && n ? 0 : 0; }' \
    >"$build/try.c"
cd "$build"
if clang -fsanitize=fuzzer "$build/try.c" -o "$build/try" 2>/dev/null; then
    # shellcheck disable=SC2086
    clang $flags -fsanitize=fuzzer,$checks $sources -lm -o "$build/fuzz"
    # shellcheck disable=SC2086
    clang $flags $sources "$here/driver.c" -lm -o "$build/driver"
    mkdir "$build/corpus"
    "$build/driver" --inputs 300 "$build/corpus"
    "$build/fuzz" -max_total_time="$seconds" -max_len=80000 -print_final_stats=1 "$build/corpus" 2>"$build/log" || {
        cat "$build/log" >&2
        for crash in "$build"/crash-* "$build"/timeout-* "$build"/oom-*; do
            if [ -e "$crash" ]; then cp "$crash" "$here/" && echo "the input is in $here" >&2; fi
        done
        exit 1
    }
    grep -E "cov:|stat::" "$build/log" | tail -8
else
    # shellcheck disable=SC2086
    ${CC:-cc} $flags -fsanitize=$checks $sources "$here/driver.c" -lm -o "$build/fuzz"
    "$build/fuzz" "$seconds"
fi
