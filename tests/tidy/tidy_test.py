#!/usr/bin/env python3
"""The repository's test of itself: dependency arrows, banned calls, machine paths, large files,
pages of docs/ that list what the code has, and what watches it.

Prints each finding as path:line: what, and what to do instead. The rules themselves are tried first,
on lines that they must refuse and lines that they must not.
"""

import os
import re
import subprocess
import sys

FILE_BYTES_MAX = 1 << 20
CODE = (".h", ".cc", ".cu", ".cuh")

# What a folder may include, besides itself and its subfolders. The arrows of docs/architecture.md.
COMMON = ["common"]
PROTO = COMMON + ["walsh/v1", "walsh/internal/v1", "google/rpc"]
TENSOR = COMMON + ["worker/tensor"]
KERNELS = TENSOR + ["worker/kernels"]
MODEL_PARTS = KERNELS + ["worker/io", "worker/tokenizer", "worker/model", "worker/rotate", "worker/gptq"]
UPPER = MODEL_PARTS + ["worker/calibrate", "worker/evaluate", "worker/engine"]
ARROWS = {
    "common": PROTO,
    "server": PROTO,
    "client": PROTO,
    "worker/tensor": COMMON,
    "worker/kernels": TENSOR,
    "worker/io": TENSOR,
    "worker/tokenizer": TENSOR + ["worker/io"],
    "worker/interop": TENSOR + ["worker/io"],
    "worker/objects": TENSOR + ["worker/io"],
    "worker/model": MODEL_PARTS,
    "worker/rotate": MODEL_PARTS,
    "worker/gptq": MODEL_PARTS,
    "worker/calibrate": UPPER,
    "worker/evaluate": UPPER,
    "worker/engine": UPPER,
    "worker/pipeline": UPPER + ["worker/objects", "worker/pipeline"],
    "worker/service": PROTO + ["worker"],
    "worker": PROTO + ["worker"],
}
OURS = ("common/", "server/", "worker/", "client/", "tests/", "walsh/", "google/rpc/")

# Messages and gRPC stay at the edges, so that all else is tested without them, under TSan too.
GRPC_HEADER = re.compile(r"^(grpcpp?/|google/protobuf/|walsh/.*\.pb\.h|google/rpc/.*\.pb\.h|common/grpc_)")
GRPC_FOLDERS = (
    "server/", "worker/service/", "client/", "tests/",
    "common/grpc_", "common/evaluation_limits", "common/field_checks", "common/generation_limits",
    "common/quantization_limits", "common/resource_name", "common/tenant_limit",
)
CUDA_HEADER = re.compile(r"^(cuda|cublas|cooperative_groups|nv)")
CUDA_FOLDERS = ("worker/kernels/cuda/", "worker/engine/cuda/", "worker/pipeline/cuda/", "tests/gpu/", "tests/bench/cuda_",
                "tests/unit/worker/kernels/cuda/", "tests/testing/host_device/", "tests/unit/worker/pipeline/cuda/")

# pattern, what to do instead, paths where it is allowed
BANNED = [
    (r"\bassert\(", "WALSH_CHECK for our bugs, absl::Status for input", ()),
    (r"\bstd::regex\b", "PCRE2: std::regex recurses on its input", ()),
    (r"\b(?:std::)?s?rand\(", "a seeded generator", ()),
    (r"\bato[ifl]\(|\bstd::sto[a-z]+\(", "absl::SimpleAtoi and friends", ("tests/",)),
    (r"\bstd::c(?:out|err)\b", "common/log.h, or a stream that the caller passes",
     ("client/", "tests/", "common/command_line.cc", "server/main.cc", "server/coordinator_flags.cc",
      "server/server.cc", "worker/service/main.cc", "worker/service/daemon.cc")),
    (r"\bsleep_for\(|\busleep\(|\babsl::SleepFor\(", "a Clock, a condition, or tests/testing/wait.h",
     ("tests/testing/", "client/client.cc")),
    (r"\busing namespace\b(?!.*literals)", "using declarations", ()),
    (r"\bthrow\b(?! std::bad_alloc)", "absl::Status", ("tests/", "common/command_line.cc")),
    (r"\b[A-Z]+DO\b(?<=TODO)(?!\(#\d+\))", "finish it, or TODO(#issue)", ()),
    (r"\b(?:FIXME|XXX)\b", "finish it", ()),
]
BANNED = [(re.compile(pattern), instead, allowed) for pattern, instead, allowed in BANNED]
MACHINE_PATH = re.compile(r"""(?:^|[\s"'`=(:])(/(?:work|root|home)/[\w./-]*)""")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]')


