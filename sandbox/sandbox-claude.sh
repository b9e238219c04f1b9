#!/bin/sh
# Run Claude Code in the sandbox: to log in, to look around. Its flags go after --.
exec python3 "$(dirname "$0")/../ktrdr_orchestrator.py" sandbox claude "$@"
