"""Generation of responses and predictions with vLLM."""
