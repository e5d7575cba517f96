#!/usr/bin/env bash
# Fine-tunes a Falcon on several machines with eight GPUs each, which this one reaches by ssh:
#
#   configs/ssh.sh "node1 node2" --model tiiuae/falcon-40b --data chats.jsonl --output runs/mine --shard
#
# Call it in the root of the repository, with its environment activated. All machines share both folders under the same
# paths, such as over NFS. Where one machine fails, all end, and the same command resumes the run. GPUS and PORT replace
# the numbers below; NCCL_SOCKET_IFNAME, in the environment of each machine, names a network that NCCL does not find.
set -euo pipefail

read -ra hosts <<< "$1"
shift
id=$(date +%s)
torchrun=$(command -v torchrun)
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT # the terminals of -tt end the processes on the other machines
for host in "${hosts[@]}"; do
  command=("$torchrun" --nnodes "${#hosts[@]}" --nproc-per-node "${GPUS:-8}" --rdzv-id "$id" --rdzv-backend c10d
    --rdzv-endpoint "${hosts[0]}:${PORT:-29500}" configs/tune.py "$@")
  ssh -tt "$host" "cd $(printf '%q' "$PWD") && $(printf '%q ' "${command[@]}")" < /dev/null &
done
for host in "${hosts[@]}"; do
  wait -n # returns the error of the first that fails
done
