"""A name becomes a Falcon: checkpoints, adapters, quantisation."""
