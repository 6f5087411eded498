"""Sources of preference pairs: local files and the Hugging Face Hub, in the usual formats."""
