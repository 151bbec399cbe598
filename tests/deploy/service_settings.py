"""What the daemons take and where they listen, as the code says it."""

import os
import re

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../.."))


def read(path):
    with open(os.path.join(ROOT, path), encoding="utf-8") as file:
        return file.read()


SOURCES = {
    # daemon: where its flags are added, where their defaults are
    "coordinator": ("server/coordinator_flags.cc", "server/server.h"),
    "worker": ("worker/service/options.cc", "worker/service/options.h"),
}


def environment_names(daemon):
    """The environment twins of its flags. Others are ignored by it without a word."""
    text = read(SOURCES[daemon][0]) + read("common/grpc_security_flags.cc")  # those of both
    flags = re.findall(r'add_(?:option|flag)\(\s*"--([a-z-]+)"', text)
    keys = re.search(r"kConfigKeys\[\] = \{(.*?)\};", read("common/config_keys.cc"), re.S).group(1)
    assert set(flags) <= set(re.findall(r'"([a-z-]+)"', keys)), "a flag was misread"
    return {"WALSH_" + flag.upper().replace("-", "_") for flag in flags}


def default_ports(daemon):
    """{name: port} of a daemon that is told nothing else."""
    return {name: int(port) for name, port in re.findall(r"int (\w+)_port = (\d+);", read(SOURCES[daemon][1]))}
