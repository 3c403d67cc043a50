"""Tasks, circuits and the tests of how faithful a circuit is."""
