"""The passes, each `graph -> graph` and pure: shard, fuse, schedule, place, lower."""
