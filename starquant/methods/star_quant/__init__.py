"""STaR-Quant (arXiv 2606.04945)."""
