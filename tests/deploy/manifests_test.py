#!/usr/bin/env python3
"""The objects that the chart and the kustomize overlays make.

Goal:   Kubernetes 1.34 takes each, also in a namespace that is restricted; names that they refer to exist; their
        flags and ports are the daemons'; a pod has the time that it needs to stop; chart and overlays make the same.
Method: helm and kubectl render them, without a cluster; JSON schemas and the checks below judge them. The checks are
        tried first, on objects that were damaged.
"""

import copy
import json
import os
import subprocess
import sys

import fetched
import service_settings

sys.path.insert(0, fetched.find("deploy-tools/python"))
import fastjsonschema  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402

CHART = os.path.join(service_settings.ROOT, "deploy/helm/walsh")
KUSTOMIZE = os.path.join(service_settings.ROOT, "deploy/kubernetes")
GPU = ["--values", os.path.join(CHART, "values-gpu.yaml")]
EVERYTHING = [*GPU, "--set", "podMonitor.enabled=true,autoscaling.enabled=true,worker.requiredModel=llama,"
                             "worker.sources.existingClaim=sources"]
KEDA = ["--set", "keda.enabled=true,keda.prometheusAddress=http://prometheus.monitoring:9090"]
SECURED = ["--set", "security.tlsSecret=walsh-tls,security.workerTokenSecret=walsh-token,"
                    "security.apiKeysSecret=walsh-keys"]
POSTGRES = ["--set", "coordinator.replicas=2,coordinator.postgres.uri=postgres://walsh@db.databases/walsh,"
                     "coordinator.postgres.passwordSecret=walsh-db"]
BUCKETS = ["--set", "worker.s3Secret=walsh-s3,worker.environment.WALSH_MODEL_URL_PREFIX=s3://models"]
# Variables that are no flags: libpq's, and those of an endpoint of buckets.
OF_LIBRARIES = ("PGPASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION",
                "AWS_SESSION_TOKEN")
WORKLOADS = ("Deployment", "StatefulSet")
# What the pod security standard `restricted` asks for, and a root file system that nothing writes to.
POD_SECURITY = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def run(tool, *arguments):
    return subprocess.run([fetched.find(f"deploy-tools/bin/{tool}"), *arguments], capture_output=True, text=True,
                          check=False)


