#!/usr/bin/env python3
"""cmake/parallel_jobs.sh keeps to the share of the machine that a container has."""

import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

SOURCE = pathlib.Path(__file__).resolve().parents[2]
GIB = 1 << 30


def n_jobs(files, n_cpus=64, available=256 * GIB):
    """What the script prints on a machine with these files."""
    with tempfile.TemporaryDirectory() as root:
        files = {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {available // 1024} kB\n", **files}
        for path, text in files.items():
            target = pathlib.Path(root, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        # nproc takes the number from there.
        environment = {**os.environ, "OMP_NUM_THREADS": str(n_cpus)}
        output = subprocess.run([SOURCE / "cmake/parallel_jobs.sh", root], env=environment,
                                check=True, capture_output=True, text=True).stdout
    return int(output)


class ParallelJobs(unittest.TestCase):
    def test_without_groups(self):
        self.assertEqual(n_jobs({}), 64)
        self.assertEqual(n_jobs({}, available=7 * GIB), 3)
        self.assertEqual(n_jobs({}, available=GIB), 1)

    def test_v2_container(self):
        files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "200000 100000\n",
                 "sys/fs/cgroup/memory.max": f"{16 * GIB}\n"}
        self.assertEqual(n_jobs(files), 2)
        files["sys/fs/cgroup/cpu.max"] = "max 100000\n"
        self.assertEqual(n_jobs(files), 8)
        files["sys/fs/cgroup/memory.max"] = "max\n"
        self.assertEqual(n_jobs(files), 64)
        files["sys/fs/cgroup/cpu.max"] = "50000 100000\n"
        self.assertEqual(n_jobs(files), 1)

    def test_v2_groups_above(self):
        files = {"proc/self/cgroup": "0::/user.slice/session.scope\n",
                 "sys/fs/cgroup/user.slice/cpu.max": "max 100000\n",
                 "sys/fs/cgroup/user.slice/memory.max": f"{6 * GIB}\n",
                 "sys/fs/cgroup/user.slice/session.scope/cpu.max": "400000 100000\n",
                 "sys/fs/cgroup/user.slice/session.scope/memory.max": "max\n"}
        self.assertEqual(n_jobs(files), 3)
        # Of a group that is not mounted here, as containers see the host's.
        files["proc/self/cgroup"] = "0::/elsewhere\n"
        self.assertEqual(n_jobs(files), 64)

    def test_v1_container(self):
        files = {"proc/self/cgroup": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n",
                 "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "300000\n",
                 "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
                 "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"}
        self.assertEqual(n_jobs(files), 3)
        files["sys/fs/cgroup/cpu/cpu.cfs_quota_us"] = "-1\n"
        files["sys/fs/cgroup/memory/memory.limit_in_bytes"] = f"{8 * GIB}\n"
        self.assertEqual(n_jobs(files), 4)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
