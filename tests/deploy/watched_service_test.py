#!/usr/bin/env python3
"""Every expression of every dashboard and rule, evaluated by a real Prometheus over the real service.

Goal:   no expression fails, and none finds nothing, but for those of MAY_BE_EMPTY. A healthy service raises no alert; a
        model that cannot be loaded and a worker that is killed raise theirs. promtool has nothing against the metrics.
Method: the daemons on the CPU with a tiny model, scraped every second with the example configuration. A job runs from
        beginning to end, another one is half done, and requests run, while expressions are evaluated.
"""

import contextlib
import glob
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import prometheus_tools
from processes import ENVIRONMENT, run_test, wait_until

DEPLOY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../deploy")
BIN = os.environ["WALSH_BIN_DIR"]
TOOLS = os.environ["WALSH_TEST_TOOLS_DIR"]

# Series that this service does not have, and why. One that turns up all the same is to be taken off this list.
MAY_BE_EMPTY = {
    "DCGM_FI_DEV_GPU_UTIL": "no dcgm-exporter runs here",
    "DCGM_FI_DEV_XID_ERRORS": "no dcgm-exporter runs here",
    "walsh_worker_gpu_memory_bytes": "the worker has no GPU",
    "walsh_request_failure_total": "no request fails",
    "walsh_tls_certificate_expiry_timestamp_seconds": "the ports are plain",
    "walsh_object_store_requests_total": "the worker keeps nothing in buckets",
}
# What Grafana puts in. Rates need some scrapes, here of a second.
VARIABLES = {
    "$__rate_interval": "6s",
    "$__interval": "6s",
    "$__range": "5m",
    "$job": ".*",
    "$instance": ".*",
    "$model_name": ".*",
}
# Of the dashboards that come with vLLM.
VLLM_QUERIES = [
    "histogram_quantile(0.99, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket[6s])))",
    "histogram_quantile(0.95, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[6s])))",
    "histogram_quantile(0.9, sum by (le) (rate(vllm:inter_token_latency_seconds_bucket[6s])))",
    "rate(vllm:prompt_tokens_total[6s])",
    "rate(vllm:generation_tokens_total[6s])",
    'vllm:num_requests_running{model_name="tiny"}',
    'vllm:num_requests_waiting{model_name="tiny"}',
    'vllm:kv_cache_usage_perc{model_name="tiny"}',
    'sum by (finished_reason) (increase(vllm:request_success_total{finished_reason="length"}[1m]))',
    "sum by (le) (increase(vllm:request_prompt_tokens_bucket[1m]))",
    "sum by (le) (increase(vllm:request_generation_tokens_bucket[1m]))",
    "rate(vllm:request_queue_time_seconds_sum[6s])",
    "rate(vllm:request_prefill_time_seconds_sum[6s])",
    "rate(vllm:request_decode_time_seconds_sum[6s])",
    'vllm:cache_config_info{block_size="16"}',
]


class Prometheus:
    def __init__(self, children, folder, endpoints):
        shutil.copytree(os.path.join(DEPLOY, "prometheus"), folder)
        config = os.path.join(folder, "prometheus.yml")
        with open(config, encoding="utf-8") as file:
            text = file.read()
        for example, here in {**endpoints, "15s": "1s"}.items():
            assert example in text, f"prometheus.yml has no {example}"
            text = text.replace(example, here)
        with open(config, "w", encoding="utf-8") as file:
            file.write(text)
        children.start("prometheus", prometheus_tools.find("prometheus"), f"--config.file={config}",
                       f"--storage.tsdb.path={folder}/data", "--web.listen-address=127.0.0.1:0")

        def address():
            children.check("prometheus")
            found = re.search(r'msg="Listening on" address=(\S+)', children.read_log("prometheus"))
            return found and found.group(1)

        self.url = f"http://{wait_until('the address of prometheus', address)}"
        wait_until("prometheus", lambda: http_ok(f"{self.url}/-/ready"))

    def get(self, path, **parameters):
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(json.load(error).get("error", str(error))) from error

    def query(self, expression):
        """Values of the moment."""
        result = self.get("query", query=expression)["result"]
        return [float(series["value"][1]) for series in result]

    def query_range(self, expression, start):
        """Values of all series since `start`."""
        result = self.get("query_range", query=expression, start=start, end=time.time(), step=1)["result"]
        return [float(value) for series in result for _, value in series["values"]]

    def firing(self):
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}


