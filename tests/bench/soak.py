#!/usr/bin/env python3
"""Does a service under load keep its memory and its pace?

    soak.py BIN ARTIFACT [--minutes 24] [--concurrency 4]

BIN has walsh, walsh-coordinator and walsh-worker; ARTIFACT is the folder of a quantized model. `walsh up` serves it on
the CPU while `walsh bench` sends requests with prompts of their own without a pause. Beside them, every ten seconds, a
job is asked for that the worker refuses, and a request is begun and cancelled in the middle. Printed are, for each of
six equal parts of the time, the figures of `walsh bench` and the resident memory of both daemons at its end. The first
two parts are the warm-up, in which caches fill. Exit code 1 when a request failed, or when a daemon's memory grew by
more than 2 % and 4 MiB from the end of the second part to that of the last.
"""
import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

PARTS = 6
WARM_UP = 2
DAEMONS = ("coordinator", "worker")


class Service:
    """One `walsh up` with the model loaded."""

    def __init__(self, binaries, data, model):
        (data / "models").mkdir()
        (data / "models" / "soak").symlink_to(model.resolve())
        self.walsh = [str(binaries / "walsh"), "--data-dir", str(data)]
        self.data = data
        # Small, so that the prefix cache has filled it before memory is compared.
        environment = {"WALSH_KV_CACHE_TOKENS": "4096"} | os.environ
        self.up = subprocess.Popen([*self.walsh, "up", "--port", "0", "--device", "cpu"], env=environment,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while (loaded := self.run("models", "load", "soak")).returncode != 0:
            if self.up.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(loaded.stderr)
            time.sleep(1)

    def run(self, *arguments):
        return subprocess.run([*self.walsh, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)

    def resident_mib(self, daemon):
        pid = json.loads((self.data / "run" / f"{daemon}.json").read_text())["pid"]
        for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError(f"{daemon} has ended")

    def disturb(self):
        if self.run("quantize", "/nowhere", "--name", "never").returncode == 0:
            raise RuntimeError("a job without a source was taken")
        cancelled = subprocess.Popen([*self.walsh, "generate", "soak", "Once", "--max-tokens", "2000"],
                                     stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        cancelled.stdout.read(20)
        cancelled.send_signal(signal.SIGINT)
        cancelled.communicate()

    def stop(self):
        self.up.send_signal(signal.SIGTERM)
        self.up.wait(60)


def load(service, options, part):
    """The figures of `walsh bench` for a part of the time."""
    bench = subprocess.Popen([*service.walsh, "bench", "soak", "--output", "json", "--seed", str(part),
                              "--duration", f"{options.minutes * 60 / PARTS:g}",
                              "--concurrency", str(options.concurrency),
                              "--prompt-tokens", str(options.prompt_tokens),
                              "--output-tokens", str(options.output_tokens)], stdout=subprocess.PIPE, text=True)
    while bench.poll() is None:
        try:
            bench.wait(10)
        except subprocess.TimeoutExpired:
            service.disturb()
    return json.load(bench.stdout)


def milliseconds(quantiles):
    return f"{1e3 * quantiles['p50']:.1f} / {1e3 * quantiles['p99']:.1f}"


def soak(service, options):
    print(f"{options.minutes:g} minutes, {options.concurrency} requests at once, prompts of {options.prompt_tokens} "
          f"tokens, {options.output_tokens} new ones; {os.cpu_count()} CPUs; {service.run('version').stdout.splitlines()[0]}\n")
    print("| part | requests | failed | tok/s | first token p50 / p99 ms | between tokens p50 / p99 ms "
          "| coordinator MiB | worker MiB |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    n_failed = 0
    memory = []
    for part in range(PARTS):
        figures = load(service, options, part)
        n_failed += figures["failed"]
        memory.append([service.resident_mib(daemon) for daemon in DAEMONS])
        print(f"| {part + 1} | {figures['requests']} | {figures['failed']} | {figures['output_tokens_per_second']:.1f} "
              f"| {milliseconds(figures['time_to_first_token_seconds'])} "
              f"| {milliseconds(figures['inter_token_latency_seconds'])} "
              f"| {memory[-1][0]:.1f} | {memory[-1][1]:.1f} |", flush=True)
    is_good = n_failed == 0
    for daemon, before, after in zip(DAEMONS, memory[WARM_UP - 1], memory[-1]):
        is_flat = after - before <= max(4, before / 50)
        is_good = is_good and is_flat
        print(f"\n{daemon}: {after - before:+.1f} MiB from the end of part {WARM_UP} on{'' if is_flat else ': IT GROWS'}")
    return is_good


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binaries", type=pathlib.Path, metavar="BIN")
    parser.add_argument("model", type=pathlib.Path, metavar="ARTIFACT")
    parser.add_argument("--minutes", type=float, default=24)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as data:
        service = Service(options.binaries, pathlib.Path(data), options.model)
        try:
            is_good = soak(service, options)
        finally:
            service.stop()
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
