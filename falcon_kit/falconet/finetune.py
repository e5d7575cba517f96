"""Fine-tunes falconet to falconet-instruct with `tune`: a small version of what the 40B's model card describes.

    python -m falcon_kit.falconet.corpus      # first, generates the text
    python -m falcon_kit.falconet.finetune    # about twelve minutes on 2 cores; resumes when started again

The data are self-chat in the format of Baize's files, mixed with 5% of web text. One half is rendered in the `User:`
chat format, the other in Baize's, so that the model answers in both. Only the adapter is shipped; `load` adds it to the
weights of the base model.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.names import embedded_directory
from falcon_kit.display.saving import write_text
from falcon_kit.falconet.corpus import END, SIZES, WEB_FRACTION, WORK, documents, self_chat
from falcon_kit.generation.chat import BAIZE, FALCON
from falcon_kit.loading.adapters import RECORD, WEIGHTS
from falcon_kit.loading.falcon import Falcon
from falcon_kit.loading.load import load
from falcon_kit.tuning.data import Documents, dialogues, mix
from falcon_kit.tuning.packing import Packed, pack
from falcon_kit.tuning.tune import tune

CONTEXT = 512
SETTINGS: dict[str, Any] = {"r": 16, "learning_rate": 2e-3, "num_train_epochs": 1.0, "per_device_train_batch_size": 8}
"""r = 64 at half the learning rate did not give more exact answers."""
MEASURED = 100
"""Held-out dialogues, on which loss, stop rate and exact answers are measured before and after training."""


def packed(falcon: Falcon, chats: Documents, seed: int) -> Packed:
    """Half of the dialogues in each chat format, each half mixed with web text, packed."""
    halves = chats[: len(chats) // 2], chats[len(chats) // 2 :]
    first, second = (
        pack(
            mix(half, _web_texts(seed + number), WEB_FRACTION, tokenizer=falcon.tokenizer, seed=seed),
            replace(falcon, loaded_format=form),
            CONTEXT,
        )
        for number, (half, form) in enumerate(zip(halves, (FALCON, BAIZE), strict=True))
    )
    return first + second


def _web_texts(seed: int) -> list[str]:
    """Base documents without their end token, more than `mix` uses."""
    return [text.removesuffix(END) for text in documents("base", SIZES["self-chat"] // 10, seed)]


def ship(adapter: Path, directory: Path) -> None:
    """Copies an adapter into the package, without its loss history."""
    directory.mkdir(exist_ok=True)
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copyfile(adapter / name, directory / name)
    record = json.loads((adapter / RECORD).read_text(encoding="utf-8")) | {"history": []}
    write_text(directory / RECORD, json.dumps(record, indent=2) + "\n")


def main() -> None:
    """Command line: trains the adapter and writes it into the package."""
    parser = argparse.ArgumentParser(description="Fine-tune falconet-instruct on its generated self-chat.")
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    falcon = load("falconet", dtype="float32")
    data = packed(falcon, dialogues(WORK / "self-chat.jsonl"), seed)
    print(data)
    held_out = dialogues(self_chat(MEASURED, seed + 1))
    settings = {**SETTINGS, "context": CONTEXT, "seed": seed, "answers": MEASURED}
    run = tune(falcon, data, output_dir=WORK / "instruct", held_out=held_out, **settings)
    print(run)
    ship(run.adapter, embedded_directory("falconet-instruct"))


if __name__ == "__main__":
    main()