def http_ok(url):
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


class Service:
    """A coordinator and a worker on free ports, with a tiny model to quantize."""

    def __init__(self, children, folder):
        self.children = children
        self.data = os.path.join(folder, "data")
        self.model = os.path.join(folder, "models", "tiny")
        self.text = os.path.join(folder, "models", "text.txt")
        os.makedirs(os.path.dirname(self.model))
        subprocess.run([os.path.join(TOOLS, "write_tiny_model"), self.model], check=True)
        with open(self.text, "w", encoding="utf-8") as file:
            file.writelines(f"Line {i} of a text that says nothing.\n" for i in range(20000))
        self.coordinator = self.start("coordinator", "--internal-port", "0", "--http-port", "0",
                                      "--heartbeat-seconds", "1", "--job-lease-seconds", "10")
        self.worker = self.start("worker", "--coordinator", self.coordinator["internal"], "--device", "cpu",
                                 "--threads", "1", "--model-root", os.path.dirname(self.model),
                                 "--serve-while-quantizing", "preempt", "--vllm-metrics-compat")
        wait_until("a registered worker", lambda: http_ok(f"http://{self.worker['metrics']}/readyz"))

    def start(self, name, *flags):
        self.children.start(name, os.path.join(BIN, f"walsh-{name}"), "--data-dir", self.data, "--host", "127.0.0.1",
                            "--grpc-port", "0", "--metrics-port", "0", *flags)

        def endpoints():
            self.children.check(name)
            with contextlib.suppress(FileNotFoundError), open(f"{self.data}/run/{name}.json", encoding="utf-8") as file:
                return json.load(file)

        return wait_until(name, endpoints)

    def command(self, *arguments):
        return [os.path.join(BIN, "walsh"), "--server", self.coordinator["grpc"], *arguments]

    def walsh(self, *arguments, check=True):
        done = subprocess.run(self.command(*arguments), stdin=subprocess.DEVNULL, capture_output=True, text=True,
                              timeout=120, env=ENVIRONMENT, check=False)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(arguments)}: {done.stdout}{done.stderr}")

    def quantize(self, name, *flags, samples=4):
        self.walsh("quantize", self.model, "--name", name, "--calibration", self.text, "--num-samples",
                   str(samples), "--seq-len", "64", *flags)

    def damage(self, name):
        """Cuts the weights of a published model short."""
        (path,) = glob.glob(f"{self.data}/models/{name}/*.safetensors")
        os.truncate(path, os.path.getsize(path) // 2)


def put_in(expression):
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def dashboards():
    for path in sorted(glob.glob(os.path.join(DEPLOY, "grafana/dashboards/*.json"))):
        with open(path, encoding="utf-8") as file:
            yield json.load(file)


def dashboard_queries():
    """(where, expression, whether it is of the moment) of every panel."""
    for dashboard in dashboards():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", []):
                yield f"{dashboard['title']}: {panel['title']}", put_in(target["expr"]), target["instant"]


def variable_queries():
    """(where, label, selector) of every variable with the values of a label."""
    for dashboard in dashboards():
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()
                yield f"{dashboard['title']}: ${variable['name']}", label, put_in(selector)


def selectors(expression):
    """The series that an alert looks at: its comparison finds nothing while all is well."""
    return re.findall(r"(?:\w+:)?(?:walsh|grpc_server|DCGM|up\b)\w*(?::\w+)?(?:\{[^}]*\})?", expression)


def may_be_empty(expression):
    return "or vector(0)" not in expression and any(name in expression for name in MAY_BE_EMPTY)


def queries(prometheus):
    """(where, expression, whether it is of the moment) of everything that is asked of Prometheus."""
    yield from dashboard_queries()
    for group in prometheus.get("rules")["groups"]:
        for rule in group["rules"]:
            looked_at = [rule["name"]] if rule["type"] == "recording" else selectors(rule["query"])
            assert looked_at, rule["query"]
            for selector in looked_at:
                yield rule["name"], selector, False
    for expression in VLLM_QUERIES:
        yield "vLLM", expression, False


def finds_something(prometheus, expression, is_instant, start):
    values = prometheus.query(expression) + ([] if is_instant else prometheus.query_range(expression, start))
    return any(not math.isnan(value) for value in values)


def find_faults(prometheus, start):
    """What is wrong with the expressions. What finds nothing at first is given the time of some scrapes."""
    faults = []
    missing = []
    for where, expression, is_instant in queries(prometheus):
        try:
            prometheus.query(expression)
        except RuntimeError as error:
            faults.append(f"{where}: {expression}: {error}")
            continue
        if not may_be_empty(expression):
            missing.append((where, expression, is_instant))
    print(f"{len(missing)} expressions")
    deadline = time.monotonic() + 20
    while missing and time.monotonic() < deadline:
        missing = [query for query in missing if not finds_something(prometheus, *query[1:], start)]
    faults += [f"{where}: {expression}: finds nothing" for where, expression, _ in missing]
    for metric, reason in MAY_BE_EMPTY.items():
        if finds_something(prometheus, metric, False, start):
            faults.append(f"{metric} is there, though MAY_BE_EMPTY says: {reason}")
    for where, label, selector in variable_queries():
        if not prometheus.get(f"label/{label}/values", **{"match[]": selector}):
            faults.append(f"{where}: {selector} has no {label}")
    for group in prometheus.get("rules")["groups"]:
        faults += [f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}"
                   for rule in group["rules"] if rule["health"] != "ok"]
    return faults


