"""What is imported before Falconet's first word: nothing that it does not need."""

import subprocess
import sys

HEAVY = {
    *("pandas", "matplotlib", "sklearn", "peft", "trl", "datasets", "bitsandbytes", "torchao", "gguf", "llama_cpp"),
    *("IPython", "ipywidgets", "anywidget", "pydantic", "openai", "lm_eval", "phonenumbers", "stdnum"),
}
PROGRAM = """
import sys
from transformers import FalconForCausalLM, PreTrainedTokenizerFast

before = {*sys.modules}
import falcon_kit as fk

fk.load("falconet").generate("The giraffe", max_new_tokens=1)
list(fk.load("falconet").stream("The giraffe", max_new_tokens=2))
packages = {each.partition(".")[0] for each in {*sys.modules} - before} - sys.stdlib_module_names
print(*packages, *({*HEAVY} & {*sys.modules}))
"""


def test_the_first_word_imports_nothing_but_the_kit_and_transformers_falcon():
    program = f"HEAVY = {sorted(HEAVY)}\n{PROGRAM}"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert ended.stdout.split() == ["falcon_kit"]
