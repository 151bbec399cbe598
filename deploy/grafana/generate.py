#!/usr/bin/env python3
"""Writes dashboards/*.json, which are committed; with --check tells whether they are what it would write.

What a panel shows is said here once; its place, its colours and the rest of Grafana's JSON follow from its kind.
"""

import json
import pathlib
import sys

FOLDER = pathlib.Path(__file__).resolve().parent / "dashboards"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH = 24  # of Grafana's grid
MIN_INTERVAL = "1m"  # of what is counted: several scrapes
GREEN, YELLOW, RED = "green", "#EAB839", "red"

# What a variable's choice leaves of a metric's series.
DAEMON = 'job=~"$job", instance=~"$instance"'
MODEL = DAEMON + ', model_name=~"$model_name"'
QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))


# -- Expressions


def quantile(q, metric, by="", where=DAEMON, window="$__rate_interval"):
    """The quantile q of a histogram, one series for each value of the label `by`."""
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{where}}}[{window}])))"


def quantiles(metric, where=DAEMON):
    """Its quantiles as targets of one panel."""
    return [(quantile(q, metric, where=where), name) for q, name in QUANTILES]


def total(by):
    """The sum over all series, or one for each value of the labels `by`."""
    return f"sum by ({by})" if by else "sum"


def rate(metric, by="", where=DAEMON):
    return f"{total(by)} (rate({metric}{{{where}}}[$__rate_interval]))"


def count(metric, by="", where=DAEMON, window="$__interval"):
    """What a counter grew by: in each interval of a graph, or in all the time shown."""
    return f"{total(by)} (increase({metric}{{{where}}}[{window}]))"


def mean(metric, by="", where=DAEMON):
    """The mean of what a histogram observed."""
    return f"{rate(metric + '_sum', by, where)} / {rate(metric + '_count', by, where)}"


# -- Panels: what Grafana's JSON wants of each kind


def steps(*limits):
    """Thresholds: green below the first limit; each limit is (value, colour)."""
    base = [{"color": GREEN, "value": None}]
    return {"mode": "absolute", "steps": base + [{"color": c, "value": v} for v, c in limits]}


def panel(kind, title, description, targets, unit, width, height, **options):
    instant = options.get("instant", False)
    defaults = {"unit": unit, "color": {"mode": options.get("color", "palette-classic")}, "mappings": []}
    defaults["thresholds"] = options.get("thresholds", steps())
    for key in ("min", "max", "decimals", "noValue"):
        if key in options:
            defaults[key] = options[key]
    defaults["custom"] = options.get("custom", {})
    made = {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"w": width, "h": height},
        "fieldConfig": {"defaults": defaults, "overrides": options.get("overrides", [])},
        "options": options["options"],
        "targets": [
            {
                "refId": chr(ord("A") + i),
                "datasource": DATASOURCE,
                "expr": expr,
                "legendFormat": legend,
                "format": options.get("format", "time_series"),
                "instant": instant,
                "range": not instant,
            }
            for i, (expr, legend) in enumerate(targets)
        ],
    }
    if "interval" in options:
        made["interval"] = options["interval"]
    return made


