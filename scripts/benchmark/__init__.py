"""The benchmark of rebuilding models from deltas. Run it with scripts/bench."""
