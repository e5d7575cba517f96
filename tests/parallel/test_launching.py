"""Tensor parallelism: two ranks compute what one process does, each holds its part, and a notebook controls them."""

import functools
import json
import logging
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import FalconConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging as transformers_logging

import falcon_kit as fk
from falcon_kit.catalogue import memory
from falcon_kit.model.modeling import FalconForCausalLM
from falcon_kit.parallel import launching
from falcon_kit.parallel.launching import ParallelFalcon
from falcon_kit.parallel.ranks import local_tensor, placement
from falcon_kit.parallel.worker import _init_process_group, _named
from falcon_kit.parallel.workers import WorkerDied, Workers
from tests.conftest import LAYOUTS, legacy, logits, simulated_gpus, small_config, small_model
from tests.parallel.program import GREEDY, IDS, MASK, gradients, mask_per_head
from tests.waiting import interrupted, interrupted_at_its_end

DIVIDED = [layout for layout in LAYOUTS if layout != "7b"]
QUESTION = "User: What do giraffes eat?\nFalcon:"
LONG = {"max_new_tokens": 1500, "min_new_tokens": 1500}

each_layout = pytest.mark.parametrize("layout", DIVIDED)


@functools.cache
def oracle(layout):
    """transformers' own Falcon."""
    return small_model(layout)


@functools.cache
def whole(layout):
    """The kit's, in one process."""
    model = FalconForCausalLM(small_config(layout)).eval()
    model.load_state_dict(oracle(layout).state_dict())
    return model


