# Cloud Run probes over HTTP and ignores HEALTHCHECK, so there is none.

FROM golang:1.26.8-bookworm AS modules
WORKDIR /src
# Apart from the code, so that editing it downloads nothing again.
COPY go.mod go.sum ./
RUN go mod download

# Run by compose.test.yml.
FROM modules AS test
# The tests of devdb start a PostgreSQL of their own; all others use the one of compose.test.yml.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends postgresql \
 && rm -rf /var/lib/apt/lists/*
COPY . .
CMD ["go", "test", "./..."]

FROM modules AS build
COPY . .
ARG VERSION=dev
RUN --mount=type=cache,target=/root/.cache/go-build \
    CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=${VERSION}" -o /orchestrator ./cmd/orchestrator

FROM gcr.io/distroless/static-debian12:nonroot
COPY --from=build /orchestrator /orchestrator
EXPOSE 8080
ENTRYPOINT ["/orchestrator"]
CMD ["serve"]
