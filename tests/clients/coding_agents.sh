#!/usr/bin/env bash
# One coding agent writes a file: coding_agents.sh NAME URL KEY ANSWER, or --list.
# AGENTS is the folder of their commands. See check_clients.py. They run with a home of their own,
# and with leave to run what the scripted model says.
set -u

if [ "$1" = --list ]; then
  echo codex qwen opencode
  exit
fi
name=$1 url="$2/v1" key=$3 answer=$4
HOME=$(mktemp -d)
export HOME CODEX_HOME=$HOME OPENAI_API_KEY=$key OPENAI_BASE_URL=$url OPENAI_MODEL=m
trap 'rm -rf "$HOME"' EXIT
mkdir "$HOME/task" && cd "$HOME/task" || exit
prompt="[[$name]] Write hello.txt."

case $name in
codex)
  provider="{name=\"x\",base_url=\"$url\",env_key=\"OPENAI_API_KEY\",wire_api=\"responses\"}"
  "$AGENTS/codex" exec --skip-git-repo-check --dangerously-bypass-approvals-and-sandbox \
    -c 'model_provider="x"' -c "model_providers.x=$provider" -m m "$prompt" </dev/null >said 2>&1
  version=$("$AGENTS/codex" --version)
  ;;
qwen)
  "$AGENTS/qwen" --auth-type openai --yolo -p "$prompt" </dev/null >said 2>&1
  version="qwen-code $("$AGENTS/qwen" --version)"
  ;;
opencode)
  printf '{"provider":{"x":{"npm":"@ai-sdk/openai-compatible","options":{"baseURL":"%s","apiKey":"%s"},"models":{"m":{}}}},"permission":"allow"}' \
    "$url" "$key" >opencode.json
  "$AGENTS/opencode" run -m x/m "$prompt" </dev/null >said 2>&1
  version="opencode $("$AGENTS/opencode" --version)"
  ;;
esac

if [ "$(cat hello.txt 2>/dev/null)" = hello ] && grep -q "$answer" said; then
  echo "$version: hello.txt is there, and it said: $answer"
else
  tail -n 20 said >&2
  echo "$version: it did not write the file, or did not end"
  exit 1
fi
