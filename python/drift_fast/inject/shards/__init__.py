"""The part of a parameter and its gradient that this process holds, by way of sharding."""
