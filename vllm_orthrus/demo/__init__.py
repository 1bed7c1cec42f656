"""`make demo`: the tiny model behind a real server, with and without its head."""
