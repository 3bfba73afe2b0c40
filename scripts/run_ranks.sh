#!/usr/bin/env bash
# Trains the digits on several ranks over MPI, compares with one rank, kills a rank, and goes on from the last checkpoint.
#
#   scripts/run_ranks.sh RANKS [--hosts N] [--quick]
#
# Installs Open MPI and a C compiler where they are missing (Debian, Ubuntu; needs root or sudo for that). With --hosts the ranks are
# spread over so many network namespaces of this machine, which needs root, as over hosts. Exits with a status other than zero where
# numbers differ. CANDLE_NORM_RANKS_PROGRAM names a program that is built, in place of a release build.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    sed -n '4p' "$0" | cut -c 3- >&2
    exit 2
}

[ $# -gt 0 ] || usage
ranks=$1 hosts=1 quick=()
shift
[[ $ranks =~ ^[1-9][0-9]*$ ]] || usage
while [ $# -gt 0 ]; do
    case $1 in
        --hosts) hosts=${2:-}; [[ $hosts =~ ^[1-9][0-9]*$ ]] || usage; shift 2 ;;
        --quick) quick=(--quick); shift ;;
        *) usage ;;
    esac
done

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

install() {
    local missing=()
    command -v mpirun > /dev/null || missing+=(openmpi-bin)
    command -v mpicc > /dev/null || missing+=(libopenmpi-dev)
    command -v cc > /dev/null || missing+=(gcc libc6-dev)
    if [ "$hosts" -gt 1 ]; then command -v ip > /dev/null || missing+=(iproute2); fi
    [ ${#missing[@]} -eq 0 ] && return
    echo "Installing ${missing[*]}"
    as_root apt-get update -qq
    as_root apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

install
program=${CANDLE_NORM_RANKS_PROGRAM:-}
if [ -z "$program" ]; then
    cargo build --release -p candle-norm-mpi --example train_distributed
    program=${CARGO_TARGET_DIR:-target}/release/examples/train_distributed
fi
program=$(realpath "$program")
work=$(mktemp -d)

# Hosts are network namespaces on a bridge without a way out, each with a name in its own /etc/hosts.
net_up() {
    local h
    ip link add cnbr type bridge
    ip link set cnbr up
    for h in $(seq "$hosts"); do
        ip netns add "cn$h"
        ip link add "cnv$h" type veth peer name eth0 netns "cn$h"
        ip link set "cnv$h" master cnbr up
        ip -n "cn$h" addr add "10.87.0.$h/24" dev eth0
        ip -n "cn$h" link set eth0 up
        ip -n "cn$h" link set lo up
        mkdir -p "/etc/netns/cn$h"
        { echo "127.0.0.1 localhost"; seq "$hosts" | sed 's/.*/10.87.0.& cn&/'; } > "/etc/netns/cn$h/hosts"
    done
    # In place of ssh: the command of a host runs in its namespace.
    cat > "$work/agent" << 'AGENT'
#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
AGENT
    chmod +x "$work/agent"
}

net_down() {
    local h
    for h in $(seq "$hosts"); do
        # Whatever a cut link has left there.
        ip netns pids "cn$h" 2> /dev/null | xargs -r kill -9 2> /dev/null || true
        # A process that still ends keeps the namespace, and with it the link.
        ip link del "cnv$h" 2> /dev/null || true
        ip netns del "cn$h" 2> /dev/null || true
        rm -rf "/etc/netns/cn$h"
    done
    ip link del cnbr 2> /dev/null || true
}

clean() {
    [ "$hosts" -eq 1 ] || net_down
    rm -rf "$work"
}
trap clean EXIT

threads=$(($(nproc) / ranks))
export RAYON_NUM_THREADS=$((threads > 0 ? threads : 1))
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1

# mpirun for the ranks of this run. Ranks that wait leave the processor to others, which may be on it too.
job() {
    local on=() start=()
    if [ "$hosts" -gt 1 ]; then
        on=(--mca plm_rsh_agent "$work/agent" --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0
            --host "$(seq -s, "$hosts" | sed "s/[0-9]*/cn&:$(((ranks + hosts - 1) / hosts))/g")")
        start=(ip netns exec cn1 unshare --uts sh -c 'hostname cn1; exec "$@"' sh)
    fi
    timeout 600 "${start[@]}" mpirun --oversubscribe --mca mpi_yield_when_idle 1 "${on[@]}" \
        -x RAYON_NUM_THREADS -n "$ranks" "$program" "${quick[@]}" "$@"
}

[ "$hosts" -eq 1 ] || net_up

echo "=== Ranks: $ranks on hosts: $hosts, and one rank"
job --losses "$work/ranks.csv" | tee "$work/ranks.txt"
"$program" "${quick[@]}" --losses "$work/one.csv"
"$program" --compare "$work/one.csv" "$work/ranks.csv" --tolerance 1e-6

echo "=== The same without synchronization"
job --norm local --losses "$work/local.csv"
if [ "$ranks" -gt 1 ] && "$program" --compare "$work/one.csv" "$work/local.csv" 2> /dev/null; then
    echo "Local statistics gave the same losses: is anything synchronized?" >&2
    exit 1
fi

echo "=== A rank that is killed in step 30"
start=$SECONDS
if job --checkpoint "$work/checkpoint.safetensors" --every 20 --kill 30 > "$work/killed.txt" 2>&1; then
    echo "The job ended well without a rank" >&2
    exit 1
fi
grep -m 1 -i -e 'signal 9' -e 'ends the job' -e 'lost connection' "$work/killed.txt"
echo "The job ended $((SECONDS - start)) s after its start"
[ $((SECONDS - start)) -lt 60 ]

echo "=== On from the checkpoint of step 20"
job --checkpoint "$work/checkpoint.safetensors" --losses "$work/rest.csv" | tee "$work/rest.txt"
"$program" --compare "$work/ranks.csv" "$work/rest.csv" --tolerance 0
digest() {
    grep -o 'variables [0-9a-f]*' "$1"
}
[ "$(digest "$work/ranks.txt")" = "$(digest "$work/rest.txt")" ]
echo "The same variables, bit for bit."

if [ "$hosts" -gt 1 ] && [ "$ranks" -gt 1 ]; then
    echo "=== A link that is cut"
    start=$SECONDS quick=()
    # mpirun may wait for the host behind the link: the ranks on this side end by their time limit.
    job --steps 1000000 --time-limit 5 > "$work/cut.txt" 2>&1 &
    mpirun=$!
    sleep 8
    ip link set "cnv$hosts" down
    until grep -m 1 'ends the job: waited' "$work/cut.txt" || [ $((SECONDS - start)) -gt 60 ]; do
        sleep 1
    done
    grep -q 'ends the job: waited' "$work/cut.txt"
    echo "The ranks ended $((SECONDS - start - 8)) s after the cut"
    kill $mpirun 2> /dev/null || true
    wait $mpirun 2> /dev/null || true
fi
