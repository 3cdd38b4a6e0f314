#!/usr/bin/env bash
# fuzz.sh SECONDS [TARGET...]: fuzzes the proxy's readers, all at once, each for so long. What is
# new is kept under the build directory, and merged into the repository's corpus where it reaches
# code that nothing there reaches; an input that fails is left beside it, and named. The instruments
# are flags of every stable compiler, so no other toolchain is needed; libFuzzer is built with g++.
set -euo pipefail

seconds=$1
shift
targets=("$@")
[ ${#targets[@]} -gt 0 ] || targets=(dns frames http1 http2 target tls)

cd "$(dirname "$0")/../crates/proxy/fuzz"
work=${CARGO_TARGET_DIR:-$PWD/target}
host=$(rustc -vV | sed -n 's/^host: //p')

coverage=-Cllvm-args=-sanitizer-coverage
export RUSTFLAGS="-Cpasses=sancov-module $coverage-level=4 $coverage-inline-8bit-counters \
$coverage-pc-table $coverage-trace-compares -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1"
# With a target that is named, build scripts and macros go without the instruments.
cargo build --release --bins --target "$host" --target-dir "$work"

fuzz() {
    local name=$1 found=$work/found/$1
    shift
    mkdir -p "$found" "$work/failed"
    "$work/$host/release/$name" -rss_limit_mb=1024 -timeout=30 -max_len=4096 \
        -artifact_prefix="$work/failed/$name-" "$@" "$found" "corpus/$name" >"$work/$name.log" 2>&1
}

failed=0
declare -A running
for name in "${targets[@]}"; do
    fuzz "$name" -max_total_time="$seconds" -print_final_stats=1 &
    running[$name]=$!
done
for name in "${targets[@]}"; do
    wait "${running[$name]}" || { failed=1 && echo "fuzz: $name failed; see $work/$name.log"; }
    sed -n "s/^stat::number_of_executed_units: */$name: runs: /p" "$work/$name.log"
    "$work/$host/release/$name" -merge=1 -use_counters=0 "corpus/$name" "$work/found/$name" >/dev/null 2>&1 || failed=1
done
exit $failed
