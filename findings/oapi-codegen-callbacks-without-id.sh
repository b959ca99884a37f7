#!/usr/bin/env bash
# oapi-codegen v2.8.2 names the types of a callback after the callback's key alone where its operation has no operationId,
# which OpenAPI 3.1 leaves optional. Two operations that declare a callback under the same key make it declare one type
# twice: it exits with 0, and the code does not compile. With operation ids it does. Seen 2026-11-30 with Go 1.26.
# Needs Go.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir"
document() { # whether callbacks have operation ids
  echo 'openapi: 3.1.0
info: {title: jobs, version: "1"}
paths:'
  for name in now later; do
    id=
    [[ $1 != with ]] || id="operationId: $name-ended, "
    echo "  /$name:
    post:
      operationId: $name
      responses: {\"202\": {description: taken}}
      callbacks:
        ended:
          '{\$request.body#/callback}':
            post: {${id}requestBody: {content: {application/json: {schema: {type: object, properties: {state: {type: string}}}}}}, responses: {\"200\": {description: heard}}}"
  done
}
generate() { # with or without
  mkdir "$1"
  document "$1" >"$1/openapi.yaml"
  cd "$1"
  go mod init example.com/generated 2>/dev/null
  go run github.com/oapi-codegen/oapi-codegen/v2/cmd/oapi-codegen@v2.8.2 -generate types,client -package generated -o generated.go openapi.yaml 2>/dev/null
  go mod tidy 2>/dev/null
  cd ..
}
generate with
generate without
go build -C with .
echo "with operation ids: compiles"
if output=$(go build -C without . 2>&1); then
  echo "changed: the code compiles without operation ids" >&2
  exit 1
fi
echo "without: $(grep -o '[A-Za-z]* redeclared in this block' <<<"$output" | head -n 1)"
[[ $output == *"redeclared"* ]]
