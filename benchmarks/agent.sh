#!/bin/sh
# The quickest agent there can be: reads its prompt, changes a file, reports completed.
cat >/dev/null
echo "$$" >"work.txt"
echo '{"type":"system","subtype":"init","session_id":"s-1","model":"none"}'
echo '{"type":"result","subtype":"success","is_error":false,"result":"","num_turns":1,"session_id":"s-1","total_cost_usd":0.01,"usage":{"input_tokens":10,"output_tokens":5},"terminal_reason":"completed","structured_output":{"status":"completed","summary":"done"}}'
