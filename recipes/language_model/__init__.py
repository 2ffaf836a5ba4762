"""ALiBi in language models: its speed at any length, what exact positions are worth, and the models people load."""
