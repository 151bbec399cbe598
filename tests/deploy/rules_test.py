#!/usr/bin/env python3
"""promtool takes the example configuration and the rules, and the rules' own tests pass."""

import glob
import os
import subprocess
import sys

import prometheus_tools

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../deploy/prometheus")


def main():
    promtool = prometheus_tools.find("promtool")
    commands = [
        ["check", "config", "--lint=all", "--lint-fatal", os.path.join(FOLDER, "prometheus.yml")],
        ["test", "rules", *sorted(glob.glob(os.path.join(FOLDER, "tests", "*.yml")))],
    ]
    return max(subprocess.run([promtool, *command], check=False).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
