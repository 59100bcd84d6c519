#!/bin/sh
# Build every test_*.c here with the core's sources, plainly and under the sanitizers, and run them.
#   run.sh [test ...]     test: "io" or "test_io.c"; none: all
# CC chooses the compiler; NX_TEST_BUILDS a subset of "plain address thread".
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
native=$here/../../nexus_ext/native
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
cc=${CC:-cc}
warnings="-std=c11 -ffp-contract=off -Wall -Wextra -Werror"
sanitize="-O1 -g -fno-omit-frame-pointer"
include="-I$native/include -I$native -I$here"
case $(uname -s) in
Darwin) defines='' ;;
*) defines='-D_GNU_SOURCE' ;;
esac

if [ $# -eq 0 ]; then
    for file in "$here"/test_*.c; do set -- "$@" "$(basename "$file" .c)"; done
fi

flags_of() {
    case $1 in
    plain) echo "-O2 -g" ;;
    address) echo "$sanitize -fsanitize=address,undefined -fno-sanitize-recover=all" ;;
    thread) echo "$sanitize -fsanitize=thread" ;;
    *) echo "run.sh: unknown build '$1'" >&2; exit 2 ;;
    esac
}

# The core is compiled once per build, all builds side by side; then each test is one file more.
compile_core() {
    mkdir -p "$build/$1"
    for source in "$native"/*.c; do
        # shellcheck disable=SC2046,SC2086
        $cc $warnings $(flags_of "$1") $defines '-DNX_VERSION="test"' -pthread $include \
            -c "$source" -o "$build/$1/$(basename "$source" .c).o"
    done
}

builds=${NX_TEST_BUILDS:-plain address thread}
pids=''
for kind in $builds; do
    compile_core "$kind" & pids="$pids $!"
done
for pid in $pids; do wait "$pid"; done

for kind in $builds; do
    for name in "$@"; do
        name=${name%.c}
        name=test_${name#test_}
        # shellcheck disable=SC2046,SC2086
        $cc $warnings $(flags_of "$kind") $defines -pthread $include "$here/$name.c" \
            "$build/$kind"/*.o -lm -ldl -o "$build/$name-$kind"
        echo "$name ($kind)"
        ASAN_OPTIONS=${ASAN_OPTIONS:-detect_leaks=1} TSAN_OPTIONS=${TSAN_OPTIONS:-halt_on_error=1} \
            "$build/$name-$kind"
    done
done
