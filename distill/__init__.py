"""distill-bridges: from a dense language model to a circuit that a person can read."""

