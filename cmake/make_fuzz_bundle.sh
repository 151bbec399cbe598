#!/usr/bin/env bash
# make_fuzz_bundle.sh BUILD WORK OUT: the fuzz targets of a build folder with their libraries, the corpus and
# what fuzzing in WORK has learned, in a folder that runs wherever glibc is at least as new as here, and
# OUT.tar.xz to carry.
set -euo pipefail

build=$1
work=$2
out=$3
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=cmake/relocate.sh
source "$root/cmake/relocate.sh"

rm -rf "$out"
mkdir -p "$out/bin" "$out/fuzz"
install -m 755 "$build"/bin/*_fuzz "$out/bin/"
strip --strip-debug "$out"/bin/*  # functions keep their names
relocate "$out"
cp -r "$root"/tests/fuzz/{run_fuzzers.py,regressions} "$root"/tests/fuzz/*.dict "$out/fuzz/"
# Of the corpus and what was learned, as much as reaches all that the whole does.
for fuzzer in "$out"/bin/*; do
  target=$(basename "$fuzzer" _fuzz)
  mkdir -p "$out/fuzz/corpus/$target" "$work/corpus/$target"
  "$fuzzer" -set_cover_merge=1 "$out/fuzz/corpus/$target" "$root/tests/fuzz/corpus/$target" "$work/corpus/$target" \
    2> /dev/null || die "$target fails on its corpus"
done

check_relocated "$out"
env -i "PATH=$PATH" python3 "$moved/fuzz/run_fuzzers.py" "$moved/bin" "$moved/work" --seconds 1 > /dev/null ||
  die "the targets do not run when moved"
pack "$out" $((25 << 20))
