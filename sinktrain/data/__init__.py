"""From text to token shards to paired windows."""
