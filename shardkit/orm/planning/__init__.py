"""Planning: from a statement to the shards that answer it, by proof, and from their results to one. Sends nothing."""
