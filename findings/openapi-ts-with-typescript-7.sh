#!/usr/bin/env bash
# @hey-api/openapi-ts 0.95.0 asks for "typescript >=5.5.3 || >=6.0.0", so npm pairs it with TypeScript 7.0.2 without a
# warning. The package typescript 7 exports only its version where 5 and 6 exported the compiler's API (that of 7 is
# under typescript/unstable/*), so every run ends with a TypeError before it reads its input. With 5.9.3 the same input
# works. Seen 2026-11-30 with Node.js 20.20.2. Needs node and npm.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
cat >openapi.yaml <<'YAML'
openapi: 3.1.0
info: {title: plays, version: "1"}
paths:
  /plays:
    get:
      operationId: list-plays
      responses: {"200": {description: the plays}}
YAML
npm init -y >/dev/null
generate() { # TYPESCRIPT-VERSION
  npm install --silent --no-fund --no-audit --save-exact @hey-api/openapi-ts@0.95.0 "typescript@$1"
  npx --no-install openapi-ts -i openapi.yaml -o "client-$1" 2>&1
}
generate 5.9.3 >/dev/null
test -s client-5.9.3/sdk.gen.ts
echo "typescript 5.9.3: $(echo client-5.9.3/*)"
if output=$(generate 7.0.2); then
  echo "changed: openapi-ts 0.95.0 works with TypeScript 7.0.2" >&2
  exit 1
fi
node -e 'console.log("typescript 7.0.2 exports:", Object.keys(require("typescript")).join(" "))'
grep -o "TypeError: .*" <<<"$output"
[[ $output == *"reading 'LineFeed'"* && ! -e client-7.0.2 ]]
