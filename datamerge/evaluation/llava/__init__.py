"""LLaVA with a tuned vision encoder: captions and answers, clean and under attack."""
