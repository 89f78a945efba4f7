"""How a program runs on one rank: memory, backends, launches, graphs, other ranks."""
