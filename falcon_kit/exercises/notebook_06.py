"""The checks of notebook 06, Fine-tuning with LoRA."""

from collections.abc import Mapping

from falcon_kit.catalogue.memory import linear_shapes, lora_parameters
from falcon_kit.catalogue.names import spec
from falcon_kit.exercises.outcome import expect, near


def exercise_1(shares: Mapping[str, float]) -> str:
    """A dictionary with a share from 0 to 1 for each: {"falconet": ..., "falcon-7b": ..., "falcon-40b": ...}."""
    for name in ("falconet", "falcon-7b", "falcon-40b"):
        shape, given = spec(name), float(shares[name])
        share = lora_parameters(shape, r=8) / shape.parameters
        expect(not near(given, 100 * share), f"{given:.3g} is the share of {name} in percent: divide it by 100.")
        expect(
            not near(given, share / 4) and not near(given, share / 2),
            f"{name}: all four layers of a block have an adapter, and each of them has both an A and a B.",
        )
        expect(near(given, share), f"{name}: divide lora_parameters(spec, r=8) by spec.parameters.")
    return "Weights grow with the square of the width, an adapter with the width: the share falls as a model grows."


def exercise_2(r: int, loss_of_four: float, loss_of_one: float) -> str:
    """A whole number, and the held-out losses of both runs: fk.check("06.2", r, loss_of_four, loss_of_one)."""
    sizes = [rows + columns for rows, columns in linear_shapes(spec("falconet"))]
    right = round(4 * sum(sizes) / sizes[0])
    expect(r != 4 * len(sizes), "The four layers have different shapes: an adapter has r x (rows + columns) weights.")
    expect(r != 4, "With r=4 on one layer, the adapter is smaller than with r=4 on all four.")
    expect(r == right, "Divide the weights of r=4 on all four layers by those of r=1 on query_key_value, and round.")
    losses = float(loss_of_four), float(loss_of_one)
    expect(min(losses) > 0, 'Give run.figures["held-out loss after"] of both runs.')
    expect(losses[0] != losses[1], "Both losses are the same: was target_modules given to the second run only?")
    lower = "all four layers" if losses[0] < losses[1] else "query_key_value alone"
    figures = f"{min(losses):.3f}, not {max(losses):.3f}"
    return f"With as many parameters, {lower} reached the lower loss: {figures}. Another seed shows how much is chance."


def exercise_3(largest_difference: float) -> str:
    """A number: the largest absolute difference between a weight of one adapter and that of the other."""
    expect(not isinstance(largest_difference, bool), "Give the largest difference as a number, not whether it is zero.")
    given = float(largest_difference)
    expect(given >= 0, "Give the largest absolute difference.")
    expect(given == 0, "A resumed run ends with the same bits. Did both calls have the same data, settings and seed?")
    return "Zero: a checkpoint has the optimizer, the schedule and the random states besides the adapter."
