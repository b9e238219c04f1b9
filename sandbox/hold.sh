#!/bin/sh
# Hold the sandbox's lock for OWNER until stdin ends. Runs as `nobody`, whom the agent
# can neither signal nor imitate; the kernel frees the lock when this process is gone.
set -eu
lock=/run/sandbox/lock
exec 9>>"$lock"
flock -n 9 || { echo "in use by $(cat "$lock")"; exit 4; }
printf '%s\n' "$1" >"$lock"
read -r stat </proc/1/stat
# shellcheck disable=SC2086 # the fields after the name: the 20th is PID 1's start time
set -- ${stat##*) }
echo "held since ${20}"
exec cat >/dev/null
