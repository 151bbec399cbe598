"""Where what `./run test` fetches lies, for tests that skip without it."""

import os
import sys

SKIPPED = 77  # as SKIP_RETURN_CODE in CMakeLists.txt


def find(path):
    """A path beneath the cache folder; ends the test where it is missing."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    found = os.path.join(os.environ.get("WALSH_CACHE_DIR") or os.path.join(cache, "walsh"), path)
    if not os.path.exists(found):
        print(f"there is no {path}: `./run test` fetches it")
        sys.exit(1 if os.environ.get("WALSH_REQUIRE_DATA") == "1" else SKIPPED)
    return found