def folder_of(path):
    """The longest folder with a rule."""
    parts = path.split("/")[:-1]
    while parts and "/".join(parts) not in ARROWS:
        parts.pop()
    return "/".join(parts)


def check_include(path, header):
    if CUDA_HEADER.match(header) and not path.startswith(CUDA_FOLDERS):
        yield f"CUDA header {header}; only in {', '.join(CUDA_FOLDERS)}"
    if GRPC_HEADER.match(header) and not path.startswith(GRPC_FOLDERS):
        yield f"gRPC or protobuf header {header}; only in {', '.join(GRPC_FOLDERS)}"
    folder = folder_of(path)
    if not folder or not header.startswith(OURS):
        return
    allowed = ARROWS[folder] + [folder]
    if not any(header.startswith(prefix + "/") for prefix in allowed):
        yield f"{folder} may not include {header}; it may include {', '.join(sorted(allowed))}"


def without_comments_and_strings(line):
    line = re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)
    return re.sub(r"//.*", "", line)


def check_code_line(path, line):
    include = INCLUDE.match(line)
    if include:
        yield from check_include(path, include.group(1))
        return
    code = without_comments_and_strings(line)
    for pattern, instead, allowed in BANNED:
        # Marks of unfinished work count in comments too.
        where = line if "DO" in pattern.pattern or "XXX" in pattern.pattern else code
        found = pattern.search(where)
        if found and not path.startswith(allowed):
            yield f"'{found.group(0)}'; instead: {instead}"


def check_line(path, line):
    found = MACHINE_PATH.search(line)
    if found and path != "tests/tidy/tidy_test.py":
        yield f"path of one machine: {found.group(1)}"
    if path.endswith(CODE):
        yield from check_code_line(path, line)


def repository_files(root):
    command = ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, check=True).stdout.decode()
    return [path for path in listed.split("\0") if path and os.path.isfile(os.path.join(root, path))]


def check_repository(root):
    for path in repository_files(root):
        full = os.path.join(root, path)
        n_bytes = os.path.getsize(full)
        if n_bytes > FILE_BYTES_MAX:
            yield f"{path}: {n_bytes} bytes, at most {FILE_BYTES_MAX}: weights and data stay outside"
            continue
        with open(full, "rb") as file:
            data = file.read()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
            for finding in check_line(path, line):
                yield f"{path}:{number}: {finding}"


def read(root, path):
    with open(os.path.join(root, path), encoding="utf-8") as file:
        return file.read()


def check_limits_page(root):
    """common/limits.h and docs/limits.md name the same constants with the same values."""
    constant = re.compile(r"constexpr \w+ (k\w+) = ([-\d.'<*\s]+);")
    header = re.sub(r"\bint64_t\{(\d+)\}", r"\1", read(root, "common/limits.h"))
    row = re.compile(r"^\| `(k\w+)` \| ([\d.,]+) \|", re.M)
    # Digits, shifts and products only, by the pattern above.
    in_code = {name: float(eval(value.replace("'", "")))
               for name, value in constant.findall(header)}
    in_page = {name: float(value.replace(",", ""))
               for name, value in row.findall(read(root, "docs/limits.md"))}
    for name in sorted(in_code.keys() | in_page.keys()):
        if in_code.get(name) != in_page.get(name):
            yield (f"docs/limits.md: {name} is {in_page.get(name)}, "
                   f"in common/limits.h {in_code.get(name)}")


def check_metrics_page(root):
    """Every metric that the code registers stands in docs/metrics.md, and no other."""
    registered = re.compile(r"\b(?:Counter|Gauge|Histogram)\(\s*\"((?:walsh|grpc_server)_\w+)\"")
    in_code = set()
    for path in repository_files(root):
        if path.endswith(".cc") and not path.startswith("tests/"):
            in_code.update(registered.findall(read(root, path)))
    in_page = set(re.findall(r"^\| `(\w+)` \|", read(root, "docs/metrics.md"), re.M))
    for name in sorted(in_code - in_page):
        yield f"docs/metrics.md: {name} is missing"
    for name in sorted(in_page - in_code):
        yield f"docs/metrics.md: {name} is not in the code"
    # Of vLLM's names the pairs.
    pairs_in_code = re.findall(r'\{"(vllm:\w+)", "(\w+)"\}', read(root, "common/vllm_metrics.cc"))
    pairs_in_page = re.findall(r"^\| `(vllm:\w+)` \| `(\w+)`", read(root, "docs/metrics.md"), re.M)
    if pairs_in_code != pairs_in_page:
        yield "docs/metrics.md: vLLM's names are not those of common/vllm_metrics.cc, in its order"
    for name in sorted({ours for _, ours in pairs_in_code} - in_page):
        yield f"common/vllm_metrics.cc: there is no {name}"


