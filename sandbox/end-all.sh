#!/usr/local/lib/sandbox/untraceable-bash
# shellcheck shell=bash
# End all processes of the agent's user, and tell that none is left. One system call ends
# all but PID 1 and its caller, and needs no new process, so a full process table does
# not stop it. Nor can the agent trace us: see the Dockerfile.
left() {
    for file in /proc/[0-9]*/status; do
        case $file in /proc/1/* | /proc/$$/*) continue ;; esac
        read -rd '' status <"$file"
        [[ ! $status =~ Uid:[[:space:]]${UID}[[:space:]] ]] || return 0
    done 2>/dev/null
    return 1
}
until kill -9 -1 2>/dev/null; ! left; do
    [ $((++rounds)) -le 10 ] || exit 9
    sleep 0.05
done
read -r stat </proc/1/stat
# shellcheck disable=SC2086 # the fields after the name: the 20th is PID 1's start time
set -- ${stat##*) }
echo "held since ${20}" # as hold.sh says: another start is another container
