"""Text in, token shards out: sources, tokenizer, shard format, offline text, inspection."""
