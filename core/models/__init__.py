"""Reading diffusers pipelines: what they are, their contracts, tokenizer and networks."""
