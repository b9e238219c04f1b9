#!/bin/sh
# Build the sandbox, start it, put the repository into /workspace. --help shows more.
exec python3 "$(dirname "$0")/../ktrdr_orchestrator.py" sandbox init "$@"
