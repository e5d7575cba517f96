"""Secrets: keys with a known form, and passwords that stand beside their name."""

from falcon_kit.guardrails.matching import Pattern

_KEYS = {  # the forms that the issuers document; a long key is found by its beginning
    "an AWS access key id": r"(?:AKIA|ASIA)[A-Z0-9]{16}(?=[^A-Za-z0-9])",
    "a GitHub token": r"(?:gh[pousr]_[A-Za-z0-9]{20}|github_pat_[A-Za-z0-9]{20})",
    "a GitLab token": r"glpat-[A-Za-z0-9_-]{20}",
    "a Google API key": r"AIza[A-Za-z0-9_-]{35}",
    "a Hugging Face token": r"hf_[A-Za-z0-9]{20}",
    "an npm token": r"npm_[A-Za-z0-9]{36}",
    "an OpenAI or Anthropic key": r"sk-[A-Za-z0-9_-]{20}",
    "a Slack token": r"xox[abeprs]-[A-Za-z0-9-]{10}",
    "a Stripe key": r"[sr]k_(?:live|test)_[A-Za-z0-9]{16}",
    "a JSON web token": r"eyJ[A-Za-z0-9_-]{8,400}\.eyJ[A-Za-z0-9_-]{4}",
}
_PRIVATE_KEY = r"-----BEGIN [A-Z ]{0,24}PRIVATE KEY-----"
_URL = r"(?<![A-Za-z])[A-Za-z][A-Za-z0-9+.-]{1,15}://[^\s/:@]{1,64}:[^\s/@]{4,64}@"
_NAMES = (
    r"(?i:pass(?:word|wd|phrase|code|wort)|pwd|kennwort|secret|token|(?:api|access|private|secret|account)[ _-]?key"
    r"|密码|口令|密钥|كلمة السر|كلمة المرور)"
)
_END = r"\s\"'<>(){}\[\],;"
# A digit or two signs make a value a secret. An identifier, a URL, a variable or one character many times is none.
_SECRET = (
    rf"(?![$%]|[^{_END}/]{{1,16}}://|(.)\1*[{_END}])(?=[^{_END}]{{0,127}}\d|(?:[^{_END}]{{0,63}}[^\w.{_END}]){{2}})"
)
_ASSIGNED = (  # password: X; "api_key" = "X"; the password for the server is X
    rf"(?<![A-Za-z]){_NAMES}(?:_key|_id)?[\"']?(?: \w{{1,16}}){{0,3}}"
    r"(?:\s{0,2}(?::=|=>|:|=)\s{0,2}| (?:is|was|ist|war|lautet) ?:? |是\s?:?)"
    rf"[\"']?{_SECRET}[^{_END}]{{8,128}}(?=[{_END}])"
)

SECRETS = (
    *(Pattern("secrets", reason, rf"(?<![A-Za-z0-9]){form}") for reason, form in _KEYS.items()),
    Pattern("secrets", "a private key", _PRIVATE_KEY),
    Pattern("secrets", "a password in a URL", _URL),
    Pattern("secrets", "a password or key beside its name", _ASSIGNED),
)
"""The patterns of this check."""
