#!/usr/bin/env bash
# Fine-tunes a Falcon on several machines that this one reaches by ssh, with eight GPUs each:
#
#   configs/ssh.sh "node1 node2" --model tiiuae/falcon-40b --data chats.jsonl --output runs/mine --shard
#
# This folder has to be the same on all of them, as on NFS: it holds the environment .venv, the data and the output.
# After an interruption, the same command resumes the run. Where a machine fails, the processes of the others start again
# as soon as it is back with its own command, up to three times. GPUS=4 and PORT=29501 replace the numbers below.
set -euo pipefail

read -ra hosts <<< "$1"
shift
id=$(date +%s)
for host in "${hosts[@]}"; do
  command=(.venv/bin/torchrun --nnodes "${#hosts[@]}" --nproc-per-node "${GPUS:-8}" --max-restarts 3
    --rdzv-id "$id" --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:${PORT:-29500}" configs/tune.py "$@")
  echo "$host: ${command[*]}"
  ssh -tt "$host" "cd $(printf '%q' "$PWD") && $(printf '%q ' "${command[@]}")" < /dev/null &
done
trap 'kill $(jobs -p) 2> /dev/null' EXIT # the terminal of -tt takes the remote processes along
for host in "${hosts[@]}"; do
  wait -n
done
