"""What a run learned and what it forgot, in sentences that name the setting to change.

The limits are choices: a loss that fell by less than a tenth counts as nothing learned, and a loss on other texts that
rose by more than 0.1 nats per token (a perplexity that grew by a tenth) counts as forgetting.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from falcon_kit.display.tables import counted
from falcon_kit.tuning.settings import Tuning

_LEAST_FALL = 0.1
_MOST_FORGOTTEN = 0.1  # nats per token
_ENOUGH_STEPS = 60
_UNSEEN = ". No rows were held out: test its answers with run.rates(rows), or tune with held_out=0.1"
_OTHER_TEXTS = {"web-text": "web text", "generated-text": "8 generated English texts"}


def verdict(
    history: Sequence[Mapping[str, float]], figures: Mapping[str, float], settings: Tuning, documents: int
) -> str:
    """What a run on so many documents did, as one line per finding.

    history, figures: as in `TuningRun`.
    """
    losses = [each["loss"] for each in history if "loss" in each]
    more = _stopped(history, len(losses), settings) or _more_steps(len(losses), settings)
    findings = [_learned(losses, figures, documents, more), _forgotten(figures, settings)]
    return "\n".join(each for each in findings if each)


def _learned(losses: Sequence[float], figures: Mapping[str, float], documents: int, more: str) -> str:
    names = ("held-out loss before", "held-out loss after")
    batches, held_out = _fall(losses), _fall([figures[name] for name in names if name in figures])
    name, fall = ("loss of the batches", batches) if held_out is None else ("held-out loss", held_out)
    steps = f"{counted(len(losses), 'step')} over {counted(documents, 'document')}"
    if fall is None:
        return f"{steps}: the loss cannot be compared{more}"
    line = f"{steps}: the {name} {_change(fall)}"
    if fall >= _LEAST_FALL:
        few = figures.get("exact answers after") == 0 and len(losses) < _ENOUGH_STEPS
        return f"{line}, and no held-out answer is exact{more}" if few else line + (_UNSEEN if held_out is None else "")
    before, after = (figures.get(f"exact answers {when}", 0.0) for when in ("before", "after"))
    if after - before >= _LEAST_FALL:
        return f"{line}, and {after:.0%} of the held-out answers are right, instead of {before:.0%}"
    if held_out is not None and batches is not None and batches >= _LEAST_FALL:
        return (
            f"{line}, that of the batches {_change(batches)}: it learned these documents by heart, and nothing for "
            "others. Give more documents, fewer epochs, or patience=2"
        )
    return f"{line}, so it has learned next to nothing{more}"


def _stopped(history: Sequence[Mapping[str, float]], steps: int, settings: Tuning) -> str:
    """What to change where `patience` ended the run before its last step, so that more steps would not help."""
    epoch = max((each.get("epoch", 0.0) for each in history), default=0.0)
    planned = settings.max_steps or (round(settings.num_train_epochs * steps / epoch) if epoch else steps)
    if not settings.patience or steps >= planned:
        return ""
    return (
        f". patience={settings.patience} ended it after {steps} of {planned} steps: raise patience, or lower "
        f"learning_rate (it was {settings.learning_rate:g})"
    )


def _more_steps(steps: int, settings: Tuning) -> str:
    """What to raise where too little was learned."""
    if steps >= _ENOUGH_STEPS:
        return f". Raise learning_rate (it was {settings.learning_rate:g}), or r (it was {settings.r})"
    rows = (
        f". Short documents share a row: a smaller context (it was {settings.context}) gives more steps to an epoch"
        if settings.packing
        else ""
    )
    return f". Raise max_steps to {_ENOUGH_STEPS} or more{rows}"


def _forgotten(figures: Mapping[str, float], settings: Tuning) -> str:
    name = next(
        (name for name in _OTHER_TEXTS if {f"{name} loss before", f"{name} loss after"} <= figures.keys()), None
    )
    if name is None:
        return ""
    before, after = (figures[f"{name} loss {when}"] for when in ("before", "after"))
    line = f"the loss on {_OTHER_TEXTS[name]} went from {before:.2f} to {after:.2f}"
    if after - before <= _MOST_FORGOTTEN:
        return f"{line}: little or nothing is forgotten"
    return (
        f"{line}: it forgets. Mix in more web text (fk.mix with web_fraction=0.3), lower learning_rate (it was "
        f"{settings.learning_rate:g}), or train fewer steps"
    )


def _fall(losses: Sequence[float]) -> float | None:
    """The share of the loss that is gone from the first fifth to the last; None where nothing can be compared."""
    part = max(1, len(losses) // 5)
    before = fmean(losses[:part]) if len(losses) > 1 else 0.0
    return 1 - fmean(losses[-part:]) / before if before else None


def _change(fall: float) -> str:
    return f"fell by {fall:.0%}" if fall >= 0 else f"rose by {-fall:.0%}"
