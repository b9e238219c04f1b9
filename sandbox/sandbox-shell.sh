#!/bin/sh
# Open a shell in the running sandbox.
exec python3 "$(dirname "$0")/../ktrdr_orchestrator.py" sandbox shell "$@"
