"""The files in configs/: what they start is what torchrun and fk.tune take."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import yaml
from moto import mock_aws
from torch.distributed.run import parse_args

import falcon_kit as fk

CONFIGS = Path(__file__).parents[2] / "configs"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_configuration_is_for_eight_gpus_and_leaves_sharding_to_the_call():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / "accelerate_8gpu.yaml"))
    assert (config.num_processes, config.distributed_type.value, config.use_cpu) == (8, "MULTI_GPU", False)
    assert "fsdp_config" not in yaml.safe_load((CONFIGS / "accelerate_8gpu.yaml").read_text())


def test_the_command_line_takes_every_setting():
    settings = load_script("tune").settings(["r=4", "learning_rate=1e-4", "lr_scheduler_type=linear", "packing=false"])
    assert fk.Tuning(**settings) == fk.Tuning(r=4, learning_rate=1e-4, lr_scheduler_type="linear", packing=False)


JOB = ["--role", "arn:aws:iam::123456789012:role/sagemaker", "--image", "123456789012.dkr.ecr/pytorch", "--shard"]
JOB += ["--code", "s3://bucket/code", "--data", "s3://bucket/data", "--output", "s3://bucket/out", "--model", "falcon"]


@mock_aws
def test_sagemaker_accepts_the_job(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    script, client = load_script("sagemaker"), boto3.client("sagemaker", region_name="us-east-1")
    client.create_training_job(**script.job(script.parse([*JOB, "--spot", "--set", "num_train_epochs=1"])))
    made = client.describe_training_job(TrainingJobName="falcon-kit-tune")
    assert " ".join(made["AlgorithmSpecification"]["ContainerArguments"]) == (
        "--nproc-per-node 8 configs/tune.py --model falcon --data /opt/ml/input/data/training "
        "--output /opt/ml/checkpoints --dtype bfloat16 --shard --set num_train_epochs=1"
    )
    assert made["CheckpointConfig"]["LocalPath"] == "/opt/ml/checkpoints"


SHARED = ["--shared", "FSxLustre", "fs-0123456789abcdef0", "/fsx/runs"]
NETWORK = ["--subnets", "subnet-1", "--security-groups", "sg-1"]


@mock_aws
def test_sagemaker_accepts_a_job_on_two_instances_and_its_output_is_shared(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    script, client = load_script("sagemaker"), boto3.client("sagemaker", region_name="us-east-1")
    job = script.job(script.parse([*JOB, "--instances", "2", *SHARED, *NETWORK]))
    client.create_training_job(**job)
    (*_, channel) = job["InputDataConfig"]
    assert (channel["ChannelName"], "CheckpointConfig" in job) == ("shared", False)
    assert "--output /opt/ml/input/data/shared " in " ".join(job["AlgorithmSpecification"]["ContainerArguments"])


def test_the_instances_of_sagemaker_meet_at_the_first(tmp_path):
    script = load_script("sagemaker")
    job = script.job(script.parse([*JOB, "--instances", "2", *SHARED, *NETWORK, "--set", "optim=adamw_torch fused"]))
    container = job["AlgorithmSpecification"]
    command = [*container["ContainerEntrypoint"], *container["ContainerArguments"]]
    for theirs, ours in (("/opt/ml/input/config", str(tmp_path)), (script.CODE, str(CONFIGS.parent))):
        command = [each.replace(theirs, ours) for each in command]
    (tmp_path / "resourceconfig.json").write_text('{"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]}')
    (run,) = started(command, tmp_path)
    assert (run.nnodes, run.nproc_per_node, run.rdzv_endpoint) == ("2", "8", "algo-1:29500")
    assert run.training_script_args[-3:] == ["--shard", "--set", "optim=adamw_torch fused"]


@pytest.mark.parametrize("instances", [[], ["--instances", "2", *SHARED, *NETWORK]], ids=["one", "two"])
def test_sagemaker_starts_a_container_with_strings_of_at_most_256_characters(instances):
    script, client = load_script("sagemaker"), boto3.client("sagemaker", region_name="us-east-1")
    changed = ["r=64", "lora_alpha=16", "learning_rate=2e-4", "num_train_epochs=1", "lr_scheduler_type=linear"]
    container = script.job(script.parse([*JOB, *instances, "--set", *changed]))["AlgorithmSpecification"]
    for field, shape in (("Entrypoint", "EntrypointString"), ("Arguments", "Argument")):
        limit = client.meta.service_model.shape_for(f"TrainingContainer{shape}").metadata["max"]
        assert [each for each in container[f"Container{field}"] if len(each) > limit] == []


def test_sagemaker_downloads_the_weights_to_the_volume_for_them():
    script = load_script("sagemaker")
    assert Path(script.job(script.parse(JOB))["Environment"]["HF_HOME"]).parts[:2] == ("/", "tmp")


@pytest.mark.parametrize(
    ("options", "problem"),
    [(["--instances", "2"], "several instances need a common directory"), (SHARED, "--shared needs --subnets")],
)
def test_instances_without_a_common_directory_are_refused(capsys, options, problem):
    with pytest.raises(SystemExit):
        load_script("sagemaker").parse([*JOB, *options])
    assert problem in capsys.readouterr().err


# Several machines


def started(command, folder, **environ):
    """What torchrun is called with, as it parses it. Programs of clusters are replaced by ones that run it here."""
    programs = {
        "pip": "true",
        "torchrun": 'printf "%s\\0" "$@" > "$STARTED/$$"',
        "ssh": 'while [ $# -gt 1 ]; do shift; done; exec bash -c "$1"',
        "scontrol": 'printf "node7\\nnode8\\n"',
        "srun": 'shift; for each in 1 2; do "$@" & done; wait',
    }
    path = folder / "bin"
    path.mkdir()
    for name, text in programs.items():
        (path / name).write_text(f"#!/bin/bash\n{text}\n")
        (path / name).chmod(0o755)
    (folder / "started").mkdir()
    paths = f"{path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = os.environ | {"PATH": paths, "STARTED": str(folder / "started")} | environ
    subprocess.run(command, env=environ, cwd=CONFIGS.parent, check=True, timeout=60)
    return [parse_args(each.read_text().split("\0")[:-1]) for each in (folder / "started").iterdir()]


LINE = ["--model", "tiiuae/falcon-40b", "--data", "my chats.jsonl", "--output", "runs/mine", "--shard"]
SLURM = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "42"}


@pytest.mark.parametrize(
    ("script", "arguments", "environ", "expected"),
    [
        ("ssh.sh", ["node7 node8"], {"GPUS": "4", "PORT": "29501"}, ("2", "4", "node7:29501", "c10d")),
        ("slurm.sbatch", [], SLURM, ("2", "4", "node7:29542", "c10d")),
    ],
)
def test_every_machine_gets_the_same_command(tmp_path, script, arguments, environ, expected):
    runs = started(["bash", CONFIGS / script, *arguments, *LINE], tmp_path, **environ)
    assert len(runs) == 2
    for run in runs:
        assert (run.nnodes, run.nproc_per_node, run.rdzv_endpoint, run.rdzv_backend) == expected
        assert (run.training_script, run.training_script_args) == ("configs/tune.py", LINE)
    assert len({run.rdzv_id for run in runs}) == 1


def test_a_machine_that_fails_ends_the_command(tmp_path):
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for name, text in {"torchrun": "true", "ssh": '[ "$2" = good ] && exec sleep 60; exit 3'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    ended = subprocess.run(["bash", CONFIGS / "ssh.sh", "good bad", *LINE], env=os.environ | environ, timeout=50)
    assert ended.returncode == 3


@pytest.mark.parametrize("file", [*CONFIGS.glob("*.sh"), *CONFIGS.glob("*.sbatch")], ids=lambda each: each.name)
def test_shell_scripts_have_the_syntax_of_bash(file):
    subprocess.run(["bash", "-n", file], check=True)


@pytest.mark.parametrize("name", ["tune.py", "ssh.sh", "slurm.sbatch"])
def test_the_commands_in_a_comment_are_taken(name):
    tune = load_script("tune")
    commands = re.findall(r"configs/\S+ .*?(--model \S+ --data \S+ --output .*)", (CONFIGS / name).read_text())
    assert commands
    for command in commands:
        chosen = tune.parse(command.split())
        fk.Tuning(**tune.settings(chosen.set))


def test_the_command_of_sagemaker_in_its_docstring_is_taken():
    script = load_script("sagemaker")
    (command,) = re.findall(r"(--role (?:.|\n)*?)\n\n", script.__doc__)
    assert script.parse(command.replace("<training image>", "image").split()).shard


def test_the_help_of_sagemaker_needs_neither_a_region_nor_boto3(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sagemaker.py", "--help"])
    monkeypatch.setitem(sys.modules, "boto3", None)  # its import fails
    with pytest.raises(SystemExit) as ended:
        load_script("sagemaker").main()
    assert ended.value.code == 0
    assert "--model" in capsys.readouterr().out
