"""Models of the Hugging Face hub: a folder of safetensors, a configuration and a tokenizer."""
