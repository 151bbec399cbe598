#!/usr/bin/env bash
# healthcheck PORT: whether the daemon that serves its metrics at PORT, or where WALSH_METRICS_PORT says,
# is alive. In bash, since the image has no HTTP client.
set -euo pipefail

exec 3<> "/dev/tcp/127.0.0.1/${WALSH_METRICS_PORT:-$1}"
printf 'GET /livez HTTP/1.0\r\n\r\n' >&3
read -r _ code _ <&3
[[ $code == 200 ]]
