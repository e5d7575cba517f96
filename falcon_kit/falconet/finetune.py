"""Fine-tunes falconet-instruct from falconet, with the kit's own means: in small, what the 40B's model card describes.

    python -m falcon_kit.falconet.corpus      # first, the text
    python -m falcon_kit.falconet.finetune    # about twelve minutes on 2 cores; Ctrl-C, then again, resumes

Self-chat in the form of Baize's files, mixed with 5% of web text. One half is packed in the `User:` form, the other in
Baize's own, so that the model answers in both. What ships is the adapter; `load` adds it to the base's weights.
"""

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from falcon_kit.catalogue.names import embedded_directory
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
"""Rank 64 at half the rate gave no better answers."""
MEASURED = 100
"""Dialogues of another seed, on which loss, stop rate and exact answers are measured before and after."""


def packed(falcon: Falcon, chats: Documents, seed: int) -> Packed:
    """Half of the chats in each form, each half mixed with web text, in rows of tokens."""
    halves = chats[: len(chats) // 2], chats[len(chats) // 2 :]
    first, second = (
        pack(
            mix(half, _web_texts(seed + number), WEB_FRACTION, tokenizer=falcon.tokenizer, seed=seed),
            replace(falcon, chat_format=form),
            CONTEXT,
        )
        for number, (half, form) in enumerate(zip(halves, (FALCON, BAIZE), strict=True))
    )
    return first + second


def _web_texts(seed: int) -> list[str]:
    """As much of the base corpus as there can be need for."""
    return [text.removesuffix(END) for text in documents("base", SIZES["self-chat"] // 10, seed)]


def ship(adapter: Path, directory: Path) -> None:
    """Copies an adapter into the package, without the curve of its loss."""
    directory.mkdir(exist_ok=True)
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copyfile(adapter / name, directory / name)
    kept = json.loads((adapter / RECORD).read_text(encoding="utf-8")) | {"history": []}
    (directory / RECORD).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


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
