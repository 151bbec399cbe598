#!/usr/bin/env bash
# parallel_jobs.sh [ROOT]: prints how many compilers may run at once.
#
# They take up to 2 GB each, and in a container its share counts, not the machine's: cgroup v2, and
# v1 as container engines mount it. ROOT is the folder of proc/ and sys/, for the test.
set -euo pipefail

root=${1-}
cgroups=$root/sys/fs/cgroup
n_cpus=$(nproc)
memory_kib=$(awk '$1 == "MemAvailable:" {print $2}' "$root/proc/meminfo")

lower() { echo $(($1 < $2 ? $1 : $2)); }
is_number() { [[ ${1-} =~ ^[0-9]+$ ]]; }
limit_cpus() { # MICROSECONDS in every PERIOD; words and negative numbers mean no limit
  is_number "${1-}" && is_number "${2-}" && (($2 > 0)) || return 0
  n_cpus=$(lower "$n_cpus" $(($1 / $2)))
}
limit_memory() { # BYTES
  is_number "${1-}" || return 0
  memory_kib=$(lower "$memory_kib" $(($1 / 1024)))
}
contents() { [[ ! -r $1 ]] || cat "$1"; }

# Each group may be limited, and so may those above it.
path=$(contents "$root/proc/self/cgroup" | sed -n 's/^0:://p')
folder=$cgroups$path
[[ $path == /* && $path != *..* && -d $folder ]] || folder=$cgroups
while [[ $folder == "$cgroups"* ]]; do
  read -r quota period <<< "$(contents "$folder/cpu.max")"
  limit_cpus "$quota" "$period"
  limit_memory "$(contents "$folder/memory.max")"
  folder=$(dirname "$folder")
done
limit_cpus "$(contents "$cgroups/cpu/cpu.cfs_quota_us")" "$(contents "$cgroups/cpu/cpu.cfs_period_us")"
limit_memory "$(contents "$cgroups/memory/memory.limit_in_bytes")"

n_jobs=$(lower "$n_cpus" $((memory_kib / (2 << 20))))
echo $((n_jobs < 1 ? 1 : n_jobs))
