"""From a bundle and a checkpoint to an engine: checks first, then weights."""
