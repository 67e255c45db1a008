"""What the paper claims (arXiv 2312.05705), one command and one page for each claim."""
