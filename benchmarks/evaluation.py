"""Time to score multiple-choice items: the kit, a bare batched loop, and lm-eval's own model with its default batch.

All score the same items of "falconet-choices" with Falconet in float32: the log-likelihood of each choice, from texts.
The bare loop encodes, sorts by length, pads and takes all logits, with nothing around it. The libraries take turns.
Seconds are those of the processor, of one thread. The checks of guardrails are measured on a stream of tokens.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import FalconForCausalLM

import falcon_kit as fk
from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.evaluation.tasks import Item, shipped_task
from falcon_kit.guardrails.measure import measured_guardrails, sample_tokens, seconds_per_token

ITEMS = 500
ROUNDS = 3
BATCH = 128  # rows of the bare loop: of 32, 64, 128 and 256 the fastest here
KIT, LOOP, HARNESS = "kit", "bare batched loop", "lm-eval, HFLM with batch_size=1"


def run() -> dict[str, Any]:
    """Median seconds of each, the ratios, and what guardrails cost."""
    torch.set_num_threads(1)  # a second one, waiting for rows of one, would count as work
    items = shipped_task("falconet-choices").items[:ITEMS]
    falcon = fk.load("falconet", dtype="float32")
    stock = FalconForCausalLM.from_pretrained(embedded_directory("falconet"), dtype=torch.float32).eval()
    calls = {
        KIT: lambda: kit(falcon),
        LOOP: lambda: bare_loop(falcon.model, falcon.tokenizer, items),
        HARNESS: harness(stock, falcon.tokenizer, items),
    }
    seconds, scores = measure(calls)
    differences = [
        abs(one - two) for name in (LOOP, HARNESS) for one, two in zip(scores[KIT], scores[name], strict=True)
    ]
    median = {name: round(statistics.median(each), 2) for name, each in seconds.items()}
    return {
        "model": f"falconet, {falcon.spec.parameters:,} parameters, float32",
        "threads": torch.get_num_threads(),
        "items": ITEMS,
        "rows": len(scores[KIT]),
        "seconds": median,
        "kit takes, of the bare loop": round(median[KIT] / median[LOOP], 2),
        "lm-eval takes so many times the kit's time": round(median[HARNESS] / median[KIT], 1),
        "largest difference of a log-likelihood, nats": float(f"{max(differences):.1e}"),
        "guardrails, microseconds a token": round(1e6 * guarding()),
    }


def measure(calls: dict[str, Callable[[], list[float]]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """The seconds of each round, and the scores of each call; the calls take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    scores: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.process_time()  # of this process: others on the machine do not count
            scores[name] = call()
            seconds[name].append(time.process_time() - start)
            print(f"{name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds, scores


def guarding() -> float:
    """Median seconds that all checks of guardrails take for a token of a stream."""
    guard, tokens = measured_guardrails(), sample_tokens(1000)
    return statistics.median(seconds_per_token(guard, tokens) for _ in range(ROUNDS))


def kit(falcon: fk.Falcon) -> list[float]:
    """The log-likelihoods from `fk.evaluate`, the model's record and the results of each item included."""
    found = fk.evaluate(falcon, "falconet-choices", limit=ITEMS)["falconet-choices"]
    return [each for item in found.items for each in item["loglikelihoods"]]


@torch.inference_mode()
def bare_loop(model: Any, tokenizer: Any, items: tuple[Item, ...]) -> list[float]:
    """The log-likelihoods from a loop over padded batches."""
    prompts = [item.text for item in items for _ in item.choices]
    texts = [f"{item.text} {choice}" for item in items for choice in item.choices]
    starts = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    rows = tokenizer(texts)["input_ids"]
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    scores = [0.0] * len(rows)
    for begin in range(0, len(order), BATCH):
        chosen = order[begin : begin + BATCH]
        longest = len(rows[chosen[0]])
        ids = torch.tensor([rows[row] + [0] * (longest - len(rows[row])) for row in chosen])
        logprobs = model(input_ids=ids[:, :-1], use_cache=False).logits.log_softmax(-1)
        targets = logprobs.gather(-1, ids[:, 1:, None])[..., 0]
        for place, row in enumerate(chosen):
            scores[row] = float(targets[place, starts[row] - 1 : len(rows[row]) - 1].sum())
    return scores


def harness(model: Any, tokenizer: Any, items: tuple[Item, ...]) -> Callable[[], list[float]]:
    """A call of lm-eval's own model, with its default batch of 1."""
    lm = HFLM(pretrained=model, tokenizer=tokenizer)
    pairs = [(item.text, f" {choice}") for item in items for choice in item.choices]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    return lambda: [total for total, _ in lm.loglikelihood(requests, disable_tqdm=True)]
