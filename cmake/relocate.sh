# shellcheck shell=bash
# Sourced by what makes bundles: folders whose programs, OUT/bin, find their libraries in OUT/lib, wherever
# they are put.

# The C library and its loader belong to the machine.
readonly glibc='^(ld-linux-x86-64|libc|libm|libmvec|libpthread|libdl|librt|libresolv|libutil|libanl)\.so'

die() {
  printf '%s: %s\n' "$(basename "$0" .sh)" "$*" >&2
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

# relocate OUT [LIBRARY...]: gives the programs of OUT/bin their libraries, and these too.
relocate() {
  local out=$1 library program
  shift
  mkdir -p "$out/lib"
  while read -r library; do
    install -m 644 "$library" "$out/lib/$(basename "$library")"
  done < <({ (($# == 0)) || printf '%s\n' "$@"; needed "$out"/bin/* "$@"; } | sort -u)
  strip --strip-unneeded "$out"/lib/*
  for library in "$out"/lib/*; do patchelf --set-rpath "\$ORIGIN" "$library"; done
  for program in "$out"/bin/*; do patchelf --set-rpath "\$ORIGIN/../lib" "$program"; done
}

# check_relocated OUT: from another place and an empty environment, every library must come from the bundle.
# $moved is that place, which goes with the script.
check_relocated() {
  local file name path
  moved=$(mktemp -d)
  trap 'rm -rf "$moved"' EXIT
  cp -r "$1/." "$moved"
  for file in "$moved"/bin/* "$moved"/lib/*; do
    while read -r name _ path _; do
      [[ $name =~ $glibc || $name == linux-vdso* || $name == /lib64/* || $name == statically ]] && continue
      [[ $path == "$moved"/* ]] || die "$(basename "$file") takes $name from $path"
    done < <(env -i ldd "$file")
  done
}

# pack OUT BYTES_MAX: OUT.tar.xz, which may not be larger. Programs have much code in common, the kernels for
# GPUs above all: a dictionary of about their size keeps it once.
pack() {
  local out=$1 n_bytes
  tar -C "$(dirname "$out")" -cf - "$(basename "$out")" | xz --lzma2=preset=1,dict=256MiB > "$out.tar.xz"
  n_bytes=$(stat -c %s "$out.tar.xz")
  printf '%s: %d programs, %d libraries, %d MiB; %s: %d MiB\n' "$out" \
    "$(find "$out/bin" -type f | wc -l)" "$(find "$out/lib" -type f | wc -l)" \
    $(($(du -sb "$out" | cut -f1) >> 20)) "$out.tar.xz" $((n_bytes >> 20))
  ((n_bytes <= $2)) || die "$out.tar.xz has $n_bytes bytes, at most $2"
}
