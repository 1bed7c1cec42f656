"""How a block of fresh rows sees the target's cache: one interface, three ways."""
