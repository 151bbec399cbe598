#!/usr/bin/env python3
"""run_fuzzers.py BIN_FOLDER WORK_FOLDER TARGET SECONDS: runs a fuzz target, or all of them, as many at a
time as there are processors, each for SECONDS.

Each starts from its corpus, its past crashes and what earlier runs found, which WORK_FOLDER keeps. A crash,
a hang or too much memory fails the run: its input is written to WORK_FOLDER/crashes, to be fixed and kept
under regressions/. Prints a row of the table of docs/reliability.md for each target.
"""

import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).parent

# Bytes of the largest input, and resident MiB: a parser's documented limits hold (docs/limits.md), so that
# more is a finding. Templates may spend 256 MiB by their steps, a tokenizer may claim 2^20 ids.
LIMITS = {
    "safetensors": (8192, 256),
    "gguf": (32768, 256),
    "model_config": (8192, 256),
    "artifact_manifest": (8192, 256),
    "tokenizer_json": (8192, 512),
    "sentencepiece_model": (8192, 512),
    "chat_template": (8192, 768),
    "generation_request": (8192, 256),
    "quantization_job": (8192, 256),
}
# Seconds of one input, under sanitizers.
TIMEOUT = 10


def command(target, bin_folder, work, seconds):
    bytes_max, mib_max = LIMITS[target]
    found = work / "corpus" / target
    found.mkdir(parents=True, exist_ok=True)
    (work / "crashes").mkdir(exist_ok=True)
    dictionary = HERE / f"{target}.dict"
    folders = [folder for folder in (found, HERE / "corpus" / target, HERE / "regressions" / target)
               if folder.is_dir()]
    return [bin_folder / f"{target}_fuzz", f"-max_total_time={seconds}", f"-max_len={bytes_max}",
            f"-rss_limit_mb={mib_max}", f"-timeout={TIMEOUT}", "-print_final_stats=1",
            f"-artifact_prefix={work}/crashes/{target}-",
            *([f"-dict={dictionary}"] if dictionary.exists() else []), *folders]


def run(target, bin_folder, work, seconds):
    """The target's output, and whether it ended without a finding."""
    environment = dict(os.environ)
    # Freed memory that is kept to catch its use counts as resident, too.
    environment["ASAN_OPTIONS"] = "quarantine_size_mb=4"
    environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    log = work / f"{target}.log"
    with open(log, "wb") as out:
        done = subprocess.run(command(target, bin_folder, work, seconds), stdout=out, stderr=out,
                              env=environment, check=False)
    return log.read_text(errors="replace"), done.returncode == 0


def row(target, output):
    statistic = dict(re.findall(r"^stat::(\w+):\s+(\d+)", output, re.M))
    executions = int(statistic.get("number_of_executed_units", 0))
    per_second = int(statistic.get("average_exec_per_sec", 0))
    return (f"| {target} | {executions:,} | {per_second:,} | {statistic.get('peak_rss_mb', '?')} |")


def main():
    bin_folder, work = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]).resolve()
    target, seconds = sys.argv[3], int(sys.argv[4])
    if target != "all" and target not in LIMITS:
        sys.exit(f"no target {target}; there are: all, {', '.join(LIMITS)}")
    targets = list(LIMITS) if target == "all" else [target]
    work.mkdir(parents=True, exist_ok=True)
    failed = []
    print("| target | executions | a second | peak MiB |\n| --- | ---: | ---: | ---: |", flush=True)
    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        runs = [pool.submit(run, target, bin_folder, work, seconds) for target in targets]
        for target, future in zip(targets, runs):
            output, is_clean = future.result()
            print(row(target, output), flush=True)
            if not is_clean:
                failed.append(target)
                print(output[-6000:], file=sys.stderr)
    if failed:
        print(f"found by {', '.join(failed)}: the inputs are in {work}/crashes", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
