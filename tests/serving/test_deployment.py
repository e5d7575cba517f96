"""Settings for servers follow from the plan."""

import shlex

import pytest
import torch

import falcon_kit as fk
from falcon_kit.serving.deployment import MEMORY_SHARE, deployment

MACHINES = {"ml.g5.12xlarge": 4, "ml.g5.48xlarge": 8, "ml.p4d.24xlarge": 8}


@pytest.fixture(scope="module", params=MACHINES)
def forty(request):
    return deployment("falcon-40b-instruct", request.param)


def test_every_gpu_of_the_machine_is_used(forty):
    assert forty.vllm["tensor-parallel-size"] == MACHINES[forty.machine]


def test_the_weights_and_all_texts_fit_into_the_share_that_vllm_may_use_and_one_more_would_not(forty):
    free = fk.plan("falcon-40b-instruct", devices=forty.machine).free_bytes * MEMORY_SHARE
    text = 122_880 * 2048  # the published bytes per token of keys and values
    needed = forty.plan.total_bytes + (forty.texts - 1) * text
    assert needed <= free
    assert needed + text > free or forty.texts == 256


def test_the_command_has_every_option_once(forty):
    words = shlex.split(forty.command("--chat-template", "hub.jinja"))
    assert words[:3] == ["vllm", "serve", "tiiuae/falcon-40b-instruct"]
    options = dict(zip(words[3::2], words[4::2], strict=True))
    expected = {f"--{name}": str(value) for name, value in forty.vllm.items()}
    assert options == {**expected, "--chat-template": "hub.jinja"}


def test_the_container_is_told_the_same_as_the_command_line(forty):
    environment = forty.environment
    assert environment["HF_MODEL_ID"] == "tiiuae/falcon-40b-instruct"
    names = {
        "OPTION_TENSOR_PARALLEL_DEGREE": "tensor-parallel-size",
        "OPTION_MAX_MODEL_LEN": "max-model-len",
        "OPTION_MAX_ROLLING_BATCH_SIZE": "max-num-seqs",
        "OPTION_GPU_MEMORY_UTILIZATION": "gpu-memory-utilization",
    }
    assert {name: environment[name] for name in names} == {
        name: str(forty.vllm[option]) for name, option in names.items()
    }


def test_more_memory_serves_more_texts():
    texts = [deployment("falcon-40b-instruct", machine).texts for machine in (*MACHINES, "ml.p5.48xlarge")]
    assert texts == sorted(texts)
    assert texts[0] < texts[-1] <= 256


def test_a_7b_splits_over_no_two_gpus():
    with pytest.raises(
        ValueError,
        match=r"1 KV heads of falcon-7b cannot be split evenly over the 4 GPUs .*: take 1",
    ):
        deployment("falcon-7b", "ml.g5.12xlarge")
    assert deployment("falcon-7b", "ml.g5.xlarge").vllm["tensor-parallel-size"] == 1


def test_a_machine_that_is_too_small_is_refused_with_what_would_help():
    with pytest.raises(fk.NotEnoughMemory, match="does not fit into 4 x T4") as short:
        deployment("falcon-40b-instruct", "ml.g4dn.12xlarge")
    larger, smaller = short.value.plan.suggestions
    assert deployment("falcon-40b-instruct", larger.split(": ")[1].split(",")[0]).texts >= 1
    assert smaller == "another model: falcon-7b-instruct"


def test_the_larger_machine_that_is_suggested_is_of_the_same_provider():
    with pytest.raises(fk.NotEnoughMemory) as short:
        deployment("falcon-40b-instruct", "a2-highgpu-1g")
    assert short.value.plan.suggestions[0] == "a larger machine: g2-standard-48, 4 x L4"


def test_a_dtype_that_vllm_does_not_serve_is_refused():
    with pytest.raises(ValueError, match="dtype 'nf4' is not one of bfloat16, float16"):
        deployment("falcon-40b-instruct", "ml.g5.48xlarge", "nf4")


def test_a_dtype_may_be_torchs():
    assert deployment("falcon-7b", "ml.g5.xlarge", torch.float16).vllm["dtype"] == "float16"


def test_a_deployment_is_one_line_as_text_and_a_table_in_jupyter(forty):
    assert repr(forty).startswith(f"Deployment(falcon-40b-instruct on {forty.machine}, {forty.gpus} x A1")
    assert "vllm serve" in forty._repr_html_()


@pytest.mark.parametrize(
    ("machine", "price"),
    [("ml.g5.12xlarge", "about $7.09/h in 2023 (SageMaker)"), ("ml.g5.48xlarge", None), ("4xA100-80GB", None)],
)
def test_a_deployment_shows_the_price_of_its_machine_where_one_was_published(machine, price):
    planned = deployment("falcon-40b-instruct", machine)
    assert (str(planned.price) if planned.price else None) == price
    assert ("/h in 2023" in planned._repr_html_()) == (price is not None)
