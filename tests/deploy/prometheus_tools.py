"""Where prometheus and promtool are, for tests that skip without them."""

import os
import shutil
import sys

SKIPPED = 77  # as SKIP_RETURN_CODE in CMakeLists.txt


def find(name):
    """The path of a tool: of this machine, or as `./run test` fetches it."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    fetched = os.path.join(os.environ.get("WALSH_CACHE_DIR") or os.path.join(cache, "walsh"), "prometheus", name)
    path = shutil.which(name) or shutil.which(fetched)
    if path is None:
        print(f"there is no {name}: `./run test` fetches it")
        sys.exit(1 if os.environ.get("WALSH_REQUIRE_DATA") == "1" else SKIPPED)
    return path
