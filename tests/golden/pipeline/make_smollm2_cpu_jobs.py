#!/usr/bin/env python3
"""make_smollm2_cpu_jobs.py QUALITY_ROWS MODEL.gguf CALIBRATION EVALUATION OUT.json

SmolLM2-135M quantized on the CPU with ten seeds of the rotation's signs, at 4 and 2 bits: what the same jobs on
a GPU are compared with (tests/gpu/smollm2_gpu_test.cc), since twenty of them take half an hour on two cores.

QUALITY_ROWS is the program of tests/bench; CALIBRATION is wikitext-train-1000.json of the test data, EVALUATION the
WikiText-2 test text as tests/bench/wikitext_test_text.py writes it. The file that is committed was made by this
program's predecessor, quality_table, which did the same jobs.
"""

import json
import math
import os
import subprocess
import sys
import tempfile

SEEDS = range(1, 11)
ROW = {"rotation": "gsr", "signs": True, "group": 64, "windows": 16, "length": 1024}
EVALUATION = "--eval-windows 8 --eval-length 2048"


def perplexity(losses):
    return math.exp(sum(losses) / len(losses))


def main():
    program, model, calibration, evaluation, out = sys.argv[1:6]
    rows = [
        {"id": f"{bits} {seed}", "bits": bits, "seed": seed, "calibration": calibration, **ROW}
        for seed in SEEDS
        for bits in (4, 2)
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, name) for name in ("rows.jsonl", "results.jsonl")]
        with open(paths[0], "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        command = [program, model, "--evaluation", evaluation, "--rows", paths[0], "--results", paths[1]]
        subprocess.run(command + EVALUATION.split(), check=True)
        with open(paths[1], encoding="utf-8") as file:
            results = [json.loads(line) for line in file]
    golden = {"options": f"{json.dumps(ROW)} {EVALUATION}", "runs": []}
    for row, result in zip(rows, results, strict=True):
        run = {"bits": row["bits"], "seed": row["seed"]}
        golden["runs"].append(run | {"perplexity": perplexity(result["losses"]), "error": result["error"]})
        golden["perplexity_before"] = perplexity(result["losses_before"])
    golden["heading"] = f"Source {results[0]['source_format']}; on {results[0]['device']}"
    with open(out, "w", encoding="utf-8") as file:
        json.dump(golden, file, indent=1, ensure_ascii=False)
        file.write("\n")


if __name__ == "__main__":
    main()