def graph(title, description, unit, targets, width=8, height=8, stack=False, log=False, bars=False, **options):
    """Lines over time; `stack` where the sum means something, `bars` for what is counted."""
    custom = {
        "drawStyle": "bars" if bars else "line",
        "lineWidth": 1,
        "fillOpacity": 70 if bars else 25 if stack else 8,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stack else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
    }
    if "thresholds" in options:
        custom["thresholdsStyle"] = {"mode": "dashed"}
    if not log:
        options.setdefault("min", 0)
    if bars:
        options["interval"] = MIN_INTERVAL
    look = {
        "legend": {
            "showLegend": True,
            "displayMode": "table",
            "placement": "bottom",
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel("timeseries", title, description, targets, unit, width, height, custom=custom, options=look, **options)


def stat(title, description, unit, expr, width=4, spark=True, **options):
    """One figure, with what it was like behind it unless it is only of the moment."""
    look = {
        "graphMode": "area" if spark else "none",
        "colorMode": "value",
        "textMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    options.setdefault("instant", not spark)
    return panel(
        "stat", title, description, [(expr, "")], unit, width, 4, color="thresholds", options=look, **options
    )


def gauges(title, description, unit, targets, width=8, height=8, **options):
    """A bar for each series, of the moment or of the whole time shown."""
    look = {
        "displayMode": "gradient",
        "orientation": "horizontal",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "showUnfilled": True,
    }
    options.setdefault("min", 0)
    return panel("bargauge", title, description, targets, unit, width, height, instant=True, options=look, **options)


def heatmap(title, description, unit, metric, where=DAEMON, width=12, height=8):
    """How a histogram's observations spread, over time."""
    look = {
        "calculate": False,
        "yAxis": {"unit": unit, "axisPlacement": "left"},
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Blues", "steps": 64},
        "legend": {"show": True},
        "tooltip": {"show": True, "yHistogram": True},
        "filterValues": {"le": 1e-9},
    }
    target = (count(metric + "_bucket", "le", where), "{{le}}")
    return panel(
        "heatmap", title, description, [target], "short", width, height, interval=MIN_INTERVAL, format="heatmap",
        options=look,
    )


def table(title, description, expr, columns, width=8, height=8):
    """A row for each series; `columns` names the labels that are shown."""
    look = {"showHeader": True, "cellHeight": "sm"}
    made = panel(
        "table", title, description, [(expr, "")], "short", width, height, instant=True, format="table", options=look
    )
    made["transformations"] = [
        {
            "id": "organize",
            "options": {
                "includeByName": {label: True for label in columns},
                "indexByName": {label: i for i, label in enumerate(columns)},
                "renameByName": columns,
            },
        }
    ]
    return made


# -- Dashboards


def choice(name, label, query):
    """A variable with the values of a label; all of them at first."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def variables(of, has_models):
    datasource = {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "hide": 0,
        "includeAll": False,
        "multi": False,
    }
    chosen = [
        datasource,
        choice("job", "Job", f"label_values({of}, job)"),
        choice("instance", "Instance", f'label_values({of}{{job=~"$job"}}, instance)'),
    ]
    if has_models:
        chosen.append(choice("model_name", "Model", f"label_values({of}{{{DAEMON}}}, model_name)"))
    return chosen


def lay_out(rows):
    """Panels of (title, [panel, …]) from left to right, in as many lines as they need."""
    panels, y = [], 0
    for title, members in rows:
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": WIDTH, "h": 1}})
        x, y, line = 0, y + 1, 0
        for member in members:
            place = member["gridPos"]
            if x + place["w"] > WIDTH:
                x, y, line = 0, y + line, 0
            place.update(x=x, y=y)
            x += place["w"]
            line = max(line, place["h"])
            panels.append(member)
        y += line
    for number, member in enumerate(panels, 1):
        member["id"] = number
    return panels


def dashboard(uid, title, description, of, rows, has_models=False):
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["walsh"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair in all panels
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "refresh": "30s",
        "annotations": {"list": []},
        "links": [
            {"type": "dashboards", "title": "walsh", "tags": ["walsh"], "asDropdown": True, "includeVars": True,
             "keepTime": True, "icon": "external link", "targetBlank": False, "tooltip": "", "url": ""}
        ],
        "templating": {"list": variables(of, has_models)},
        "panels": lay_out(rows),
    }


def serving():
    failed = " + ".join(
        f"(sum (rate({metric}{{{where}}}[$__rate_interval])) or vector(0))"
        for metric, where in (
            ("walsh_request_failure_total", MODEL),
            ("walsh_admission_rejections_total", MODEL + ', reason="queue_full"'),
        )
    )
    ended = f"{rate('walsh_request_success_total', where=MODEL)} + {failed}"
    overview = [
        stat("Requests", "Requests that ended, or were refused for a full queue.", "reqps", ended),
        stat("Failed", "Share of them that failed or were refused for a full queue.", "percentunit",
             f"({failed}) / ({ended})", thresholds=steps((0.01, YELLOW), (0.05, RED)), noValue="no requests"),
        stat("Time to first token, p95", "From a request's arrival to its first token.", "s",
             quantile(0.95, "walsh_time_to_first_token_seconds", where=MODEL),
             thresholds=steps((2, YELLOW), (5, RED))),
        stat("Between tokens, p95", "Between successive tokens of a request.", "s",
             quantile(0.95, "walsh_inter_token_latency_seconds", where=MODEL),
             thresholds=steps((0.1, YELLOW), (0.25, RED))),
        stat("Generated", "Tokens generated by all models shown.", "tok/s",
             rate("walsh_generation_tokens_total", where=MODEL)),
        stat("KV cache", "The fullest KV cache: share of its blocks that requests hold.", "percentunit",
             f"max (walsh_kv_cache_usage_perc{{{MODEL}}})", max=1,
             thresholds=steps((0.8, YELLOW), (0.95, RED))),
    ]
    latency = [
        graph("Time to first token", "From a request's arrival to its first token, waiting included. WalshHighTTFT "
              "looks at the 95th percentile.", "s",
              quantiles("walsh_time_to_first_token_seconds", where=MODEL)),
        graph("Inter-token latency", "Between successive tokens of a request. WalshHighInterTokenLatency looks at the "
              "95th percentile.", "s",
              quantiles("walsh_inter_token_latency_seconds", where=MODEL)),
        graph("End-to-end latency", "From a request's arrival to its end. Long answers take long.", "s",
              quantiles("walsh_e2e_request_latency_seconds", where=MODEL)),
        graph("Where the time goes", "Mean time of a request in the queue, in prefill (from admission to the first "
              "token) and in decode (from the first to the last).", "s",
              [(mean("walsh_request_queue_time_seconds", where=MODEL), "queue"),
               (mean("walsh_request_prefill_time_seconds", where=MODEL), "prefill"),
               (mean("walsh_request_decode_time_seconds", where=MODEL), "decode")], stack=True, width=12),
        graph("Time per output token", "Mean time per token after the first, by request: what one reader sees.", "s",
              quantiles("walsh_request_time_per_output_token_seconds", where=MODEL), width=12),
    ]
    throughput = [
        graph("Tokens", "Tokens of prompts that were admitted, those of the prefix cache included, and tokens "
              "generated.", "tok/s",
              [(rate("walsh_generation_tokens_total", "model_name", MODEL), "{{model_name}} generated"),
               (rate("walsh_prompt_tokens_total", "model_name", MODEL), "{{model_name}} prompt")]),
        graph("Requests by what ended them", "stop: a stop token or string; eos: the model's own end; length: "
              "max_tokens or the context; deadline: out of time, with a part of the answer.", "reqps",
              [(rate("walsh_request_success_total", "finished_reason", MODEL), "{{finished_reason}}")], stack=True),
        graph("Refused, failed, cancelled", "Refused before they were queued, by reason; failed after, by code; "
              "cancelled by their client.", "reqps",
              [(rate("walsh_admission_rejections_total", "reason", MODEL), "refused: {{reason}}"),
               (rate("walsh_request_failure_total", "code", MODEL), "failed: {{code}}"),
               (rate("walsh_request_cancelled_total", where=MODEL), "cancelled")]),
    ]
    scheduler = [
        graph("Requests in the engine", "Running: they hold a sequence. Waiting: accepted, not admitted yet. "
              "WalshQueueBacklog looks at those that wait.", "short",
              [(f"sum by (model_name) (walsh_num_requests_running{{{MODEL}}})", "{{model_name}} running"),
               (f"sum by (model_name) (walsh_num_requests_waiting{{{MODEL}}})", "{{model_name}} waiting")]),
        graph("KV cache in use", "Share of the blocks that requests hold. What only the prefix cache keeps is not "
              "counted: it goes when it is needed.", "percentunit",
              [(f"walsh_kv_cache_usage_perc{{{MODEL}}}", "{{model_name}} {{instance}}")], max=1,
              thresholds=steps((0.95, RED))),
        graph("Prompt tokens from the prefix cache", "Share of the admitted prompts' tokens that were not computed "
              "again.", "percentunit",
              [(f"{rate('walsh_prefix_cache_hit_tokens_total', 'model_name', MODEL)} / "
                f"{rate('walsh_prompt_tokens_total', 'model_name', MODEL)}", "{{model_name}}")], max=1),
        graph("Tokens of a step", "How well steps are filled: mean tokens of one step of the engine, of prompts and of "
              "running sequences.", "short",
              [(mean("walsh_iteration_tokens", "model_name", MODEL), "{{model_name}}")]),
        graph("Preemptions", "Running requests that gave their KV cache to an earlier one and compute it again. More "
              "than a few: the cache is too small for the load.", "ops",
              [(rate("walsh_num_preemptions_total", "model_name", MODEL), "{{model_name}}")]),
        graph("Age of the scheduler's heartbeat", "Since an engine's loop last turned, or its step went on to another "
              "layer. After 60 s the worker's liveness fails.", "s",
              [(f"walsh_scheduler_heartbeat_age_seconds{{{MODEL}}}", "{{model_name}} {{instance}}")],
              thresholds=steps((60, RED))),
    ]
    lengths = [
        heatmap("Prompt length", "Tokens of the prompts of requests that ended well.", "short",
                "walsh_request_prompt_tokens", MODEL),
        heatmap("Output length", "Tokens that were generated for them.", "short",
                "walsh_request_generation_tokens", MODEL),
    ]
    return dashboard(
        "walsh-serving",
        "walsh / Serving",
        "What clients of the served models see, and why.",
        "walsh_num_requests_running",
        [("Overview", overview), ("Latency", latency), ("Throughput", throughput),
         ("Scheduler and KV cache", scheduler), ("Length of requests", lengths)],
        has_models=True,
    )


def quantization():
    def ended(state):
        where = f'{DAEMON}, state="{state}"'
        return count("walsh_quantization_jobs_finished_total", where=where, window="$__range")

    def jobs(state):
        return f'sum (walsh_quantization_jobs{{{DAEMON}, state="{state}"}})'

    overview = [
        stat("Queued", "Jobs that wait for a worker.", "short", jobs("QUEUED")),
        stat("Oldest in the queue", "How long the job that has waited longest has waited. WalshJobQueueAge fires after "
             "an hour.", "s", f"max (walsh_quantization_oldest_queued_job_age_seconds{{{DAEMON}}})",
             thresholds=steps((1800, YELLOW), (3600, RED))),
        stat("Running", "Jobs that a worker holds.", "short", jobs("RUNNING")),
        stat("Succeeded", "Within the time shown.", "short", ended("SUCCEEDED"), spark=False, decimals=0),
        stat("Failed", "Within the time shown.", "short", ended("FAILED"), spark=False, decimals=0,
             thresholds=steps((1, RED))),
        stat("Below their quality gate", "Of those that failed within the time shown.", "short",
             count("walsh_quantization_quality_gate_failures_total", window="$__range"), spark=False, decimals=0,
             thresholds=steps((1, RED))),
    ]
    progress = [
        gauges("Layers done", "Of each running job; before its first layer a job is not shown.", "percentunit",
               [(f"walsh_quantization_layers_done{{{DAEMON}}} / walsh_quantization_layers{{{DAEMON}}}",
                 "{{exported_job}}")], max=1, color="continuous-BlPu", noValue="no job is at its layers"),
        graph("Layers done, over time", "A line that stays level is a job that works on something else (loading, "
              "evaluation), waits for requests, or is stuck.", "short",
              [(f"walsh_quantization_layers_done{{{DAEMON}}}", "{{exported_job}}")]),
        graph("Since a job last came forward", "WalshJobStuck fires after ten minutes, or three times the median of a "
              "layer where that is longer.", "s",
              [(f"time() - walsh_quantization_job_progress_timestamp_seconds{{{DAEMON}}}", "{{exported_job}}")],
              thresholds=steps((600, RED))),
        graph("Jobs by state", "Jobs that are not over.", "short",
              [(f'sum by (state) (walsh_quantization_jobs{{{DAEMON}, state=~"QUEUED|RUNNING|CANCELLING"}})',
                "{{state}}")], stack=True),
        graph("Jobs that ended", "In each interval, by how.", "short",
              [(count("walsh_quantization_jobs_finished_total", "state"), "{{state}}")], stack=True, bars=True),
        graph("Jobs that came back", "Refused by a worker that cannot run them (memory, device), or whose worker "
              "stopped its heartbeats.", "short",
              [(count("walsh_quantization_job_refusals_total"), "refused"),
               (count("walsh_worker_lease_expirations_total"), "lease lost")],
              stack=True, bars=True),
    ]
    quality = [
        graph("Error of the layers as they are finished", "Mean relative output error of each kind of linear over the "
              "calibration inputs. A job's layers follow one another in time, from the first to the last.",
              "percentunit", [(mean("walsh_quantization_layer_error", "linear"), "{{linear}}")], log=True,
              width=16, height=9),
        heatmap("How the errors spread", "Relative output errors of all linears.", "percentunit",
                "walsh_quantization_layer_error", width=8, height=9),
        gauges("Perplexity after over before", "Of the jobs that ended within the time shown, those that a quality "
               "gate refused, too. 1 is no loss.", "short",
               [(quantile(q, "walsh_quantization_perplexity_ratio", window="$__range"), name)
                for q, name in QUANTILES], min=1, color="continuous-GrYlRd"),
        graph("Linears that needed help", "Rounded to nearest because their Hessian could not be factored, and those "
              "that needed more than the damping asked for.", "short",
              [(count("walsh_quantization_fallbacks_total", "reason"), "rounded: {{reason}}"),
               (count("walsh_quantization_damp_retries_total"), "more damping")], stack=True, bars=True),
        graph("Failed their quality gate", "Models that were kept apart and not published.", "short",
              [(count("walsh_quantization_quality_gate_failures_total"), "jobs")], bars=True),
    ]
    time = [
        gauges("Time by stage", "Of the jobs that succeeded within the time shown, all together.", "s",
               [(count("walsh_quantization_stage_seconds_sum", "stage", window="$__range"), "{{stage}}")],
               color="continuous-BlPu"),
        graph("Time of a layer", "From one finished layer to the next, with the time that the job waited for requests.",
              "s", quantiles("walsh_quantization_layer_seconds")),
        gauges("Time of a job", "From creation to a worker, and from the first start to the end, of the jobs within "
               "the time shown.", "s",
               [(quantile(q, f"walsh_quantization_job_{part}_seconds", window="$__range"), f"{what}, {name}")
                for part, what in (("queue", "in the queue"), ("duration", "from its start"))
                for q, name in QUANTILES[:2]], color="continuous-BlPu"),
        graph("Waiting for requests", "Share of its time that a worker's job stood still for the requests of models "
              "(--serve-while-quantizing).", "percentunit",
              [(f"rate(walsh_quantization_yield_seconds_total{{{DAEMON}}}[$__rate_interval])", "{{instance}}")],
              max=1),
        graph("Calibration tokens", "Tokens that the calibrations of finished jobs ran on.", "short",
              [(count("walsh_quantization_calibration_tokens_total"), "tokens")], bars=True),
        graph("Artifacts", "Bytes written, and operations that failed.", "bytes",
              [(count("walsh_artifact_bytes_total", "op"), "{{op}}"),
               (count("walsh_artifact_errors_total", "op"), "{{op}} failed")], bars=True,
              overrides=[{"matcher": {"id": "byRegexp", "options": ".* failed"},
                          "properties": [{"id": "unit", "value": "short"},
                                         {"id": "custom.axisPlacement", "value": "right"},
                                         {"id": "color", "value": {"mode": "fixed", "fixedColor": RED}}]}]),
    ]
    return dashboard(
        "walsh-quantization",
        "walsh / Quantization",
        "Jobs: how far they are, what they cost, and what they make.",
        "walsh_build_info",
        [("Overview", overview), ("Jobs", progress), ("Quality", quality), ("Time and data", time)],
    )


def fleet():
    def workers(state):
        return f'sum (walsh_workers{{{DAEMON}, state="{state}"}})'

    def models(state):
        return f'sum (walsh_models{{{DAEMON}, state="{state}"}})'

    gpu_used = " - ".join(
        f'sum by (instance, device) (walsh_worker_gpu_memory_bytes{{{DAEMON}, kind="{kind}"}})'
        for kind in ("total", "free")
    )
    overview = [
        stat("Daemons up", "Coordinators and workers that answer on their metrics ports.", "short",
             f"sum (walsh_build_info{{{DAEMON}}})"),
        stat("Workers online", "Workers that heartbeat.", "short", workers("ONLINE")),
        stat("Workers lost", "Workers that have been silent for the time of a lease; forgotten after an hour.", "short",
             workers("OFFLINE"), thresholds=steps((1, RED))),
        stat("Models ready", "Models that at least one worker serves.", "short", models("READY")),
        stat("Models failed", "Models whose last load failed everywhere.", "short", models("FAILED"),
             thresholds=steps((1, RED))),
        stat("Alerts", "Alerts of walsh that fire.", "short",
             'count (ALERTS{alertname=~"Walsh.*", alertstate="firing"}) or vector(0)',
             thresholds=steps((1, RED))),
    ]
    calls = [
        graph("Calls", "RPCs that ended, by service.", "reqps",
              [(rate("grpc_server_handled_total", "grpc_service"), "{{grpc_service}}")], stack=True),
        graph("Calls that failed", "Share of each public service's calls that failed by no fault of their callers. "
              "WalshRequestErrorRate fires above 5 %.", "percentunit",
              [('service:grpc_server_errors:ratio_rate5m{job=~"$job"}', "{{grpc_service}}")], max=1,
              thresholds=steps((0.05, RED))),
        graph("Time of unary calls, p95", "By method. Calls that wait for work or for an answer's end take long by "
              "nature.", "s",
              [(quantile(0.95, "grpc_server_handling_seconds", "grpc_method", DAEMON + ', grpc_type="unary"'),
                "{{grpc_method}}")]),
        graph("Calls by code", "How RPCs ended, on all daemons shown.", "reqps",
              [(rate("grpc_server_handled_total", "grpc_code"), "{{grpc_code}}")], stack=True, width=12),
        graph("Messages", "To and from clients, workers and the coordinator.", "ops",
              [(rate("grpc_server_msg_received_total", "grpc_service"), "{{grpc_service}} received"),
               (rate("grpc_server_msg_sent_total", "grpc_service"), "{{grpc_service}} sent")], width=12),
    ]
    models_row = [
        graph("Models by state", "Published models; a model is READY where at least one worker serves it.", "short",
              [(f"sum by (state) (walsh_models{{{DAEMON}}})", "{{state}}")], stack=True),
        graph("Memory of the weights", "Of loaded models; their KV caches come beside it.", "bytes",
              [(f"sum by (model_name) (walsh_model_memory_bytes{{{DAEMON}}})", "{{model_name}}")], stack=True),
        # Too few for rates, and their series come with the first.
        graph("Time to load", "From the request to load until the model serves: mean since the worker's start.", "s",
              [(f"sum by (model_name) (walsh_model_load_seconds_sum{{{DAEMON}}}) / "
                f"sum by (model_name) (walsh_model_load_seconds_count{{{DAEMON}}})", "{{model_name}}")]),
        graph("Loads that failed", "Since the worker's start, by model and code.", "short",
              [(f"sum by (model_name, code) (walsh_model_load_failures_total{{{DAEMON}}})",
                "{{model_name}} {{code}}")], width=12),
        table("KV caches", "What the KV cache of each loaded model is made of.",
              f"walsh_kv_cache_config_info{{{DAEMON}}}",
              {"instance": "Worker", "model_name": "Model", "num_blocks": "Blocks", "block_size": "Tokens of a block",
               "prefix_cache": "Prefix cache"}, width=12),
    ]
    workers_row = [
        graph("Workers by state", "As the coordinator sees them.", "short",
              [(f"sum by (state) (walsh_workers{{{DAEMON}}})", "{{state}}")], stack=True),
        graph("Requests by worker", "Running and waiting, of all its models.", "short",
              [(f"sum by (instance) (walsh_num_requests_running{{{DAEMON}}})", "{{instance}} running"),
               (f"sum by (instance) (walsh_num_requests_waiting{{{DAEMON}}})", "{{instance}} waiting")]),
        graph("Generated by worker", "Tokens of all its models.", "tok/s",
              [(rate("walsh_generation_tokens_total", "instance"), "{{instance}}")], stack=True),
        table("Builds", "What runs where.", f"walsh_build_info{{{DAEMON}}}",
              {"job": "Job", "instance": "Instance", "version": "Version", "revision": "Revision", "cuda": "CUDA"},
              width=24, height=6),
    ]
    gpus = [
        graph("GPU memory in use", "By all processes of the device, as of the worker's last heartbeat.", "bytes",
              [(gpu_used, "{{instance}} {{device}}")]),
        graph("GPU memory free", "As of the worker's last heartbeat.", "bytes",
              [(f'walsh_worker_gpu_memory_bytes{{{DAEMON}, kind="free"}}', "{{instance}} {{device}}")]),
        graph("GPU active", "Of dcgm-exporter, where there is one: share of time that a kernel ran.", "percent",
              [("DCGM_FI_DEV_GPU_UTIL", "{{Hostname}} {{gpu}}")], max=100),
    ]
    return dashboard(
        "walsh-fleet",
        "walsh / Fleet",
        "Coordinators, workers, their models and their calls.",
        "walsh_build_info",
        [("Overview", overview), ("Calls", calls), ("Models", models_row), ("Workers", workers_row), ("GPUs", gpus)],
    )


def main():
    is_check = sys.argv[1:] == ["--check"]
    differing = []
    for made in (serving(), quantization(), fleet()):
        path = FOLDER / f"{made['uid']}.json"
        text = json.dumps(made, indent=2) + "\n"
        if not is_check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            differing.append(path.name)
    if differing:
        print(f"{', '.join(differing)}: not what deploy/grafana/generate.py writes; run it")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
