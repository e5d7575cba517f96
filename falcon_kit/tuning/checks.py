"""What `tune` refuses before it trains: models that it cannot train, and tokens that an adapter does not contain."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from falcon_kit.catalogue.card import CARD
from falcon_kit.catalogue.gguf import gguf_file
from falcon_kit.catalogue.memory import FLOAT_DTYPES
from falcon_kit.display.errors import printable, shown
from falcon_kit.display.warning import warn
from falcon_kit.generation.prompts import vocabulary_size
from falcon_kit.loading.falcon import Falcon, first_rows
from falcon_kit.loading.gguf import gguf_tokenizer
from falcon_kit.loading.merging import check_no_adapters
from falcon_kit.loading.quantization import is_quantised
from falcon_kit.model import modeling
from falcon_kit.model.checks import is_offloaded
from falcon_kit.tuning.packing import Packed, column
from falcon_kit.tuning.settings import Tuning


def check_model(falcon: Falcon, settings: Tuning) -> None:
    """Raises ValueError for a model that cannot be trained; warns of an instruct model, with the advice of its card."""
    check_no_adapters(falcon, "the new one")
    if not isinstance(falcon.model, modeling.FalconForCausalLM):
        raise ValueError(
            "with transformers' own Falcon, packed documents attend to each other: load the model without "
            "attention='transformers'"
        )
    if is_offloaded(falcon.model):
        raise ValueError(
            "a part of the model is offloaded to host memory or disk, where it cannot be trained: load it completely "
            "onto the device, with dtype='nf4-double' (QLoRA) if it is too large, or take a smaller model"
        )
    check_no_new_tokens(falcon)
    if (dtype := str(falcon.model.dtype).removeprefix("torch.")) not in FLOAT_DTYPES:
        raise ValueError(
            f"the model is in {dtype}, and training is in {', '.join(FLOAT_DTYPES)}: call falcon.model.float() first"
        )
    if settings.shard and is_quantised(falcon.model):
        raise ValueError(
            "quantised weights cannot be sharded: leave shard out, so that each process has a copy (4 bits are a "
            "quarter of 16), or load in bfloat16"
        )
    _warn_of_changed_weights(falcon)
    if falcon.spec.fine_tuned_from:
        warn(
            f"{falcon.spec.name} is an instruct model. Its card: {CARD.fine_tuning} Here that is "
            f"{falcon.spec.fine_tuned_from!r}"
        )


def _warn_of_changed_weights(falcon: Falcon) -> None:
    """Warns of weights that were changed in memory: the adapter's base would be loaded without the change."""
    rows = falcon.loaded_rows
    for name, now in first_rows(falcon.model).items():
        if name in rows and not rows[name].to(now.dtype).equal(now):
            warn(
                f"{name} was changed after {printable(falcon.name)} was loaded, and fk.load(run.adapter) will add the "
                "adapter to the weights as they are stored: use fk.merge(run, falcon), or first falcon.save(folder), "
                "and tune fk.load(folder)"
            )
            return


def settings_of_rows(rows: Packed, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run on packed rows; ValueError for one that would have to change them."""
    packing = any(len(each) > 1 for each in rows.rows)
    for name, there in (("context", rows.context), ("packing", packing)):
        given = settings.get(name)
        if given is not None and given != there:
            raise ValueError(
                f"{name}={shown(given)}, but the rows are packed with {name}={there}: leave it out, or give the "
                "documents instead of fk.pack's rows"
            )
    return {**settings, "context": rows.context, "packing": packing}


def check_same_vocabulary(falcon: Falcon, *packed: Packed | None) -> None:
    """Raises ValueError for rows whose tokens are of another vocabulary than the Falcon's, or beyond its embeddings."""
    size = vocabulary_size(falcon.model)
    for part in chain.from_iterable(column(each.examples, "ids") for each in packed if each is not None):
        if (last := int(part.flatten().to_numpy().max(initial=0))) >= size:
            raise ValueError(
                f"the rows have the token {falcon.tokenizer.convert_ids_to_tokens(last)!r}, whose id is {last}, but "
                f"the model has embeddings of 0 to {size - 1}: falcon.model.resize_token_embeddings({last + 1}), "
                "falcon.save(folder), and tune fk.load(folder)"
            )
    own = falcon.tokenizer.get_vocab()
    if any(each is not None and each.tokenizer.get_vocab() != own for each in packed):
        raise ValueError(
            f"packed rows have the tokens of another tokenizer than that of {printable(falcon.name)}: pack the "
            "documents again with this Falcon"
        )


def check_no_new_tokens(falcon: Falcon) -> None:
    """Raises ValueError for tokens that were added after loading: an adapter contains neither tokens nor embeddings.

    Its base would be loaded without them, and would read other tokens than the adapter was trained on. A new padding
    token is no problem, because the model does not read it.
    """
    tokenizer, stored = falcon.tokenizer, _stored_tokenizer(falcon.tokenizer.name_or_path)
    own = tokenizer.get_vocab()
    known = stored.get_vocab() if stored else {token: id for token, id in own.items() if id < falcon.spec.vocabulary}
    changed = dict(own.items() ^ known.items())
    changed.pop(str(tokenizer.pad_token), None)
    if stored and stored.eos_token not in (None, tokenizer.eos_token):
        changed[str(tokenizer.eos_token)] = tokenizer.eos_token_id
    if changed:
        raise ValueError(
            f"the token {next(iter(changed))!r} is not as in {falcon.name}, with which the adapter would be loaded: "
            "falcon.save(folder), and tune fk.load(folder)"
        )


def _stored_tokenizer(place: str) -> PreTrainedTokenizerFast | None:
    """The tokenizer in the folder or GGUF file that one was loaded from; None where it is no longer there."""
    if Path(place).suffix.lower() == ".gguf" and Path(place).is_file():
        return gguf_tokenizer(gguf_file(place))
    there = place and Path(place, "tokenizer.json").is_file()
    return PreTrainedTokenizerFast.from_pretrained(place) if there else None
