#!/usr/bin/env bash
# The end-to-end tests of the cluster that KUBECONFIG leads to, in which Palisade is: its state, the
# rights of its service accounts, the walk-through, the connectivity tests. Whatever is given to this
# script is given to `palisade connectivity test`.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
palisade=${PALISADE:-$root/target/debug/palisade}
# What set-up installed for this clone only.
export PATH=$root/.tools/bin:$PATH
if [ -z "${KUBECONFIG:-}" ]; then
    echo "set KUBECONFIG to the file that leads to the cluster" >&2
    exit 2
fi
problems=$(mktemp)
trap 'rm -f "$problems"' EXIT

# Each right of install/rights.txt, as the API server sees it.
rights() {
    local home secrets account expected verbs resources question verb resource answer
    local failed=0 asked=0
    home=$(kubectl get clusterrolebinding palisade --ignore-not-found \
        -o 'jsonpath={.subjects[0].namespace}') || return 1
    if [ -z "$home" ]; then
        echo "skipped: nobody bound the role palisade here, as it is in a lab"
        return 0
    fi
    secrets=$(kubectl get namespace -l app.kubernetes.io/part-of=palisade \
        -o 'jsonpath={.items[0].metadata.name}') || return 1
    while read -r account expected verbs resources question; do
        case $account in '' | '#'*) continue ;; esac
        question=${question/HOME/$home}
        question=${question/SECRETS/$secrets}
        for verb in ${verbs//,/ }; do
            for resource in ${resources//,/ }; do
                # Whatever kubectl warns of, the last line is the answer.
                # shellcheck disable=SC2086 # the rest of the question is words
                answer=$(kubectl auth can-i "$verb" "$resource" $question \
                    --as="system:serviceaccount:$home:$account" 2>"$problems" </dev/null | tail -n 1)
                if grep -q "doesn't have a resource type" "$problems"; then
                    echo "skipped: this cluster has no $resource"
                    continue
                fi
                asked=$((asked + 1))
                # A "no" may have its reason behind it.
                [ "${answer%% *}" = "$expected" ] && continue
                failed=$((failed + 1))
                echo "FAIL  may $account $verb $resource $question: ${answer:-no answer}, and must be $expected"
                tail -n 1 "$problems"
            done
        done
    done <"$root/install/rights.txt"
    echo "$((asked - failed)) of $asked rights are as they must be"
    [ "$failed" -eq 0 ]
}

status=0
step() {
    local name=$1
    shift
    printf '\n══ %s\n' "$name"
    "$@" || { status=1; echo "FAILED: $name"; }
}

step "Palisade is ready" "$palisade" status --wait
step "Rights of its service accounts" rights
step "The Star Wars walk-through" "$palisade" demo starwars --in-cluster
step "Connectivity" "$palisade" connectivity test "$@"
exit "$status"
