#!/usr/bin/env python3
"""The tables of docs/quality.md: every rotation and quantizer on one model, with confidence intervals.

    quality_study.py run   BIN MODEL --data DATA --out OUT [--device cuda:0] [--plan full|main]
    quality_study.py table OUT

`run` writes the rows of the plan, and has BIN (quality_rows) do them: those that only the CPU does, beside those of
the device. It goes on where it was cut off. DATA has wikitext-train-1000.json, wikitext-2-test.txt
(wikitext_test_text.py) and, in eval/, the zero-shot tasks. `table` prints Markdown.

Each row is done twice, calibrated on two texts that share no sample (the two halves of the training file) and with two
seeds of the random signs. With L_i the mean of a row's two losses in evaluation window i, a difference D of two rows is
the mean over i of the difference of their L_i, and its interval of about 95 % is

    D ± sqrt((1.96 s_w)² + (t s_c)²)

s_w is the standard error of the mean over windows. s_c is that of the mean over the two calibrations: the root of the
mean of ((D_a − D_b) / 2)² over the n rows of all methods of that many bits (round-to-nearest by itself), since two
values of one row alone tell little; t is Student's for n. It is approximate: the rows share the two texts.
"""

import argparse
import json
import math
import os
import subprocess
import sys

ROTATIONS = ("none", "hadamard", "walsh", "local-hadamard", "gsr")
METHODS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq", "error_propagation": 0.0},
    "gptaq": {"method": "gptaq"},
    "ep": {"method": "gptq", "error_propagation": 0.5},
}
# What one option changes, on top of gsr at 2 bits.
OPTIONS = {
    "gptq": METHODS["gptq"],
    "gptq, natural order": {**METHODS["gptq"], "order": "natural"},
    "gptq, act-order": {**METHODS["gptq"], "order": "act-order"},
    "gptq, no MSE clip": {**METHODS["gptq"], "mse_clip": False},
    "gptq, symmetric": {**METHODS["gptq"], "symmetric": True},
    "gptq, group 32": {**METHODS["gptq"], "group": 32},
    "gptq, group 64": {**METHODS["gptq"], "group": 64},
    "gptq, group 128": {**METHODS["gptq"], "group": 128},
    "gptaq, α = 0.25": METHODS["gptaq"],
    "gptaq, α = 0.5": {**METHODS["gptaq"], "gptaq_alpha": 0.5},
    "gptaq, α = 1": {**METHODS["gptaq"], "gptaq_alpha": 1.0},
    "ep, β = 0.25": {**METHODS["ep"], "error_propagation": 0.25},
    "ep, β = 0.5": METHODS["ep"],
    "ep, β = 0.75": {**METHODS["ep"], "error_propagation": 0.75},
    "ep, β = 1": {**METHODS["ep"], "error_propagation": 1.0},
    "ep, β = 0.5, act-order": {**METHODS["ep"], "order": "act-order"},
    "ep, β = 0.5, group 32": {**METHODS["ep"], "group": 32},
    "ep, β = 0.5, group 64": {**METHODS["ep"], "group": 64},
    "ep, β = 0.5, group 128": {**METHODS["ep"], "group": 128},
    "ep, β = 1, group 128": {**METHODS["ep"], "error_propagation": 1.0, "group": 128},
}
# What only the CPU does, and the rows that it is to be compared with.
CPU_OPTIONS = {
    "gptq": METHODS["gptq"],
    "gptq, float zero point": {**METHODS["gptq"], "zero_point": "float"},
    "gptq, codebook": {**METHODS["gptq"], "grid": "codebook"},
    "ep, β = 0.5": METHODS["ep"],
    "ep, β = 0.5, float zero point": {**METHODS["ep"], "zero_point": "float"},
    "ep, β = 0.5, codebook": {**METHODS["ep"], "grid": "codebook"},
    "ep, β = 1": {**METHODS["ep"], "error_propagation": 1.0},
    "ep, β = 1, float zero point": {**METHODS["ep"], "error_propagation": 1.0, "zero_point": "float"},
    "ep, β = 1, codebook": {**METHODS["ep"], "error_propagation": 1.0, "grid": "codebook"},
}
# Calibrated on both halves at once, as a user would: twice the tokens.
WHOLE_TEXT = {
    "none, gptq": {"rotation": "none", **METHODS["gptq"]},
    "gsr, gptq": {"rotation": "gsr", **METHODS["gptq"]},
    "gsr, gptaq": {"rotation": "gsr", **METHODS["gptaq"]},
    "gsr, ep, β = 0.25": {"rotation": "gsr", **METHODS["ep"], "error_propagation": 0.25},
    "gsr, ep, β = 0.5": {"rotation": "gsr", **METHODS["ep"]},
    "gsr, ep, β = 0.75": {"rotation": "gsr", **METHODS["ep"], "error_propagation": 0.75},
    "gsr, ep, β = 1": {"rotation": "gsr", **METHODS["ep"], "error_propagation": 1.0},
}
MAIN_OPTIONS = ("gptq", "gptq, group 64", "ep, β = 0.25", "ep, β = 0.5", "ep, β = 1", "ep, β = 0.5, group 64")
# Activations per token, symmetric, clipped at 0.9; keys and values by head, asymmetric, clipped at 0.95 (QuaRot).
ROUNDING = {
    "W2A16": {"bits": 2},
    "W2A4": {"bits": 2, "activation_bits": 4},
    "W2A4KV4": {"bits": 2, "activation_bits": 4, "kv_bits": 4, "query_key_rotation": True},
    "W4A4KV4": {"bits": 4, "activation_bits": 4, "kv_bits": 4, "query_key_rotation": True},
}
TASKS = ("piqa.jsonl", "arc_easy.jsonl", "arc_challenge.jsonl", "hellaswag.txt", "winogrande.jsonl", "lambada_openai.jsonl")
ZERO_SHOT = {
    "original": {"bits": 16},
    "W4 gsr, ep": {"bits": 4, "rotation": "gsr", **METHODS["ep"]},
    "W3 gsr, ep": {"bits": 3, "rotation": "gsr", **METHODS["ep"]},
    "W3 none, gptq": {"bits": 3, "rotation": "none", **METHODS["gptq"]},
    "W2 none, gptq": {"bits": 2, "rotation": "none", **METHODS["gptq"]},
    "W2 hadamard, signs, gptq": {"bits": 2, "rotation": "hadamard", "signs": True, **METHODS["gptq"]},
    "W2 gsr, gptq": {"bits": 2, "rotation": "gsr", **METHODS["gptq"]},
    "W2 gsr, gptaq": {"bits": 2, "rotation": "gsr", **METHODS["gptaq"]},
    "W2 gsr, ep": {"bits": 2, "rotation": "gsr", **METHODS["ep"]},
}
CALIBRATIONS = ("a", "b")
CPU_OPTIONS_TABLE = "W2 gsr, options of the CPU"
WHOLE_TEXT_TABLE = "W2, calibrated on the whole text"


