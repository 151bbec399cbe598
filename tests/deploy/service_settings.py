"""What the daemons take and where they listen, as the code says it."""

import os
import re

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


def environment_names():
    """The environment twins of all flags."""
    keys = re.search(r"kConfigKeys\[\] = \{(.*?)\};", read("common/config_keys.cc"), re.S).group(1)
    return {"WALSH_" + key.upper().replace("-", "_") for key in re.findall(r'"([a-z-]+)"', keys)}


def default_ports(component):
    """{name: port} of a coordinator or a worker that is told nothing else."""
    header = {"coordinator": "server/server.h", "worker": "worker/service/options.h"}[component]
    return {name: int(port) for name, port in re.findall(r"int (\w+)_port = (\d+);", read(header))}
