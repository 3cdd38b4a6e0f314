#!/usr/bin/env bash
# Every test of the workspace. Tests that use the kernel or the lab need root.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" -ne 0 ]; then
    echo "test: error: the kernel and lab tests need root; run 'make test' as root" >&2
    echo "             (the pure ones alone: cargo test -p palisade-policy -p palisade-api)" >&2
    exit 1
fi

status=0
cargo test --workspace --locked --no-fail-fast || status=$?

# The same policies and Services once more, with pods that meet in the overlay.
PALISADE_TEST_ROUTING=overlay \
    cargo test --workspace --locked --test e2e -- matrices:: services:: || status=$?
exit "$status"
