"""Processes of a test, which end with it."""

import os
import signal
import subprocess
import tempfile
import time

# Without the session's own settings, which may be of another service.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("WALSH_")}


def wait_until(what, condition, timeout=60):
    """The first true value of `condition`."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout} s")
        time.sleep(0.1)
    return value


class Children:
    """Processes that are stopped with this object, each with a log in `folder`."""

    def __init__(self, folder):
        self.folder = folder
        self.processes = {}

    def start(self, name, *command):
        with open(self.log(name), "wb") as log:
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)

    def log(self, name):
        return os.path.join(self.folder, f"{name}.log")

    def read_log(self, name):
        with open(self.log(name), encoding="utf-8", errors="replace") as file:
            return file.read()

    def check(self, name):
        code = self.processes[name].poll()
        if code is not None:
            raise RuntimeError(f"{name} has ended with {code}:\n{self.read_log(name)[-4000:]}")

    def kill(self, name):
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def stop(self):
        for process in reversed(self.processes.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_test(find_faults):
    """Prints what `find_faults(folder, children)` finds, in a folder that goes afterwards; the exit code. Where it raises, the
    ends of the processes' logs are printed, too."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="walsh-test-") as folder:
        children = Children(folder)
        try:
            faults = list(find_faults(folder, children))
        except Exception:
            for name in children.processes:
                print(f"--- the end of {name}.log\n{children.read_log(name)[-4000:]}")
            raise
        finally:
            children.stop()
    for fault in faults:
        print(fault)
    print(f"{len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0
