"""Two models at a time: students, bridges, and circuits compared across them."""