def lint(endpoint):
    """What promtool has against a page of metrics. vLLM's names are as they are."""
    with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10) as page:
        done = subprocess.run([prometheus_tools.find("promtool"), "check", "metrics"], input=page.read(),
                              capture_output=True, check=False)
    return [line for line in done.stderr.decode().splitlines() if not line.startswith("vllm:")]


def run(folder, children):
    service = Service(children, folder)
    start = time.time()
    prometheus = Prometheus(children, os.path.join(folder, "prometheus"),
                            {"localhost:8002": service.coordinator["metrics"],
                             "localhost:8003": service.worker["metrics"]})
    wait_until("two scraped daemons", lambda: prometheus.query("sum(up)") == [2])

    service.quantize("tiny", "--eval-text", service.text, "--eval-windows", "2", "--eval-window", "64", "--load")
    # What rates look at must grow after it was first seen.
    wait_until("errors of layers", lambda: prometheus.query("walsh_quantization_layer_error_count"))
    service.quantize("damaged", "--no-eval", "--no-load")
    # Some seconds of work, and it stands still while there are requests: it is there for as long as they are.
    service.quantize("waiting", "--no-eval", "--no-load", "--detach", samples=6000)
    wait_until("progress of a job", lambda: prometheus.query("walsh_quantization_layers"))
    # More at once than run, so that some wait.
    children.start("load", *service.command("bench", "tiny", "--concurrency", "24", "--requests", "1000000",
                                            "--prompt-tokens", "32", "--shared-prefix", "16", "--output-tokens", "64"))
    answered = put_in("sum(rate(walsh_request_success_total[$__rate_interval])) > 0")
    wait_until("answered requests", lambda: prometheus.query(answered))
    assert not prometheus.firing(), f"a healthy service raises {prometheus.firing()}"

    service.damage("damaged")
    service.walsh("models", "load", "damaged", check=False)
    wait_until("WalshModelLoadFailed", lambda: prometheus.firing() == {"WalshModelLoadFailed"})
    faults = find_faults(prometheus, start)
    for daemon in (service.coordinator, service.worker):
        faults += lint(daemon["metrics"])
    children.kill("load")

    children.kill("worker")
    wait_until("WalshWorkerLost", lambda: "WalshWorkerLost" in prometheus.firing())
    return faults


def main():
    prometheus_tools.find("prometheus")
    return run_test(run)


if __name__ == "__main__":
    sys.exit(main())
