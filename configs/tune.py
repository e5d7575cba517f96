"""Fine-tunes a Falcon, in one process or several.

    python configs/tune.py --model falconet --data chats.jsonl --output runs/mine --set num_train_epochs=1
    torchrun --nproc-per-node 8 configs/tune.py --model tiiuae/falcon-40b --data chats.jsonl --output runs/mine --shard
    accelerate launch --config_file configs/accelerate_8gpu.yaml configs/tune.py --model tiiuae/falcon-7b ...

With --shard each process has a part of every layer (FSDP2), for a model that does not fit on one GPU; without it, a
copy. After an interruption, the same command resumes the run. On several machines: ssh.sh, slurm.sbatch, sagemaker.py
beside this file; --output is then a folder that all of them share.
"""

import argparse
import json
import os
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import record

import falcon_kit as fk


@record  # torchrun then reports the process that failed first, with its machine and error
def main() -> None:
    """Command line: one call of fk.tune."""
    args = parse()
    place = {"": "cpu"} if args.shard else None  # in host memory until it is sharded; else on the process's own GPU
    falcon = fk.load(args.model, dtype=args.dtype, device_map=place)
    run = fk.tune(falcon, args.data, output_dir=args.output, shard=args.shard, **settings(args.set))
    if int(os.environ.get("RANK", "0")) == 0:
        print(run)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a Falcon with LoRA.")
    parser.add_argument("--model", required=True, help="a name for fk.load")
    parser.add_argument("--data", required=True, help="a file or folder of dialogues")
    parser.add_argument("--output", required=True, help="folder for checkpoints and the adapter")
    parser.add_argument("--dtype", default="auto", help='"nf4-double" is QLoRA (with copies, not with --shard)')
    parser.add_argument("--shard", action="store_true", help="a part of the weights in each process")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of fk.Tuning")
    return parser.parse_args(arguments)


def settings(pairs: list[str]) -> dict[str, Any]:
    """The settings in NAME=VALUE pairs. Values are JSON (numbers, true, null) or else text."""
    split = [pair.partition("=") for pair in pairs]
    return {name: _value(value) for name, _, value in split}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
