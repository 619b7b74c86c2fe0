#!/usr/bin/env bash
# One tensor-parallel group over several nodes, for pods of a LeaderWorkerSet: `multinode.sh worker` or `multinode.sh leader`.
#
# Workers run sshd; the leader waits for all of them and starts one tritonserver a rank with mpirun. Rank 0 serves; the others load the tokens model
# alone and open no port. Tested with doubles of ssh and mpirun; not run on a cluster.
#
# From LeaderWorkerSet: LWS_LEADER_ADDRESS (pod.service.namespace), LWS_GROUP_SIZE. From the chart: GPUS_PER_NODE, SSH_PORT, MODELS,
# EXIT_TIMEOUT.
# /ssh holds id_ed25519, authorized_keys, host_key and host_key.pub, the same in all pods.
set -euo pipefail

ssh_folder=${SSH_FOLDER:-/ssh}
known=${TMPDIR:-/tmp}/known_hosts
port=${SSH_PORT:-2222}
exit_timeout=${EXIT_TIMEOUT:-60}

worker() {
    exec /usr/sbin/sshd -D -e -f /dev/null -p "$port" -h "$ssh_folder/host_key" \
        -o AuthorizedKeysFile="$ssh_folder/authorized_keys" -o PasswordAuthentication=no -o UsePAM=no -o StrictModes=no \
        -o PidFile=none
}

leader() {
    : "${LWS_LEADER_ADDRESS:?}" "${LWS_GROUP_SIZE:?}" "${GPUS_PER_NODE:?}" "${MODELS:?}"
    local pod=${LWS_LEADER_ADDRESS%%.*} domain=${LWS_LEADER_ADDRESS#*.} hosts="localhost:$GPUS_PER_NODE" index host
    # One host key for all: whatever the address, the key must be this one.
    echo "ngpt-worker $(cat "$ssh_folder/host_key.pub")" >"$known"
    local agent="ssh -p $port -i $ssh_folder/id_ed25519 -o HostKeyAlias=ngpt-worker -o UserKnownHostsFile=$known -o BatchMode=yes"
    for ((index = 1; index < LWS_GROUP_SIZE; index++)); do
        host=$pod-$index.$domain
        echo "waiting for $host"
        # shellcheck disable=SC2086
        until $agent -o ConnectTimeout=5 "$host" true; do sleep "${WAIT_SECONDS:-5}"; done
        hosts+=",$host:$GPUS_PER_NODE"
    done
    local ranks=$((LWS_GROUP_SIZE * GPUS_PER_NODE)) command=() rank
    for ((rank = 0; rank < ranks; rank++)); do
        ((rank == 0)) || command+=(:)
        command+=(-n 1 tritonserver "--model-repository=$MODELS" --disable-auto-complete-config "--exit-timeout-secs=$exit_timeout"
            "--backend-config=python,shm-region-prefix-name=rank${rank}_")
        ((rank == 0)) || command+=(--model-control-mode=explicit --load-model=tensorrt_llm
            --allow-http=false --allow-grpc=false --allow-metrics=false)
    done
    # Open MPI kills its ranks soon after its own SIGTERM: requests in flight have the pod's preStop to end in.
    exec mpirun --host "$hosts" --mca plm_rsh_agent "$agent" --map-by slot -x PATH -x LD_LIBRARY_PATH "${command[@]}"
}

case ${1:-} in
    leader | worker) "$1" ;;
    *) echo "usage: multinode.sh leader|worker" >&2; exit 2 ;;
esac
