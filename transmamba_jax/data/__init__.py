"""Text sources, tokenizers and the pipeline that turns them into rows of tokens."""
