#!/bin/sh
# A private Docker engine for the tests: `engine.sh up DIR [OPTIONS OF DOCKERD]` prints its DOCKER_HOST,
# `down DIR` ends it. Needs root, dockerd and a static busybox. Idempotent; touches no other engine on the
# machine. It lives in the caller's mount namespace, because it must see what a node mounts later.
set -eu
action=${1:?up or down}
mkdir -p "${2:?a directory}"
dir=$(cd "$2" && pwd)
shift 2
sock="unix://$dir/d.sock"

alive() { docker -H "$sock" info >/dev/null 2>&1; }

# What an engine that was killed leaves: its containerd, that one's shims, its containers' control
# groups with what runs in them, and mounts, the deepest first.
leftovers() {
    pgrep -f -- "$dir/exec/" | xargs -r kill -9 2>/dev/null || true
    for path in "$dir"/data/containers/* "$dir"/data/*/containers/*; do
        [ -d "$path" ] || continue
        find /sys/fs/cgroup -depth -type d -path "*/docker/${path##*/}*" | while read -r group; do
            xargs -r kill -9 <"$group/cgroup.procs" 2>/dev/null || true
            for _ in 1 2 3 4 5; do
                rmdir "$group" 2>/dev/null && break
                sleep 0.1
            done
        done
    done
    awk -v below="$dir/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort -r | xargs -r umount -l
}

up() {
    if ! alive; then
        leftovers
        rm -rf "$dir/exec" "$dir/d.pid" "$dir/d.sock"
        setsid dockerd --data-root "$dir/data" --exec-root "$dir/exec" -H "$sock" \
            --pidfile "$dir/d.pid" --bridge=none --iptables=false --ip-masq=false "$@" \
            >"$dir/log" 2>&1 </dev/null &
        tries=0
        until alive; do
            tries=$((tries + 1))
            [ "$tries" -lt 150 ] || { tail -20 "$dir/log" >&2; exit 1; }
            sleep 0.1
        done
    fi
    if ! docker -H "$sock" image inspect lumaris/busybox:test >/dev/null 2>&1; then
        root="$dir/root"
        rm -rf "$root"
        mkdir -p "$root/bin" "$root/tmp" "$root/in" "$root/out" "$root/proc" "$root/dev" "$root/sys" "$root/etc"
        cp /bin/busybox "$root/bin/busybox"
        for applet in $(/bin/busybox --list); do
            # busybox lists itself; a link of that name would replace the program.
            [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
        done
        tar -C "$root" -c . | docker -H "$sock" import - lumaris/busybox:test >/dev/null
        rm -rf "$root"
    fi
    echo "$sock"
}

down() {
    if [ -f "$dir/d.pid" ]; then
        pid=$(cat "$dir/d.pid")
        docker -H "$sock" ps -aq 2>/dev/null | xargs -r docker -H "$sock" rm -f >/dev/null 2>&1 || true
        kill "$pid" 2>/dev/null || true
        tries=0
        while kill -0 "$pid" 2>/dev/null; do
            tries=$((tries + 1))
            [ "$tries" -lt 150 ] || { kill -9 "$pid"; break; }
            sleep 0.1
        done
    fi
    leftovers
    rm -rf "$dir/data" "$dir/exec" "$dir/d.sock" "$dir/d.pid"
}

case $action in
up) up "$@" ;;
down) down ;;
*) echo "usage: engine.sh up|down DIR" >&2; exit 2 ;;
esac
