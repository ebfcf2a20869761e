#!/bin/sh
# Run once by the postgres image, on its empty database: the login `graft`, which is no superuser and makes no roles,
# the three roles that the product switches between, and the database. The password is the one in the URL that the
# API and the worker have; no command line shows it.
set -eu
url=/run/secrets/database_url

grep -q '^postgresql://graft:[0-9A-Za-z]\{16,\}@' "$url" || {
    echo "$url: expected postgresql://graft:PASSWORD@..., with a password of 16 letters and digits or more" >&2
    exit 1
}
psql --no-psqlrc --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\set password `sed -n 's|^postgresql://graft:\([^@]*\)@.*|\1|p' /run/secrets/database_url`
CREATE ROLE graft LOGIN NOSUPERUSER NOCREATEROLE NOBYPASSRLS PASSWORD :'password';
CREATE ROLE graft_owner NOLOGIN NOSUPERUSER NOBYPASSRLS;
CREATE ROLE graft_app NOLOGIN NOSUPERUSER NOBYPASSRLS;
CREATE ROLE graft_worker NOLOGIN NOSUPERUSER NOBYPASSRLS;
GRANT graft_owner, graft_app, graft_worker TO graft;
CREATE DATABASE graft OWNER graft TEMPLATE template0;
SQL
