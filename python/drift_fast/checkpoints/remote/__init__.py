"""Checkpoints on a server: a local directory that holds just the bytes that are needed.

`client` sends requests, `attempts` counts those that brought nothing, `transfer` judges answers and
resumes after interruptions, `sparse` keeps what arrived, `shards` knows which files a checkpoint
has, and `url` and `hub` where it comes from.
"""

from drift_fast.checkpoints.remote.checkpoint import RemoteCheckpoint, Transfer
from drift_fast.checkpoints.remote.hub import open_hub
from drift_fast.checkpoints.remote.sparse import default_cache
from drift_fast.checkpoints.remote.url import open_url

__all__ = ["RemoteCheckpoint", "Transfer", "default_cache", "open_hub", "open_url"]
