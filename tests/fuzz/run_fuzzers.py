#!/usr/bin/env python3
"""Runs fuzz targets, several processes at a time, and prints a row of the table of docs/reliability.md for each.

Each target is run once for SECONDS. With --executions, processes are shared out for SECONDS until every
target has so many executions, those of earlier runs of the same binary in the same folder counted: whatever
has most left to do gets the next process. Only what is fuzzed counts, not the corpus that a process begins
with.

A process starts from the corpus, past crashes and what others have found, which WORK_FOLDER keeps. A crash,
a hang or too much memory fails the run: its input is written to WORK_FOLDER/crashes, to be fixed and kept
under regressions/.
"""

import argparse
import ctypes
import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import time

HERE = pathlib.Path(__file__).resolve().parent

# Bytes of the largest input, and resident MiB: a parser's documented limits hold (docs/limits.md), so that
# more is a finding. Templates may spend 256 MiB by their steps, a tokenizer may claim 2^20 ids.
LIMITS = {
    "safetensors": (4096, 256),
    "gguf": (16384, 256),
    "model_config": (4096, 256),
    "weights_index": (4096, 256),
    "artifact_manifest": (4096, 256),
    "tokenizer_json": (8192, 512),
    "sentencepiece_model": (8192, 512),
    "chat_template": (4096, 768),
    "generation_request": (4096, 256),
    "quantization_job": (4096, 256),
    "job_query": (4096, 256),
    "xml": (4096, 256),
}
# personality(2): AddressSanitizer of LLVM 14 does not always start where addresses are as random as newer
# kernels make them.
ADDR_NO_RANDOMIZE = 0x0040000
# Seconds of one input, under sanitizers.
TIMEOUT = 10
# Of one process, where several share the work: then it starts again with what the others have found.
SLICE_SECONDS = 60
SLICE_SECONDS_FIRST = 10
SLICE_SECONDS_MIN = 5
PER_SECOND_GUESS = 1000
# Processes that may end with a finding before a target is left alone.
FINDINGS_MAX = 10
# Freed memory that is kept to catch its use counts as resident, too. Where something was allocated is told
# by a replay of the finding.
ENVIRONMENT = {"ASAN_OPTIONS": "quarantine_size_mb=4:malloc_context_size=1", "UBSAN_OPTIONS": "print_stacktrace=1"}


@dataclasses.dataclass
class Target:
    """What has been done of a target by one binary, in all its runs."""

    name: str
    binary: str  # digest
    executions: int = 0
    seconds: float = 0  # of processes
    peak_mib: int = 0
    findings: int = 0
    processes: int = 0

    def per_second(self):
        return self.executions / self.seconds if self.seconds else 0

    def seconds_left(self, executions):
        """Of processes, until it has so many executions; a guess before the first."""
        return max(0, executions - self.executions) / (self.per_second() or PER_SECOND_GUESS)

    def row(self):
        return f"| {self.name} | {self.executions:,} | {self.per_second():,.0f} | {self.peak_mib} | {self.findings} |"


class Process:
    """A libFuzzer process for so many seconds."""

    def __init__(self, target, arguments, seconds):
        bytes_max, mib_max = LIMITS[target.name]
        work = arguments.work
        found = work / "corpus" / target.name
        for folder in (found, work / "crashes", work / "logs"):
            folder.mkdir(parents=True, exist_ok=True)
        target.processes += 1
        self.target = target
        self.log = work / "logs" / f"{target.name}-{target.processes}.log"
        dictionary = HERE / f"{target.name}.dict"
        folders = [folder for folder in (found, HERE / "corpus" / target.name, HERE / "regressions" / target.name)
                   if folder.is_dir()]
        # Without -entropic, which takes up to half of the time where inputs have many features.
        command = [arguments.binaries / f"{target.name}_fuzz", f"-max_total_time={seconds}",
                   f"-max_len={bytes_max}", f"-rss_limit_mb={mib_max}", f"-timeout={TIMEOUT}", "-entropic=0",
                   "-print_final_stats=1", f"-artifact_prefix={work}/crashes/{target.name}-",
                   *([f"-dict={dictionary}"] if dictionary.exists() else []), *folders]
        self.begin = time.monotonic()
        self.end = self.begin + seconds
        with open(self.log, "wb") as out:
            self.popen = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **ENVIRONMENT})

    def seconds_left(self):
        return max(0.0, self.end - time.monotonic())

    def account(self):
        """Adds what it has done to its target; true where it ended with a finding."""
        output = self.log.read_text(errors="replace")
        statistic = dict(re.findall(r"^stat::(\w+):\s+(\d+)", output, re.M))
        inited = re.search(r"^#(\d+)\s+INITED", output, re.M)
        target = self.target
        if inited:
            target.executions += int(statistic.get("number_of_executed_units", 0)) - int(inited.group(1))
        target.seconds += time.monotonic() - self.begin
        target.peak_mib = max(target.peak_mib, int(statistic.get("peak_rss_mb", 0)))
        if self.popen.returncode == 0:
            self.log.unlink()
            return False
        target.findings += 1
        print(f"{target.name}: {self.log}\n{output[-6000:]}", file=sys.stderr, flush=True)
        return True


