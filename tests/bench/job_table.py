#!/usr/bin/env python3
"""job_table.py CEILINGS.json SHAPE JOB.json...: where jobs on a GPU spent their time, against its floor.

CEILINGS.json is device_ceilings.py's, of the same run; SHAPE is one of random_checkpoint.py; JOB.json is what
`walsh --output json jobs get` prints. Prints Markdown.

A floor is the least arithmetic of a step over the rate of the unit that does it, or the least bytes over the
bandwidth, whichever is larger; where a step has none that means something, it is left out. "Compute" is all
stages from ROTATING to PACKING without the waits for files, by the host's clock.
"""

import json
import sys

from random_checkpoint import SHAPES

STAGES_OF_COMPUTE = ("ROTATING", "CALIBRATING", "QUANTIZING", "PACKING")


def sets(shape):
    """(rows, cols, has its own Hessian) of what is quantized together in a layer."""
    hidden, inter, _, heads, kv_heads, head_dim, _ = shape
    width = heads * head_dim
    return [(width + 2 * kv_heads * head_dim, hidden), (hidden, width), (2 * inter, hidden), (hidden, inter)]


def propagation_flops(rows, cols):
    """Of the products with W by 3xTF32, and of the others in fp32 (worker/kernels/cuda/propagate_error.cu)."""
    if rows >= 2 * cols:
        return 2 * rows * cols**2, 2 * cols**3
    return 2 * rows * cols**2, 2 * rows * cols**2


def floors(shape, n_layers, job, rates):
    hidden, inter, _, heads, _, head_dim, vocab = shape
    result = job["result"]
    n = int(result["calibration"]["tokens"])
    window = n // int(result["calibration"]["windows"])
    parts = sets(shape)
    weights = sum(rows * cols for rows, cols in parts) * n_layers
    linears = 2 * weights * n / rates["bf16_flops"]
    attention = 4 * n * window / 2 * heads * head_dim * n_layers / rates["bf16_flops"]
    half = n * sum(cols**2 for _, cols in parts) * n_layers / rates["bf16_flops"]
    propagation = [propagation_flops(rows, cols) for rows, cols in parts]
    evaluated = int(result["evaluation_tokens"])
    evaluation = 2 * weights * evaluated / rates["bf16_flops"]
    return {
        "fold_rotate": 6 * (weights + 2 * vocab * hidden) / rates["copy_bytes"],
        "forward": linears,
        "attention": attention,
        "original_flow": linears + attention,
        "hessian": half,
        "cross": 2 * half,
        "factorization": 2 / 3 * sum(cols**3 for _, cols in parts) * n_layers / rates["fp32_flops"],
        "error_propagation": sum(t / (rates["tf32_flops"] / 3) + f / rates["fp32_flops"] for t, f in propagation)
        * n_layers,
        "columns": sum(rows * cols**2 for rows, cols in parts) * n_layers / rates["fp32_flops"],
        "report": sum(4 * rows * cols**2 for rows, cols in parts) * n_layers / rates["tf32_flops"],
        "pack": int(result["linear_bytes_after"]) / rates["pinned_copy_bytes"],
        "evaluate_original": evaluation,
        "evaluate_stored": evaluation,
        "evaluate_logits": 4 * evaluated * hidden * vocab / rates["bf16_flops"],
    }


def stage_seconds(job):
    return {time["stage"]: time["seconds"] for time in job["result"]["stage_times"]}


def print_job(shape_name, job, rates):
    result = job["result"]
    shape = SHAPES[shape_name]
    n_layers = len(result["per_layer"]) // 7
    least = floors(shape, n_layers, job, rates)
    stages = stage_seconds(job)
    steps = {time["name"]: time["seconds"] for time in result["step_times"]}
    waits = steps.get("read_wait", 0) + steps.get("write_wait", 0)
    compute = sum(stages.get(stage, 0) for stage in STAGES_OF_COMPUTE) - waits
    source = int(result["source_size_bytes"])
    print(
        f"{shape_name}, {n_layers} layers, {result['bits_per_weight']:.3f} bits a weight, "
        f"{result['calibration']['tokens']} tokens of calibration: **compute {compute:.2f} s**, "
        f"all stages {sum(stages.values()):.2f} s (without evaluation {sum(stages.values()) - stages.get('EVALUATING', 0):.2f} s); "
        f"peak memory {int(result['peak_device_memory_bytes']) / 1e9:.2f} GB on the device, "
        f"{int(result['peak_memory_bytes']) / 1e9:.2f} GB on the host.\n"
    )
    print("| step | seconds | floor | ratio |\n| --- | ---: | ---: | ---: |")
    print_row("hash the source (LOADING)", stages.get("LOADING", 0), source / rates["file_read_bytes"])
    for name, seconds in steps.items():
        print_row(name, seconds, least.get(name))
    floor_names = [name for name in steps if name in least and not name.startswith("evaluate")]
    print_row("compute", compute, sum(least[name] for name in floor_names))
    print("\n" + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in stages.items()) + "\n")


def print_row(what, seconds, floor):
    if floor:
        print(f"| {what} | {seconds:.3f} | {floor:.3f} | {seconds / floor:.2f} |")
    else:
        print(f"| {what} | {seconds:.3f} | | |")


def main():
    with open(sys.argv[1], encoding="utf-8") as file:
        rates = json.load(file)
    print(
        f"{rates['gpu']}; ceilings of this run: bf16 {rates['bf16_flops'] / 1e12:.0f}, TF32 "
        f"{rates['tf32_flops'] / 1e12:.0f}, fp32 {rates['fp32_flops'] / 1e12:.1f} TFLOP/s; copy on the device "
        f"{rates['copy_bytes'] / 1e9:.0f} GB/s, from pinned memory {rates['pinned_copy_bytes'] / 1e9:.1f}; files "
        f"{rates['file_read_bytes'] / 1e9:.1f} GB/s read (cached), {rates['file_write_bytes'] / 1e9:.1f} written.\n"
    )
    for path in sys.argv[3:]:
        with open(path, encoding="utf-8") as file:
            print_job(sys.argv[2], json.load(file), rates)


if __name__ == "__main__":
    main()
