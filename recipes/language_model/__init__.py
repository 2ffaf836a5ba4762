"""ALiBi in language models: its speed, what exact positions are worth, the models people load. T5 in training."""