def render(tool, *arguments):
    done = run(tool, *arguments)
    if done.returncode != 0:
        raise RuntimeError(f"{tool} {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def helm(*flags):
    return render("helm", "template", "walsh", CHART, *flags)


def kustomize(overlay):
    return render("kubectl", "kustomize", os.path.join(KUSTOMIZE, "overlays", overlay))


def parse(text):
    return [found for found in YAML(typ="safe", pure=True).load_all(text) if found is not None]


def name_of(found):
    return f"{found['kind']} {found['metadata']['name']}"


class Schemas:
    """Kubernetes' schemas, which refuse fields that they do not know."""

    def __init__(self):
        self.folder = fetched.find("deploy-tools/schemas")
        self.validators = {}

    def read(self, name):
        with open(os.path.join(self.folder, name), encoding="utf-8") as file:
            return json.load(file)

    def faults(self, found):
        group, _, version = found["apiVersion"].rpartition("/")
        if group in ("monitoring.coreos.com", "keda.sh"):
            return  # an operator's, not Kubernetes'
        parts = [found["kind"].lower(), group.split(".")[0], version]
        name = "-".join(part for part in parts if part) + ".json"
        if name not in self.validators:
            self.validators[name] = fastjsonschema.compile(
                self.read(name), handlers={"https": lambda uri: self.read(uri.rpartition("/")[2])})
        try:
            self.validators[name](found)
        except fastjsonschema.JsonSchemaValueException as error:
            yield error.message


class Fleet:
    """All objects of one rendering."""

    def __init__(self, objects):
        self.objects = objects
        self.workloads = [found for found in objects if found["kind"] in WORKLOADS]

    def of_kind(self, kind):
        return [found for found in self.objects if found["kind"] == kind]

    def selected(self, labels):
        """Workloads whose pods have these labels."""
        return [found for found in self.workloads
                if labels.items() <= found["spec"]["template"]["metadata"]["labels"].items()]

    def flags(self, container):
        """{environment variable: value} of a container."""
        values = {}
        for source in container.get("envFrom", []):
            (config,) = [found for found in self.of_kind("ConfigMap")
                         if found["metadata"]["name"] == source["configMapRef"]["name"]]
            values.update(config["data"])
        values.update({entry["name"]: entry.get("value") for entry in container.get("env", [])
                       if entry["name"] not in OF_LIBRARIES})
        return values


def container_of(workload):
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    return container


def container_ports(workload):
    """{name: number}"""
    return {port["name"]: port["containerPort"] for port in container_of(workload)["ports"]}


def has(settings, wanted):
    return all(settings.get(key) == value for key, value in wanted.items())


def check_container(fleet, workload):
    pod = workload["spec"]["template"]["spec"]
    container = container_of(workload)
    if not has(pod["securityContext"], POD_SECURITY) or not has(container["securityContext"], CONTAINER_SECURITY):
        yield "is not restricted"
    if not container["resources"].get("requests") or "memory" not in container["resources"].get("limits", {}):
        yield "has no requests or no limit of memory"
    if pod["enableServiceLinks"]:
        yield "takes variables of Services, which look like flags"
    ports = container_ports(workload)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        settings = container.get(probe)
        if settings is None:
            yield f"has no {probe}"
            continue
        port = (settings.get("grpc") or settings.get("httpGet"))["port"]
        if port not in ports and port not in ports.values():
            yield f"{probe}: there is no port {port}"
    if ports != service_settings.default_ports(container["name"]):
        yield f"the daemon does not listen on {ports}"

    flags = fleet.flags(container)
    for name in sorted(flags.keys() - service_settings.environment_names(container["name"])):
        yield f"{name} is none of its flags"
    seconds = container["lifecycle"]["preStop"]["sleep"]["seconds"] + float(flags["WALSH_SHUTDOWN_TIMEOUT"])
    if pod["terminationGracePeriodSeconds"] <= seconds:
        yield f"has {pod['terminationGracePeriodSeconds']} s to stop and needs more than {seconds:.0f} s"

    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes.update(claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", []))
    if volumes != {mount["name"] for mount in container["volumeMounts"]}:
        yield "its volumes are not those that it mounts"


def check_secrets(fleet, workload):
    """Files of flags are in mounted Secrets, and no probe speaks gRPC to a port with TLS."""
    container = container_of(workload)
    flags = fleet.flags(container)
    volumes = {volume["name"]: volume for volume in workload["spec"]["template"]["spec"].get("volumes", [])}
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]
               if "secret" in volumes.get(mount["name"], {}) and mount.get("readOnly")]
    for flag, value in flags.items():
        if str(value).startswith("/etc/walsh/") and os.path.dirname(value) not in mounted:
            yield f"{flag}: no Secret is mounted at {os.path.dirname(value)}"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if "WALSH_TLS_CERT" in flags and "grpc" in container.get(probe, {}):
            yield f"{probe} speaks gRPC without TLS"


def check_selector(fleet, labels, ports):
    """A selector finds pods, and these have the ports."""
    workloads = fleet.selected(labels)
    if not workloads:
        yield f"selects nothing: {labels}"
    for workload in workloads:
        for port in ports:
            if port not in container_ports(workload):
                yield f"{name_of(workload)} has no port {port}"


def check_network_policy(fleet, policy):
    labels = policy["spec"]["podSelector"]["matchLabels"]
    for rule in policy["spec"]["ingress"]:
        yield from check_selector(fleet, labels, [port["port"] for port in rule["ports"]])
    for rule in policy["spec"]["egress"]:
        ports = [port["port"] for port in rule["ports"]]
        for peer in rule["to"]:
            if "podSelector" in peer:
                yield from check_selector(fleet, peer["podSelector"]["matchLabels"], ports)


