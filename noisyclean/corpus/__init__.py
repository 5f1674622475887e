"""Where pairs come from: shards, their samples, the synthetic corpus, planted noise."""
