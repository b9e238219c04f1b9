#!/bin/sh
# Write one anchored pattern for each host of EGRESS_ALLOW, then serve.
set -euf # f: a `*` is shown as it was written, not expanded to file names

for host in $EGRESS_ALLOW; do
    case $host in
    *[!A-Za-z0-9.-]* | [.-]* | *[.-])
        echo "egress: EGRESS_ALLOW names '$host'; expected host names" \
            "such as pypi.org, without scheme, port, path or *" >&2
        exit 2
        ;;
    esac
    printf '^%s$\n' "$host" | sed 's/\./\\./g'
done >/run/egress/allow

exec tinyproxy -d -c /etc/tinyproxy.conf