RULES = "deploy/prometheus/rules/"


def check_watching(root):
    """Rules and dashboards name metrics that exist; each alert has its entry in the runbook and no other
    has; promtool tests each alert silent and firing, and each recording rule."""
    paths = [path for path in repository_files(root)
             if path.startswith((RULES, "deploy/grafana/dashboards/"))]
    metrics = set(re.findall(r"^\| `(\w+)` \|", read(root, "docs/metrics.md"), re.M))
    for path in paths:
        used = set(re.findall(r"(?<![:\w])(?:walsh|grpc_server)_\w+", read(root, path)))
        for name in sorted(used):
            if name not in metrics and re.sub(r"_(bucket|sum|count)$", "", name) not in metrics:
                yield f"{path}: there is no metric {name}"

    rules = "".join(read(root, path) for path in paths if path.startswith(RULES))
    alerts = re.findall(r"- alert: (\w+)", rules)
    links = re.findall(r"runbook_url: (\S+)", rules)
    if links != [f"docs/runbook.md#{alert.lower()}" for alert in alerts]:
        yield f"{RULES}: an alert's runbook_url is not docs/runbook.md# and its name in small letters"
    entries = re.findall(r"^## (\w+)$", read(root, "docs/runbook.md"), re.M)
    for name in sorted(set(alerts) ^ set(entries)):
        yield f"docs/runbook.md: {name} is {'not in it' if name in alerts else 'no alert'}"

    tests = read(root, "deploy/prometheus/tests/alerts_test.yml")
    expected = re.findall(r"- alertname: (\w+)\n\s+eval_time: \S+\n\s+exp_alerts:( \[\])?", tests)
    for name in alerts:
        for silent, what in ((" []", "silent"), ("", "firing")):
            if (name, silent) not in expected:
                yield f"deploy/prometheus/tests/alerts_test.yml: {name} is not tested {what}"
    tests = read(root, "deploy/prometheus/tests/recording_test.yml")
    for name in re.findall(r"- record: (\S+)", rules):
        if not re.search(f"expr: .*{re.escape(name)}", tests):
            yield f"deploy/prometheus/tests/recording_test.yml: {name} is not tested"


SELF_TEST = [
    # path, line, refused?
    ("worker/tensor/a.cc", '#include "worker/kernels/kernels.h"', True),
    ("worker/kernels/cpu/a.cc", '#include "worker/tensor/half.h"', False),
    ("worker/kernels/a.cc", '#include "worker/io/artifact.h"', True),
    ("worker/io/a.cc", '#include "worker/kernels/kernels.h"', True),
    ("server/jobs/a.cc", '#include "worker/io/artifact.h"', True),
    ("client/a.cc", '#include "server/jobs/job.h"', True),
    ("common/a.cc", '#include "server/jobs/job.h"', True),
    ("worker/engine/a.cc", "#include <grpcpp/server.h>", True),
    ("worker/engine/a.cc", '#include "walsh/v1/model.pb.h"', True),
    ("worker/service/a.cc", '#include "walsh/v1/model.pb.h"', False),
    ("worker/model/a.cc", "#include <cuda_runtime.h>", True),
    ("worker/kernels/cuda/a.cu", "#include <cuda_runtime.h>", False),
    ("common/a.cc", "  assert(x);", True),
    ("common/a.cc", "  static_assert(x);", False),
    ("common/a.cc", "  // assert(x) is banned", False),
    ("common/a.cc", "  int n = std::stoi(text);", True),
    ("common/a.cc", "  std::cout << n;", True),
    ("client/a.cc", "  std::cout << n;", False),
    ("tests/unit/a.cc", "  std::this_thread::sleep_for(x);", True),
    ("tests/testing/a.cc", "  std::this_thread::sleep_for(x);", False),
    ("common/a.cc", "  int operand(int);", False),
    ("common/a.cc", "  int x = rand();", True),
    ("common/a.cc", "  // TO" + "DO: later", True),
    ("common/a.cc", "  // TO" + "DO(#12): later", False),
    ("docs/a.md", "see /work/shared", True),
    ("docs/a.md", "see https://example.org/work/shared and network/work/x", False),
    ("docs/a.md", "under `/root/x`", True),
]


def self_test():
    for path, line, is_refused in SELF_TEST:
        findings = list(check_line(path, line))
        if bool(findings) != is_refused:
            yield f"self-test: {path}: {line!r} was {'accepted' if is_refused else findings}"


def main():
    root = sys.argv[1] if len(sys.argv) > 1 else os.getcwd()
    findings = [*self_test(), *check_repository(root), *check_limits_page(root),
                *check_metrics_page(root), *check_watching(root)]
    for finding in findings:
        print(finding)
    print(f"{len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
