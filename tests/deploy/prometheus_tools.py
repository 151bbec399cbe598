"""Where prometheus and promtool are, for tests that skip without them."""

import shutil

import fetched


def find(name):
    """The path of a tool: of this machine, or as `./run test` fetches it."""
    return shutil.which(name) or fetched.find(f"prometheus/{name}")
