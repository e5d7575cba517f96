"""Starts configs/tune.py as a SageMaker training job on eight GPUs.

    python configs/sagemaker.py --role arn:aws:iam::...:role/sagemaker --image <training image> \
        --data s3://bucket/chats/ --output s3://bucket/runs/mine --model tiiuae/falcon-40b --shard

Images with torch: https://github.com/aws/deep-learning-containers, those called pytorch-training. Checkpoints go to
--output as they are written. On spot instances (--spot) an interrupted job starts again and goes on from there.
"""

import argparse
import shlex
from typing import Any

CODE, DATA, CHECKPOINTS = "/opt/ml/input/data/code", "/opt/ml/input/data/training", "/opt/ml/checkpoints"


def job(given: argparse.Namespace) -> dict[str, Any]:
    """The request, as boto3's `create_training_job` takes it."""
    options = ["--model", given.model, "--data", DATA, "--output", CHECKPOINTS, "--dtype", given.dtype]
    options += ["--shard"] if given.shard else []
    options += ["--set", *given.set] if given.set else []
    start = shlex.join(["torchrun", "--nproc-per-node", str(given.gpus), "configs/tune.py", *options])
    hours = 3600 * given.hours
    waiting = {"MaxWaitTimeInSeconds": 2 * hours} if given.spot else {}
    return {
        "TrainingJobName": given.name,
        "RoleArn": given.role,
        "AlgorithmSpecification": {
            "TrainingImage": given.image,
            "TrainingInputMode": "File",
            "ContainerEntrypoint": ["bash", "-c"],
            "ContainerArguments": [f"cd {CODE} && pip install -c constraints.txt . && {start}"],
        },
        "InputDataConfig": [_channel("code", given.code), _channel("training", given.data)],
        "CheckpointConfig": {"S3Uri": given.output, "LocalPath": CHECKPOINTS},
        "OutputDataConfig": {"S3OutputPath": given.output},
        "ResourceConfig": {
            "InstanceType": given.instance,
            "InstanceCount": 1,
            "VolumeSizeInGB": given.disk,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": hours, **waiting},
        "EnableManagedSpotTraining": given.spot,
    }


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Fine-tune a Falcon on SageMaker.")
    parser.add_argument("--name", default="falcon-kit-tune", help="of the job")
    for name, text in {
        "--role": "ARN of the role that the job takes",
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
    parser.add_argument("--hours", type=int, default=24, help="at most")
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
