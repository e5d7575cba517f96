"""The tokenizer, the chat format and the generation config of a checkpoint."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from falcon_kit.display.errors import is_whole, require, shown
from falcon_kit.display.reading import named_errors
from falcon_kit.display.warning import warn
from falcon_kit.generation.chat import ChatFormat, default_format, plain_template
from falcon_kit.generation.own_format import own_format, stored_format
from falcon_kit.loading.adapters import RECORD, record
from falcon_kit.loading.checkpoints import Checkpoint
from falcon_kit.loading.gguf import gguf_tokenizer

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""The special tokens in a generation config."""
_WRONG_IN_2023 = (1, 2)
"""bos_token_id and eos_token_id in the published generation configs of 2023; the models were trained with 11."""


def tokenizer_and_format(found: Checkpoint, chosen: ChatFormat | None) -> tuple[PreTrainedTokenizerFast, ChatFormat]:
    """The tokenizer, with a chat template, and the chat format; chosen: the format that the user asks for."""
    tokenizer = _own_tokenizer(found)
    format = chosen or trained_format(found, tokenizer)
    unmarked = tokenizer.chat_template in (None, plain_template(format.template))
    if chosen or unmarked:  # the format's own template marks the assistant's messages for training
        tokenizer.chat_template = format.template
    return tokenizer, format


def _own_tokenizer(found: Checkpoint) -> PreTrainedTokenizerFast:
    """The tokenizer of the last adapter that brings one, with its base's chat template if it has none; else the base's.

    Adapters of 2023 often bring one with a token for padding that the model has no embedding of; it is not used.
    """
    base = gguf_tokenizer(found.gguf) if found.gguf else load_tokenizer(found.directory)
    folders = [each for each in found.adapters if each != found.directory and (each / "tokenizer.json").is_file()]
    if not folders:
        return base
    own = load_tokenizer(folders[-1])
    template = own.chat_template or base.chat_template
    if len(own) > found.config.vocab_size:
        warn(
            f"the tokenizer in {folders[-1]} has {len(own)} tokens, and the model {found.config.vocab_size}: that of "
            f"{found.base.name} is used"
        )
        own = base
    own.chat_template = template
    return own


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer, without token type ids, which Falcon does not accept."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{directory} has no tokenizer.json: copy it from the model that this one was made from"
        )
    with named_errors(file):
        names = ["input_ids", "attention_mask"]
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, model_input_names=names)
    if tokenizer.eos_token is None:
        tokenizer.eos_token = "<|endoftext|>"
    return tokenizer


def trained_format(found: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    """The chat format that an adapter was trained in, or the tokenizer's own, or the default."""
    for adapter in reversed(found.adapters):
        if trained := record(adapter).get("chat_format"):
            with named_errors(adapter / RECORD, "delete it, and give chat='falcon', 'hub' or 'baize'"):
                return stored_format(trained)
    if tokenizer.chat_template is None:
        return default_format(found.base)
    return own_format(tokenizer, str(tokenizer.name_or_path or found.directory))


def generation_config(directory: Path, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig | None:
    """The generation config in a checkpoint's folder, with its special tokens; None where there is none.

    They are set while it is read. A config that was changed afterwards is saved by transformers only if each of its
    settings has an effect, and those of published checkpoints often have none.
    """
    if not (file := directory / "generation_config.json").is_file():
        return None
    with named_errors(file, "correct it, or fetch the checkpoint again"):
        config = GenerationConfig.from_pretrained(directory)
        set_special_tokens(config, tokenizer)
        tokens = {name: getattr(config, name) for name in TOKEN_IDS}
        for name, value in tokens.items():
            ids = value if isinstance(value, list) else [value]
            require(all(is_whole(each, -1) for each in ids), f"its {name} is {shown(value)}, not the number of a token")
        return GenerationConfig.from_pretrained(directory, **tokens)


def set_special_tokens(config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Sets the special tokens that a generation config lacks, and replaces those of 2023, which were not Falcon's."""
    if (config.bos_token_id, config.eos_token_id) == _WRONG_IN_2023:
        config.bos_token_id = config.eos_token_id = None
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.bos_token_id is None:
        config.bos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
