"""Starts configs/tune.py as a SageMaker training job on eight GPUs.

    python configs/sagemaker.py --role arn:aws:iam::...:role/sagemaker --image <training image> \
        --data s3://bucket/chats/ --output s3://bucket/runs/mine --model tiiuae/falcon-40b --shard

Images with torch: https://github.com/aws/deep-learning-containers, those called pytorch-training. Checkpoints are
copied to --output during the training. With --spot, an interrupted job on spot instances is restarted and resumes.
"""

import argparse
import shlex
from typing import Any

CODE, DATA, CHECKPOINTS = "/opt/ml/input/data/code", "/opt/ml/input/data/training", "/opt/ml/checkpoints"


def job(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of boto3's `create_training_job`."""
    options = ["--model", args.model, "--data", DATA, "--output", CHECKPOINTS, "--dtype", args.dtype]
    options += ["--shard"] if args.shard else []
    options += ["--set", *args.set] if args.set else []
    start = shlex.join(["torchrun", "--nproc-per-node", str(args.gpus), "configs/tune.py", *options])
    hours = 3600 * args.hours
    waiting = {"MaxWaitTimeInSeconds": 2 * hours} if args.spot else {}
    return {
        "TrainingJobName": args.name,
        "RoleArn": args.role,
        "AlgorithmSpecification": {
            "TrainingImage": args.image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["bash", "-c"],
            "ContainerArguments": [f"cd {CODE} && pip install -c constraints.txt . && {start}"],
        },
        "InputDataConfig": [_channel("code", args.code), _channel("training", args.data)],
        "CheckpointConfig": {"S3Uri": args.output, "LocalPath": CHECKPOINTS},
        "OutputDataConfig": {"S3OutputPath": args.output},
        "ResourceConfig": {
            "InstanceType": args.instance,
            "InstanceCount": 1,
            "VolumeSizeInGB": args.disk,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": hours, **waiting},
        "EnableManagedSpotTraining": args.spot,
    }


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a Falcon on SageMaker.")
    parser.add_argument("--name", default="falcon-kit-tune", help="name of the job")
    for name, text in {
        "--role": "ARN of the role of the job",
        "--image": "training image with torch",
        "--code": "s3:// folder with this repository",
        "--data": "s3:// folder of dialogues",
        "--output": "s3:// folder for checkpoints and the adapter",
        "--model": "a name for fk.load",
    }.items():
        parser.add_argument(name, required=True, help=text)
    parser.add_argument("--instance", default="ml.p4d.24xlarge", help="instance type")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of the instance")
    parser.add_argument("--disk", type=int, default=300, help="GB, for the weights")
    parser.add_argument("--hours", type=int, default=24, help="maximum duration")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shard", action="store_true", help="a part of the weights in each process")
    parser.add_argument("--spot", action="store_true", help="spot instances")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of fk.Tuning")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line: starts the job."""
    import boto3

    print(boto3.client("sagemaker").create_training_job(**job(parse()))["TrainingJobArn"])


if __name__ == "__main__":
    main()
