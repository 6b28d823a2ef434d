"""mergekit's YAML, as recipes: the methods that both have."""
