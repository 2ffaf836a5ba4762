"""What a person runs: the command line, demonstrations and reproductions."""
