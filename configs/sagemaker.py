"""Starts configs/tune.py as a SageMaker training job on instances with eight GPUs.

    python configs/sagemaker.py --role arn:aws:iam::...:role/sagemaker --image <training image> \
        --code s3://bucket/falcon-kit/ --data s3://bucket/chats/ --output s3://bucket/runs/mine \
        --model tiiuae/falcon-40b --shard

The folder of --code is a copy of this repository, which the job installs with constraints.txt; this replaces the
image's torch. Images with torch: those called pytorch-training in https://github.com/aws/deep-learning-containers.
Checkpoints are copied to --output during the training. With --spot, an interrupted job on spot instances is restarted
and resumes.

With --instances 2, both write the run to a directory that they share, because each has a copy of its own of what is in
S3: --shared FSxLustre fs-0123456789abcdef0 /fsx/runs, or EFS, in the network that --subnets and --security-groups name.
There the same command with another --name resumes the run.

https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_CreateTrainingJob.html has the fields,
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-training-algo-running-container.html the files.
"""

import argparse
from typing import Any

CODE, DATA, CHECKPOINTS = "/opt/ml/input/data/code", "/opt/ml/input/data/training", "/opt/ml/checkpoints"
SHARED = "/opt/ml/input/data/shared"
DOWNLOADS = "/tmp/huggingface"  # noqa: S108  # on the volume for the weights; the home directory is on a smaller one
INSTALL = f"cd {CODE} && pip install -c constraints.txt ."
_FIRST_HOST = (
    """$(python -c 'import json; print(json.load(open("/opt/ml/input/config/resourceconfig.json"))["hosts"][0])')"""
)


def job(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of boto3's `create_training_job`."""
    output = SHARED if args.shared else CHECKPOINTS
    options = ["--model", args.model, "--data", DATA, "--output", output, "--dtype", args.dtype]
    options += ["--shard"] if args.shard else []
    options += ["--set", *args.set] if args.set else []
    start, together = "torchrun", []
    if args.instances > 1:
        start += f" --rdzv-endpoint {_FIRST_HOST}:29500"
        together = ["--nnodes", str(args.instances), "--rdzv-id", "tune", "--rdzv-backend", "c10d"]
    seconds = 3600 * args.hours
    waiting = {"MaxWaitTimeInSeconds": 2 * seconds} if args.spot else {}
    return {
        "TrainingJobName": args.name,
        "RoleArn": args.role,
        "AlgorithmSpecification": {
            "TrainingImage": args.image,
            "TrainingInputMode": "File",
            # No string may be longer than 256 characters here, so the shell reads only what it has to.
            "ContainerEntrypoint": ["bash", "-c", f'{INSTALL} && {start} "$@"', "tune"],
            "ContainerArguments": [*together, "--nproc-per-node", str(args.gpus), "configs/tune.py", *options],
        },
        "Environment": {"HF_HOME": DOWNLOADS},
        "InputDataConfig": [_channel("code", args.code), _channel("training", args.data), *_shared(args.shared)],
        **(_network(args) if args.shared else {"CheckpointConfig": {"S3Uri": args.output, "LocalPath": CHECKPOINTS}}),
        "OutputDataConfig": {"S3OutputPath": args.output},
        "ResourceConfig": {
            "InstanceType": args.instance,
            "InstanceCount": args.instances,
            "VolumeSizeInGB": args.disk,
        },
        "StoppingCondition": {"MaxRuntimeInSeconds": seconds, **waiting},
        "EnableManagedSpotTraining": args.spot,
    }


def _channel(name: str, uri: str) -> dict[str, Any]:
    source = {"S3DataType": "S3Prefix", "S3Uri": uri, "S3DataDistributionType": "FullyReplicated"}
    return {"ChannelName": name, "DataSource": {"S3DataSource": source}}


def _shared(directory: list[str] | None) -> list[dict[str, Any]]:
    """The channel of a directory that all instances read and write."""
    if directory is None:
        return []
    kind, system, path = directory
    source = {"FileSystemId": system, "FileSystemType": kind, "FileSystemAccessMode": "rw", "DirectoryPath": path}
    return [{"ChannelName": "shared", "DataSource": {"FileSystemDataSource": source}}]


def _network(args: argparse.Namespace) -> dict[str, Any]:
    return {"VpcConfig": {"SecurityGroupIds": args.security_groups, "Subnets": args.subnets}}


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
    parser.add_argument("--instances", type=int, default=1, help="number of instances")
    parser.add_argument("--shared", nargs=3, metavar=("KIND", "ID", "PATH"), help="a file system for the run")
    parser.add_argument("--subnets", nargs="+", help="subnets of that file system")
    parser.add_argument("--security-groups", nargs="+", help="security groups that reach it")
    parser.add_argument("--gpus", type=int, default=8, help="processes on each instance, one for a GPU")
    parser.add_argument(
        "--disk", type=int, default=300, help="GB for the weights, unless the instance has its own disks"
    )
    parser.add_argument("--hours", type=int, default=24, help="maximum duration")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--shard", action="store_true", help="a part of the weights in each process")
    parser.add_argument("--spot", action="store_true", help="spot instances")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="fields of fk.Tuning")
    args = parser.parse_args(arguments)
    if not args.shared and args.instances > 1:
        parser.error("several instances need a common directory: --shared FSxLustre or EFS, its id and path")
    if args.shared and not (args.subnets and args.security_groups):
        parser.error("--shared needs --subnets and --security-groups of the file system")
    return args


def main() -> None:
    """Command line: starts the job."""
    arguments = job(parse())  # before AWS is asked for: --help needs neither boto3 nor a region
    import boto3

    print(boto3.client("sagemaker").create_training_job(**arguments)["TrainingJobArn"])


if __name__ == "__main__":
    main()
