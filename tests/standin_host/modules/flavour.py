"""Which of the three hosts this one stands in for: "a1111", "forge" or "classic"."""

name = "a1111"