def check_scaled_object(fleet, spec):
    """KEDA's triggers ask who is there for what is there."""
    for trigger in spec["triggers"]:
        settings = trigger["metadata"]
        if trigger["type"] == "external":
            service, _, port = settings["scalerAddress"].partition(":")
            ports = [entry["port"] for found in fleet.of_kind("Service")
                     if found["metadata"]["name"] == service.split(".")[0] for entry in found["spec"]["ports"]
                     if entry["name"] == "internal"]
            if ports != [int(port)]:
                yield f"nobody answers at {settings['scalerAddress']}"
        else:
            metric = settings["query"].removeprefix("sum(").partition("{")[0]
            if f"| `{metric}` |" not in service_settings.read("docs/metrics.md"):
                yield f"there is no metric {metric}"


def check_target(fleet, target):
    if f"{target['kind']} {target['name']}" not in [name_of(workload) for workload in fleet.workloads]:
        yield f"there is no {target['kind']} {target['name']}"


def check_references(fleet, found):
    spec = found.get("spec", {})
    if found["kind"] in WORKLOADS:
        yield from check_selector(fleet, spec["selector"]["matchLabels"], [])
        services = [service["metadata"]["name"] for service in fleet.of_kind("Service")]
        if found["kind"] == "StatefulSet" and spec["serviceName"] not in services:
            yield f"there is no Service {spec['serviceName']}"
    elif found["kind"] == "Service":
        yield from check_selector(fleet, spec["selector"], [port["targetPort"] for port in spec["ports"]])
    elif found["kind"] == "PodDisruptionBudget":
        yield from check_selector(fleet, spec["selector"]["matchLabels"], [])
    elif found["kind"] == "PodMonitor":
        yield from check_selector(fleet, spec["selector"]["matchLabels"],
                                  [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]])
    elif found["kind"] == "NetworkPolicy":
        yield from check_network_policy(fleet, found)
    elif found["kind"] == "HorizontalPodAutoscaler":
        yield from check_target(fleet, spec["scaleTargetRef"])
        for metric in spec["metrics"]:
            if f"| `{metric['pods']['metric']['name']}` |" not in service_settings.read("docs/metrics.md"):
                yield f"there is no metric {metric['pods']['metric']['name']}"
    elif found["kind"] == "ScaledObject":
        yield from check_target(fleet, spec["scaleTargetRef"])
        yield from check_scaled_object(fleet, spec)


def check(objects, schemas):
    fleet = Fleet(objects)
    for found in objects:
        faults = [*schemas.faults(found), *check_references(fleet, found)]
        if found["kind"] in WORKLOADS:
            faults += [*check_container(fleet, found), *check_secrets(fleet, found)]
        yield from (f"{name_of(found)}: {fault}" for fault in faults)


def by_name(objects):
    """Objects by kind and name, without the namespace, which only overlays have."""
    named = {}
    for found in copy.deepcopy(objects):
        found["metadata"].pop("namespace", None)
        named[name_of(found)] = found
    return named


def compare(overlay, made, wanted):
    made, wanted = by_name(made), by_name(wanted)
    made.pop("Namespace walsh")
    for name in sorted(made.keys() | wanted.keys()):
        if made.get(name) != wanted.get(name):
            yield f"overlay {overlay}: {name} is not what the chart makes"


# what: the kind of the object to damage, and how
DAMAGES = {
    "a field that does not exist": ("Service", lambda found: found["spec"].update(bogus=1)),
    "no probe": ("StatefulSet", lambda found: container_of(found).pop("readinessProbe")),
    "a probe of another port": (
        "Deployment", lambda found: container_of(found)["readinessProbe"]["grpc"].update(port=1)),
    "no limit": ("StatefulSet", lambda found: container_of(found)["resources"].pop("limits")),
    "root's rights": (
        "StatefulSet", lambda found: container_of(found)["securityContext"]["capabilities"].pop("drop")),
    "a Secret that is not mounted": (
        "ConfigMap", lambda found: found["data"].update(WALSH_TLS_CERT="/etc/walsh/tls/tls.crt")),
    "a flag that does not exist": ("ConfigMap", lambda found: found["data"].update(WALSH_BOGUS="1")),
    "the other daemon's flag": ("ConfigMap", lambda found: found["data"].update(WALSH_LOAD_MODEL="llama")),
    "no time": ("ConfigMap", lambda found: found["data"].update(WALSH_SHUTDOWN_TIMEOUT="100")),
    "another port": ("Deployment", lambda found: container_of(found)["ports"][0].update(containerPort=1)),
    "a Service's other port": ("Service", lambda found: found["spec"]["ports"][0].update(targetPort="bogus")),
    "another label": (
        "PodDisruptionBudget", lambda found: found["spec"]["selector"]["matchLabels"].update(bogus="1")),
    "a policy of another port": (
        "NetworkPolicy", lambda found: found["spec"]["egress"][0]["ports"][0].update(port="bogus")),
    "a metric that does not exist": (
        "HorizontalPodAutoscaler",
        lambda found: found["spec"]["metrics"][0]["pods"]["metric"].update(name="bogus")),
}
KEDA_DAMAGES = {
    "a scaler of another port": (
        "ScaledObject",
        lambda found: found["spec"]["triggers"][0]["metadata"].update(scalerAddress="walsh-coordinator.default.svc:1")),
    "a query of no metric": (
        "ScaledObject", lambda found: found["spec"]["triggers"][1]["metadata"].update(query="sum(bogus{})")),
    "another target": ("ScaledObject", lambda found: found["spec"]["scaleTargetRef"].update(name="bogus")),
}


