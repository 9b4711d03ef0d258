"""What a checkpoint is: tensor roles, a census from the configuration alone, and shards as a stream."""
