#!/usr/bin/env python3
"""make_smollm2_cpu_jobs.py QUALITY_TABLE MODEL.gguf CALIBRATION EVALUATION OUT.json

SmolLM2-135M quantized on the CPU with ten seeds of the rotation's signs, at 4 and 2 bits: what the same jobs on
a GPU are compared with (tests/gpu/smollm2_gpu_test.cc), since twenty of them take half an hour on two cores.

QUALITY_TABLE is the program of tests/bench; CALIBRATION is wikitext-train-1000.json of the test data, EVALUATION the
WikiText-2 test text as tests/bench/wikitext_test_text.py writes it.
"""

import json
import re
import subprocess
import sys

SEEDS = range(1, 11)
OPTIONS = "--bits 4,2 --rotations gsr --signs --group 64 --windows 16 --length 1024 --eval-windows 8 --eval-length 2048"
RUN = re.compile(r"^(\d) bits, gsr: perplexity ([\d.]+), E ([\d.]+),", re.MULTILINE)
BEFORE = re.compile(r"^\| 16 \| – \| 16 \| ([\d.]+) \|", re.MULTILINE)
HEADING = re.compile(r"^Source .*$", re.MULTILINE)


def parse(seed, text):
    runs = [
        {"bits": int(bits), "seed": seed, "perplexity": float(perplexity), "error": float(error)}
        for bits, perplexity, error in RUN.findall(text)
    ]
    return runs, float(BEFORE.search(text)[1]), HEADING.search(text)[0]


def write(texts, path):
    """`texts`: what quality_table printed, by seed."""
    golden = {"options": OPTIONS, "runs": []}
    for seed, text in texts.items():
        runs, golden["perplexity_before"], golden["heading"] = parse(seed, text)
        golden["runs"] += runs
    with open(path, "w", encoding="utf-8") as file:
        json.dump(golden, file, indent=1, ensure_ascii=False)
        file.write("\n")


def main():
    program, model, calibration, evaluation, out = sys.argv[1:6]
    texts = {}
    for seed in SEEDS:
        command = [program, model, "--calibration", calibration, "--evaluation", evaluation]
        command += OPTIONS.split() + ["--seed", str(seed)]
        texts[seed] = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
        ).stdout
    write(texts, out)


if __name__ == "__main__":
    main()
