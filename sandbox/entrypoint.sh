#!/usr/local/lib/sandbox/untraceable-bash
# shellcheck shell=bash
# PID 1 of the sandbox: waits for ever and reaps the orphans that end up with it.
# It needs no child of its own, so `kill -9 -1`, which spares only PID 1, empties the
# sandbox without stopping it, and a full process table cannot bring it down.
set -u
[ $# -eq 0 ] || exec "$@"

exec 3<> <(:) # a pipe that stays open at both ends: reading it blocks, costs nothing
while :; do
    read -r -u 3
done
