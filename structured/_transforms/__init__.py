"""Fourier and cosine transforms, and the autocorrelations that they give."""
