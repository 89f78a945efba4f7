"""A batch on many machines: shards that workers lease, finish, and merge in the input's order."""