def variants(rotations=ROTATIONS):
    """(name, members) of R1 without and with random signs."""
    for rotation in rotations:
        yield rotation, {"rotation": rotation}
        if rotation != "none":
            yield f"{rotation}, signs", {"rotation": rotation, "signs": True}


def plan(which, group):
    """(table, name of the row, members, whether only the CPU does it): one for each row, calibrations aside."""
    rows = []

    def add(bits, methods, rotations):
        for method in methods:
            for name, rotation in rotations:
                members = {"bits": bits, "group": group, **METHODS[method], **rotation}
                rows.append((f"W{bits} {method}", name, members, False))

    signed = list(variants())
    unsigned = [variant for variant in signed if "signs" not in variant[1]]
    few = [variant for variant in unsigned if variant[0] in ("none", "hadamard", "gsr")]
    add(2, METHODS, signed)
    add(3, METHODS, signed)
    if which == "full":
        add(4, METHODS, list(variants(("hadamard", "gsr"))))
    else:
        add(4, ("gptq", "ep"), few)
    # The order of columns of the GSR paper.
    for name, rotation in unsigned + [variant for variant in signed if variant[0] == "hadamard, signs"]:
        members = {"bits": 2, "group": group, **METHODS["gptq"], "order": "natural", **rotation}
        rows.append(("W2 gptq, natural order", name, members, False))
    for name, quantizer in OPTIONS.items():
        names_the_group = "group" in quantizer and quantizer["group"] == group
        if (which == "full" or name in MAIN_OPTIONS) and not names_the_group:
            members = {"bits": 2, "group": group, "rotation": "gsr", **quantizer}
            rows.append(("W2 gsr, options", name, members, False))
    for name, quantizer in WHOLE_TEXT.items():
        rows.append((WHOLE_TEXT_TABLE, name, {"bits": 2, "group": group, **quantizer}, False))
    if which == "full":
        for rounding, members in ROUNDING.items():
            for method in ("gptq", "ep"):
                for rotation in ("hadamard", "gsr"):
                    online = {"rotation": rotation, "down_rotation": rotation, "signs": rotation == "hadamard"}
                    row = {"group": group, **members, **online, **METHODS[method]}
                    rows.append(("Run-time rotations", f"{rounding} {rotation}, {method}", row, True))
        # The GSR paper's row: a global R4 beside a local R1.
        for method in ("gptq", "ep"):
            online = {**ROUNDING["W2A4"], "rotation": "gsr", "down_rotation": "hadamard"}
            row = {"group": group, **online, **METHODS[method]}
            rows.append(("Run-time rotations", f"W2A4 gsr, R4 hadamard, {method}", row, True))
        for name, quantizer in CPU_OPTIONS.items():
            members = {"bits": 2, "group": group, "rotation": "gsr", **quantizer}
            rows.append((CPU_OPTIONS_TABLE, name, members, True))
    return rows


