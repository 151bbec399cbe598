#!/usr/bin/env bash
# make_bundle.sh BUILD OUT: the binaries of a build folder with every library that they need but
# glibc's, in a folder that runs wherever glibc is at least as new as here, and OUT.tar.xz to carry.
#
# CUDA's libraries are never inside (cuBLASLt alone is 500 MB): cudart is linked statically, the rest is
# the machine's and loaded at run time (docs/adr/0011-cuda-libraries-by-dlopen.md).
set -euo pipefail

build=$1
out=$2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=cmake/relocate.sh
source "$root/cmake/relocate.sh"

rm -rf "$out"
mkdir -p "$out/bin"
for program in "$build"/bin/* "$build"/bench/* "$build"/tests/*gpu_test; do
  if [[ -f $program && -x $program ]]; then install -m 755 "$program" "$out/bin/"; fi
done
[[ -x $out/bin/gpu_test ]] || die "$build was built without CUDA"
strip --strip-unneeded "$out"/bin/*

# OpenBLAS is loaded at run time, so ldd does not show it.
openblas=$(ldconfig -p | awk '$1 == "libopenblas.so.0" {print $NF; exit}')
[[ -n $openblas ]] || die "libopenblas.so.0 is not installed"
relocate "$out" "$openblas"

install -m 755 "$root/tests/gpu/run-gpu-tests.sh" "$out/"
mkdir "$out/bench"
install -m 755 "$root"/tests/bench/*.sh "$root"/tests/bench/*.py "$out/bench/"
install -D -m 644 -t "$out/tests/golden/pipeline" "$root/tests/golden/pipeline/smollm2_cpu_jobs.json"
# Texts for the tests of a real model. They are test data, not ours to ship: a bundle that is made
# where they are missing has none, and those tests then skip.
data=${WALSH_TEST_DATA:-$root/../shared/data}
for text in corpora/wikitext-train-1000.json corpora/wiki.test.raw; do
  if [[ -f $data/$text ]]; then install -D -m 644 "$data/$text" "$out/data/$text"; fi
done

check_relocated "$out"
env -i "$moved/bin/gpu_test" --gtest_brief=1 > /dev/null || die "gpu_test does not start when moved"

# What is carried to a GPU machine is the archive: OpenBLAS with its kernels for every processor has
# 37 MB unpacked, more than half of what may travel.
pack "$out" $((64 << 20))
