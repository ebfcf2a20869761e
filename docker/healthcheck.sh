#!/bin/sh
# The images' HEALTHCHECK: does the API in this container answer? /healthz needs neither database nor worker; /readyz
# tells of those. The certificate is made out to the name that clients use, not to 127.0.0.1, so it is not verified.
if [ -n "${GRAFT_TLS_CERT:-}" ]; then
    scheme=https
else
    scheme=http
fi
exec curl --silent --show-error --fail --insecure --max-time 4 --output /dev/null \
    "$scheme://127.0.0.1:${GRAFT_LISTEN##*:}/healthz"
