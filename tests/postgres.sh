#!/bin/sh
# A private PostgreSQL for trying things out: `postgres.sh up DIR` prints the address of its database
# `lumaris`, `down DIR` ends it and deletes its data. It listens on a Unix socket in DIR only. DIR's path
# must be short and open to the user postgres when root calls. Idempotent; touches no other server.
set -eu
action=${1:?up or down}
mkdir -p "${2:?a directory}"
dir=$(cd "$2" && pwd)
bin=$(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1)
[ -n "$bin" ] || { echo "needs PostgreSQL (Debian package postgresql)" >&2; exit 1; }

# The server refuses to run as root.
as_owner() {
    if [ "$(id -u)" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi
}

up() {
    [ "$(id -u)" != 0 ] || chown postgres "$dir"
    cd "$dir"
    if [ ! -d "$dir/data" ]; then
        as_owner "$bin/initdb" -D "$dir/data" -A trust -U postgres -E UTF8 --locale=C >/dev/null
    fi
    if ! as_owner "$bin/pg_ctl" -D "$dir/data" status >/dev/null; then
        as_owner "$bin/pg_ctl" -D "$dir/data" -l "$dir/log" -w start \
            -o "-c listen_addresses='' -c unix_socket_directories='$dir'" >/dev/null
    fi
    "$bin/createdb" -h "$dir" -U postgres lumaris 2>/dev/null ||
        "$bin/psql" -h "$dir" -U postgres -d lumaris -qc '' # it was there already
    echo "postgresql://postgres@/lumaris?host=$dir"
}

down() {
    cd "$dir"
    if [ -d "$dir/data" ]; then
        as_owner "$bin/pg_ctl" -D "$dir/data" -w -m immediate stop >/dev/null || true
        rm -rf "$dir/data" "$dir/log"
    fi
}

case $action in
up) up ;;
down) down ;;
*) echo "usage: postgres.sh up|down DIR" >&2; exit 2 ;;
esac
