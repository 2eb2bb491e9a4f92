#!/bin/sh
# A private Docker engine for the tests: `engine.sh up DIR` prints its DOCKER_HOST, `down DIR` ends it.
# Needs root, dockerd and a static busybox. Idempotent; touches no other engine on the machine.
set -eu
action=${1:?up or down}
mkdir -p "${2:?a directory}"
dir=$(cd "$2" && pwd)
sock="unix://$dir/d.sock"

alive() { docker -H "$sock" info >/dev/null 2>&1; }

up() {
    if ! alive; then
        rm -f "$dir/d.pid" "$dir/d.sock"
        # A private mount namespace without the unused v2 mount: hybrid hierarchies confuse runtimes.
        setsid unshare -m sh -c "mount --make-rprivate /; umount /sys/fs/cgroup/unified 2>/dev/null
            exec dockerd --data-root '$dir/data' --exec-root '$dir/exec' -H '$sock' \
            --pidfile '$dir/d.pid' --bridge=none --iptables=false --ip-masq=false" \
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
    rm -rf "$dir/data" "$dir/exec" "$dir/d.sock" "$dir/d.pid"
}

case $action in
up) up ;;
down) down ;;
*) echo "usage: engine.sh up|down DIR" >&2; exit 2 ;;
esac
