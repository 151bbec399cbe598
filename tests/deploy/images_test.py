#!/usr/bin/env python3
"""The Dockerfile and the compose file: hadolint has nothing against the one, and both know flags, ports and times."""

import os
import re
import subprocess
import sys

import fetched
import service_settings

sys.path.insert(0, fetched.find("deploy-tools/python"))
from ruamel.yaml import YAML  # noqa: E402

DOCKER = os.path.join(service_settings.ROOT, "docker")


def check_dockerfile():
    dockerfile = service_settings.read("docker/Dockerfile")
    for daemon in service_settings.SOURCES:
        pattern = rf"^FROM \S+ AS {daemon}(?:-runtime)?\n(.*?)(?=^FROM|\Z)"
        stage = re.search(pattern, dockerfile, re.M | re.S).group(1)
        ports = service_settings.default_ports(daemon)
        if sorted(re.search(r"^EXPOSE (.*)$", stage, re.M).group(1).split()) != sorted(map(str, ports.values())):
            yield f"{daemon}: EXPOSE is not {ports}"
        if f'CMD ["healthcheck", "{ports["metrics"]}"]' not in stage:
            yield f"{daemon}: HEALTHCHECK does not ask the metrics port"
        user = re.search(r"runAsUser: (\d+)", service_settings.read("deploy/kubernetes/base/walsh.yaml")).group(1)
        if f"\nUSER {user}:{user}\n" not in stage:
            yield f"{daemon}: USER is not {user}, as in Kubernetes"


def services_of(path):
    return YAML(typ="safe", pure=True).load(service_settings.read(path))["services"]


def check_compose():
    services = services_of("docker/compose.yaml")
    for daemon in service_settings.SOURCES:
        environment = services[daemon]["environment"]
        on_gpu = services_of("docker/compose.gpu.yaml").get(daemon, {}).get("environment", {})
        for name in sorted({**environment, **on_gpu}.keys() - service_settings.environment_names(daemon)):
            yield f"compose: {daemon}: {name} is none of its flags"
        grace = float(services[daemon]["stop_grace_period"].removesuffix("s"))
        if grace <= float(environment["WALSH_SHUTDOWN_TIMEOUT"]):
            yield f"compose: {daemon}: {grace:.0f} s are no time to stop"
    for name, service in services.items():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            if source.startswith(".") and not os.path.isdir(os.path.join(DOCKER, source)):
                yield f"compose: {name}: there is no {source}"


def main():
    command = [fetched.find("deploy-tools/bin/hadolint"), "--no-color", os.path.join(DOCKER, "Dockerfile")]
    hadolint = subprocess.run(command, capture_output=True, text=True, check=False)
    faults = [*hadolint.stdout.splitlines(), *hadolint.stderr.splitlines(), *check_dockerfile(), *check_compose()]
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