class Run:
    def __init__(self, arguments):
        self.arguments = arguments
        self.state_file = arguments.work / "state.json"
        self.known = {}
        if arguments.executions and self.state_file.exists():
            self.known = json.loads(self.state_file.read_text())
        self.targets = []
        for name in arguments.targets:
            binary = hashlib.sha256((arguments.binaries / f"{name}_fuzz").read_bytes()).hexdigest()
            is_same = self.known.get(name, {}).get("binary") == binary
            self.targets.append(Target(**self.known[name]) if is_same else Target(name, binary))
        self.running = []
        self.has_finding = False
        self.end = time.monotonic() + arguments.seconds

    def processes(self, target):
        return [process for process in self.running if process.target is target]

    def seconds_wanted(self, target):
        """Of processes, beside those that run."""
        under_way = sum(process.seconds_left() for process in self.processes(target))
        return target.seconds_left(self.arguments.executions) - under_way

    def next_process(self):
        """None where there is nothing to start now."""
        if not self.arguments.executions:
            fresh = [target for target in self.targets if not target.processes]
            return Process(fresh[0], self.arguments, self.arguments.seconds) if fresh else None
        seconds_left = int(self.end - time.monotonic())
        waiting = [target for target in self.targets
                   if self.seconds_wanted(target) > 0 and target.findings < FINDINGS_MAX]
        if not waiting or seconds_left < SLICE_SECONDS_MIN:
            return None
        target = max(waiting, key=lambda target: self.seconds_wanted(target) / (len(self.processes(target)) + 1))
        seconds = min(SLICE_SECONDS if target.executions else SLICE_SECONDS_FIRST, int(self.seconds_wanted(target)))
        return Process(target, self.arguments, min(max(seconds, SLICE_SECONDS_MIN), seconds_left))

    def to_end(self):
        while True:
            for process in [process for process in self.running if process.popen.poll() is not None]:
                self.running.remove(process)
                self.has_finding |= process.account()
                if self.arguments.executions:
                    self.save()
            while len(self.running) < self.arguments.jobs and (process := self.next_process()):
                self.running.append(process)
            if not self.running:
                return
            time.sleep(0.1)

    def save(self):
        part = self.state_file.with_suffix(".part")
        self.known.update({target.name: dataclasses.asdict(target) for target in self.targets})
        part.write_text(json.dumps(self.known, indent=1))
        part.replace(self.state_file)

    def table(self):
        return "\n".join(["| target | executions | a second | peak MiB | findings |",
                          "| --- | ---: | ---: | ---: | ---: |", *(target.row() for target in self.targets)])


def keep_results(work, results, table):
    """The table, and an archive that an emptied work folder goes on from."""
    results.mkdir(parents=True, exist_ok=True)
    (results / "table.md").write_text(table + "\n")
    with tarfile.open(results / "work.tar.gz", "w:gz") as archive:
        for name in ("state.json", "corpus", "crashes", "logs"):
            if (work / name).exists():
                archive.add(work / name, arcname=name)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", metavar="BIN_FOLDER", type=pathlib.Path)
    parser.add_argument("work", metavar="WORK_FOLDER", type=lambda path: pathlib.Path(path).resolve())
    parser.add_argument("targets", metavar="TARGET", nargs="*", help=f"default: {' '.join(LIMITS)}")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--executions", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes at a time")
    parser.add_argument("--results", type=pathlib.Path, help="folder for the table and for work.tar.gz: unpacked "
                        "in an empty WORK_FOLDER, it is gone on from")
    arguments = parser.parse_args()
    arguments.targets = arguments.targets or list(LIMITS)
    if unknown := set(arguments.targets) - set(LIMITS):
        parser.error(f"no target {', '.join(sorted(unknown))}; there are: {', '.join(LIMITS)}")
    ctypes.CDLL(None).personality(ADDR_NO_RANDOMIZE)
    run = Run(arguments)
    run.to_end()
    print(run.table())
    if arguments.results:
        keep_results(arguments.work, arguments.results, run.table())
    if run.has_finding:
        print(f"the inputs are in {arguments.work}/crashes", file=sys.stderr)
    return 1 if run.has_finding else 0


if __name__ == "__main__":
    sys.exit(main())
