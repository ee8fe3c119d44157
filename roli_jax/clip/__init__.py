"""CLIP's text side: prompts as heads, and mixtures of both sides."""
