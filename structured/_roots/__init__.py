"""Roots of inverses: in closed form where there is one, and by iteration."""
