#!/bin/sh
# Makes what compose.yaml hands to its services as secrets, in docker/secrets/, unless it is there:
#
#   postgres_password   of the database's superuser, whom only the database's own container knows
#   database_url        for the API and the worker, as a login that is no superuser
#
# The folder is closed to other users of this machine. The files in it are not: a container's user has another number
# than yours, and reads them through a mount of the file alone.
set -eu
cd "$(dirname "$0")"

random() {
    od -An -N24 -tx1 /dev/urandom | tr -d ' \n'
}

mkdir -p -m 700 secrets
umask 022
[ -e secrets/postgres_password ] || random >secrets/postgres_password
[ -e secrets/database_url ] || printf 'postgresql://graft:%s@postgres:5432/graft\n' "$(random)" >secrets/database_url
echo "docker/secrets/ has what compose.yaml needs"