def self_test(objects, damages, schemas):
    for what, (kind, change) in damages.items():
        damaged = copy.deepcopy(objects)
        change(next(found for found in damaged if found["kind"] == kind))
        if not list(check(damaged, schemas)):
            yield f"self-test: {what} is not found"


def main():
    schemas = Schemas()
    rendered = {
        "helm": parse(helm()),
        "helm, GPU": parse(helm(*GPU)),
        "helm, everything": parse(helm(*EVERYTHING)),
        "helm, KEDA": parse(helm(*KEDA)),
        "helm, secured": parse(helm(*SECURED)),
        "helm, PostgreSQL": parse(helm(*POSTGRES)),
        "helm, buckets": parse(helm(*BUCKETS)),
        "overlay cpu": parse(kustomize("cpu")),
        "overlay gpu": parse(kustomize("gpu")),
    }
    faults = [*self_test(rendered["helm, everything"], DAMAGES, schemas),
              *self_test(rendered["helm, KEDA"], KEDA_DAMAGES, schemas)]
    for where, objects in rendered.items():
        faults += [f"{where}: {fault}" for fault in check(objects, schemas)]
    faults += compare("cpu", rendered["overlay cpu"], rendered["helm"])
    faults += compare("gpu", rendered["overlay gpu"], rendered["helm, GPU"])
    if service_settings.read("deploy/kubernetes/base/walsh.yaml") != helm():
        faults.append("deploy/kubernetes/base/walsh.yaml is not the chart's; make it again:\n"
                      "  helm template walsh deploy/helm/walsh > deploy/kubernetes/base/walsh.yaml")
    lint = run("helm", "lint", "--strict", "--quiet", CHART)
    if lint.returncode != 0:
        faults.append(lint.stdout + lint.stderr)
    refused = run("helm", "template", "walsh", CHART, "--set", "worker.environment.WALSH_HOST=::1")
    if "WALSH_HOST is the chart's own" not in refused.stderr:
        faults.append("helm: a flag that the manifests stand on can be changed")
    refused = run("helm", "template", "walsh", CHART, *KEDA, "--set", "autoscaling.enabled=true")
    if "both scale the workers" not in refused.stderr:
        faults.append("helm: two of them can scale the workers")
    refused = run("helm", "template", "walsh", CHART, *KEDA, "--set", "security.tlsSecret=walsh-tls")
    if "without TLS" not in refused.stderr:
        faults.append("helm: KEDA can ask a port with TLS without")
    refused = run("helm", "template", "walsh", CHART, *SECURED, "--set", "worker.requiredModel=llama")
    if "speaks no TLS" not in refused.stderr:
        faults.append("helm: a worker with TLS can have a probe without")
    refused = run("helm", "template", "walsh", CHART, "--set", "coordinator.replicas=2")
    if "needs coordinator.postgres.uri" not in refused.stderr:
        faults.append("helm: two coordinators can have one volume")
    for fault in faults:
        print(fault)
    print(f"{sum(map(len, rendered.values()))} objects, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
