#!/usr/bin/env bash
# make_bundle.sh BUILD OUT: the binaries of a build folder with every library that they need but
# glibc's, in a folder that runs wherever glibc is at least as new as here, and OUT.tar.gz to carry.
#
# CUDA's libraries are never inside (cuBLASLt alone is 500 MB): cudart is linked statically, the rest is
# the machine's and loaded at run time (docs/adr/0011-cuda-libraries-by-dlopen.md).
set -euo pipefail

build=$1
out=$2
readonly bytes_max=$((64 << 20))
# The C library and its loader belong to the machine.
readonly glibc='^(ld-linux-x86-64|libc|libm|libmvec|libpthread|libdl|librt|libresolv|libutil|libanl)\.so'

die() {
  printf 'make_bundle: %s\n' "$*" >&2
  exit 1
}

# needed FILE...: the paths of the libraries that the files load, without glibc's.
needed() {
  local name arrow path
  ldd "$@" 2> /dev/null | while read -r name arrow path _; do
    [[ $arrow == '=>' ]] || continue
    [[ $name =~ $glibc ]] && continue
    [[ $path == /* ]] || die "$name is not on this machine"
    printf '%s\n' "$path"
  done | sort -u
}

rm -rf "$out"
mkdir -p "$out/bin" "$out/lib"
for program in "$build"/bin/* "$build"/bench/* "$build"/tests/*gpu_test; do
  if [[ -f $program && -x $program ]]; then install -m 755 "$program" "$out/bin/"; fi
done
[[ -x $out/bin/gpu_test ]] || die "$build was built without CUDA"

# OpenBLAS is loaded at run time, so ldd does not show it.
openblas=$(ldconfig -p | awk '$1 == "libopenblas.so.0" {print $NF; exit}')
[[ -n $openblas ]] || die "libopenblas.so.0 is not installed"
while read -r library; do
  install -m 644 "$library" "$out/lib/$(basename "$library")"
done < <({ printf '%s\n' "$openblas"; needed "$out"/bin/* "$openblas"; } | sort -u)

strip --strip-unneeded "$out"/bin/* "$out"/lib/*
for library in "$out"/lib/*; do patchelf --set-rpath "\$ORIGIN" "$library"; done
for program in "$out"/bin/*; do patchelf --set-rpath "\$ORIGIN/../lib" "$program"; done
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
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

# From another place and an empty environment, every library must come from the bundle.
moved=$(mktemp -d)
trap 'rm -rf "$moved"' EXIT
cp -r "$out" "$moved/walsh"
for file in "$moved"/walsh/bin/* "$moved"/walsh/lib/*; do
  while read -r name _ path _; do
    [[ $name =~ $glibc || $name == linux-vdso* || $name == /lib64/* || $name == statically ]] && continue
    [[ $path == "$moved"/walsh/* ]] || die "$(basename "$file") takes $name from $path"
  done < <(env -i ldd "$file")
done
env -i "$moved/walsh/bin/gpu_test" --gtest_brief=1 > /dev/null || die "gpu_test does not start when moved"

# What is carried to a GPU machine is the archive: OpenBLAS with its kernels for every processor has
# 37 MB unpacked, more than half of what may travel.
tar -C "$(dirname "$out")" -czf "$out.tar.gz" "$(basename "$out")"
n_bytes=$(stat -c %s "$out.tar.gz")
printf '%s: %d programs, %d libraries, %d MiB; %s: %d MiB\n' "$out" \
  "$(find "$out/bin" -type f | wc -l)" "$(find "$out/lib" -type f | wc -l)" \
  $(($(du -sb "$out" | cut -f1) >> 20)) "$out.tar.gz" $((n_bytes >> 20))
((n_bytes <= bytes_max)) || die "$out.tar.gz has $n_bytes bytes, at most $bytes_max"
