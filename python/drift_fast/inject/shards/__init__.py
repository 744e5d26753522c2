"""The shard of each parameter that this process holds, one module for each way of sharding."""
