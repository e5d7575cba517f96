"""Remarks of bitsandbytes that a user can do nothing about, kept out of cells."""

import logging
from functools import partial

_REMARKS = {
    "backends.cpu.ops": "kernels-community",  # on its import, also by PEFT: a faster kernel could be fetched
    "autograd._functions": "inputs will be cast",  # at each 8-bit product, which always rounds bfloat16 to float16
}


def _lacks(text: str, record: logging.LogRecord) -> bool:
    return text not in record.msg


def drop_remarks() -> None:
    """Drops them where they are logged; bitsandbytes is not imported for it."""
    for name, text in _REMARKS.items():
        logging.getLogger(f"bitsandbytes.{name}").addFilter(partial(_lacks, text))