@pytest.fixture(scope="module")
def checkpoints(tokenizer, tmp_path_factory):
    """A checkpoint of each layout, and beside it what two ranks under torchrun made of it."""
    root = tmp_path_factory.mktemp("ranks")
    for layout in DIVIDED:
        small_model(layout).save_pretrained(root / layout)
        tokenizer.save_pretrained(root / layout)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = Path(__file__).with_name("program.py")
    run = subprocess.run(
        [*torchrun, program, *(root / layout for layout in DIVIDED)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return root


@pytest.fixture
def tensors(checkpoints, layout):
    """What each rank computed."""
    return [load_file(checkpoints / layout / f"rank-{rank}.safetensors") for rank in (0, 1)]


@pytest.fixture
def facts(checkpoints, layout):
    """What each rank wrote."""
    return [json.loads((checkpoints / layout / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def together():
    """falconet-instruct in two processes, as from a notebook."""
    with fk.load("falconet-instruct", tensor_parallel=2) as falcon:
        yield falcon


# Two ranks under torchrun


@each_layout
def test_every_rank_has_the_logits_of_one_process(layout, tensors):
    for rank in tensors:
        torch.testing.assert_close(rank["logits"], logits(oracle(layout)), atol=1e-5, rtol=0)


@each_layout
def test_a_mask_for_each_head_reaches_the_rank_of_the_head(layout, tensors):
    mask = mask_per_head(whole(layout).config.num_attention_heads)
    with torch.inference_mode():
        expected = whole(layout)(IDS[:1], attention_mask=mask).logits
    for rank in tensors:
        torch.testing.assert_close(rank["per head"], expected, atol=1e-5, rtol=0)


@each_layout
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_ranks_write_the_greedy_text_of_one_process(layout, tensors, cache):
    expected = oracle(layout).generate(IDS, attention_mask=MASK, **GREEDY).sequences
    assert [rank[f"greedy {cache}"].tolist() for rank in tensors] == [expected.tolist()] * 2


@each_layout
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_rank_keeps_half_of_the_cache(layout, facts, cache):
    options = {"cache_implementation": "static"} if cache == "static" else {}
    layers = whole(layout).generate(IDS, attention_mask=MASK, **GREEDY, **options).past_key_values.layers
    half = sum(each.keys.nbytes + each.values.nbytes for each in layers) // 2
    assert [each["caches"][cache] for each in facts] == [half, half]


@each_layout
def test_a_rank_holds_the_weights_of_the_closed_form(layout, facts):
    spec = fk.FalconSpec.from_config(small_config(layout).to_dict())
    assert [each["weights"] for each in facts] == [memory.rank_bytes(spec, "float32", 2)] * 2


@each_layout
def test_every_rank_has_the_gradients_of_one_process(layout, tensors):
    for name, expected in gradients(oracle(layout)).items():
        for rank in tensors:
            allowed = 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(rank[f"gradient {name}"], expected, atol=allowed, rtol=0)


@each_layout
def test_what_ranks_save_is_the_checkpoint_they_were_loaded_from(layout, checkpoints):
    folders = checkpoints / layout, checkpoints / layout / "saved"
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize(("layout", "times"), [("40b", 1), ("180b", 1), ("rw", 2)])
def test_a_parallel_block_adds_up_once_and_a_sequential_one_twice(facts, times):
    assert facts[0]["sums"] == 2 * times  # two layers


@each_layout
def test_ranks_draw_the_same_tokens_whatever_their_random_states(facts):
    assert facts[0]["drawn"] == facts[1]["drawn"]


@each_layout
def test_a_stream_that_one_rank_closes_ends_at_the_same_token_on_all(facts):
    (_, tokens, reason), (_, others, their_reason) = (each["cut"] for each in facts)
    assert (tokens, reason) == (others, their_reason)
    assert reason == "cancelled"


# The published sizes


@pytest.fixture
def pretended(request):
    """torch.distributed with a number of ranks of which only this process exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=request.param - 1, world_size=request.param)
    yield request.param
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["falcon-40b", "falcon-180B", "falcon-rw-1b"])
@pytest.mark.parametrize("pretended", [2, 4, 8], indirect=True)
def test_a_rank_of_a_published_falcon_holds_the_bytes_of_the_closed_form(name, pretended):
    spec = fk.spec(name)
    with torch.device("meta"):  # where weights are not tied yet while they are divided
        model = FalconForCausalLM(FalconConfig(**spec.to_config() | {"tie_word_embeddings": False})).to(torch.bfloat16)
    config, _, mesh = FalconForCausalLM.prepare_distribute_model(DistributedConfig(tp_size=pretended))
    model = FalconForCausalLM.maybe_distribute_model(model, config, mesh)
    held = sum(local_tensor(parameter).nbytes for parameter in model.transformer.parameters())
    assert held == memory.rank_bytes(spec, "bfloat16", pretended)


def test_the_rows_of_a_plan_are_what_each_rank_holds():
    plan, spec = fk.plan("falcon-40b", devices="8x24GiB", tensor_parallel=8), fk.spec("falcon-40b")
    weights = [row.bytes for row in plan.rows if row.part in ("layers of a rank", "embedding and head")]
    assert sum(weights) == 8 * memory.rank_bytes(spec, "bfloat16", 8)
    assert (plan.fits, plan.kv_bytes) == (True, spec.kv_bytes_per_token() * 2048)


def test_a_plan_for_ranks_that_does_not_fit_says_how_many_would():
    plan = fk.plan("falcon-40b", devices="2xA10G", tensor_parallel=2)
    assert (plan.fits, plan.suggestions[0]) == (False, "tensor_parallel=4 on 4 x A10G")


# Refused before workers start


@pytest.fixture
def nothing_starts(monkeypatch):
    """No worker may be started."""
    monkeypatch.setattr(launching, "Workers", lambda *_: pytest.fail("workers were started"))


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"tensor_parallel": 1}, "tensor_parallel=1: give the number of ranks, 2 or more, or leave it out"),
        ({"tensor_parallel": 0}, "tensor_parallel=0: give the number of ranks, 2 or more"),
        ({"tensor_parallel": "2"}, "tensor_parallel='2': give the number of ranks"),
        ({"tensor_parallel": 3}, r"falconet has 2 KV heads for 4 query heads: give 2\. .*device_map='auto'"),
        ({"tensor_parallel": 2, "device_map": "auto"}, "tensor_parallel=2 divides .* leave out device_map='auto'"),
        ({"tensor_parallel": 2, "attention": "transformers"}, "cache='transformers': leave it out"),
        ({"tensor_parallel": 2, "dtype": "nf4"}, "nf4"),
    ],
)
def test_what_cannot_be_divided_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        fk.load("falconet", **arguments)


@pytest.mark.usefixtures("nothing_starts")
def test_a_single_kv_head_is_refused_with_the_alternatives(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"1 KV head for 4 query heads, which cannot be divided\. .*or use falcon-40b"):
        fk.load(legacy(tmp_path / "7b", "7b", tokenizer), tensor_parallel=2)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}, "launcher started 4: torchrun --nproc-per-node 2"),
        ({"RANK": "0"}, "RANK is set, as by a launcher, but not LOCAL_RANK, WORLD_SIZE"),
    ],
)
def test_a_launcher_that_says_otherwise_is_refused(monkeypatch, variables, text):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=text):
        fk.load("falconet", tensor_parallel=2)


@pytest.mark.usefixtures("nothing_starts")
def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"needs 2 GPUs here, torch finds 1: .* give device_map='cpu'"):
        fk.load("falconet", tensor_parallel=2)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="to compute on the CPU, start torchrun with CUDA_VISIBLE_DEVICES=''"):
        fk.load("falconet", tensor_parallel=2)


# From a notebook


@pytest.mark.parametrize("on_cpu", [True, False])
def test_ranks_see_the_gpus_unless_they_compute_on_the_cpu(monkeypatch, on_cpu):
    simulated_gpus(monkeypatch, [2**34] * 2)
    hidden = launching._environment(0, 2, on_cpu).get("CUDA_VISIBLE_DEVICES") == ""
    assert hidden == on_cpu


def test_beside_one_gpu_the_ranks_compute_on_the_cpu_if_asked(monkeypatch):
    simulated_gpus(monkeypatch, [2**34])
    with fk.load("falconet", tensor_parallel=2, device_map="cpu") as falcon:
        assert [each.device for each in falcon.ranks] == ["cpu", "cpu"]
        assert falcon.generate("The", max_new_tokens=2).text


def test_processes_write_what_one_would(together, instruct):
    answer, expected = together.generate(QUESTION), instruct.generate(QUESTION)
    assert (answer.text, answer.tokens, answer.finish_reason) == (
        expected.text,
        expected.tokens,
        expected.finish_reason,
    )
    torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(expected.logprobs), atol=1e-4, rtol=0)


def test_each_process_keeps_half_of_weights_and_cache(together):
    answer = together.generate(QUESTION, max_new_tokens=5)
    assert [rank.cache_bytes for rank in together.ranks] == [answer.stats.cache_bytes // 2] * 2
    kept = answer.stats.prompt_tokens + len(answer.tokens) - 1
    assert answer.stats.cache_bytes == together.spec.kv_bytes_per_token(4) * kept
    assert [rank.weight_bytes for rank in together.ranks] == [memory.rank_bytes(together.spec, "float32", 2)] * 2


def test_the_settings_of_the_checkpoint_are_those_of_one_process(tokenizer, tmp_path):
    small_model("40b").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 11, "top_p": 0.5, "max_new_tokens": 3}')
    with fk.load(tmp_path, tensor_parallel=2) as falcon:
        assert falcon.generation_settings == {"top_p": 0.5, "max_new_tokens": 3}


@pytest.mark.parametrize("method", ["chat", "stream"])
def test_a_template_that_the_processes_do_not_have_is_refused(together, method, monkeypatch):
    monkeypatch.setattr(together.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    with pytest.raises(ValueError, match=r"load the model again with chat=fk\.ChatFormat"):
        together.chat([{"role": "user", "content": "Hi"}]) if method == "chat" else list(
            together.stream([{"role": "user", "content": "Hi"}])
        )
    assert together.generate(QUESTION, max_new_tokens=1).tokens


def test_a_stream_from_processes_gives_the_pieces_of_one(together, instruct):
    chat = [{"role": "user", "content": "What do pandas eat?"}]
    expected = [(piece.text, piece.token_id) for piece in instruct.stream(chat)]
    assert [(piece.text, piece.token_id) for piece in together.stream(chat)] == expected
    assert together.chat(chat).text == instruct.chat(chat).text


def test_a_batch_comes_back_in_order(together, instruct):
    prompts = [QUESTION, "The giraffe"]
    texts = [each.text for each in instruct.generate(prompts, max_new_tokens=10)]
    assert [each.text for each in together.generate(prompts, max_new_tokens=10)] == texts


def test_a_seed_gives_the_same_text_again(together):
    first, second = (together.generate(QUESTION, top_k=10, seed=3, max_new_tokens=20) for _ in range(2))
    assert first.tokens == second.tokens


def test_pieces_come_while_the_processes_write(together):
    stream = together.stream(QUESTION, **LONG)
    next(stream)
    stream.close()
    assert stream.generation.finish_reason == "cancelled"
    assert len(stream.generation.tokens) <= 3


def test_after_a_stream_was_left_the_processes_answer_again(together, instruct):
    for _ in together.stream(QUESTION, **LONG):
        break
    assert together.generate(QUESTION).text == instruct.generate(QUESTION).text


def test_ctrl_c_stops_all_processes_and_leaves_them_usable(together, instruct):
    with interrupted(0.5):
        together.generate(QUESTION, **LONG)
    assert together.generate(QUESTION).text == instruct.generate(QUESTION).text


def raised_once(call, key, before=False):
    """The call, with a Ctrl-C before or after the first message that has the key; the message is lost after it came."""
    left = [KeyboardInterrupt()]

    def called(*given, **named):
        if before and key in given[0] and left:
            raise left.pop()
        came = call(*given, **named)
        if not before and key in (came or given)[-1] and left:
            raise left.pop()
        return came

    return called


@pytest.mark.parametrize(
    ("method", "settings", "place", "key", "before"),
    [
        ("stream", LONG, "receive", "piece", False),
        ("stream", LONG, "send", "go", True),
        ("stream", LONG, "send", "go", False),
        ("stream", {"max_new_tokens": 1}, "send", "go", False),
        ("stream", {"max_new_tokens": 1}, "receive", "done", False),
        ("generate", {"max_new_tokens": 1}, "receive", "done", False),
        ("generate", {"temprature": 1}, "receive", "error", False),
    ],
)
def test_ctrl_c_between_two_messages_leaves_the_processes_usable(
    together, instruct, monkeypatch, method, settings, place, key, before
):
    monkeypatch.setattr(together._workers, place, raised_once(getattr(together._workers, place), key, before))
    with pytest.raises((KeyboardInterrupt, ValueError)) as raised:
        list(getattr(together, method)(QUESTION, **settings))
    assert raised.type is (ValueError if key == "error" else KeyboardInterrupt)
    tokens = [*instruct.generate(QUESTION, max_new_tokens=3).tokens]
    assert [*together.generate(QUESTION, max_new_tokens=3).tokens] == tokens
    assert [piece.token_id for piece in together.stream(QUESTION, max_new_tokens=3)] == tokens


@pytest.mark.parametrize("reached", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_ctrl_c_while_a_request_is_sent_leaves_the_processes_usable(together, instruct, monkeypatch, method, reached):
    send, left = together._workers.send, [reached]

    def sent(message, rank=None):
        if not left:
            return send(message, rank)
        for each in left.pop():
            send(message, each)
        raise KeyboardInterrupt

    monkeypatch.setattr(together._workers, "send", sent)
    with pytest.raises(KeyboardInterrupt):
        list(getattr(together, method)(QUESTION, **LONG))
    answer = together.generate(QUESTION, max_new_tokens=3)
    assert answer.tokens == instruct.generate(QUESTION, max_new_tokens=3).tokens


def test_ctrl_c_within_the_line_of_a_long_request_leaves_the_processes_usable(together, instruct, monkeypatch):
    send, left = together._workers.send, [KeyboardInterrupt()]

    def sent(message, rank=None):
        if not left:
            return send(message, rank)
        pipe = together._workers.processes[0].stdin
        pipe.write('{"call": "gen')
        pipe.flush()
        raise left.pop()

    monkeypatch.setattr(together._workers, "send", sent)
    with interrupted(10):
        together.generate(QUESTION, **LONG)
    answer = together.generate(QUESTION, max_new_tokens=3)
    assert answer.tokens == instruct.generate(QUESTION, max_new_tokens=3).tokens


def test_ctrl_c_just_before_a_request_leaves_the_processes_usable(together, instruct, monkeypatch):
    monkeypatch.setattr(together, "_lock", interrupted_at_its_end())
    with pytest.raises(KeyboardInterrupt):
        together.generate(QUESTION)
    monkeypatch.undo()
    assert together.generate(QUESTION).text == instruct.generate(QUESTION).text


def test_a_second_text_has_to_wait_for_the_first(together):
    stream = together.stream(QUESTION, **LONG)
    next(stream)
    with pytest.raises(RuntimeError, match="another text is being generated: let its stream end, or close"):
        together.generate(QUESTION)
    stream.close()


def test_an_error_of_the_processes_arrives_as_their_own(together, instruct):
    with pytest.raises(ValueError, match=r"the prompt has 3001 tokens, the model's context is 2048"):
        together.generate([15] * 3001)
    with pytest.raises(ValueError, match="Unknown setting 'temprature'"):
        next(together.stream(QUESTION, temprature=1))
    assert together.generate(QUESTION).text == instruct.generate(QUESTION).text


def test_a_setting_out_of_range_is_refused_when_a_stream_is_asked_for(together):
    with pytest.raises(ValueError, match="top_p must be above 0"):
        together.stream(QUESTION, top_p=2)


def test_objects_cannot_go_to_other_processes(together):
    with pytest.raises(TypeError, match=r"logits_processor is sent to other processes, .* under torchrun"):
        together.generate(QUESTION, logits_processor=[object()])


def test_the_own_tokenizer_and_what_is_none_do_not_go_to_other_processes(together, instruct):
    settings = {"stop_strings": ["acacia"], "tokenizer": together.tokenizer, "num_return_sequences": None}
    expected = instruct.generate(QUESTION, stop=["acacia"]).tokens
    assert together.generate(QUESTION, **settings).tokens == expected
    assert tuple(piece.token_id for piece in together.stream(QUESTION, **settings)) == expected
    with pytest.raises(ValueError, match="another one than the Falcon's own"):
        together.generate(QUESTION, tokenizer=instruct.tokenizer)


def test_arrays_go_to_other_processes_as_lists(together, instruct):
    ids, count = torch.tensor([23, 900, 77]), np.int64(3)
    assert together.generate(ids, max_new_tokens=count).text == instruct.generate(ids, max_new_tokens=count).text


def test_the_model_is_said_to_be_elsewhere(together):
    with pytest.raises(AttributeError, match="the model is in 2 other processes: use generate, stream and chat"):
        _ = together.model


def test_saving_says_how_to_load_the_model_for_it(together, tmp_path):
    with pytest.raises(AttributeError, match="is not saved: load it without tensor_parallel to save it"):
        together.save(tmp_path / "saved")


def test_any_number_of_prompts_is_generated_batch_by_batch(together, instruct):
    with pytest.raises(AttributeError, match=r"no generate_each: falcon.generate\(prompts\[:16\]\) runs a batch"):
        together.generate_each  # noqa: B018
    prompts = [QUESTION] * 3
    found, expected = (falcon.generate(prompts[:16], max_new_tokens=3) for falcon in (together, instruct))
    assert [each.tokens for each in found] == [each.tokens for each in expected]


def test_the_processes_introduce_themselves(together):
    assert repr(together) == "ParallelFalcon(falconet-instruct, 4,856,320 parameters, float32, 2 processes on cpu)"
    assert "cpu, 9.28 MiB" in together._repr_html_()


def test_alternatives_come_back_as_they_do_from_one_process(together, instruct):
    settings = {"max_new_tokens": 4, "alternatives": 2}
    expected = [
        [(each.text, each.token_id) for each in step] for step in instruct.generate(QUESTION, **settings).alternatives
    ]
    stream = together.stream(QUESTION, **settings)
    pieces = [[(each.text, each.token_id) for each in piece.alternatives] for piece in stream]
    whole = [[(each.text, each.token_id) for each in step] for step in stream.generation.alternatives]
    assert (pieces, whole) == (expected, expected)


def test_a_falcon_in_several_processes_knows_the_dtype_and_bytes_of_its_weights(together, instruct):
    assert (together.dtype, together.weight_bytes) == (
        instruct.dtype,
        sum(rank.weight_bytes for rank in together.ranks),
    )


def test_the_weights_of_a_falcon_in_several_processes_say_where_their_bytes_are_told(together):
    with pytest.raises(AttributeError, match="see weight_bytes, and ranks for each"):
        together.weights  # noqa: B018


def test_a_token_id_that_no_rank_has_is_refused(together):
    with pytest.raises(ValueError, match="99999 is no token id of this model, whose ids are 0 to 2047"):
        together.generate([99999, 1])


def test_unpacking_a_falcon_in_several_processes_says_where_the_model_lives(together):
    with pytest.raises(AttributeError, match="the model is in 2 other processes"):
        _model, _tokenizer = together


def test_weights_that_are_missing_are_reported_and_no_process_is_left(tokenizer, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(launching, "Workers", lambda *given: started.append(Workers(*given)) or started[0])
    small_model("40b").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    small_config("40b", num_hidden_layers=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights that its config.json asks for"):
        fk.load(tmp_path, tensor_parallel=2)
    assert [process.poll() for process in started[0].processes] == [-9, -9]


def test_a_process_that_dies_takes_the_others_along_and_is_named():
    falcon = fk.load("falconet", tensor_parallel=2)
    stream = falcon.stream("The giraffe", **LONG)
    next(stream)
    falcon._workers.processes[1].kill()
    with pytest.raises(WorkerDied, match="worker 1 was killed by SIGKILL, perhaps out of memory"):
        list(stream)
    assert [process.poll() for process in falcon._workers.processes] == [-9, -9]
    with pytest.raises(RuntimeError, match="the processes of this model have ended: load it again"):
        falcon.generate("The giraffe")


# A rank that fails while the others wait for it


def test_an_end_of_file_while_a_rank_loads_is_reported_as_its_error():
    code = "from falcon_kit.parallel.worker import serve\ndef load(name, **_): raise EOFError(name)\n"
    workers = Workers(code + "serve(load)", [{"RANK": "0", "WORLD_SIZE": "1"}])
    workers.send({"directory": "cut off", "settings": {"chat": "falcon"}})
    assert workers.receive(120) == (0, {"error": ["EOFError", "cut off"]})
    workers.close()


class Answers:
    """Workers that have sent these messages, and of which one then dies or all wait."""

    closed = False

    def __init__(self, messages, end):
        self.processes, self._messages, self._end = [0, 1], iter(messages), end

    def send(self, message):
        if isinstance(self._end, KeyboardInterrupt):
            raise self._end

    def receive(self, seconds):
        if (message := next(self._messages, None)) is None:
            raise self._end
        if isinstance(message, BaseException):
            raise message
        return message

    def close(self):
        self.closed = True


OUT_OF_MEMORY = (1, {"number": 0, "error": ["MemoryError", "out of memory after 3 tokens"]})


@pytest.mark.parametrize(
    ("messages", "end", "kind", "text"),
    [
        ([OUT_OF_MEMORY], queue.Empty(), MemoryError, r"after 3 tokens\. Raised on rank 1, it ended all 2 processes"),
        (
            [OUT_OF_MEMORY],
            WorkerDied("worker 0 ended"),
            WorkerDied,
            "worker 0 ended. Before that, rank 1: MemoryError: out of memory after 3",
        ),
        ([], WorkerDied("worker 0 ended"), WorkerDied, "^worker 0 ended$"),
        (
            [(rank, {"number": 0, "error": ["MemoryError", f"GPU {rank} is full"]}) for rank in (1, 0)],
            AssertionError("it waits"),
            MemoryError,
            "^rank 0: MemoryError: GPU 0 is full; rank 1: MemoryError: GPU 1 is full$",
        ),
    ],
)
def test_the_message_of_the_rank_that_failed_first_is_kept(messages, end, kind, text):
    tokenizer = SimpleNamespace(chat_template=None)
    falcon = ParallelFalcon(Answers(messages, end), "falconet", tokenizer, fk.spec("falconet"), None, None, "")
    with pytest.raises(kind, match=text):
        falcon.generate("Hello")


MADE = {"device": "cpu", "weight_bytes": 1, "cache_bytes": 1}
DONE = [(rank, {"number": 0, "done": {"rank": rank, **MADE}}) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("messages", "end", "kind", "closed"),
    [
        ([DONE[0], KeyboardInterrupt(), DONE[1]], AssertionError("it waits"), KeyboardInterrupt, False),
        ([OUT_OF_MEMORY, KeyboardInterrupt()], queue.Empty(), MemoryError, True),
        ([], KeyboardInterrupt(), KeyboardInterrupt, True),
    ],
    ids=["after the answer of one rank", "after the error of one rank", "while the request and the cancel are sent"],
)
def test_ctrl_c_does_not_wait_for_what_has_arrived(messages, end, kind, closed):
    workers = Answers(messages, end)
    tokenizer = SimpleNamespace(chat_template=None)
    falcon = ParallelFalcon(workers, "falconet", tokenizer, fk.spec("falconet"), None, None, "")
    with pytest.raises(kind):
        falcon.generate("Hello")
    assert workers.closed is closed


def test_a_logger_is_quiet_while_parts_are_read_although_it_was_asked_before():
    logger = transformers_logging.get_logger("transformers.distributed.tensor_parallel")
    asked = [logger.isEnabledFor(logging.WARNING)]
    with placement(2):
        asked.append(logger.isEnabledFor(logging.WARNING))
    assert [*asked, logger.isEnabledFor(logging.WARNING)] == [True, False, True]


@pytest.mark.parametrize(
    ("error", "name"),
    [(torch.OutOfMemoryError("x"), "MemoryError"), (MemoryError("x"), "MemoryError"), (ValueError("x"), "ValueError")],
)
def test_memory_that_runs_out_on_a_rank_is_a_memory_error_here(error, name):
    assert _named(error) == [name, "x"]


def test_a_reader_may_pause_longer_than_torchs_timeout(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **options: given.update(options))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    _init_process_group(tmp_path)
    assert given["timeout"] > 100 * dist.default_pg_timeout


def test_the_memory_of_deleted_tensors_is_free_for_the_ranks_before_they_start(monkeypatch):
    """torch's cache is free for this process only."""
    seen = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: seen.append("emptied"))
    monkeypatch.setattr(launching, "Workers", lambda *_: seen.append("started") or sys.exit())
    with pytest.raises(SystemExit):
        launching.launch("falconet", {"tensor_parallel": 2}, progress=False, on_cpu=False)
    assert seen == ["emptied", "started"]
