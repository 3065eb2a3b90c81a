#!/usr/bin/env bash
# Install the wheels of dist into an environment of their own and do there what a user does first: try_wheels.sh MODEL...
set -euo pipefail
cd "$(dirname "$0")/.."
ROOT=$PWD
FRESH=$(mktemp -d)
trap 'rm -rf "$FRESH"' EXIT
python3 -m venv "$FRESH/venv"
PATH=$FRESH/venv/bin:$PATH
pip install --quiet --disable-pip-version-check "${TORCH:-torch==2.13.0}"
pip install --quiet --disable-pip-version-check --find-links dist biote "${@/#/biote-}"
cd "$FRESH"
biote list
for name in "$@"; do
    original=$ROOT/models/$name/tests/golden
    biote convert "$original" "$name/te" --to te
    biote convert "$name/te" "$name/back" --to hf
    biote export "$original" "$name/hub"
    biote verify "$name/hub"
    python -c "from transformers import AutoModelForMaskedLM as Auto; Auto.from_pretrained('$name/te', trust_remote_code=True)"
done
