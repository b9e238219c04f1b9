#!/bin/sh
# Make /workspace as it was after init and clear the logs; models and strategies stay.
exec python3 "$(dirname "$0")/../ktrdr_orchestrator.py" sandbox reset "$@"
