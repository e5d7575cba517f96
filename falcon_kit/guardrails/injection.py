"""Marks of prompt injection in a prompt: control tokens and chat markers, and phrases that revoke instructions."""

import re

from falcon_kit.catalogue.spec import SPECIAL_TOKENS
from falcon_kit.generation.chat import FORMATS
from falcon_kit.guardrails.folding import fold
from falcon_kit.guardrails.matching import Pattern
from falcon_kit.guardrails.words import UNSPACED

_PREFIXES = {each for format in FORMATS for each in (format.user_prefix, format.assistant_prefix)}
_SPEAKERS = "|".join(sorted(re.escape(each) for each in {*_PREFIXES, "System:"} if each.endswith(":")))
_CONTROL = {
    "a special token of Falcon": "|".join(map(re.escape, SPECIAL_TOKENS)),
    "a chat marker": "|".join(sorted(re.escape(each) for each in _PREFIXES if not each.endswith(":"))),
    "a chat marker at the beginning of a line": rf"[\r\n][ \t]{{0,8}}(?:{_SPEAKERS})",
    "a control token of another model": (
        r"<\|(?!endoftext\|)[A-Za-z_]{2,24}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    ),
}

_REVOKED = "a phrase that revokes instructions"
_LEAK = "a request for the system prompt"
# Between two words: "_" is a gap without a word, "~" a gap with up to three.
_PHRASES = {
    _REVOKED: (
        "(?:ignore|disregard|forget|override|bypass)~(?:previous|prior|above|preceding|earlier|your|all|these|the)"
        "~(?:instructions?|rules|directions|directives|guidelines|commands|prompts?)",
        "(?:ignore|disregard|forget)_(?:everything|all|anything)~(?:above|before|previously|told|said)",
        "(?:ignorier(?:e|t|en)|vergiss|vergesst|missachte)~(?:vorherigen|vorigen|bisherigen|obigen|fruheren"
        "|alle|deine)~(?:anweisungen|regeln|instruktionen|vorgaben|befehle)",
        "(?:vorherigen|bisherigen|obigen|fruheren)_(?:anweisungen|regeln|vorgaben)_(?:ignorieren|vergessen)",
        "(?:تجاهل|تجاهلي|انس|انسي)~(?:التعليمات|الاوامر|القواعد|تعليماتك)_(?:السابقة|اعلاه|كلها)",
    ),
    "a phrase that takes restrictions away": (
        "you_(?:are|have|ve)~(?:no|any|without|free_of|free_from)~(?:restrictions|rules|limits|limitations|filters)",
        "(?:pretend|imagine|act)~you~(?:no|any|without)~(?:restrictions|rules|limits|limitations|filters)",
        "(?:you_are|you_re|act_as|enter|enable|activate)~(?:dan|developer_mode|god_mode|jailbroken|unrestricted)",
        "do_anything_now",
    ),
    _LEAK: (
        "(?:reveal|repeat|print|show|output|display|leak|quote|what)~your_(?:system|hidden|initial|original|secret)"
        "_(?:prompt|instructions?|message|rules)",
        "(?:zeige?|nenne|verrate|wiederhole)~(?:systemprompt|systemanweisung|systemanweisungen)",
    ),
}
_CHINESE = {  # no spaces, so no borders: up to six characters stand between two parts
    _REVOKED: (
        "(?:忽略|无视|忘记|忘掉)[^。!?\\s]{0,6}(?:之前|以上|上面|先前|前面|所有)[^。!?\\s]{0,6}(?:指令|指示|规则|提示|命令)"
    ),
    _LEAK: "(?:告诉|显示|输出|打印|重复|透露)[^。!?\\s]{0,6}(?:系统提示|系统指令|隐藏指令)",
}


def _phrase(words: str) -> str:
    between = r"[^\w]{1,3}"
    border = rf"\W{UNSPACED}"  # in scripts without spaces, a phrase of another one may stand beside a letter
    inside = fold(words).replace("~", rf"(?:{between}\w{{1,20}}){{0,3}}{between}").replace("_", between)
    return rf"(?<![^{border}]){inside}(?=[{border}])"


CONTROL_TOKENS = tuple(Pattern("control_tokens", reason, expression) for reason, expression in _CONTROL.items())
"""The patterns of the check "control_tokens"; the first line of a text may begin with a chat marker."""
INJECTION = (
    *(Pattern("injection", reason, _phrase(each), folded=True) for reason in _PHRASES for each in _PHRASES[reason]),
    *(Pattern("injection", reason, each, folded=True) for reason, each in _CHINESE.items()),
)
"""The patterns of the check "injection"."""
