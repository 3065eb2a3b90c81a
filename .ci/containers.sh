#!/usr/bin/env bash
# Build models' images and run their tests with the very commands of their Dockerfiles: containers.sh [MODEL...]
# With a Docker engine at hand the base is the real one. Without, on Debian as root, podman stands in for docker and
# a Debian with torch for the base, under the base's name, so that the commands stay as they are written; no MODEL
# given, that is all it does, and it fails where containers cannot run.
set -euo pipefail
cd "$(dirname "$0")/.."
WORK=${WORK:-build/containers}
TORCH=${TORCH:-torch==2.13.0}

podman_for_docker() {
    command -v podman runc mmdebstrap >/dev/null || {
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends buildah podman runc mmdebstrap >/dev/null
    }
    mkdir -p "$WORK/bin"
    WORK=$(realpath "$WORK")
    printf '[storage]\ndriver = "overlay"\ngraphroot = "%s/storage"\nrunroot = "%s/run"\n' "$WORK" "$WORK" >"$WORK/storage.conf"
    printf '[containers]\ndefault_ulimits = []\nnetns = "host"\n[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n' \
        >"$WORK/containers.conf"
    printf '#!/bin/sh\nexec podman "$@"\n' >"$WORK/bin/docker"
    chmod +x "$WORK/bin/docker"
    export CONTAINERS_STORAGE_CONF=$WORK/storage.conf CONTAINERS_CONF=$WORK/containers.conf
    export BUILDAH_ISOLATION=chroot BUILDAH_FORMAT=docker PATH=$WORK/bin:$PATH
}

make_base() { # under the name given
    buildah inspect --type image "$1" >/dev/null 2>&1 && return
    mmdebstrap --quiet --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip \
        --customize-hook='rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED; ln -sf python3 "$1/usr/bin/python"' \
        bookworm "$WORK/base.tar"
    local base authorities=/etc/ssl/certs/ca-certificates.crt pip=()
    base=$(buildah from scratch)
    buildah add --quiet "$base" "$WORK/base.tar" /
    rm "$WORK/base.tar"
    buildah copy --quiet "$base" "$authorities" "$authorities" # this machine's, which may have more
    buildah config --cmd /bin/bash --env LANG=C.UTF-8 --env PIP_CERT=$authorities --env SSL_CERT_FILE=$authorities \
        --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$base"
    for path in /etc/pip.conf /etc/xdg/pip $(python3 -m pip config list | sed -n "s/.*find-links='\(.*\)'/\1/p" | sort -u); do
        [ ! -e "$path" ] || pip+=(-v "$path:$path:ro") # where this machine's pip finds torch
    done
    buildah run "${pip[@]}" "$base" -- python3 -m pip install --quiet --no-cache-dir --no-compile "$TORCH"
    buildah commit --quiet "$base" "$1" >/dev/null
    buildah rm "$base" >/dev/null
}

if ! docker info >/dev/null 2>&1; then
    podman_for_docker
    BASE=$(sed -n 's/^ARG BASE_IMAGE=//p' models/*/Dockerfile | sort -u)
    make_base "$BASE"
    docker run --rm "$BASE" true
fi
for name in "$@"; do
    (
        cd "models/$name"
        docker build -t "${name}_test" . && docker run --rm -it --gpus all "${name}_test" pytest -v .
    )
done