def divides(members, width):
    return members["group"] <= 0 or width % members["group"] == 0


def row_id(table, name, calibration):
    return f"{table} | {name} | {calibration}"


def write_lines(path, objects):
    with open(path, "w", encoding="utf-8") as file:
        for item in objects:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")


def split_calibration(data, out):
    with open(os.path.join(data, "wikitext-train-1000.json"), encoding="utf-8") as file:
        samples = json.load(file)
    texts = {"a": samples[: len(samples) // 2], "b": samples[len(samples) // 2 :], "whole": samples}
    for name, text in texts.items():
        with open(os.path.join(out, f"calibration-{name}.json"), "w", encoding="utf-8") as file:
            json.dump(text, file, ensure_ascii=False)


def write_rows(args):
    """The rows of the device, of the CPU beside it, and of the zero-shot tasks."""
    device, cpu, tasks = [], [], []
    calibration = {"windows": args.windows, "length": args.length}
    on_cpu = {"windows": args.cpu_windows, "length": args.length}
    for table, name, members, needs_cpu in plan(args.plan, args.group):
        if not divides(members, args.width):
            continue
        is_whole = table == WHOLE_TEXT_TABLE
        for index, which in enumerate(("whole",) if is_whole else CALIBRATIONS):
            if needs_cpu and index > 0 and not args.cpu_twice:
                continue
            text = os.path.join(args.out, f"calibration-{which}.json")
            row = {"id": row_id(table, name, which), "calibration": text, "seed": index, **members}
            if needs_cpu:
                cpu.append(row | on_cpu)
            elif is_whole:
                device.append(row | calibration | {"windows": 2 * args.windows})
            else:
                device.append(row | calibration)
    for name, members in ZERO_SHOT.items() if args.task_limit >= 0 else ():
        files = [os.path.join(args.data, "eval", task) for task in TASKS]
        row = {"id": row_id("Zero-shot", name, "a"), "tasks": files, "task_limit": args.task_limit, **members}
        if members["bits"] != 16:
            row |= {"calibration": os.path.join(args.out, "calibration-a.json"), "group": args.group, **calibration}
        tasks.append(row)
    write_lines(os.path.join(args.out, "rows-device.jsonl"), device)
    write_lines(os.path.join(args.out, "rows-cpu.jsonl"), cpu)
    write_lines(os.path.join(args.out, "rows-tasks.jsonl"), tasks)


def run(args):
    os.makedirs(args.out, exist_ok=True)
    split_calibration(args.data, args.out)
    write_rows(args)
    with open(os.path.join(args.out, "protocol.json"), "w", encoding="utf-8") as file:
        json.dump({key: value for key, value in vars(args).items() if key in PROTOCOL}, file)

    def start(part, device, n_windows):
        command = [args.binary, args.model, "--evaluation", os.path.join(args.data, "wikitext-2-test.txt")]
        command += ["--rows", os.path.join(args.out, f"rows-{part}.jsonl")]
        command += ["--results", os.path.join(args.out, f"results-{part}.jsonl"), "--device", device]
        command += ["--threads", str(args.threads), "--eval-windows", str(n_windows)]
        return subprocess.Popen(command)

    starts = {
        "device": lambda: start("device", args.device, args.eval_windows),
        "cpu": lambda: start("cpu", "cpu", args.cpu_eval_windows),
        "tasks": lambda: start("tasks", args.device, 1),  # of which the perplexity is not looked at
    }
    processes = []
    for part in args.parts.split(","):
        processes.append(starts[part]())
        if args.device == "cpu":
            processes[-1].wait()
    return max(process.wait() for process in processes)


PROTOCOL = (
    "plan windows length group eval_windows cpu_windows cpu_eval_windows cpu_twice task_limit device threads".split()
)


# Tables -------------------------------------------------------------------------------------------------------------


def mean(values):
    return sum(values) / len(values)


def standard_error(values):
    if len(values) < 2:
        return 0.0
    m = mean(values)
    return math.sqrt(sum((v - m) ** 2 for v in values) / (len(values) - 1) / len(values))


def parsed(line):
    """None for a line that a run which was cut off has left."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def read_results(out):
    """results[table][row][calibration] in the order of the plan's files."""
    found = {}
    order = []
    for part in ("device", "cpu", "tasks"):
        rows = os.path.join(out, f"rows-{part}.jsonl")
        results = os.path.join(out, f"results-{part}.jsonl")
        if os.path.exists(rows):
            with open(rows, encoding="utf-8") as file:
                order += [json.loads(line)["id"] for line in file]
        if os.path.exists(results):
            with open(results, encoding="utf-8") as file:
                found |= {result["id"]: result for result in filter(None, map(parsed, file))}
    tables = {}
    for key in order:
        if key in found:
            table, name, calibration = key.split(" | ")
            tables.setdefault(table, {}).setdefault(name, {})[calibration] = found[key]
    return tables


def differences(row, minus):
    """By calibration, the list over windows of the difference to what `minus` gives for it."""
    return {c: [x - y for x, y in zip(result["losses"], minus(c), strict=True)] for c, result in row.items()}


# Two-sided 95 % of Student's t, by degrees of freedom; between them the one before, which is larger.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 8: 2.31, 10: 2.23, 15: 2.13, 20: 2.09, 30: 2.04}


def calibration_spread(all_differences):
    """t s_c of the module's comment; 0 where nothing was calibrated twice."""
    squares = [((mean(d["a"]) - mean(d["b"])) / 2) ** 2 for d in all_differences if len(d) == 2]
    if not squares:
        return 0.0
    return STUDENT[max(n for n in STUDENT if n <= len(squares))] * math.sqrt(mean(squares))


def estimate(by_calibration, spread):
    """(D, half the width of its interval)."""
    windows = [mean(values) for values in zip(*by_calibration.values())]
    return mean(windows), math.hypot(1.96 * standard_error(windows), spread if len(by_calibration) == 2 else 0.0)


def interval(value, sign=True):
    center, half = value
    return f"{center:{'+' if sign else ''}.3f} ± {half:.3f}"


# Differences of rotations that papers order.
PAIRS = (
    ("gsr", "local-hadamard"),
    ("gsr", "hadamard"),
    ("gsr", "hadamard, signs"),
    ("gsr", "walsh"),
    ("walsh", "hadamard"),
    ("walsh", "hadamard, signs"),
)


class Table:
    """Rows of one table and what their differences are. `siblings` are the tables whose calibrations tell its spread."""

    def __init__(self, rows, siblings=None):
        self.rows = rows
        self.siblings = siblings or [rows]
        self.reference = next((name for name in ("none", "gptq", "none, gptq") if name in rows), None)
        self.spread = calibration_spread(self.against(t, n, None) for t in self.siblings for n in t)
        kl = [{c: r["divergences"] for c, r in row.items()} for t in self.siblings for row in t.values()]
        self.kl_spread = calibration_spread(kl)

    @staticmethod
    def against(rows, name, other):
        """By calibration and window, row `name` minus row `other`, or minus the original."""
        return differences(rows[name], lambda c: rows[other][c]["losses"] if other else rows[name][c]["losses_before"])

    def difference(self, name, other):
        """Of two rows of this table, with its interval."""
        tables = [t for t in self.siblings if other in t]
        spread = calibration_spread(self.against(t, n, other) for t in tables for n in t if n != other)
        return estimate(self.against(self.rows, name, other), spread)

    def delta(self, name):
        return estimate(self.against(self.rows, name, None), self.spread)

    def delta_to_first(self, name):
        return self.difference(name, self.reference)

    def kl(self, name):
        return estimate({c: r["divergences"] for c, r in self.rows[name].items()}, self.kl_spread)

    def base_loss(self):
        return mean(next(iter(next(iter(self.rows.values())).values()))["losses_before"])

    def perplexity(self, name):
        return math.exp(mean([mean(r["losses"]) for r in self.rows[name].values()]))

    def windows(self, name):
        return len(next(iter(self.rows[name].values()))["losses"])

    def of(self, name, member):
        return mean([r[member] for r in self.rows[name].values()])

    def lines(self):
        to_first = f"Δ to {self.reference}, nat | " if self.reference else ""
        yield f"| | bits a weight | perplexity | Δ to the original, nat | {to_first}KL, nat | top-1 | E | runs |"
        yield "|---|---|---|---|---|---|---|---|" + ("---|" if self.reference else "")
        for name, row in self.rows.items():
            if self.reference:
                to_first = (interval(self.delta_to_first(name)) if name != self.reference else "–") + " | "
            error = math.exp(mean([math.log(r["error"]) for r in row.values()]))
            yield (
                f"| {name} | {self.of(name, 'bits_per_weight'):.3f} | {self.perplexity(name):.2f} | "
                f"{interval(self.delta(name))} | {to_first}{interval(self.kl(name), sign=False)} | "
                f"{100 * self.of(name, 'top1_agreement'):.1f} % | {error:.5f} | {len(row)} |"
            )
        pairs = [pair for pair in PAIRS if pair[0] in self.rows and pair[1] in self.rows]
        if pairs:
            yield ""
            yield "Differences, nat: " + "; ".join(f"{x} − {y} {interval(self.difference(x, y))}" for x, y in pairs) + "."


def table_of(tables, title):
    bits, _, method = title.partition(" ")
    siblings = [f"{bits} {other}" for other in METHODS if other != "rtn"]
    if method not in METHODS or method == "rtn":
        return Table(tables[title])
    return Table(tables[title], [tables[sibling] for sibling in siblings if sibling in tables])


def print_matrix(tables, bits):
    """Perplexity of every rotation by every method."""
    titles = {method: f"W{bits} {method}" for method in METHODS}
    built = {method: table_of(tables, title) for method, title in titles.items() if title in tables}
    if not built:
        return
    print(f"### W{bits}: perplexity, Δ to the original in nat\n")
    print("| R1 | " + " | ".join(built) + " |\n|---|" + "---|" * len(built))
    names = list(dict.fromkeys(name for table in built.values() for name in table.rows))
    for name in names:
        cells = [
            f"{t.perplexity(name):.2f} ({interval(t.delta(name))})" if name in t.rows else "–" for t in built.values()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print()


def print_zero_shot(rows):
    names = list(next(iter(rows.values()))["a"]["tasks"])
    print("### Zero-shot\n")
    print("Accuracy, normalised by length where the task has it, in %; ± is the standard error of the average, from those of the plain accuracies.\n")
    print("| | " + " | ".join(names) + " | average |\n|---|" + "---|" * (len(names) + 1))
    for name, row in rows.items():
        scores = [row["a"]["tasks"][task] for task in names]
        values = [100 * score["accuracy_norm"] for score in scores]
        error = 100 * math.sqrt(sum(score["standard_error"] ** 2 for score in scores)) / len(scores)
        cells = " | ".join(f"{value:.1f}" for value in values)
        print(f"| {name} | {cells} | {mean(values):.2f} ± {error:.2f} |")
    print()


def print_tables(args):
    tables = read_results(args.out)
    with open(os.path.join(args.out, "protocol.json"), encoding="utf-8") as file:
        protocol = json.load(file)
    one = next(iter(next(iter(next(iter(tables.values())).values())).values()))
    base = Table(next(iter(tables.values())))
    print(
        f"Source {one['source_format']}; group {one['group']}; calibrated on {one['calibration_windows']} windows of "
        f"{one['calibration_tokens'] // one['calibration_windows']} tokens of each half; {len(one['losses'])} windows of "
        f"{one['evaluation_length']} tokens evaluated; on {one['device']}. Original: perplexity {math.exp(base.base_loss()):.3f}.\n"
    )
    print("Protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items()) + ".\n")
    for bits in (2, 3, 4):
        print_matrix(tables, bits)
    for title, rows in tables.items():
        if title == "Zero-shot":
            print_zero_shot(rows)
            continue
        table = table_of(tables, title)
        print(f"### {title}\n")
        if title in ("Run-time rotations", CPU_OPTIONS_TABLE):
            counts = {n: [name for name in rows if table.windows(name) == n] for n in map(table.windows, rows)}
            usual = max(counts, key=lambda n: len(counts[n]))
            others = "".join(f"; {n}: {', '.join(names)}" for n, names in counts.items() if n != usual)
            print(f"On the CPU, the first windows alone ({usual}{others}).\n")
        for line in table.lines():
            print(line)
        print()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    commands = parser.add_subparsers(required=True)
    do_run = commands.add_parser("run")
    do_run.add_argument("binary")
    do_run.add_argument("model")
    do_run.add_argument("--data", required=True)
    do_run.add_argument("--out", required=True)
    do_run.add_argument("--device", default="cpu")
    do_run.add_argument("--parts", default="device,cpu,tasks")
    do_run.add_argument("--plan", choices=("full", "main"), default="full")
    do_run.add_argument("--group", type=int, default=64)
    do_run.add_argument("--width", type=int, default=576, help="of the model: groups that do not divide it are left out")
    do_run.add_argument("--windows", type=int, default=28)
    do_run.add_argument("--length", type=int, default=2048)
    do_run.add_argument("--eval-windows", type=int, default=1000)
    do_run.add_argument("--cpu-windows", type=int, default=28, help="of calibration, of what only the CPU does")
    do_run.add_argument("--cpu-eval-windows", type=int, default=20)
    do_run.add_argument("--cpu-twice", action="store_true", help="both calibrations of what the CPU does")
    do_run.add_argument("--task-limit", type=int, default=0, help="items of each task; 0: all; -1: no tasks")
    do_run.add_argument("--threads", type=int, default=os.cpu_count())
    do_run.set_defaults(call=run)
    table = commands.add_parser("table")
    table.add_argument("out")
    table.set_defaults(call=lambda args: print_tables(args) or 0)
    args = parser.parse_args()
    return args.call(args)


if __name__ == "__main__":
    sys.exit(main())
